"""The list of dead latents, which AuxK decodes; on a GPU without asking the device how many there are.

On a CPU the list is as long as it has to be. A host that runs ahead (`dictlearn.ops.ahead`) cannot know how long that
is, but some steps before it can have counted the latents that will be dead by then if they do not fire meanwhile: the
list gets that length, and what it has too many are latents that are not dead. They are all different, come after those
that are, and change nothing: `Dead.only` makes their pre-activations 0, through which no gradient passes.

Axes: B rows, S latents, G groups of latents with a list each, A latents in all lists.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dictlearn import ops
from dictlearn.ops.ahead import LAG, Arriving

FEWEST = 64
"""Lengths of lists are multiples of it, and beyond 512 one of eight between a power of two and the next: a shape that
is new costs memory, and the choice of a kernel."""


class Dead(NamedTuple):
    """Some latents, the dead ones of a dictionary among them.

    Attributes:
        latents: (A,) int64, all different, group by group, in each the dead ones first and ascending.
        alive: (A,) bool: which of them are not dead. None where all are.
        lengths: (G,) how many there are of each group.
    """

    latents: Tensor
    alive: Tensor | None
    lengths: list[int]

    def only(self, pre_BA: Tensor) -> Tensor:
        """Pre-activations with 0 for the latents that are not dead."""
        return pre_BA if self.alive is None else pre_BA.masked_fill(self.alive, 0)

    def term(self, loss: Tensor) -> Tensor:
        """A term () of the loss that is about dead latents: 0 where there are none."""
        return loss if self.alive is None else loss.masked_fill(self.alive.all(), 0)


class DeadLatents:
    """Lists those of one dictionary, step after step.

    Args:
        groups: of equally many consecutive latents.
    """

    def __init__(self, groups: int = 1) -> None:
        self._groups = groups
        self._dead_after: int | None = None
        self._rows = 0
        self._bounds: deque[tuple[Arriving, int]] = deque(maxlen=LAG)
        """How many of a group could be dead, at most, before that many rows have been seen; the oldest first."""
        self._counted: tuple[Tensor, int] | None = None
        """The counters that the bounds are of, and their version."""

    def __deepcopy__(self, memo: dict[int, Any]) -> DeadLatents:
        return DeadLatents(self._groups)  # what is on its way is on its way to one host

    def of(self, rows_since_fired_S: Tensor, dead_after: int) -> Dead | None:
        """The latents that have not fired for more than ``dead_after`` rows; None where it is known that all have."""
        dead_GS = (rows_since_fired_S > dead_after).view(self._groups, -1)
        if not ops.runs_ahead(dead_GS.device):
            if not ops.anywhere(dead_GS):
                return None
            latents_A = ops.latents_where(dead_GS.flatten())
            return Dead(latents_A, None, [len(latents_A)] if self._groups == 1 else dead_GS.sum(dim=1).tolist())
        self._dead_after = dead_after
        length = rounded_up(self._most(rows_since_fired_S, dead_GS), dead_GS.shape[1])
        if length == 0:
            return None
        in_group_GS = dead_GS.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        first_G1 = torch.arange(0, dead_GS.numel(), dead_GS.shape[1], device=dead_GS.device)[:, None]
        latents_A = (in_group_GS[:, :length] + first_G1).flatten()
        return Dead(latents_A, ~dead_GS.flatten()[latents_A], [length] * self._groups)

    def foresee(self, rows_since_fired_S: Tensor, rows: int) -> None:
        """Count, after a step of so many rows, how many latents could be dead `LAG` steps later."""
        if self._dead_after is None or not ops.runs_ahead(rows_since_fired_S.device):
            return
        between = (LAG - 1) * rows
        self._rows += rows
        could_be_GS = (rows_since_fired_S > self._dead_after - between).view(self._groups, -1)
        self._bounds.append((Arriving(could_be_GS.sum(dim=1).amax()), self._rows + between))
        self._counted = rows_since_fired_S, rows_since_fired_S._version

    def bounds(self) -> Tensor:
        """(n, 2) int64: how many of a group could be dead within how many rows from now. Next steps depend on it."""
        bounds = [[int(most.read()), until - self._rows] for most, until in self._bounds]
        return torch.tensor(bounds, dtype=torch.int64).reshape(-1, 2)

    def set_bounds(self, bounds: Tensor, rows_since_fired_S: Tensor) -> None:
        """Put back what `bounds` gave, when the counters are back."""
        self._rows, self._counted = 0, (rows_since_fired_S, rows_since_fired_S._version)
        self._bounds.clear()
        self._bounds.extend((Arriving(most), int(until)) for most, until in bounds.unbind())

    def _most(self, rows_since_fired_S: Tensor, dead_GS: Tensor) -> int:
        """At least as many as are dead of any group: foreseen, or counted now, in the first steps, and waited for."""
        counters, version = self._counted or (None, 0)
        if counters is not rows_since_fired_S or version != rows_since_fired_S._version:
            self._bounds.clear()  # they were set by somebody else
        if len(self._bounds) == LAG and self._rows <= self._bounds[0][1]:
            return int(self._bounds[0][0].read())
        return int(dead_GS.sum(dim=1).amax())


def rounded_up(most: int, latents: int) -> int:
    """To one of few lengths, and no more than there are latents."""
    step = max(FEWEST, 2 ** (most.bit_length() - 4)) if most else 1
    return min(latents, -(-most // step) * step)
