"""BatchTopK: k latents active per row on average, shared out over the batch. SAE and transcoder alike.

Bussmann, Leask, Nanda 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410): section 3, equations 4 to 6. It is
`dictlearn.dictionaries.topk` with another selection:

    training     of the ReLU'd pre-activations of all B rows together the B k largest
    afterwards   those that reach a threshold: the running mean, over training's batches, of the least one selected

so that what a row is encoded to depends on that row alone, and some rows take more latents than others. `encode` always
uses the threshold, `loss` always the batch. The threshold is fitted first on the batch that the dictionary begins with,
and is in the units of the pre-activations: folding multiplies it by what it multiplies those by.

A batch is what `loss` is given: all rows of a step, on all processes, but one part of them when accumulating gradients.

Selecting needs no (B, S) matrix. Each row offers its 4 k largest; should some row have all that it offered among the
B k largest of the batch, twice as many are offered by each. That gives what the whole matrix would. It also is the one
number in a step that a GPU is asked for and waited for: how many slots the busiest row needs.

Axes: B rows, D input width, S latents, C candidates per row, K slots that the busiest row needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Update, Width
from dictlearn.dictionaries.configs import BatchTopKConfig
from dictlearn.dictionaries.scaling import ControlStatistics
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops import TopKCodes

OFFERED = 4
"""Times k: what each row offers at first."""


class BatchTopK(TopK):
    kind = "batchtopk"
    Config = BatchTopKConfig
    config: BatchTopKConfig
    latent_tensors: ClassVar[tuple[str, ...]] = ()
    threshold: Tensor

    def __init__(self, config: BatchTopKConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.register_buffer("threshold", torch.zeros(()))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        super().initialise(x, target, generator, control)
        least = _least_active(self._select(self.input_scaling(x), self.config.k_start or self.config.k).values)
        if torch.isfinite(least):
            self.threshold.copy_(least)

    @torch.no_grad()
    def after_update(self, update: Update) -> Mapping[str, float | Tensor]:
        """As TopK's; and the threshold moves towards the least value that was selected in the batch."""
        said = super().after_update(update)
        least = ops.least_over_rows(_least_active(update.loss.codes.values)).to(self.threshold)
        least = torch.where(torch.isfinite(least), least, self.threshold)
        self.threshold.lerp_(least, self.config.threshold_rate)
        return {**said, "threshold": self.threshold.clone()}

    def multiply_codes(self, factor: float) -> None:
        super().multiply_codes(factor)
        self.threshold.mul_(factor)

    def _active(self, x_BD: Tensor) -> Codes:
        """Every pre-activation of a row that is positive and reaches the threshold."""
        slots = min(OFFERED * self.k, self.d_sae)
        while True:
            values_BC, indices_BC, _ = ops.encode_topk(x_BD, self.W_enc, self.b_enc, slots, self._pre_bias())
            values_BC = values_BC * (values_BC >= self.threshold)
            if slots == self.d_sae or not (values_BC > 0).all(dim=1).any():
                codes = in_few_slots(values_BC, indices_BC)
                return Codes(codes.indices, codes.values, self.d_sae)
            slots = min(2 * slots, self.d_sae)

    def _select(self, x_BD: Tensor, k: int, also_A: Tensor | None = None) -> TopKCodes:
        """The B k largest of a whole batch of scaled rows."""
        slots = min(OFFERED * k, self.d_sae)
        while True:
            values_BC, indices_BC, also_BA = ops.encode_topk(
                x_BD, self.W_enc, self.b_enc, slots, self._pre_bias(), also_A
            )
            values_BC = ops.keep_largest_of_batch(values_BC, k)
            (needed,) = slots_needed([values_BC])
            if slots == self.d_sae or not ops.anywhere_over_rows(needed == slots, x_BD.device):
                return in_slots(needed, values_BC, indices_BC, also_BA)
            slots = min(2 * slots, self.d_sae)

    def _largest(self, values_BW: Tensor, indices_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Of the latents selected in the batch the B k with the largest values."""
        codes = in_few_slots(ops.keep_largest_of_batch(values_BW, self.k), indices_BW)
        return codes.values, codes.indices


def _least_active(values_BK: Tensor) -> Tensor:
    """The least positive value; infinite where there is none."""
    return values_BK.masked_fill(~(values_BK > 0), torch.inf).amin()


def slots_needed(several: Sequence[Tensor]) -> list[int]:
    """Of each of several (B, C) activations of the same rows, by the busiest row; at least one. Asked in one go."""
    counts = [(values_BC > 0).sum(dim=1).max() for values_BC in several if len(values_BC)]
    return [max(1, count) for count in torch.stack(counts).tolist()] if counts else [1] * len(several)


def in_slots(slots: int, values_BC: Tensor, indices_BC: Tensor, also_BA: Tensor | None = None) -> TopKCodes:
    """The same activations in so many slots, enough for each row, or a few more."""
    slots = min(ops.padded_slots(slots, values_BC.device), values_BC.shape[1])
    places_BK = values_BC.topk(slots, dim=1, sorted=False).indices
    return TopKCodes(values_BC.gather(1, places_BK), indices_BC.gather(1, places_BK), also_BA)


def in_few_slots(values_BC: Tensor, indices_BC: Tensor) -> TopKCodes:
    """The same activations in as many slots as the busiest row needs."""
    return in_slots(slots_needed([values_BC])[0], values_BC, indices_BC)
