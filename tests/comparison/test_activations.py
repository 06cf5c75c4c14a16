"""Rows in which latents of two indexes fire: counted as sets would count them, over the same rows alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from activation_store.errors import UserError
from dictlearn.comparison.activations import shared_rows

ROWS = 1000


class Index:
    """What is asked of a feature index: sorted rows by latent."""

    def __init__(self, seed: int, store: str = "acts", rows: int = ROWS) -> None:
        random = np.random.default_rng(seed)
        self.fired = [np.sort(random.choice(rows, size=size, replace=False)) for size in (0, 1, 30, 400, rows)]
        self.name, self.rows = f"index{seed}", rows
        self.manifest = SimpleNamespace(made_from=SimpleNamespace(store=store, store_fingerprint=f"sha256:{store}"))

    def check_latent(self, latent: int) -> int:
        if latent >= len(self.fired):
            raise UserError(f"There is no latent {latent}.")
        return latent

    def activations(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        return self.fired[latent], np.ones(len(self.fired[latent]))


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_counted_as_sets_count_them(seed: int) -> None:
    a, b = Index(seed), Index(seed + 10)
    pairs = [(one, other) for one in range(5) for other in range(5)]
    for (one, other), found in zip(pairs, shared_rows(a, b, pairs), strict=True):
        mine, others = set(a.fired[one].tolist()), set(b.fired[other].tolist())
        assert (found.both, found.either) == (len(mine & others), len(mine | others))
        assert found.jaccard == (len(mine & others) / len(mine | others) if mine | others else 0)


def test_latents_that_fire_independently_score_what_chance_does() -> None:
    scores = [shared_rows(Index(seed), Index(seed + 100), [(3, 3)])[0] for seed in range(20)]
    mean = sum(one.jaccard for one in scores) / len(scores)
    assert mean == pytest.approx(scores[0].by_chance, abs=0.02)
    assert scores[0].by_chance == pytest.approx(0.16 / 0.64)


def test_latents_that_never_fire_share_nothing() -> None:
    (found,) = shared_rows(Index(0), Index(1), [(0, 0)])
    assert (found.jaccard, found.by_chance, found.either) == (0, 0, 0)


@pytest.mark.parametrize("other", [Index(1, store="others"), Index(1, rows=ROWS + 1)])
def test_other_rows_are_refused_with_both_counts(other: Index) -> None:
    with pytest.raises(UserError, match=r"'index0' is of 1,000 rows of 'acts' and 'index1' of 1,00[01] rows of"):
        shared_rows(Index(0), other, [(0, 0)])


def test_a_latent_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="There is no latent 9"):
        shared_rows(Index(0), Index(1), [(1, 9)])
