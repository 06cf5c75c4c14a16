"""TopK: keep the k largest pre-activations of a learned encoder. SAE and transcoder alike.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093): section 2.3 the activation, appendix A
the AuxK loss and the initialisation, Multi-TopK; Makhzani and Frey 2013 (arXiv 1312.5663) for the k-sparse idea and for
a k that falls during training; Bricken et al. 2023, "Towards monosemanticity", for redrawing dead latents.

    codes = ReLU(TopK(W_enc (u - b_pre) + b_enc))        output = codes W_dec + b_dec        u: the scaled input

See `dictlearn.dictionaries.two_matrices` for all but the selection, the loss and how dead latents are redrawn.

Axes: B rows, D input width, O output width, S latents, K active per row, A dead latents.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Loss, Update, Width
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.falling_k import falling_k
from dictlearn.dictionaries.scaling import LEAST
from dictlearn.dictionaries.start import geometric_median
from dictlearn.dictionaries.two_matrices import TwoMatrices
from dictlearn.ops import Rule, TopKCodes

MULTIPLE = 4
"""Times k: the latents that the Multi-TopK term decodes (Gao et al. 2024; its weight there is 1/8)."""


class TopK(TwoMatrices):
    kind = "topk"
    Config = TopKConfig
    config: TopKConfig
    rule: ClassVar[Rule] = "relu"
    latent_tensors: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "rows_since_fired")

    def __init__(self, config: TopKConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.k = config.k
        """Latents active per row: the config's k, but for the first steps of a run that begins with more."""

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD, target_BO = self._scaled(x, target)
        revives = self.config.auxk_weight > 0
        dead = self.dead_latents.of(self.rows_since_fired, self.config.dead_after_rows) if revives else None
        wide = self.config.multi_topk_weight > 0
        slots = min(MULTIPLE * self.k, self.config.d_sae) if wide else self.k
        values_BK, indices_BK, dead_pre_BA = self._select_to_learn(
            x, x_BD, slots, None if dead is None else dead.latents
        )
        without_codes = self._without_codes(x_BD)
        if wide:
            wide_BO = ops.decode(values_BK, indices_BK, self.W_dec) + without_codes
            values_BK, indices_BK = self._largest(values_BK, indices_BK)
        dead_BA = dead_A = None
        if dead is not None and dead_pre_BA is not None:
            dead_BA = ops.keep_topk(dead.only(dead_pre_BA), self.config.k_aux or max(1, self.d_in // 2), self.rule)
            dead_A = dead.latents
        mse, output_BO, revived_BO = ops.rebuild(
            values_BK, indices_BK, self.W_dec, without_codes, target_BO, dead_BA, dead_A
        )
        total, terms = self._fit(mse, target_BO, values_BK, indices_BK)
        if wide:
            multi = (target_BO - wide_BO).square().mean()
            terms["multi_topk"] = multi.detach()
            total = total + self.config.multi_topk_weight * multi
        if dead is not None and revived_BO is not None:
            scale = ops.mean_over_rows(mse.detach()).clamp_min(LEAST)
            auxk = dead.term((target_BO - output_BO - revived_BO).square().mean() / scale)
            terms["auxk"] = auxk.detach()
            total = total + self.config.auxk_weight * auxk
        codes = Codes(indices_BK, values_BK.detach(), self.d_sae)
        return Loss(total, terms, codes, self.target_scaling.undo(output_BO, x))

    def schedule(self, step: int, steps: int) -> None:
        """k: from ``k_start`` linearly to ``k`` over the first ``k_anneal_share`` of the run."""
        self.k = falling_k(self.config.k_start, self.config.k, self.config.k_anneal_share, step, steps)

    def fold(self) -> Self:
        """As every kind with two matrices, with the config's k."""
        folded = super().fold()
        folded.k = self.config.k
        return folded

    def _redraw(self, update: Update) -> int:
        """Redraw dead latents towards rows of the batch, with probability proportional to their squared error.

        A redrawn latent writes the error of its row and reads the row's input, as strongly as gives that row the
        error's length: alone it repairs its row. No row is drawn twice at once. Returns how many were redrawn.

        It reaches latents that AuxK cannot: where all of a latent's pre-activations are negative, the ReLU leaves it no
        gradient, and so it was with 83 % of the dead latents of the bundled model's first transcoder (256 -> 1024,
        k 16, 600 steps of 1024 rows). There redrawing every 50 steps took the dead on held-out rows from 17 to 22 %
        down to 3 or 4 %, and the FVU from 0.168-0.171 to 0.159-0.163 (three seeds).
        """
        x_BD, target_BO = self._scaled(update.x, update.target)
        codes = self._select(x_BD, self.k)
        error_BO = target_BO - ops.decode(codes.values, codes.indices, self.W_dec) - self._without_codes(x_BD)
        dead_A, rows_A = self._draw_rows(error_BO.square().sum(dim=1), update.generator)
        centre_D = self.b_dec if self.subtracts_b_dec else x_BD.mean(dim=0)
        read_AD, written_AO = x_BD[rows_A] - centre_D, error_BO[rows_A]
        strength_A = written_AO.norm(dim=1) / read_AD.square().sum(dim=1).clamp_min(LEAST)
        self._point(dead_A, read_AD * strength_A[:, None], written_AO, centre_D, update)
        return len(dead_A)

    def _examples(self, rows: int, generator: torch.Generator) -> Tensor | None:
        examples_S = torch.randint(rows, (self.d_sae,), generator=generator)
        begin = self.config.initial_decoder or ("random" if self.autoencoder else "data")
        return examples_S if begin == "data" else None

    def _centre(self, target_BO: Tensor) -> Tensor:
        if self.config.initial_b_dec == "zero":
            return torch.zeros_like(target_BO[0])
        return target_BO.mean(dim=0) if self.config.initial_b_dec == "mean" else geometric_median(target_BO)

    def _first_output(self, x_BD: Tensor) -> Tensor:
        codes = self._select(x_BD, self.config.k_start or self.config.k)
        return ops.decode(codes.values, codes.indices, self.W_dec)

    def _fit(
        self, mse: Tensor, target_BO: Tensor, values_BK: Tensor, indices_BK: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What rebuilding the target costs, and its terms, detached: here the squared error of all codes together."""
        return mse, {"mse": mse.detach()}

    def _without_codes(self, x_BD: Tensor) -> Tensor:
        """(O,) or (B, O) the scaled output where nothing fires."""
        return self.b_dec

    def _active(self, x_BD: Tensor) -> Codes:
        codes = self._select(x_BD, self.k)
        return Codes(codes.indices, codes.values, self.d_sae)

    def _select(self, x_BD: Tensor, k: int, also_A: Tensor | None = None) -> TopKCodes:
        """What is active in a batch of scaled rows while training, and the pre-activations of ``also_A`` besides."""
        return ops.encode_topk(x_BD, self.W_enc, self.b_enc, k, self._pre_bias(), also_A, self.rule)

    def _select_to_learn(self, x: Tensor, x_BD: Tensor, k: int, also_A: Tensor | None) -> TopKCodes:
        """What the loss decodes, of raw rows x (B, D) and the same rows scaled: what is active, unless it is noisy."""
        return self._select(x_BD, k, also_A)

    def _largest(self, values_BW: Tensor, indices_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Of the latents selected in each row the k with the largest values."""
        kept_BW = ops.keep_topk(values_BW, self.k, self.rule)
        places_BK = kept_BW.abs().topk(min(self.k, kept_BW.shape[1]), dim=1, sorted=False).indices
        return kept_BW.gather(1, places_BK), indices_BW.gather(1, places_BK)

    def _pre_bias(self) -> Tensor | None:
        """What is subtracted from the scaled input before it is encoded."""
        return self.b_dec if self.subtracts_b_dec else None
