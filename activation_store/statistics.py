"""What is known of all rows of one hook: read with a store, or estimated from some of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from activation_store.moments import Moments
from activation_store.spec import NORM_OUTLIER_RATIO


@dataclass(frozen=True)
class HookStatistics:
    """One hook over all rows of a complete store, in float64, of the values as stored.

    Attributes:
        count: rows.
        mean: (d,).
        mean_square: (d,), mean of the squares, not centred.
        mean_norm, median_norm: of the Euclidean lengths of the rows; the median is the lower one of an even number.
        norm_outliers: rows whose norm is above `activation_store.spec.NORM_OUTLIER_RATIO` times the median.
        second_moment: (d, d), mean of x xT, not centred, over ``second_moment_rows`` of the rows, spread evenly: all of
            them in a store of fewer than 128 d rows (`activation_store.moments`).
        excluded: tokens that gave no row, by reason.
    """

    count: int
    mean: np.ndarray
    mean_square: np.ndarray
    mean_norm: float
    median_norm: float
    norm_outliers: int
    second_moment: np.ndarray
    second_moment_rows: int
    excluded: dict[str, int]

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), of the population, as far as `second_moment` knows it."""
        return self.second_moment - np.outer(self.mean, self.mean)

    @property
    def mean_squared_norm(self) -> float:
        """Mean of |x|^2, over all rows."""
        return float(self.mean_square.sum())


def estimate_statistics(rows: np.ndarray, excluded: Mapping[str, int]) -> HookStatistics:
    """Statistics of these rows (n, ...), of a type as stored, in the place of those of all rows."""
    moments = Moments(rows[0].size)
    moments.update(rows)
    norms = moments.take_row_norms()
    median = float(np.partition(norms, (len(norms) - 1) // 2)[(len(norms) - 1) // 2])
    return HookStatistics(
        count=moments.count,
        mean=moments.mean,
        mean_square=moments.mean_square,
        mean_norm=moments.mean_norm,
        median_norm=median,
        norm_outliers=int((norms > NORM_OUTLIER_RATIO * median).sum()),
        second_moment=moments.second_moment,
        second_moment_rows=moments.outer_count,
        excluded=dict(excluded),
    )
