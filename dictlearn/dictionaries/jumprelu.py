"""JumpReLU: a threshold for each latent, trained through straight-through estimators. SAE and transcoder alike.

Rajamanoharan et al. 2024, "Jumping ahead" (arXiv 2407.14435), sections 3 and 4:

    pi = W_enc (u - b_pre) + b_enc        codes = pi H(pi - theta)        output = codes W_dec + b_dec
    loss = mse + l0_weight * warm-up * l0         l0 = mean over rows of sum H(pi - theta)
                                                  or mean over rows of (sum H(pi - theta) / target_l0 - 1)^2

H is the step function, u the scaled input; theta = exp(log_threshold) stays positive. The steps have no gradient in
theta, so that these pseudo-derivatives stand in for it, with K the rectangle, 1 where |v| < 1/2, and e the bandwidth:

    d JumpReLU / d theta = -(theta / e) K((pi - theta) / e)        d H / d theta = -(1 / e) K((pi - theta) / e)

In pi the JumpReLU has its own derivative H(pi - theta), and H none: a penalty on L0 moves thresholds alone. SAELens
calls the first penalty "step" and the second, up to a constant factor, "quadratic"; dictionary_learning has the second
with the L0 of the whole batch, and the weight 1 that is ours where none is given. The paper gives latents that die no
other help than the penalty's warm-up; redrawing them, as for the other kinds, is off unless asked for.

Adam moves log_threshold by at most about its learning rate a step, so that a short run ends near where it began, and
above its target_l0: of 400 steps at 0.002 (the bundled model's blocks.2.hook_mlp_out, 256 -> 1024, target 32, two
seeds) those with weight 1 ended at 53 active per row, with 0.3 at 56, with 0.03 at 66, with 0.001 at 170.

The paper has no pre-bias; an autoencoder's b_dec is one here, as in the other kinds, which folds into b_enc.

Axes: B rows, D input width, O output width, S latents, A dead latents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dictlearn.dictionaries.base import Loss, Remembers, Width, forget_moments
from dictlearn.dictionaries.configs import JumpReLUConfig
from dictlearn.dictionaries.penalised import Penalised


class JumpReLU(Penalised):
    kind = "jumprelu"
    Config = JumpReLUConfig
    config: JumpReLUConfig

    def __init__(self, config: JumpReLUConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.initial_log_threshold = math.log(config.initial_threshold * self.length)
        self.log_threshold = nn.Parameter(torch.full((self.d_sae,), self.initial_log_threshold))

    def activate(self, product_BS: Tensor) -> Tensor:
        return self._jump(product_BS)[0]

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD, target_BO = self._scaled(x, target)
        codes_BS, l0_B = self._jump(self._product(x_BD))
        output_BO = codes_BS @ self.W_dec + self.b_dec
        mse = (target_BO - output_BO).square().mean()
        l0 = l0_B.mean()
        terms, penalty = {"mse": mse, "l0": l0}, l0
        if self.config.target_l0 is not None:
            penalty = terms["l0_distance"] = (l0_B / self.config.target_l0 - 1).square().mean()
        total = mse + self.config.penalty_weight * self.warmed * penalty
        return self._reported(x, total, terms, codes_BS, output_BO)

    def multiply_codes(self, factor: float) -> None:
        super().multiply_codes(factor)
        self.log_threshold.add_(math.log(factor))

    def _jump(self, product_BS: Tensor) -> tuple[Tensor, Tensor]:
        """``(codes (B, S), how many there are in each row (B,))``."""
        pre_BS = product_BS + self.b_enc
        codes_BS, l0_B = _Jump.apply(pre_BS, self.log_threshold.exp(), self.config.bandwidth * self.length)
        return codes_BS, l0_B

    def _reset(self, latents_A: Tensor, optimiser: Remembers) -> None:
        super()._reset(latents_A, optimiser)
        self.log_threshold[latents_A] = self.initial_log_threshold
        forget_moments(optimiser, self.log_threshold, latents_A)


class _Jump(torch.autograd.Function):
    """JumpReLU and L0 with the pseudo-derivatives above; the kernel's mask is made once for both."""

    @staticmethod
    def forward(ctx: Any, pre_BS: Tensor, threshold_S: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        fires_BS = pre_BS > threshold_S
        ctx.save_for_backward(pre_BS, threshold_S)
        ctx.bandwidth = bandwidth
        return pre_BS * fires_BS, fires_BS.sum(dim=1, dtype=pre_BS.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor, grad_B: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_BS, threshold_S = ctx.saved_tensors
        near_BS = (pre_BS - threshold_S).abs() < ctx.bandwidth / 2
        through_codes_S = threshold_S * (grad_BS * near_BS).sum(dim=0)
        through_l0_S = grad_B @ near_BS.to(grad_B.dtype)
        return grad_BS * (pre_BS > threshold_S), -(through_codes_S + through_l0_S) / ctx.bandwidth, None
