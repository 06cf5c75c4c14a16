"""Refusing what is not finite: at once where the host waits for each step, some steps later where it runs ahead.

Where it runs ahead, the device itself leaves out the update of a step that is not finite, and of all that follow, until
the host has come to know of it: the weights are then those of before that step, but for the last bit of rows that are
brought back to unit norm.

Axes: B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dictlearn.dictionaries.base import Loss
from dictlearn.ops.ahead import Arriving


class NotFinite(Exception):
    """A step whose loss or gradient is not finite; nothing was updated.

    Attributes:
        terms: the numbers that tell where it began, as words.
        rows: (n,) int64, the rows of the batch in which it shows; empty where it shows in no row alone.
        step: number of the step, from 0; where the host runs ahead, steps have been taken since, and came to nothing.
    """

    def __init__(self, terms: str, rows: Tensor, step: int) -> None:
        super().__init__(terms)
        self.terms = terms
        self.rows = rows
        self.step = step


@dataclass(frozen=True)
class Found:
    """What a step leaves behind to tell where it stopped being finite.

    Attributes:
        step: its number, from 0.
        numbers: terms of the loss and the norm of the gradient, each ().
        rows: of the input, the target and the output, in the order in which they are blamed: (B,) the largest absolute
            value of each row, finite where all of them are. One pass over each, and nothing large is kept.
    """

    step: int
    numbers: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    @classmethod
    def of(cls, step: int, loss: Loss, norm: Tensor, x: Tensor, target: Tensor | None) -> Found:
        largest = {
            where: torch.linalg.vector_norm(rows, torch.inf, dim=1)
            for where, rows in (("input", x), ("target", target), ("output", loss.output))
            if rows is not None
        }
        return cls(step, {**loss.terms, "gradient norm": norm}, largest)

    def in_words(self) -> NotFinite:
        """Which numbers are not finite, and the rows in which they show: in the data, or else in the reconstruction."""
        terms = ", ".join(f"{name} {float(value)}" for name, value in self.numbers.items() if not torch.isfinite(value))
        for where, largest_B in self.rows.items():
            bad = (~torch.isfinite(largest_B)).nonzero().squeeze(1)
            if len(bad):
                return NotFinite(f"{terms}; the {where} is not finite", bad.cpu(), self.step)
        return NotFinite(terms, torch.empty(0, dtype=torch.int64), self.step)


class Unread:
    """The last steps of a member, of which the host does not know yet whether they were finite."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._steps: deque[tuple[Arriving, Found]] = deque()

    def add(self, step: int, loss: Loss, norm: Tensor, x: Tensor, target: Tensor | None, waits: bool) -> Tensor | None:
        """Look at the loss and gradient of a step.

        Args:
            waits: whether the host asks about it at once.

        Returns:
            () bool, on the device: whether this step was finite, and with it all that the host has not asked about.
            None where it has waited, and so they were.

        Raises:
            NotFinite: the host has waited, and the step is not finite.
        """
        finite = torch.isfinite(loss.total.detach() + norm)
        if waits:
            if not finite:
                raise Found.of(step, loss, norm, x, target).in_words()
            return None
        self._finite = finite if self._finite is None else self._finite & finite
        self._steps.append((Arriving(self._finite), Found.of(step, loss, norm, x, target)))
        return self._finite

    def settle(self, within: int = 0) -> None:
        """Ask about all steps but the last ``within``. Raises NotFinite: of the first that was not finite."""
        while len(self._steps) > within:
            finite, found = self._steps.popleft()
            if not finite.read():
                self._finite = None
                self._steps.clear()
                raise found.in_words()
