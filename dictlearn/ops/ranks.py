"""The operations over several processes: each rank holds some of the rows of a batch, or some of the latents.

Rows are easy: a loss is a mean over rows, so gradients are averaged after the backward pass, and only normalisers need
to be averaged before (`mean_over_rows`). Latents are exact too: a latent among the k largest of all is among the k
largest of its own rank, so every rank offers its k candidates, all see all candidates, and each keeps those of its own
that are among the k largest. Decoded parts add up.

Axes: B rows, D input width, S latents on this rank, K slots, A latents looked at besides, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dictlearn.ops.reference import Rule


class Ranks:
    """All rows and all latents are here, on one process. `ProcessMesh` spreads them."""

    several: ClassVar[bool] = False
    """Whether there are other processes, which have to take the same branches."""

    def shared(self, tensor: Tensor) -> Tensor:
        """A tensor that is the same on all ranks that share the latents: its gradient is the sum of theirs."""
        return tensor

    def keep_largest_of_row(self, values: Tensor, k: int, rule: Rule) -> Tensor:
        """Of the k largest (B, K) that each rank found among its own latents those that are the k largest of all."""
        return values

    def keep_largest_of_dense_row(self, kept: Tensor, k: int, rule: Rule) -> Tensor:
        """The same for rows (B, A) in which at most k are not 0."""
        return kept

    def among_the_largest_of_batch(self, values: Tensor, k: int) -> Tensor:
        """(B, K) bool: which of all rows' values are the k times as many as rows that are largest."""
        return _among_the_largest_of_all(values.detach().flatten(), k * len(values)).view(values.shape)

    def least_of_batch(self, scalar: Tensor) -> Tensor:
        return scalar

    def total(self, part: Tensor) -> Tensor:
        """The sum of what the ranks' latents give."""
        return part

    def anywhere(self, mask: Tensor) -> bool:
        """Whether a mask over latents is true on any rank."""
        return bool(mask.any())

    def mean_over_rows(self, scalar: Tensor) -> Tensor:
        return scalar

    def total_over_latents(self, count: Tensor) -> Tensor:
        return count

    def total_rows(self, rows: int) -> int:
        """Rows of the whole batch."""
        return rows

    def anywhere_in_batch(self, mask: Tensor) -> Tensor:
        """A mask over this rank's latents, true where it is on any rank that holds the same latents."""
        return mask

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Over the ranks that share a batch; a parameter without a gradient has none on any of them."""


class ProcessMesh(Ranks):
    """Ranks of torch.distributed: rows spread over ``data``, latents over ``latents``; a group of one splits nothing.

    Every rank must make the same calls in the same order.
    """

    several = True

    def __init__(self, data: dist.ProcessGroup, latents: dist.ProcessGroup) -> None:
        self.data = data
        self.latents = latents
        self.latent_parts = latents.size()

    def shared(self, tensor: Tensor) -> Tensor:
        if self.latent_parts == 1 or not tensor.requires_grad:
            return tensor
        return _SumOfGradients.apply(tensor, self.latents)

    def keep_largest_of_row(self, values: Tensor, k: int, rule: Rule) -> Tensor:
        if self.latent_parts == 1:
            return values
        by_BK = values.detach().abs() if rule == "magnitude" else values.detach()
        return values * self._among_the_largest(by_BK, k)

    def keep_largest_of_dense_row(self, kept: Tensor, k: int, rule: Rule) -> Tensor:
        if self.latent_parts == 1:
            return kept
        by_BA = kept.detach().abs() if rule == "magnitude" else kept.detach()
        by_BA = by_BA.masked_fill(kept == 0, -torch.inf)
        values_BK, places_BK = by_BA.topk(min(k, kept.shape[1]), dim=1, sorted=False)
        mask_BK = self._among_the_largest(values_BK, k)
        return kept * torch.zeros_like(kept).scatter(1, places_BK, mask_BK.to(kept.dtype))

    def among_the_largest_of_batch(self, values: Tensor, k: int) -> Tensor:
        """Ranks have equally many rows, and may have slots of different numbers. The latents may not be spread."""
        if self.latent_parts > 1:
            raise ValueError("The largest of a whole batch cannot be found where latents are spread over processes.")
        slots = torch.tensor(values.shape[1], device=values.device)
        dist.all_reduce(slots, dist.ReduceOp.MAX, group=self.data)
        mine = F.pad(values.detach(), (0, int(slots) - values.shape[1]), value=-torch.inf).flatten()
        all_ranks = [torch.empty_like(mine) for _ in range(self.data.size())]
        dist.all_gather(all_ranks, mine, group=self.data)
        # all ranks sort the same numbers, so that all make the same choice among those that tie
        chosen = _among_the_largest_of_all(torch.cat(all_ranks), k * len(values) * self.data.size())
        of_rank = chosen.chunk(self.data.size())[dist.get_rank(self.data)]
        return of_rank.view(len(values), -1)[:, : values.shape[1]]

    def least_of_batch(self, scalar: Tensor) -> Tensor:
        least = scalar.detach().clone()
        if self.data.size() > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.data)
        return least

    def total(self, part: Tensor) -> Tensor:
        return _Total.apply(part, self.latents) if self.latent_parts > 1 else part

    def anywhere(self, mask: Tensor) -> bool:
        found = mask.any().to(torch.int32)
        if self.latent_parts > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.latents)
        return bool(found)

    def mean_over_rows(self, scalar: Tensor) -> Tensor:
        if self.data.size() == 1:
            return scalar
        total = scalar.detach().clone()
        dist.all_reduce(total, group=self.data)
        return total / self.data.size()

    def total_over_latents(self, count: Tensor) -> Tensor:
        if self.latent_parts == 1:
            return count
        total = count.detach().clone()
        dist.all_reduce(total, group=self.latents)
        return total

    def total_rows(self, rows: int) -> int:
        return rows * self.data.size()

    def anywhere_in_batch(self, mask: Tensor) -> Tensor:
        if self.data.size() == 1:
            return mask
        found = mask.to(torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.data)
        return found.bool()

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        if self.data.size() > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.data)
                    parameter.grad /= self.data.size()

    @torch.no_grad()
    def _among_the_largest(self, values_BK: Tensor, k: int) -> Tensor:
        """(B, K) bool: which of this rank's candidates are among the k largest of all ranks'. A rank with fewer than k
        fills up with what is never chosen."""
        B, offered = values_BK.shape
        mine_Bk = values_BK.new_full((B, k), -torch.inf)
        mine_Bk[:, :offered] = values_BK
        all_ranks = [torch.empty_like(mine_Bk) for _ in range(self.latent_parts)]
        dist.all_gather(all_ranks, mine_Bk, group=self.latents)
        candidates = torch.cat(all_ranks, dim=1)
        # all ranks sort the same numbers, so that all make the same choice among those that tie
        chosen_Bk = candidates.topk(k, dim=1, sorted=False).indices
        first = dist.get_rank(self.latents) * k
        mask = torch.zeros(candidates.shape, dtype=torch.bool, device=values_BK.device)
        return mask.scatter_(1, chosen_Bk, True)[:, first : first + offered]


def _among_the_largest_of_all(values_N: Tensor, count: int) -> Tensor:
    """(N,) bool: which are the ``count`` largest; all, if there are fewer."""
    chosen = values_N.topk(min(count, len(values_N)), sorted=False).indices
    return torch.zeros(len(values_N), dtype=torch.bool, device=values_N.device).scatter_(0, chosen, True)


class _Total(torch.autograd.Function):
    """Sum over ranks; what follows is the same on every rank, so a part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumOfGradients(torch.autograd.Function):
    """The identity; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
