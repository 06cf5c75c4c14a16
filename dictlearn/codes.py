"""Sparse activations: which latents fired for each row, and how strongly.

Axes: B rows, K slots per row, S latents of the dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Up to K active latents per row, as padded index and value arrays.

    A slot with value 0 is empty: its index is valid but means nothing. A latent stands in at most one slot of a row.

    Attributes:
        indices: (B, K) int64, each in [0, d_sae).
        values: (B, K) floating point; may be negative for dictionaries with signed codes.
        d_sae: number of latents S.
        offset: (B, O) what each row's output is when nothing fires, for dictionaries in which that depends on the row;
            None for all others, whose output begins at b_dec.
    """

    indices: Tensor
    values: Tensor
    d_sae: int
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape or self.indices.ndim != 2:
            raise ValueError(
                f"indices and values must both be (rows, slots), got {tuple(self.indices.shape)} "
                f"and {tuple(self.values.shape)}."
            )

    def __len__(self) -> int:
        return self.indices.shape[0]

    def dense(self) -> Tensor:
        """(B, S) with zeros where nothing fired."""
        dense_BS = self.values.new_zeros(len(self), self.d_sae)
        return dense_BS.scatter_add(1, self.indices, self.values)

    def active(self) -> Tensor:
        """(B, K) mask of the slots that hold a non-zero activation."""
        return self.values != 0

    def l0(self) -> Tensor:
        """(B,) number of latents that fired in each row."""
        return self.active().sum(dim=1)

    def fired(self) -> Tensor:
        """(S,) number of rows in which each latent fired, int64."""
        return torch.bincount(self.indices[self.active()], minlength=self.d_sae)

    def fired_anywhere(self) -> Tensor:
        """(S,) bool: whether each latent fired in any row. Of a GPU no number is asked, so that nobody waits for it."""
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.values.device)
        if self._same_slots:
            return fired.scatter_(0, self.indices[0], self.active().any(dim=0))[:-1]
        places = self.indices.masked_fill(~self.active(), self.d_sae)  # empty slots all go to one past the last
        return fired.scatter_(0, places.flatten(), True)[:-1]

    def in_few_slots(self) -> Codes:
        """The same in less memory, where all rows have the same slots."""
        return Codes.from_dense(self.dense(), self.offset) if self._same_slots else self

    @property
    def _same_slots(self) -> bool:
        """Whether each slot is of the same latent in all rows, by the layout alone."""
        return len(self) > 0 and self.indices.stride(0) == 0

    def detach(self) -> Codes:
        offset = None if self.offset is None else self.offset.detach()
        return Codes(self.indices, self.values.detach(), self.d_sae, offset)

    def to(self, *args: Any, **kwargs: Any) -> Codes:
        """Move all arrays; a floating dtype does not apply to the indices."""
        values = self.values.to(*args, **kwargs)
        offset = None if self.offset is None else self.offset.to(*args, **kwargs)
        return Codes(self.indices.to(values.device), values, self.d_sae, offset)

    @staticmethod
    def merged(indices_BK: Tensor, values_BK: Tensor, d_sae: int) -> Codes:
        """Codes in which a latent may have stood in several slots of a row: its values are added up in one of them."""
        indices_BK, order_BK = indices_BK.sort(dim=1)
        values_BK = values_BK.gather(1, order_BK)
        first_BK = torch.ones_like(indices_BK, dtype=torch.bool)
        first_BK[:, 1:] = indices_BK[:, 1:] != indices_BK[:, :-1]
        slot_BK = first_BK.cumsum(dim=1) - 1
        sums_BK = torch.zeros_like(values_BK).scatter_add(1, slot_BK, values_BK)
        return Codes(torch.zeros_like(indices_BK).scatter(1, slot_BK, indices_BK), sums_BK, d_sae)

    @staticmethod
    def in_all_slots(dense_BS: Tensor) -> Codes:
        """The same activations, uncopied, in a slot for each latent: how many the busiest row needs is not asked."""
        latents_S = torch.arange(dense_BS.shape[1], device=dense_BS.device)
        return Codes(latents_S.expand(dense_BS.shape), dense_BS, dense_BS.shape[1])

    @staticmethod
    def from_dense(dense_BS: Tensor, offset: Tensor | None = None) -> Codes:
        """The same activations in as few slots as the busiest row needs (at least one)."""
        slots = max(1, int((dense_BS != 0).sum(dim=1).max())) if len(dense_BS) else 1
        indices_BK = dense_BS.abs().topk(slots, dim=1).indices
        return Codes(indices_BK, dense_BS.gather(1, indices_BK), dense_BS.shape[1], offset)
