"""What the dictionaries with a sparsity penalty share (`relu`, `jumprelu`, `gated`): all but the activation and loss.

    codes = activation(W_enc (u - b_pre))        output = codes W_dec + b_dec        u: the scaled input

An autoencoder's b_pre is its b_dec, a transcoder has none. How many latents fire is not bounded, so the loss is dense
algebra in autograd; only what leaves the dictionary is packed into codes.

Decoder rows have unit norm in scaled units (see `dictlearn.dictionaries.scaling`), otherwise a penalty on the size of
codes would be evaded by long rows: their gradient loses its component along them, after each update the norm is
restored.

The papers scale rows so that their squared length has a mean of 1; here a coordinate's has. The squared error of the
papers is then our mean over coordinates, and lengths in their units are ours divided by sqrt(O), which `length` is.

Axes: B rows, D input width, O output width, S latents, K slots of the busiest row, A dead latents.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import ControlStatistics, Dictionary, Loss, Remembers, Update, forget_moments
from dictlearn.dictionaries.configs import PenalisedConfig
from dictlearn.dictionaries.scaling import LEAST, RowWise, scalings
from dictlearn.dictionaries.topk import geometric_median

EXAMPLE_SHARE = 0.8
"""How much of a direction that begins at a data point is its example, the rest being random."""

REDRAWN_STRENGTH = 0.2
"""Length of a redrawn encoder row beside the mean length of the others (Bricken et al. 2023)."""

REDRAWN_SHARE = 0.8
"""Share of a run, from its start, in which dead latents are redrawn: the last ones need steps to learn in."""


class Penalised(Dictionary):
    config: PenalisedConfig
    biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters (S,) that are added to W_enc's product with the scaled input."""

    def __init__(self, config: PenalisedConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.input_scaling, self.target_scaling = scalings(
            config.scaling, self.d_in, config.shrinkage, self.autoencoder
        )
        self.length = self.d_out**0.5
        """Length of a typical target row in scaled units; the papers' unit."""
        self.warmed = 1.0
        """Share of the penalty's weight that counts, by `schedule`."""
        self.subtracts_b_dec = False
        """Whether b_pre is b_dec: true while an autoencoder trains, false for transcoders and for anything folded."""

    # --- what every kind defines --------------------------------------------------------------------------------

    def activate(self, product_BS: Tensor) -> Tensor:
        """(B, S) non-negative activations from W_enc's product with the centred input, before any bias."""
        raise NotImplementedError

    def multiply_codes(self, factor: float) -> None:
        """Multiply what `activate` gives by a positive number, through the parameters."""
        self.W_enc.mul_(factor)
        for name in self.biases:
            getattr(self, name).mul_(factor)

    # --- shared -------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes, in as many slots as the busiest row needs.

        Where an autoencoder's rows have a scale of their own, values are multiplied by it, so that a value times its
        decoder row is raw; the codes' offset is the rest of what makes a row raw again.
        """
        codes = packed(self.activate(self._product(self.input_scaling(x))))
        if not isinstance(self.target_scaling, RowWise):
            return codes
        shift_B1, scale_B1 = self.target_scaling.of_rows(x)
        return Codes(codes.indices, codes.values * scale_B1, self.d_sae, self.b_dec * scale_B1 + shift_B1)

    def decode(self, codes: Codes) -> Tensor:
        """Codes to a raw reconstruction (B, O). ValueError when they lack the offset that a row's own scale needs."""
        output_BO = ops.decode(codes.values, codes.indices, self.W_dec)
        return self.target_scaling.undo(output_BO + self.b_dec) if codes.offset is None else output_BO + codes.offset

    def _product(self, scaled_BD: Tensor) -> Tensor:
        """(B, S) W_enc's product with the centred input, in the input's own type."""
        centred_BD = scaled_BD - self.b_dec if self.subtracts_b_dec else scaled_BD
        return (centred_BD @ self.W_enc.T).to(scaled_BD.dtype)

    def _scaled(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(input, target)`` in scaled units."""
        scaled_BD = self.input_scaling(x)
        return scaled_BD, scaled_BD if target is None else self.target_scaling(target)

    def _reported(
        self, x: Tensor, total: Tensor, terms: dict[str, Tensor], codes_BS: Tensor, output_BO: Tensor
    ) -> Loss:
        """The loss with what is reported of it, detached, from dense codes and a scaled reconstruction."""
        detached = {name: term.detach() for name, term in terms.items()}
        return Loss(total, detached, packed(codes_BS.detach()), self.target_scaling.undo(output_BO.detach(), x))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Unit decoder rows: random, and an autoencoder's encoder their transpose; a transcoder's along data points.

        A transcoder's latent s begins mostly as one example: row s of W_enc along a centred input, row s of W_dec
        along that input's target. The decoder's bias begins at the geometric median (Bricken et al. 2023), the
        encoder at the length that fits the first rows best: at full length half of the latents overshoot together.
        """
        if self.autoencoder != (target is None):
            raise ValueError("An autoencoder begins without a target, a transcoder with one.")
        self.subtracts_b_dec = self.autoencoder
        self.input_scaling.fit(x, control)
        if target is not None:
            self.target_scaling.fit(target, control)
        x_BD, target_BO = self._scaled(x, target)
        self.b_dec.copy_(geometric_median(target_BO))
        written_SO = F.normalize(torch.randn(self.d_sae, self.d_out, generator=generator), dim=1)
        if self.autoencoder:
            self.W_dec.copy_(written_SO)
            self.W_enc.copy_(written_SO)
        else:
            examples_S = torch.randint(len(x), (self.d_sae,), generator=generator)
            read_SD = F.normalize(torch.randn(self.d_sae, self.d_in, generator=generator), dim=1)
            self.W_dec.copy_(_towards(target_BO, examples_S, written_SO))
            self.W_enc.copy_(_towards(x_BD, examples_S, read_SD))
        for name in self.biases:
            getattr(self, name).copy_(torch.zeros(self.d_sae) if self.autoencoder else -self.W_enc @ x_BD.mean(dim=0))
        codes_BS = (self._product(x_BD) + self.b_enc).relu()
        output_BO = codes_BS @ self.W_dec
        fit = (output_BO * (target_BO - self.b_dec)).sum() / output_BO.square().sum().clamp_min(LEAST)
        if fit > 0:
            Penalised.multiply_codes(self, float(fit))

    def schedule(self, step: int, steps: int) -> None:
        """The penalty's weight rises linearly from 0 over the first ``warm_up_share`` of the run."""
        last = self.config.warm_up_share * steps
        self.warmed = 1.0 if step >= last else step / last

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
        if every == 0 or taken % every or taken > REDRAWN_SHARE * update.steps:
            return {}
        return {"resampled": float(self._redraw(update))}

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations, folded in float64; decoder rows stay of unit norm, but for whitening."""
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

    def _redraw(self, update: Update) -> int:
        """Point dead latents at rows of the batch, drawn with probability proportional to their squared loss.

        Bricken et al. 2023, "Towards monosemanticity", appendix "Neuron resampling": decoder row along the centred
        row, encoder row the same at a fifth of the others' length, bias 0, moments forgotten. Theirs are autoencoders;
        a transcoder's latent reads the centred input and writes the centred target. Returns how many were redrawn.
        """
        x_BD, target_BO = self._scaled(update.x, update.target)
        codes_BS = self.activate(self._product(x_BD))
        output_BO = codes_BS @ self.W_dec + self.b_dec
        squared_loss_B = (target_BO - output_BO).square().sum(dim=1).square().double().cpu()
        dead_S = self.rows_since_fired > self.config.dead_after_rows
        dead_A = dead_S.nonzero().squeeze(1)[: int((squared_loss_B > 0).sum())]
        if len(dead_A) == 0:
            return 0
        rows_A = torch.multinomial(squared_loss_B, len(dead_A), generator=update.generator).to(x_BD.device)
        centre_D = self.b_dec if self.subtracts_b_dec else x_BD.mean(dim=0)
        others_SD = self.W_enc if dead_S.all() else self.W_enc[~dead_S]
        read_AD = F.normalize(x_BD[rows_A] - centre_D, dim=1) * REDRAWN_STRENGTH * others_SD.norm(dim=1).mean()
        self.W_enc[dead_A] = read_AD
        self.W_dec[dead_A] = F.normalize(target_BO[rows_A] - self.b_dec, dim=1)
        for name in self.biases:
            getattr(self, name)[dead_A] = 0.0 if self.subtracts_b_dec else -read_AD @ centre_D
        self._reset(dead_A, update.optimiser)
        self.rows_since_fired[dead_A] = 0
        return len(dead_A)

    def _reset(self, latents_A: Tensor, optimiser: Remembers) -> None:
        """What a redrawn latent has besides its rows and biases begins anew; the optimiser forgets all of it."""
        for name in ("W_enc", "W_dec", *self.biases):
            forget_moments(optimiser, getattr(self, name), latents_A)


def packed(codes_BS: Tensor) -> Codes:
    """Dense non-negative activations in as few slots as the busiest row needs (at least one)."""
    slots = max(1, int((codes_BS > 0).sum(dim=1).max())) if len(codes_BS) else 1
    values_BK, indices_BK = codes_BS.topk(slots, dim=1, sorted=False)
    return Codes(indices_BK, values_BK, codes_BS.shape[1])


def _towards(rows: Tensor, examples: Tensor, directions: Tensor) -> Tensor:
    """(S, ...) unit rows: mostly the centred example of each latent, partly its random unit direction."""
    centred = F.normalize((rows - rows.mean(dim=0))[examples], dim=1)
    return F.normalize(EXAMPLE_SHARE * centred + (1 - EXAMPLE_SHARE) * directions, dim=1)
