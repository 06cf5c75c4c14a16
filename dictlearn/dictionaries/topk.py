"""TopK: keep the k largest pre-activations of a learned encoder. SAE and transcoder alike.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093): section 2.3 the activation, appendix A
the AuxK loss and the initialisation; Makhzani and Frey 2013 (arXiv 1312.5663) for the k-sparse idea.

    codes = ReLU(TopK(W_enc (x - b_pre) + b_enc))        output = codes W_dec + b_dec

An autoencoder's b_pre is its b_dec. A transcoder's target is another hook's activation, so it has no b_pre. Decoder
rows have unit norm: before each update their gradient loses its component along them, after it the norm is restored.

Axes: B rows, D input width, O output width, S latents, K active per row.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import ControlStatistics, Dictionary, Loss, Update
from dictlearn.dictionaries.configs import TopKConfig


class TopK(Dictionary):
    kind = "topk"
    Config = TopKConfig
    config: TopKConfig
    latent_parallel = True

    def __init__(self, config: TopKConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.subtracts_b_dec = False
        """Whether b_pre is b_dec: true while an autoencoder trains, false for transcoders and for anything folded."""

    def encode(self, x: Tensor) -> Codes:
        codes = ops.encode_topk(x / self.input_scale, self.W_enc, self.b_enc, self.config.k, self._pre_bias())
        return Codes(codes.indices, codes.values, self.d_sae)

    def decode(self, codes: Codes) -> Tensor:
        return (ops.decode(codes.values, codes.indices, self.W_dec) + self.b_dec) * self.target_scale

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD = x / self.input_scale
        target_BO = x_BD if target is None else target / self.target_scale
        dead_S = self.rows_since_fired > self.config.dead_after_rows
        revive = self.config.auxk_weight > 0 and ops.anywhere(dead_S)
        dead_A = ops.latents_where(dead_S) if revive else None
        values_BK, indices_BK, dead_pre_BA = ops.encode_topk(
            x_BD, self.W_enc, self.b_enc, self.config.k, self._pre_bias(), dead_A
        )
        if dead_A is None or dead_pre_BA is None:
            rebuilt_BO = ops.decode(values_BK, indices_BK, self.W_dec)
        else:
            dead_BA = ops.keep_topk(dead_pre_BA, self.config.k_aux or max(1, self.d_in // 2))
            rebuilt_BO, revived_BO = ops.decode_also(values_BK, indices_BK, self.W_dec, dead_BA, dead_A)
        output_BO = rebuilt_BO + self.b_dec
        error_BO = target_BO - output_BO
        mse = error_BO.square().mean()
        terms, total = {"mse": mse.detach()}, mse
        if revive:
            residual_BO = error_BO.detach()
            auxk = (residual_BO - revived_BO).square().mean() / ops.mean_over_rows(mse.detach()).clamp_min(1e-12)
            terms["auxk"] = auxk.detach()
            total = total + self.config.auxk_weight * auxk
        codes = Codes(indices_BK, values_BK.detach(), self.d_sae)
        return Loss(total, terms, codes, output_BO.detach() * self.target_scale)

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Unit random decoder rows, the encoder their transpose, b_dec the geometric median of the target.

        Scales make the target's per-coordinate variance 1 on average, so the mse term starts near the FVU's unit. A
        transcoder has no transpose to start from: its latent s begins mostly as one example, row s of W_enc along a
        centred input and row s of W_dec along that input's target. From random directions 89 % of the latents of
        the bundled model's first transcoder stopped firing (one seed, 240 steps of 2048 rows).
        """
        self.subtracts_b_dec = target is None
        directions = torch.randn(self.d_sae, self.d_out, generator=generator)
        self.W_dec.copy_(F.normalize(directions, dim=1))
        self.input_scale.copy_(_spread(x))
        if target is None:
            self.target_scale.copy_(self.input_scale)
            self.W_enc.copy_(self.W_dec)
            self.b_enc.zero_()
            self.b_dec.copy_(geometric_median(x / self.input_scale))
        else:
            self.target_scale.copy_(_spread(target))
            examples = torch.randint(len(x), (self.d_sae,), generator=generator)
            inputs = torch.randn(self.d_sae, self.d_in, generator=generator)
            self.W_enc.copy_(_towards(x, examples, inputs))
            self.W_dec.copy_(_towards(target, examples, directions))
            self.b_enc.copy_(-self.W_enc @ (x / self.input_scale).mean(dim=0))
            self.b_dec.copy_(geometric_median(target / self.target_scale))
            self._shrink_to_fit(x / self.input_scale, target / self.target_scale)

    @torch.no_grad()
    def project_gradients(self) -> None:
        if self.W_dec.grad is not None:
            along_S1 = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.sub_(along_S1 * self.W_dec)

    @torch.no_grad()
    def after_update(self, update: Update) -> dict[str, float]:
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))
        return {}

    @torch.no_grad()
    def fold(self) -> Self:
        folded = self.copy()
        folded.W_enc.mul_(self.target_scale / self.input_scale)
        bias_S = self.b_enc - self.W_enc @ self.b_dec if self.subtracts_b_dec else self.b_enc
        folded.b_enc.copy_(bias_S * self.target_scale)
        folded.b_dec.mul_(self.target_scale)
        folded.input_scale.fill_(1)
        folded.target_scale.fill_(1)
        folded.subtracts_b_dec = False
        return folded

    def _shrink_to_fit(self, x: Tensor, target: Tensor) -> None:
        """Scale the encoder by the factor that fits these rows best (least squares).

        A row's examples overlap, so that k of them at full strength overshoot ten times, and the steps that repair it
        silence many latents for good.
        """
        values_BK, indices_BK, _ = ops.encode_topk(x, self.W_enc, self.b_enc, self.config.k)
        output_BO = ops.decode(values_BK, indices_BK, self.W_dec)
        energy = output_BO.square().sum()
        fit = (output_BO * (target - self.b_dec)).sum() / energy.clamp_min(1e-12)
        if fit > 0:
            self.W_enc.mul_(fit)
            self.b_enc.mul_(fit)

    def _pre_bias(self) -> Tensor | None:
        """What is subtracted from the input before it is encoded."""
        return self.b_dec if self.subtracts_b_dec else None


EXAMPLE_SHARE = 0.8
"""How much of a transcoder's first direction is its example, the rest being random."""


def _towards(rows: Tensor, examples: Tensor, directions: Tensor) -> Tensor:
    """(S, ...) unit rows: mostly the centred example of each latent, partly its random direction."""
    centred = F.normalize((rows - rows.mean(dim=0))[examples], dim=1)
    return F.normalize(EXAMPLE_SHARE * centred + (1 - EXAMPLE_SHARE) * F.normalize(directions, dim=1), dim=1)


def _spread(rows: Tensor) -> Tensor:
    """Root of the mean squared deviation per coordinate (a scalar)."""
    return (rows - rows.mean(dim=0)).square().mean().sqrt().clamp_min(1e-12)


def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least mean distance to the rows (B, D), by Weiszfeld's iteration from the mean."""
    guess = rows.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (rows - guess).norm(dim=1).clamp_min(1e-8)
        better = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        if (better - guess).norm() <= tolerance * better.norm():
            return better
        guess = better
    return guess
