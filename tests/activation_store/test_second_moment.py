"""Statistics of stores of several shards: over exactly the rows that the rule names, and the same bits after a kill.

The rule: within each shard rows are taken in blocks of 1024; of a hook of width d in a store of n rows, every
(n // 64 d)-th row of each block, from its first, goes into the second moment. Everything else is over all rows.
"""

from __future__ import annotations

import shutil
from math import ceil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store import writer as writer_module
from activation_store.bfloat16 import as_float32, from_float32
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store, open_store
from activation_store.testing import Killed, KillingDisk, RecordingDisk, UnsyncedDisk, assert_same_files
from activation_store.writer import StoreWriter

ROWS, BATCH = 9_500, 777
GEOMETRY = Geometry(rows_per_chunk=100, rows_per_shard=2500)
"""Shards of blocks of 1024, 1024 and 452 rows; the last has 2000 rows."""
HOOKS = [
    HookSpec("narrow", (2, 4), "float32"),
    HookSpec("wide", (60,), "bfloat16"),
    HookSpec("widest", (150,), "float16"),
]
SHARDS = ceil(ROWS / GEOMETRY.rows_per_shard)


def values(hook: HookSpec, rows: int = ROWS) -> np.ndarray:
    """Rows as stored, their mean far from zero, so that a sum over other rows is another sum."""
    drawn = np.random.default_rng(hook.d).normal(1, 3, (rows, *hook.shape)).astype(np.float32)
    drawn *= 1 + np.arange(rows, dtype=np.float32).reshape(-1, *[1] * len(hook.shape)) / rows
    return from_float32(drawn) if hook.dtype == "bfloat16" else drawn.astype(hook.array.carrier)


VALUES = {hook.name: values(hook) for hook in HOOKS}


def make(path, disk=None, *, hooks=HOOKS, rows=ROWS, geometry=GEOMETRY, all_values=VALUES, batch=BATCH):
    plan = StorePlan(rows, [DocumentRows("a", "train", 0, rows)])
    with StoreWriter(path, plan, hooks, geometry, {}, disk=disk) as writer:
        while writer.next_row < rows:
            part = slice(writer.next_row, min(rows, writer.next_row + batch))
            numbers = np.arange(part.start, part.stop)
            writer.append({hook.name: all_values[hook.name][part] for hook in hooks}, numbers, numbers, numbers * 0)
        writer.finish()


def rows_of_the_second_moment(d: int, rows: int, rows_per_shard: int) -> np.ndarray:
    """Row numbers, by the rule, written out."""
    stride = max(1, rows // (64 * d))
    chosen = []
    for shard in range(ceil(rows / rows_per_shard)):
        first, stop = shard * rows_per_shard, min(rows, (shard + 1) * rows_per_shard)
        chosen += [np.arange(start, min(stop, start + 1024), stride) for start in range(first, stop, 1024)]
    return np.concatenate(chosen)


def about_the_mean(chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The covariance of some rows about their own mean, put about the mean of all."""
    centred, mean = chosen - chosen.mean(axis=0), rows.mean(axis=0)
    return centred.T @ centred / len(chosen) + np.outer(mean, mean)


def assert_statistics(store: Store, hook: HookSpec, stored: np.ndarray, rows_per_shard: int) -> None:
    x = as_float32(stored).reshape(len(stored), -1).astype(np.float64)
    chosen = x[rows_of_the_second_moment(hook.d, len(x), rows_per_shard)]
    found = store.statistics(hook.name)
    assert found.count == len(x)
    assert found.second_moment_rows == len(chosen)
    assert np.allclose(found.second_moment, about_the_mean(chosen, x), rtol=1e-11)
    eigenvalues = np.linalg.eigvalsh(found.covariance)
    assert eigenvalues[0] >= -1e-9 * np.linalg.norm(found.second_moment), "of a covariance none is negative"
    assert np.allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    assert np.allclose(found.mean_square, (x**2).mean(axis=0), rtol=1e-12)
    assert found.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-12)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "store"
    make(path, UnsyncedDisk())
    return path


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_statistics_are_over_exactly_the_rows_that_the_rule_names(undisturbed, hook):
    assert_statistics(open_store(undisturbed), hook, VALUES[hook.name], GEOMETRY.rows_per_shard)


def test_the_hooks_of_these_tests_take_all_some_and_few_of_the_rows():
    """Otherwise a writer that takes all rows, or the same ones for all hooks, would pass."""
    shares = [len(rows_of_the_second_moment(hook.d, ROWS, GEOMETRY.rows_per_shard)) / ROWS for hook in HOOKS]
    assert shares[0] < 0.2 < shares[1] < 0.7 and shares[2] == 1
    chosen = rows_of_the_second_moment(60, ROWS, GEOMETRY.rows_per_shard)
    x = as_float32(VALUES["wide"]).astype(np.float64)
    all_of_them = x.T @ x / len(x)
    assert not np.allclose(x[chosen].T @ x[chosen] / len(chosen), all_of_them, rtol=1e-4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    d=st.integers(1, 5),
    rows=st.integers(1, 6000),
    rows_per_shard=st.sampled_from([100, 1000, 1024, 1025, 2500, 4096]),
    batch=st.integers(50, 3000),
)
def test_for_any_width_size_and_shard(fast_folder, d, rows, rows_per_shard, batch):
    shutil.rmtree(fast_folder / "store", ignore_errors=True)
    hook = HookSpec("x", (d,), "float32")
    stored = values(hook, rows)
    asked = dict(hooks=[hook], rows=rows, geometry=Geometry(rows_per_shard, rows_per_shard), batch=batch)
    make(fast_folder / "store", UnsyncedDisk(), all_values={"x": stored}, **asked)
    assert_statistics(open_store(fast_folder / "store"), hook, stored, rows_per_shard)


# --- after a kill -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["always", "now and then", "never"])
def staged(request, monkeypatch):
    """How often the running sums are kept beside the store."""
    per = {"always": 0.0, "now and then": 10.0, "never": 1e9}[request.param]
    monkeypatch.setattr(writer_module, "SUMS_ARE_STAGED_PER", per)
    return request.param


def test_sums_computed_again_after_a_kill_have_the_same_bits(fast_folder, undisturbed, staged, monkeypatch):
    recording = RecordingDisk()
    make(fast_folder / "recorded", recording)
    assert_same_files(fast_folder / "recorded", undisturbed)
    commits = [number for number, point in enumerate(recording.points, start=1) if point == "manifest.rename"]
    assert len(commits) == SHARDS + 2  # the empty store and the complete one
    read_again = []
    sums_of_committed = StoreWriter._sums_of_committed
    monkeypatch.setattr(
        StoreWriter,
        "_sums_of_committed",
        lambda self, store, hook, shard: read_again.append(shard) or sums_of_committed(self, store, hook, shard),
    )
    for number in (commits[3], commits[-2]):
        path = fast_folder / f"killed-{number}"
        with pytest.raises(Killed):
            make(path, KillingDisk("*", number + 1, by_signal=False))  # the commit is there, nothing after it
        make(path, UnsyncedDisk())
        assert_same_files(path, undisturbed)
    assert (read_again == []) == (staged == "always")
    if staged == "never":
        assert sorted({*read_again}) == list(range(SHARDS))
    if staged == "now and then":
        assert 0 not in read_again and read_again, "it begins at the last sums that were kept"


def test_killed_at_every_commit_in_turn_the_sums_still_have_the_same_bits(fast_folder, undisturbed, staged):
    """One store, one kill after each of its commits, so that sums are computed again from sums computed again."""
    path = fast_folder / "store"
    for commit in range(SHARDS + 1):
        with pytest.raises(Killed):
            make(path, KillingDisk("manifest.sync_folders", 2 if commit == 0 else 1, by_signal=False))
        assert open_store(path).rows == min(ROWS, (commit + 1) * GEOMETRY.rows_per_shard)
    make(path, UnsyncedDisk())
    assert_same_files(path, undisturbed)
