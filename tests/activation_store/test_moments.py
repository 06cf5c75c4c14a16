"""Streaming moments equal those of all rows at once, and depend on the order of rows but not on how they arrive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.bfloat16 import from_float32, to_float32
from activation_store.moments import BLOCK_ROWS, ROWS_PER_DIMENSION, Moments, second_moment_stride


def of(rows: np.ndarray, cuts: list[int] | None = None) -> Moments:
    moments = Moments(rows[0].size)
    for part in np.split(rows, sorted(cuts or [])):
        moments.update(part)
    return moments


def test_they_are_the_moments_of_all_rows():
    rows = np.random.default_rng(0).normal(3, 2, size=(2 * BLOCK_ROWS + 77, 5))
    moments = of(rows)
    assert moments.count == 2 * BLOCK_ROWS  # the last 77 are waiting for a full block
    assert np.allclose(moments.mean, rows.mean(axis=0), rtol=1e-13)
    assert moments.count == len(rows)
    assert np.allclose(moments.second_moment, rows.T @ rows / len(rows), rtol=1e-13)
    assert moments.outer_count == len(rows)
    assert np.allclose(moments.mean_square, (rows**2).mean(axis=0), rtol=1e-13)
    assert moments.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-13)


def about_the_mean(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The covariance of some rows about their own mean, put about the mean of all."""
    centred, mean = chosen - chosen.mean(axis=0), rows.mean(axis=0)
    return centred.T @ centred / len(chosen) + np.outer(mean, mean)


def test_every_nth_row_of_a_block_goes_into_the_second_moment_and_all_into_the_rest():
    rows = np.random.default_rng(6).normal(size=(4 * BLOCK_ROWS + 300, 3))
    whole = Moments(3, stride=3)
    whole.update(rows)
    parts = Moments(3)
    for first_block in range(5):  # as the shards of a store do
        part = Moments(3, stride=3)
        part.update(rows[first_block * BLOCK_ROWS : (first_block + 1) * BLOCK_ROWS])
        parts.merge(part)
    chosen = np.concatenate([rows[first : first + BLOCK_ROWS][::3] for first in range(0, len(rows), BLOCK_ROWS)])
    for moments in (whole, parts):
        moments.settle()
        assert (moments.count, moments.outer_count) == (len(rows), len(chosen)) and len(chosen) == 4 * 342 + 100
        assert np.allclose(moments.second_moment, about_the_mean(chosen, rows), rtol=1e-12)
        assert np.allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)


@given(st.integers(1, 10**9), st.integers(1, 20_000))
def test_the_second_moment_has_at_least_64_rows_for_each_dimension_if_the_store_has(rows, d):
    assert rows // second_moment_stride(rows, d) >= min(rows, ROWS_PER_DIMENSION * d)


def test_row_norms_are_handed_over_once_in_order():
    rows = np.random.default_rng(7).normal(size=(BLOCK_ROWS + 9, 4))
    moments = Moments(4)
    moments.update(rows)
    assert np.allclose(moments.take_row_norms(), np.linalg.norm(rows, axis=1), rtol=1e-6)
    assert not len(moments.take_row_norms())


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3000), max_size=6))
def test_how_rows_are_cut_into_updates_changes_no_bit(cuts):
    rows = np.random.default_rng(1).normal(size=(3000, 3)).astype(np.float32)
    assert np.array_equal(of(rows, cuts).to_vector(), of(rows).to_vector())


@pytest.mark.parametrize("d", [1, 20, 100, 124, 255, 256, 257, 260, 399])
def test_the_number_of_threads_changes_no_bit(d):
    """Otherwise the ranks of a job, which have fewer threads each, would make another store."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    rows = np.random.default_rng(2).normal(size=(1500, d))
    vectors = []
    for threads in (1, 2, 3, 5):
        with threadpoolctl.threadpool_limits(threads):
            vectors.append(of(rows).to_vector())
    for vector in vectors[1:]:
        assert np.array_equal(vectors[0], vector)


def test_bits_count_as_the_numbers_they_stand_for():
    bits = from_float32(np.random.default_rng(3).normal(size=(100, 2, 3)).astype(np.float32))
    assert np.array_equal(of(bits).to_vector(), of(to_float32(bits).astype(np.float64)).to_vector())


def test_merging_adds():
    rows = np.random.default_rng(4).normal(size=(500, 4))
    merged = of(rows[:123])
    merged.merge(of(rows[123:]))
    assert np.allclose(merged.to_vector(), of(rows).to_vector(), rtol=1e-13)
    with pytest.raises(ValueError, match="width 3"):
        merged.merge(Moments(3))


def test_they_survive_being_kept_as_a_vector():
    moments = of(np.random.default_rng(5).normal(size=(50, 3)))
    assert np.array_equal(Moments.from_vector(3, moments.to_vector()).second_moment, moments.second_moment)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(value):
    rows = np.zeros((2 * BLOCK_ROWS, 2))
    rows[BLOCK_ROWS + 5 :, 1] = value
    assert of(rows).non_finite == BLOCK_ROWS + 5
    before = of(np.zeros((10, 2)))
    before.merge(of(rows))
    assert before.non_finite == 10 + BLOCK_ROWS + 5
