"""Gated: one path decides which latents fire, another how strongly. SAE and transcoder alike.

Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014), section 3.
The two paths share their directions, up to a factor exp(r_mag) for each latent:

    gate = W_enc (u - b_pre) + b_gate        magnitude = exp(r_mag) W_enc (u - b_pre) + b_enc
    codes = H(gate) ReLU(magnitude)          output = codes W_dec + b_dec        u: the scaled input, H: the step
    loss = mse + l1_weight * warm-up * l1 + auxiliary_weight * auxiliary
    l1 = mean over rows of sum ReLU(gate) / sqrt(O)
    auxiliary = the mean squared error of ReLU(gate) W_dec + b_dec, with W_dec and b_dec frozen

No gradient passes the step, so that the gate learns from the last two terms alone, and the codes' size, which the
penalty does not see, does not shrink. b_pre, the b_dec that an autoencoder subtracts from its input, is not frozen.

Folded, exp(r_mag) is part of W_enc, and b_gate is multiplied by it, so that a code is W_enc x + b_enc where it fires.
Latents that die are redrawn as in Bricken et al. 2023 when asked for.

Axes: B rows, D input width, O output width, S latents, A dead latents.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from dictlearn.dictionaries.base import Loss, Remembers, Width, forget_moments
from dictlearn.dictionaries.configs import GatedConfig
from dictlearn.dictionaries.penalised import Penalised


class Gated(Penalised):
    kind = "gated"
    Config = GatedConfig
    config: GatedConfig
    biases = ("b_enc", "b_gate")

    def __init__(self, config: GatedConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    def activate(self, product_BS: Tensor) -> Tensor:
        magnitude_BS = self.r_mag.exp() * product_BS + self.b_enc
        return magnitude_BS.relu() * (product_BS + self.b_gate > 0)

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD, target_BO = self._scaled(x, target)
        product_BS = self._product(x_BD)
        codes_BS = self.activate(product_BS)
        output_BO = codes_BS @ self.W_dec + self.b_dec
        mse = (target_BO - output_BO).square().mean()
        gate_BS = (product_BS + self.b_gate).relu()
        l1 = gate_BS.sum(dim=1).mean() / self.length
        by_gate_BO = gate_BS @ self.W_dec.detach() + self.b_dec.detach()
        auxiliary = (target_BO - by_gate_BO).square().mean()
        total = mse + self.config.l1_weight * self.warmed * l1 + self.config.auxiliary_weight * auxiliary
        return self._reported(x, total, {"mse": mse, "l1": l1, "auxiliary": auxiliary}, codes_BS, output_BO)

    @torch.no_grad()
    def fold(self) -> Self:
        """As every kind with a penalty, with r_mag 0."""
        whole = self.copy().double()
        factor_S = whole.r_mag.exp()
        whole.W_enc.mul_(factor_S[:, None])
        whole.b_gate.mul_(factor_S)
        whole.r_mag.zero_()
        return super(Gated, whole).fold().to(self.W_dec.dtype)

    def _reset(self, latents_A: Tensor, optimiser: Remembers) -> None:
        super()._reset(latents_A, optimiser)
        self.r_mag[latents_A] = 0.0
        forget_moments(optimiser, self.r_mag, latents_A)
