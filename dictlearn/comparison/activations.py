"""Whether latents of two dictionaries fire alike: the rows of two feature indexes, latent by latent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from activation_store.errors import UserError
from dictlearn.feature_index.index import FeatureIndex


@dataclass(frozen=True)
class SharedRows:
    """Rows in which two latents fire.

    Attributes:
        both: rows in which both fire; either: rows in which one of them does.
        by_chance: the Jaccard index of two latents that fire as often, independently of one another.
    """

    both: int
    either: int
    by_chance: float

    @property
    def jaccard(self) -> float:
        return self.both / self.either if self.either else 0.0


def shared_rows(a: FeatureIndex, b: FeatureIndex, pairs: Iterable[tuple[int, int]]) -> list[SharedRows]:
    """Of each pair (latent of a, latent of b), the rows in which both fire.

    Raises:
        UserError: indexes of different rows, or a latent that is not there.
    """
    refuse_other_rows(a, b)
    return [_shared(a, b, *pair) for pair in pairs]


def refuse_other_rows(a: FeatureIndex, b: FeatureIndex) -> None:
    """Raises UserError where the rows of two indexes are not the same."""
    one, other = a.manifest.made_from, b.manifest.made_from
    if (one.store_fingerprint, a.rows) != (other.store_fingerprint, b.rows):
        raise UserError(
            f"The index {a.name!r} is of {a.rows:,} rows of {one.store!r} and {b.name!r} of {b.rows:,} rows of "
            f"{other.store!r}; index both over the same rows to see what fires together."
        )


def _shared(a: FeatureIndex, b: FeatureIndex, latent_a: int, latent_b: int) -> SharedRows:
    rows_a = a.activations(a.check_latent(latent_a))[0]
    rows_b = b.activations(b.check_latent(latent_b))[0]
    both = len(np.intersect1d(rows_a, rows_b, assume_unique=True))
    density_a, density_b = len(rows_a) / a.rows, len(rows_b) / b.rows
    either_by_chance = density_a + density_b - density_a * density_b
    by_chance = density_a * density_b / either_by_chance if either_by_chance else 0.0
    return SharedRows(both, len(rows_a) + len(rows_b) - both, by_chance)
