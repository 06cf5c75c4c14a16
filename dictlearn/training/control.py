"""The statistics that centre and whiten the input of a dictionary of several hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from dictlearn.dictionaries.scaling import ControlStatistics


class SideBySide:
    """Of several hooks as one: each is centred and whitened by itself.

    How two hooks vary together is in no store, and counts as not at all: the covariance has a block for each hook.
    """

    def __init__(self, of_hooks: Sequence[ControlStatistics]) -> None:
        self._of_hooks = of_hooks

    @cached_property
    def mean(self) -> np.ndarray:
        """(D,) float64, of all hooks one after the other."""
        return np.concatenate([np.ravel(one.mean) for one in self._of_hooks])

    @cached_property
    def second_moment(self) -> np.ndarray:
        """(D, D) float64."""
        moment = np.outer(self.mean, self.mean)
        first = 0
        for one in self._of_hooks:
            last = first + np.size(one.mean)
            moment[first:last, first:last] = one.second_moment
            first = last
        return moment
