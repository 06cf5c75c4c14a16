"""What the dictionaries with an encoder and a decoder matrix share: `topk` and its kin, `penalised` and its kin.

    codes = activation(W_enc (u - b_pre) + b_enc)        output = codes W_dec + b_dec        u: the scaled input

An autoencoder's b_pre is its b_dec. A transcoder's target is another hook's activation, so it has no b_pre. In scaled
units (see `dictlearn.dictionaries.scaling`) decoder rows have unit norm: before each update their gradient loses its
component along them, after it the norm is restored. Dead latents can be redrawn (Bricken et al. 2023, "Towards
monosemanticity").

Axes: B rows, D input width, O output width, S latents, A dead latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Remembers, Update, Width, forget_moments
from dictlearn.dictionaries.scaling import LEAST, ControlStatistics, RowWise, scalings, spread
from dictlearn.dictionaries.start import geometric_median, towards, unit_directions
from dictlearn.dictionaries.unit_rows import drop_gradient_along, restore_norms

REDRAWN_SHARE = 0.8
"""Share of a run, from its start, in which dead latents are redrawn: the last ones need steps to learn in."""


class TwoMatrices(Dictionary):
    updated_by_row = ("W_enc", "W_dec")
    biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters (S,) that are added to W_enc's product with the centred input."""
    spread_of_parts: Tensor
    """(P,) of each rebuilt hook, where there are several, the root of its variance per coordinate in raw units."""

    def __init__(self, config: Any, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.input_scaling, self.target_scaling = scalings(
            config.scaling, self.input_parts, None if self.autoencoder else self.output_parts, config.shrinkage
        )
        if len(self.output_parts) > 1:
            self.register_buffer("spread_of_parts", torch.ones(len(self.output_parts)))
        self.subtracts_b_dec = False
        """Whether b_pre is b_dec: true while an autoencoder trains, false for transcoders and for anything folded."""

    # --- what each family defines -----------------------------------------------------------------------------------

    def _active(self, x_BD: Tensor) -> Codes:
        """What `encode` finds active in scaled rows."""
        raise NotImplementedError

    def _first_output(self, x_BD: Tensor) -> Tensor:
        """(B, O) what the codes of the first scaled rows decode to, without bias."""
        raise NotImplementedError

    def _redraw(self, update: Update) -> int:
        """Redraw dead latents towards rows of the batch that are rebuilt badly. Returns how many were redrawn."""
        raise NotImplementedError

    # --- what a kind may define -------------------------------------------------------------------------------------

    def multiply_codes(self, factor: float) -> None:
        """Multiply all codes by a positive number, through the parameters."""
        self._multiply_encoder(factor)

    def _examples(self, rows: int, generator: torch.Generator) -> Tensor | None:
        """(S,) numbers of the first rows that latents begin along; None for random directions."""
        return None if self.autoencoder else torch.randint(rows, (self.d_sae,), generator=generator)

    def _centre(self, target_BO: Tensor) -> Tensor:
        """(O,) where the decoder's bias begins."""
        return geometric_median(target_BO)

    def _reset(self, latents_A: Tensor, optimiser: Remembers) -> None:
        """What a redrawn latent has besides its rows and biases begins anew; the optimiser forgets all of it."""
        for name in ("W_enc", "W_dec", *self.biases):
            forget_moments(optimiser, getattr(self, name), latents_A)

    # --- shared -----------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes.

        Where an autoencoder's rows have a scale of their own, values are multiplied by it, so that a value times its
        decoder row is raw; the codes' offset is the rest of what makes a row raw again.
        """
        codes = self._active(self.input_scaling(x))
        if not isinstance(self.target_scaling, RowWise):
            return codes
        shift_B1, scale_B1 = self.target_scaling.of_rows(x)
        return replace(codes, values=codes.values * scale_B1, offset=self.b_dec * scale_B1 + shift_B1)

    def decode(self, codes: Codes) -> Tensor:
        """Codes to a raw reconstruction (B, O). ValueError when they lack the offset that a row's own scale needs."""
        output_BO = ops.decode(codes.values, codes.indices, self.W_dec)
        return self.target_scaling.undo(output_BO + self.b_dec) if codes.offset is None else output_BO + codes.offset

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Unit decoder rows, random or along data points; an autoencoder's encoder is their transpose times a number.

        A transcoder has no transpose to start from: its latent s begins mostly as one example, row s of W_enc along a
        centred input and row s of W_dec along that input's target. From random directions 89 % of the latents of
        the bundled model's first transcoder stopped firing (TopK, one seed, 240 steps of 2048 rows).
        """
        if self.autoencoder != (target is None):
            raise ValueError("An autoencoder begins without a target, a transcoder with one.")
        self.subtracts_b_dec = self.autoencoder
        self.input_scaling.fit(x, control)
        if target is not None:
            self.target_scaling.fit(target, control)
        if len(self.output_parts) > 1:
            rebuilt = (x if target is None else target).split(self.output_parts, dim=1)
            self.spread_of_parts.copy_(torch.stack([spread(part) for part in rebuilt]))
        x_BD, target_BO = self._scaled(x, target)
        written_SO = unit_directions(self.d_sae, self.d_out, generator)
        examples_S = self._examples(len(x), generator)
        self.W_dec.copy_(written_SO if examples_S is None else towards(target_BO, examples_S, written_SO))
        self.b_dec.copy_(self._centre(target_BO))
        if self.autoencoder:
            self.W_enc.copy_(self.W_dec)
        else:
            read_SD = unit_directions(self.d_sae, self.d_in, generator)
            self.W_enc.copy_(read_SD if examples_S is None else towards(x_BD, examples_S, read_SD))
        for name in self.biases:
            bias_S = getattr(self, name)
            bias_S.copy_(torch.zeros_like(bias_S) if self.autoencoder else -self.W_enc @ x_BD.mean(dim=0))
        self._shrink_to_fit(x_BD, target_BO)

    def project_gradients(self) -> None:
        drop_gradient_along(self.W_dec)

    def constrain(self) -> None:
        restore_norms(self.W_dec)

    @torch.no_grad()
    def after_update(self, update: Update) -> Mapping[str, float | Tensor]:
        """Unit decoder rows again; every ``resample_every`` steps dead latents are redrawn."""
        self.constrain()
        every, taken = self.config.resample_every, update.step + 1
        if every == 0 or taken % every or taken > REDRAWN_SHARE * update.steps:
            return {}
        if update.finite is not None and not update.finite:
            return {}
        return {"resampled": float(self._redraw(update))}

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations, folded in float64.

        Decoder rows stay of unit norm, but for whitening and several hooks. A row's own scale (per_token, layer_norm)
        cannot be folded and stays a part of `encode` and `decode`.
        """
        folded = self.copy().double()
        reads_SD = folded.W_enc.clone()
        for name in self.biases:
            bias_S = getattr(folded, name)
            centred_S = bias_S - reads_SD @ folded.b_dec if self.subtracts_b_dec else bias_S
            raw_SD, raw_S = folded.input_scaling.into_encoder(reads_SD, centred_S)
            folded.W_enc.copy_(raw_SD)
            bias_S.copy_(raw_S)
        W_dec, b_dec = folded.target_scaling.into_decoder(folded.W_dec.clone(), folded.b_dec.clone())
        folded.W_dec.copy_(W_dec)
        folded.b_dec.copy_(b_dec)
        folded.multiply_codes(folded.target_scaling.unit())
        folded.drop_scaling()
        folded.subtracts_b_dec = False
        return folded.to(self.W_dec.dtype)

    def _scaled(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(input, target)`` in scaled units."""
        x_BD = self.input_scaling(x)
        return x_BD, x_BD if target is None else self.target_scaling(target)

    def _multiply_encoder(self, factor: float) -> None:
        for name in ("W_enc", *self.biases):
            getattr(self, name).mul_(factor)

    def _shrink_to_fit(self, x_BD: Tensor, target_BO: Tensor) -> None:
        """Scale the encoder by the factor that fits these rows best (least squares).

        The k largest of many random directions overshoot twice, and k of a row's examples, which overlap, ten times.
        The steps that repair it fill Adam's moments with large gradients and silence many latents for good.
        """
        output_BO = self._first_output(x_BD)
        fit = (output_BO * (target_BO - self.b_dec)).sum() / output_BO.square().sum().clamp_min(LEAST)
        if fit > 0:
            self._multiply_encoder(float(fit))

    def _draw_rows(self, weight_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(dead latents (A,), a row of the batch for each (A,))``: rows by their weight, none twice at once."""
        weight_B = weight_B.double().cpu()
        dead_A = ops.latents_where(self.rows_since_fired > self.config.dead_after_rows)[: int((weight_B > 0).sum())]
        rows_A = torch.multinomial(weight_B, len(dead_A), generator=generator) if len(dead_A) else dead_A
        return dead_A, rows_A.to(dead_A.device)

    def _point(self, latents_A: Tensor, read_AD: Tensor, written_AO: Tensor, centre_D: Tensor, of: Update) -> None:
        """Redrawn latents read and write these vectors; biases let them fire beyond the centre of the input."""
        self.W_enc[latents_A] = read_AD
        self.W_dec[latents_A] = F.normalize(written_AO, dim=1)
        for name in self.biases:
            getattr(self, name)[latents_A] = 0.0 if self.subtracts_b_dec else -read_AD @ centre_D
        self._reset(latents_A, of.optimiser)
        self.rows_since_fired[latents_A] = 0
