"""A latent that one token explains is found by that token, and scored on documents that chose nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dictlearn.feature_index.selectivity import recognisable

from .conftest import Made, make_index


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Made:
    return make_index(tmp_path_factory.mktemp("long"), [300] * 12, k=2, d_sae=40, before=1.0)


def test_scores_are_those_of_the_dense_activations(long: Made) -> None:
    found = recognisable(long.index, limit=100, least_rows=10, most_density=1.0)
    tokens = long.store.token_ids(0, long.store.rows)
    documents = long.store.documents(0, long.store.rows)
    held_out = long.index.is_held_out(np.arange(long.store.rows))
    assert len(found) > 5
    for one in found:
        shifted = np.roll(tokens, -one.offset)
        matches = (shifted == one.token_id) & (np.roll(documents, -one.offset) == documents)
        values = np.abs(long.dense[:, one.latent])
        assert one.count == (values != 0).sum()
        assert one.precision == pytest.approx(values[matches & held_out].sum() / values[held_out].sum(), rel=1e-5)
        assert one.recall == pytest.approx((values != 0)[matches & held_out].sum() / (matches & held_out).sum())
        precision = values[matches & ~held_out].sum() / values[~held_out].sum()
        recall = (values != 0)[matches & ~held_out].sum() / (matches & ~held_out).sum()
        assert one.score == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-5)
        assert 2 * one.precision * one.recall / (one.precision + one.recall) >= one.score / 2
        assert one.token == long.index.token_text(one.token_id) and repr(one.token) in one.pattern


def test_best_first_and_no_pattern_twice(long: Made) -> None:
    found = recognisable(long.index, limit=100, least_rows=10, most_density=1.0)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert len({(one.offset, one.token_id) for one in found}) == len(found)
    assert {one.offset for one in found} >= {0, -1}
    assert recognisable(long.index, limit=3, least_rows=10, most_density=1.0) == found[:3]


def test_rare_and_dense_latents_are_left_out(long: Made) -> None:
    density = long.index.table().density
    for one in recognisable(long.index, least_rows=10, most_density=0.05):
        assert density[one.latent] <= 0.05
    assert recognisable(long.index, least_rows=10**6) == []
