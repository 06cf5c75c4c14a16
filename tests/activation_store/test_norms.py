"""The norms of the rows as stored, their exact lower median, and the count of rows far above it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from activation_store import norms as norms_module
from activation_store.bfloat16 import as_float32
from activation_store.norms import summarise_norms
from activation_store.spec import NORM_OUTLIER_RATIO, DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter
from tests.activation_store.random_stores import random_stores

SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Norms:
    """As much of a store as the summary needs."""

    def __init__(self, norms):
        self.rows = len(norms)
        self.all = np.asarray(norms, dtype=np.float32)

    def norms(self, hook, start, stop):
        return self.all[start:stop]


def expected(norms):
    """By sorting, in float64."""
    norms = np.sort(np.asarray(norms, dtype=np.float32)).astype(np.float64)
    median = norms[(len(norms) - 1) // 2]
    return median, int((norms > NORM_OUTLIER_RATIO * median).sum())


FEW_VALUES = st.sampled_from([0.0, 1e-45, 1.0, 1.0000001, 10.0, 10.000001, 3.4e38])
ANY_VALUE = st.floats(0, float(np.finfo(np.float32).max), width=32)


@settings(SHARED, max_examples=200)
@given(norms=st_numpy.arrays(np.float32, st.integers(1, 60), elements=st.one_of(FEW_VALUES, ANY_VALUE)))
@example(norms=np.zeros(1, dtype=np.float32))
@example(norms=np.zeros(7, dtype=np.float32))
@example(norms=np.array([0, 0, 0, 5], dtype=np.float32))
@example(norms=np.array([2.0], dtype=np.float32))
@example(norms=np.array([1, 2, 3, 4], dtype=np.float32))  # the lower of the two in the middle
def test_median_and_outliers_are_those_of_the_sorted_norms(norms):
    assert summarise_norms(Norms(norms), "x") == expected(norms)


def test_blocks_that_are_read_one_after_the_other_add_up(monkeypatch):
    monkeypatch.setattr(norms_module, "READ_AT_ONCE", 7)
    for seed in range(5):
        norms = np.random.default_rng(seed).gamma(0.3, size=200).astype(np.float32)
        assert summarise_norms(Norms(norms), "x") == expected(norms)


def test_the_limit_of_outliers_is_not_rounded_to_float32():
    """Ten times this median lies between two float32 numbers, nearer to the upper one, which is above it."""
    median = next(
        value
        for value in np.nextafter(np.float32(1), 2) + np.arange(100, dtype=np.float32) * np.float32(2**-23)
        if np.float64(np.float32(10 * np.float64(value))) > 10 * np.float64(value)
    )
    norms = np.array([median, median, np.float32(10 * np.float64(median))])
    assert summarise_norms(Norms(norms), "x") == (median, 1) == expected(norms)


@settings(SHARED, max_examples=20)
@given(made=random_stores())
def test_the_norms_of_any_store_are_those_of_its_rows_as_stored(fast_folder, made):
    shutil.rmtree(fast_folder / "store", ignore_errors=True)
    store = open_store(made.write(fast_folder / "store"))
    for hook in made.hooks:
        rows = as_float32(store.read_rows(hook.name, 0, store.rows)).reshape(store.rows, -1).astype(np.float64)
        with np.errstate(over="ignore"):  # the norm of the largest float32 numbers is larger than all of them
            norms = np.linalg.norm(rows, axis=1).astype(np.float32)
        found = store.norms(hook.name, 0, store.rows)
        assert found.dtype == np.float32
        # Both are rounded once from float64, where the order of the sum may show.
        assert np.allclose(found, norms, rtol=2e-7, atol=0)
        statistics = store.statistics(hook.name)
        assert (statistics.median_norm, statistics.norm_outliers) == expected(found)
        assert np.array_equal(store.take_norms(hook.name, np.arange(store.rows)[::-1].copy()), found[::-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_outliers_in_a_store_are_counted(fast_folder, dtype):
    """Rows of length 1, of which every hundredth is 50 times as long, as attention sinks are."""
    hook = HookSpec("x", (4, 4), dtype)
    values = np.full((1000, 4, 4), 0.25, dtype=np.float32)
    values[::100] *= 50
    rows = (
        (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(hook.array.carrier)
    )
    plan = StorePlan(1000, [DocumentRows("a", "train", 0, 1000)])
    with StoreWriter(fast_folder / "store", plan, [hook], Geometry(8, 64), {}, disk=UnsyncedDisk()) as writer:
        writer.append({"x": rows}, *np.zeros((3, 1000), dtype=np.int64))
        writer.finish()
    store = open_store(fast_folder / "store")
    statistics = store.statistics("x")
    assert (statistics.median_norm, statistics.norm_outliers) == (1.0, 10)
    assert statistics.mean_norm == pytest.approx(0.99 + 0.01 * 50)
    assert store.norms("x", 0, 101)[[0, 1, 100]].tolist() == [50, 1, 50]
