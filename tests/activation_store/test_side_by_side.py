"""Rows gathered from all shards at once are those gathered shard by shard; what cannot be laid out so is read so."""

from __future__ import annotations

import gc
import mmap
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import activation_store.store as store_module
from activation_store.errors import UserError
from activation_store.shard import encode_index
from activation_store.side_by_side import SideBySide
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter

ROWS = 2500
GEOMETRY = Geometry(rows_per_chunk=256, rows_per_shard=1024)
HOOK = HookSpec("x", (mmap.ALLOCATIONGRANULARITY // 1024, 2), "float16")
VALUES = (np.arange(ROWS * HOOK.d) % 2039).reshape(ROWS, *HOOK.shape).astype(np.float16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two full shards and one of 452 rows, each of whole pages."""
    path = tmp_path_factory.mktemp("side by side") / "store"
    plan = StorePlan(ROWS, [DocumentRows("all", "train", 0, ROWS)])
    with StoreWriter(path, plan, [HOOK], GEOMETRY, {}, disk=UnsyncedDisk()) as writer:
        writer.append({"x": VALUES}, np.zeros(ROWS), np.arange(ROWS), np.zeros(ROWS))
        writer.finish()
    return path


@pytest.fixture
def made(monkeypatch):
    """Every layout side by side that was tried: the object, or None where it could not be."""
    made = []
    of = SideBySide.of
    monkeypatch.setattr(store_module.SideBySide, "of", lambda *a: made.append(of(*a)) or made[-1])
    return made


@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=60))
def test_any_rows_in_any_order_are_what_was_written(path, rows):
    assert np.array_equal(open_store(path).take("x", np.array(rows, dtype=np.int64)), VALUES[rows])


def test_all_shards_are_read_as_one_array(path, made):
    store = open_store(path)
    assert np.array_equal(store.take("x", np.arange(ROWS)[::-1]), VALUES[::-1])
    assert made[0].there.all() and made[0].rows.shape == (3 * 1024, *HOOK.shape)


def test_only_the_shards_asked_for_are_opened(path, made):
    store = open_store(path)
    store.take("x", np.array([2100, 3]))
    assert made[0].there.tolist() == [True, False, True]


def test_rows_cannot_be_written_through_it(path, made):
    open_store(path).take("x", np.array([0]))
    with pytest.raises(ValueError, match="read-only"):
        made[0].rows[0] = 0


def test_a_copy_of_rows_outlives_the_store(path, made):
    taken = open_store(path).take("x", np.array([5]))
    made.clear()
    gc.collect()
    assert np.array_equal(taken, VALUES[5:6])


def test_shards_that_end_within_a_page_are_read_one_by_one(small, made):
    small.take("blocks.1.hook_mlp_out", np.arange(430))
    assert made == [None]


def test_a_shard_with_its_chunks_in_another_order_is_read_one_by_one(path, tmp_path, made):
    """As another writer may leave it."""
    copied = Path(shutil.copytree(path, tmp_path / "copied"))
    file = copied / HOOK.array.shard_key(1)
    chunks = np.frombuffer(file.read_bytes()[: 4 * 256 * HOOK.array.row_bytes], np.uint8).reshape(4, -1)
    size = chunks.shape[1]
    index = np.array([[size * place, size] for place in (3, 2, 1, 0)])
    file.write_bytes(chunks[::-1].tobytes() + encode_index(index))
    store = open_store(copied)
    assert np.array_equal(store.take("x", np.arange(1000)), VALUES[:1000])
    assert np.array_equal(store.take("x", np.arange(ROWS)), VALUES)


def test_a_system_that_refuses_is_no_obstacle(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("activation_store.side_by_side._mmap", refuse)
    assert np.array_equal(open_store(path).take("x", np.arange(ROWS)), VALUES)


def test_a_system_that_refuses_later_is_no_obstacle(path, monkeypatch):
    store = open_store(path)
    store.take("x", np.array([0]))

    def refuse(*arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("activation_store.side_by_side._mmap", refuse)
    assert np.array_equal(store.take("x", np.arange(ROWS)), VALUES)


def test_a_missing_shard_is_named(path, tmp_path):
    copied = Path(shutil.copytree(path, tmp_path / "copied"))
    (copied / HOOK.array.shard_key(2)).unlink()
    store = open_store(copied)
    assert np.array_equal(store.take("x", np.arange(2048)), VALUES[:2048])
    with pytest.raises(UserError, match=f"{HOOK.array.shard_key(2)} is missing"):
        store.take("x", np.array([0, 2400]))
