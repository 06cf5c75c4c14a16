"""TopK: keep the k largest pre-activations of a learned encoder. SAE and transcoder alike.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093): section 2.3 the activation, appendix A
the AuxK loss and the initialisation, Multi-TopK; Makhzani and Frey 2013 (arXiv 1312.5663) for the k-sparse idea and for
a k that falls during training; Bricken et al. 2023, "Towards monosemanticity", for redrawing dead latents.

    codes = ReLU(TopK(W_enc (u - b_pre) + b_enc))        output = codes W_dec + b_dec        u: the scaled input

An autoencoder's b_pre is its b_dec. A transcoder's target is another hook's activation, so it has no b_pre. In scaled
units (see `dictlearn.dictionaries.scaling`) decoder rows have unit norm: before each update their gradient loses its
component along them, after it the norm is restored.

Axes: B rows, D input width, O output width, S latents, K active per row, A dead latents.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import ControlStatistics, Dictionary, Loss, Update, forget_moments
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.falling_k import falling_k
from dictlearn.dictionaries.scaling import LEAST, RowWise, scalings
from dictlearn.ops import Rule, TopKCodes

MULTIPLE = 4
"""Times k: the latents that the Multi-TopK term decodes (Gao et al. 2024; its weight there is 1/8)."""

RESAMPLED_SHARE = 0.8
"""Share of a run, from its start, in which dead latents are redrawn: the last ones need steps to learn in."""


class TopK(Dictionary):
    kind = "topk"
    Config = TopKConfig
    config: TopKConfig
    rule: ClassVar[Rule] = "relu"
    latent_tensors: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "rows_since_fired")

    def __init__(self, config: TopKConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.input_scaling, self.target_scaling = scalings(
            config.scaling, self.d_in, config.shrinkage, self.autoencoder
        )
        self.k = config.k
        """Latents active per row: the config's k, but for the first steps of a run that begins with more."""
        self.subtracts_b_dec = False
        """Whether b_pre is b_dec: true while an autoencoder trains, false for transcoders and for anything folded."""

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes.

        Where an autoencoder's rows have a scale of their own, values are multiplied by it, so that a value times its
        decoder row is raw; the codes' offset is the rest of what makes a row raw again.
        """
        codes = self._active(self.input_scaling(x))
        if not isinstance(self.target_scaling, RowWise):
            return Codes(codes.indices, codes.values, self.d_sae)
        shift_B1, scale_B1 = self.target_scaling.of_rows(x)
        return Codes(codes.indices, codes.values * scale_B1, self.d_sae, self.b_dec * scale_B1 + shift_B1)

    def decode(self, codes: Codes) -> Tensor:
        """Codes to a raw reconstruction (B, O). ValueError when they lack the offset that a row's own scale needs."""
        output_BO = ops.decode(codes.values, codes.indices, self.W_dec)
        return self.target_scaling.undo(output_BO + self.b_dec) if codes.offset is None else output_BO + codes.offset

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD = self.input_scaling(x)
        target_BO = x_BD if target is None else self.target_scaling(target)
        dead_S = self.rows_since_fired > self.config.dead_after_rows
        revive = self.config.auxk_weight > 0 and ops.anywhere(dead_S)
        dead_A = ops.latents_where(dead_S) if revive else None
        wide = self.config.multi_topk_weight > 0
        slots = min(MULTIPLE * self.k, self.config.d_sae) if wide else self.k
        values_BK, indices_BK, dead_pre_BA = self._select(x_BD, slots, dead_A)
        if wide:
            wide_BO = ops.decode(values_BK, indices_BK, self.W_dec) + self.b_dec
            values_BK, indices_BK = self._largest(values_BK, indices_BK)
        if dead_A is None or dead_pre_BA is None:
            rebuilt_BO = ops.decode(values_BK, indices_BK, self.W_dec)
        else:
            dead_BA = ops.keep_topk(dead_pre_BA, self.config.k_aux or max(1, self.d_in // 2), self.rule)
            rebuilt_BO, revived_BO = ops.decode_also(values_BK, indices_BK, self.W_dec, dead_BA, dead_A)
        output_BO = rebuilt_BO + self.b_dec
        error_BO = target_BO - output_BO
        mse = error_BO.square().mean()
        total, terms = self._fit(mse, target_BO, values_BK, indices_BK)
        if wide:
            multi = (target_BO - wide_BO).square().mean()
            terms["multi_topk"] = multi.detach()
            total = total + self.config.multi_topk_weight * multi
        if revive:
            residual_BO = error_BO.detach()
            auxk = (residual_BO - revived_BO).square().mean() / ops.mean_over_rows(mse.detach()).clamp_min(LEAST)
            terms["auxk"] = auxk.detach()
            total = total + self.config.auxk_weight * auxk
        codes = Codes(indices_BK, values_BK.detach(), self.d_sae)
        return Loss(total, terms, codes, self.target_scaling.undo(output_BO.detach(), x))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Unit decoder rows, random or along data points; an autoencoder's encoder is their transpose times a number.

        A transcoder has no transpose to start from: its latent s begins mostly as one example, row s of W_enc along a
        centred input and row s of W_dec along that input's target. From random directions 89 % of the latents of
        the bundled model's first transcoder stopped firing (one seed, 240 steps of 2048 rows).
        """
        if self.autoencoder != (target is None):
            raise ValueError("An autoencoder begins without a target, a transcoder with one.")
        self.subtracts_b_dec = self.autoencoder
        self.input_scaling.fit(x, control)
        x_BD = target_BO = self.input_scaling(x)
        if target is not None:
            self.target_scaling.fit(target, control)
            target_BO = self.target_scaling(target)

        from_data = (self.config.initial_decoder or ("random" if self.autoencoder else "data")) == "data"
        written_SO = F.normalize(torch.randn(self.d_sae, self.d_out, generator=generator), dim=1)
        examples_S = torch.randint(len(x), (self.d_sae,), generator=generator)
        self.W_dec.copy_(_towards(target_BO, examples_S, written_SO) if from_data else written_SO)
        self.b_dec.copy_(_centre(target_BO, self.config.initial_b_dec))
        if self.autoencoder:
            self.W_enc.copy_(self.W_dec)
            self.b_enc.zero_()
        else:
            read_SD = F.normalize(torch.randn(self.d_sae, self.d_in, generator=generator), dim=1)
            self.W_enc.copy_(_towards(x_BD, examples_S, read_SD) if from_data else read_SD)
            self.b_enc.copy_(-self.W_enc @ x_BD.mean(dim=0))
        self._shrink_to_fit(x_BD, target_BO)

    def schedule(self, step: int, steps: int) -> None:
        """k: from ``k_start`` linearly to ``k`` over the first ``k_anneal_share`` of the run."""
        self.k = falling_k(self.config.k_start, self.config.k, self.config.k_anneal_share, step, steps)

    @torch.no_grad()
    def project_gradients(self) -> None:
        if self.W_dec.grad is not None:
            along_S = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(self.W_dec, along_S[:, None], value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(LEAST))

    @torch.no_grad()
    def after_update(self, update: Update) -> dict[str, float]:
        """Unit decoder rows again; every ``resample_every`` steps dead latents are redrawn."""
        self.constrain()
        every, taken = self.config.resample_every, update.step + 1
        if every == 0 or taken % every or taken > RESAMPLED_SHARE * update.steps:
            return {}
        return {"resampled": float(self._resample(update))}

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations, folded in float64, with the config's k.

        Decoder rows stay of unit norm, but for whitening. A row's own scale (per_token, layer_norm) cannot be folded
        and stays a part of `encode` and `decode`.
        """
        folded = self.copy()
        W_enc, b_enc, W_dec, b_dec = (p.double() for p in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        if self.subtracts_b_dec:
            b_enc = b_enc - W_enc @ b_dec
        W_enc, b_enc = self.input_scaling.into_encoder(W_enc, b_enc)
        W_dec, b_dec = self.target_scaling.into_decoder(W_dec, b_dec)
        unit = self.target_scaling.unit()
        for name, raw in {"W_enc": W_enc * unit, "b_enc": b_enc * unit, "W_dec": W_dec, "b_dec": b_dec}.items():
            getattr(folded, name).copy_(raw)
        folded.drop_scaling()
        folded.subtracts_b_dec = False
        folded.k = self.config.k
        return folded

    def _resample(self, update: Update) -> int:
        """Redraw dead latents towards rows of the batch, with probability proportional to their squared error.

        A redrawn latent writes the error of its row and reads the row's input, as strongly as gives that row the
        error's length: alone it repairs its row. No row is drawn twice at once. Returns how many were redrawn.

        It reaches latents that AuxK cannot: where all of a latent's pre-activations are negative, the ReLU leaves it no
        gradient, and so it was with 83 % of the dead latents of the bundled model's first transcoder (256 -> 1024,
        k 16, 600 steps of 1024 rows). There redrawing every 50 steps took the dead on held-out rows from 17 to 22 %
        down to 3 or 4 %, and the FVU from 0.168-0.171 to 0.159-0.163 (three seeds).
        """
        x_BD = self.input_scaling(update.x)
        target_BO = x_BD if update.target is None else self.target_scaling(update.target)
        codes = self._select(x_BD, self.k)
        error_BO = target_BO - ops.decode(codes.values, codes.indices, self.W_dec) - self.b_dec
        squared_B = error_BO.square().sum(dim=1).double().cpu()
        dead_A = ops.latents_where(self.rows_since_fired > self.config.dead_after_rows)
        dead_A = dead_A[: int((squared_B > 0).sum())]
        if len(dead_A) == 0:
            return 0
        rows_A = torch.multinomial(squared_B, len(dead_A), generator=update.generator).to(x_BD.device)
        centre_D = self.b_dec if self.subtracts_b_dec else x_BD.mean(dim=0)
        read_AD, written_AO = x_BD[rows_A] - centre_D, error_BO[rows_A]
        strength_A = written_AO.norm(dim=1) / read_AD.square().sum(dim=1).clamp_min(LEAST)
        self.W_enc[dead_A] = read_AD * strength_A[:, None]
        self.b_enc[dead_A] = 0.0 if self.subtracts_b_dec else -self.W_enc[dead_A] @ centre_D
        self.W_dec[dead_A] = F.normalize(written_AO, dim=1)
        for parameter in (self.W_enc, self.b_enc, self.W_dec):
            forget_moments(update.optimiser, parameter, dead_A)
        self.rows_since_fired[dead_A] = 0
        return len(dead_A)

    def _fit(
        self, mse: Tensor, target_BO: Tensor, values_BK: Tensor, indices_BK: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What rebuilding the target costs, and its terms, detached: here the squared error of all codes together."""
        return mse, {"mse": mse.detach()}

    def _active(self, x_BD: Tensor) -> TopKCodes:
        """What `encode` finds active in scaled rows."""
        return self._select(x_BD, self.k)

    def _select(self, x_BD: Tensor, k: int, also_A: Tensor | None = None) -> TopKCodes:
        """What is active in a batch of scaled rows while training, and the pre-activations of ``also_A`` besides."""
        return ops.encode_topk(x_BD, self.W_enc, self.b_enc, k, self._pre_bias(), also_A, self.rule)

    def _largest(self, values_BW: Tensor, indices_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Of the latents selected in each row the k with the largest values."""
        kept_BW = ops.keep_topk(values_BW, self.k, self.rule)
        places_BK = kept_BW.abs().topk(min(self.k, kept_BW.shape[1]), dim=1, sorted=False).indices
        return kept_BW.gather(1, places_BK), indices_BW.gather(1, places_BK)

    def _shrink_to_fit(self, x_BD: Tensor, target_BO: Tensor) -> None:
        """Scale the encoder by the factor that fits these rows best (least squares).

        The k largest of many random directions overshoot twice, and k of a row's examples, which overlap, ten times.
        The steps that repair it fill Adam's moments with large gradients and silence many latents for good.
        """
        k = self.config.k_start or self.config.k
        values_BK, indices_BK, _ = self._select(x_BD, k)
        output_BO = ops.decode(values_BK, indices_BK, self.W_dec)
        energy = output_BO.square().sum()
        fit = (output_BO * (target_BO - self.b_dec)).sum() / energy.clamp_min(LEAST)
        if fit > 0:
            self.W_enc.mul_(fit)
            self.b_enc.mul_(fit)

    def _pre_bias(self) -> Tensor | None:
        """What is subtracted from the scaled input before it is encoded."""
        return self.b_dec if self.subtracts_b_dec else None


EXAMPLE_SHARE = 0.8
"""How much of a direction that begins at a data point is its example, the rest being random."""


def _towards(rows: Tensor, examples: Tensor, directions: Tensor) -> Tensor:
    """(S, ...) unit rows: mostly the centred example of each latent, partly its random unit direction."""
    centred = F.normalize((rows - rows.mean(dim=0))[examples], dim=1)
    return F.normalize(EXAMPLE_SHARE * centred + (1 - EXAMPLE_SHARE) * directions, dim=1)


def _centre(rows: Tensor, name: str) -> Tensor:
    """(O,) where the decoder's bias begins."""
    if name == "zero":
        return torch.zeros_like(rows[0])
    return rows.mean(dim=0) if name == "mean" else geometric_median(rows)


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
