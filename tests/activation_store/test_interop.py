"""Other programs read what we write, and we read what they write, bit for bit: zarr-python and TensorStore, both ways.

TensorStore shares no code with zarr-python, and knows bfloat16 by its registered name. Every fast way of reading that
we have is compared here with zarr-python's own reader: memory maps, shards side by side, and decoded chunks.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.bfloat16 import register
from activation_store.spec import (
    COMPRESSIONS,
    STATISTICS_ARRAYS,
    ArraySpec,
    DocumentRows,
    Geometry,
    HookSpec,
    StorePlan,
)
from activation_store.store import open_store
from activation_store.testing import files_of
from tests.activation_store.random_stores import RandomStore, random_stores
from tests.activation_store.small_store import HOOKS, ROWS, stored

register()
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tensorstore():
    return pytest.importorskip("tensorstore")


@pytest.fixture(params=COMPRESSIONS)
def store_path(request, small_path, small_zstd_path):
    return {"none": small_path, "zstd": small_zstd_path}[request.param]


@pytest.fixture
def store_copy(store_path, fast_folder):
    return shutil.copytree(store_path, fast_folder / "copy")


def opened_by_tensorstore(tensorstore, folder, **how):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open(spec, **how).result()


def bits(values):
    """What is on disk, whatever type a program shows it by."""
    values = np.ascontiguousarray(values)
    return values.view(f"<u{values.dtype.itemsize}")


def rewrite(folder, values, writer, tensorstore=None, parts=1):
    """Take the shards of an array away and have another program write them, in so many parts."""
    for shard in folder.glob("c*"):
        shard.unlink()
    array = zarr.open_array(folder, mode="r+")
    if writer == "tensorstore":
        array = opened_by_tensorstore(tensorstore, folder, read=True, write=True)
        if array.dtype.name == "bfloat16":
            values = values.view(array.dtype.numpy_dtype)
    bounds = np.linspace(0, len(values), parts + 1).astype(int)
    for start, stop in reversed(list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))):
        if writer == "tensorstore":
            array[start:stop].write(values[start:stop]).result()
        else:
            array[start:stop] = values[start:stop]


# --- they read what we write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dtype)
def test_tensorstore_reads_the_rows_that_were_written(tensorstore, store_path, hook):
    array = opened_by_tensorstore(tensorstore, store_path / "activations" / hook.name)
    assert array.dtype.name == hook.dtype and array.shape == (ROWS, *hook.shape)
    assert array.chunk_layout.read_chunk.shape == (16, *hook.shape)
    assert np.array_equal(bits(array.read().result()), bits(stored(hook, 0, ROWS)))
    rows = np.random.default_rng(0).integers(0, ROWS, 50)
    assert np.array_equal(bits(array[rows].read().result()), bits(stored(hook, 0, ROWS)[rows]))


def test_tensorstore_reads_everything_else(tensorstore, store_path):
    store = open_store(store_path)
    for name in ("token_ids", "positions", "documents"):
        found = opened_by_tensorstore(tensorstore, store_path / name).read().result()
        assert np.array_equal(found, getattr(store, name)(0, ROWS))
    for hook in store.hooks:
        norms = opened_by_tensorstore(tensorstore, store_path / "norms" / hook).read().result()
        assert np.array_equal(norms, store.norms(hook, 0, ROWS))
        for part in STATISTICS_ARRAYS:
            found = opened_by_tensorstore(tensorstore, store_path / "statistics" / hook / part).read().result()
            assert np.array_equal(found, getattr(store.statistics(hook), part))
    ends = opened_by_tensorstore(tensorstore, store_path / "document_table" / "id_ends").read().result()
    ids = opened_by_tensorstore(tensorstore, store_path / "document_table" / "ids").read().result()
    assert ids[ends[2] : ends[3]].tobytes().decode() == store.document_table[3].id


@settings(SHARED, max_examples=15)
@given(made=random_stores())
def test_zarr_python_and_tensorstore_read_any_store(tensorstore, fast_folder, made):
    path = written(made, fast_folder)
    store = open_store(path)
    for hook in made.hooks:
        ours = store.read_rows(hook.name, 0, store.rows)
        assert np.array_equal(bits(zarr.open_array(path / "activations" / hook.name, mode="r")[:]), bits(ours))
        theirs = opened_by_tensorstore(tensorstore, path / "activations" / hook.name).read().result()
        assert np.array_equal(bits(theirs), bits(ours))


# --- we read what they write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["tensorstore", "zarr"])
@pytest.mark.parametrize("parts", [1, 5])
def test_a_store_whose_shards_another_program_wrote_reads_the_same(tensorstore, store_copy, writer, parts):
    """With the chunk of zeros left out, and other compressors' bytes."""
    before = files_of(store_copy)
    for hook in HOOKS:
        rewrite(store_copy / "activations" / hook.name, stored(hook, 0, ROWS), writer, tensorstore, parts)
    after = files_of(store_copy)
    assert before.keys() == after.keys() and before != after
    store = open_store(store_copy)
    order = np.random.default_rng(1).permutation(ROWS)
    for hook in HOOKS:
        assert np.array_equal(store.read_rows(hook.name, 0, ROWS), stored(hook, 0, ROWS))
        assert np.array_equal(store.take(hook.name, order), stored(hook, 0, ROWS)[order])


@settings(SHARED, max_examples=15)
@given(made=random_stores(), writer=st.sampled_from(["tensorstore", "zarr"]), data=st.data())
def test_any_shards_that_another_program_wrote_read_as_they_were_written(tensorstore, fast_folder, made, writer, data):
    path = written(made, fast_folder)
    for hook in made.hooks:
        values = open_store(path).read_rows(hook.name, 0, made.plan.rows)
        zeros = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
        values[zeros] = 0
        values[np.arange(len(values)) % made.geometry.rows_per_shard == made.geometry.rows_per_shard - 1] = 1
        folder = path / "activations" / hook.name
        rewrite(folder, values, writer, tensorstore, data.draw(st.integers(1, 3)))
        if len([*folder.glob("c*")]) < made.geometry.shards(made.plan.rows):
            continue  # a shard of zeros is left out as a whole; to us that is a damaged store
        store = open_store(path)
        assert np.array_equal(bits(store.read_rows(hook.name, 0, len(values))), bits(values))
        backwards = np.arange(len(values))[::-1].copy()
        assert np.array_equal(bits(store.take(hook.name, backwards)), bits(values)[::-1])


# --- every fast way of reading against zarr-python's ------------------------------------------------------------------


def written(made, folder):
    shutil.rmtree(folder / "store", ignore_errors=True)
    return made.write(folder / "store")


PAGES = RandomStore(
    hooks=(HookSpec("x", (8, 32), "bfloat16"), HookSpec("y", (64,), "float32"), HookSpec("z", (128,), "float16")),
    geometry=Geometry(rows_per_chunk=8, rows_per_shard=32),
    plan=StorePlan(101, [DocumentRows("a", "train", 0, 101)]),
    provenance={},
    compression="none",
    bits=7,
    text=0,
)
"""Shards of whole pages, which can be laid side by side."""


@pytest.fixture(scope="module", params=["maps", "side by side", "chunks", "few chunks"])
def read_fast(request, tmp_path_factory):
    """(store, what zarr-python reads from it), read by one of our ways each."""
    made = PAGES
    if request.param == "maps":
        made = replace(made, geometry=Geometry(rows_per_chunk=3, rows_per_shard=27))
    if request.param.endswith("chunks"):
        made = replace(made, compression="zstd")
    path = made.write(tmp_path_factory.mktemp("fast") / "store")
    store = open_store(path)
    if request.param == "few chunks":
        store.reserve(16)
    theirs = {hook.name: zarr.open_array(path / "activations" / hook.name, mode="r")[:] for hook in made.hooks}
    yield store, theirs
    # Each way was the one that its name says.
    laid = [side_by_side is not None for side_by_side in store._in_one.values()]
    assert laid == {"maps": [False] * 3, "side by side": [True] * 3}.get(request.param, [])
    assert bool(store._mapped) == (request.param in ("maps", "side by side"))
    slots = {arena.slots for arena in store._arenas.values()}
    assert slots == {"chunks": {13}, "few chunks": {2}}.get(request.param, set())


@settings(SHARED, max_examples=80)
@given(rows=st.lists(st.integers(0, 100), max_size=120), start=st.integers(0, 101), length=st.integers(0, 101))
def test_fast_reads_are_zarr_pythons(read_fast, rows, start, length):
    store, theirs = read_fast
    stop, indices = min(101, start + length), np.array(rows, dtype=np.int64)
    for name, expected in theirs.items():
        if rows:
            store.prefetch(name, np.unique(indices // store.manifest.geometry.rows_per_chunk))
        assert np.array_equal(bits(store.take(name, indices)), bits(expected[indices]))
        assert np.array_equal(bits(store.read_rows(name, start, stop)), bits(expected[start:stop]))
        out = np.empty((len(rows), *expected.shape[1:]), dtype=store.hook(name).array.carrier)
        assert store.take(name, indices, out) is out
        assert np.array_equal(bits(out), bits(expected[indices]))


@settings(SHARED, max_examples=15)
@given(made=random_stores(), data=st.data())
def test_reads_of_any_store_are_zarr_pythons(fast_folder, made, data):
    path = written(made, fast_folder)
    store = open_store(path)
    arrays = {hook.array.path: store.take for hook in made.hooks} | {
        hook.norms.path: store.take_norms for hook in made.hooks
    }
    rows = np.array(data.draw(st.lists(st.integers(0, store.rows - 1), max_size=30)), dtype=np.int64)
    for array, take in arrays.items():
        expected = zarr.open_array(path / array, mode="r")[:]
        assert np.array_equal(bits(take(array.split("/", 1)[1], rows)), bits(expected[rows]))
    for name in ("token_ids", "positions", "documents"):
        assert np.array_equal(store.take_row_array(name, rows), zarr.open_array(path / name, mode="r")[:][rows])


def test_the_metadata_is_what_tensorstore_would_have_written(tensorstore, tmp_path):
    """Opened with our metadata it writes our array; created from what it makes of it, it writes equal metadata."""
    array = ArraySpec("x", (2, 3), "bfloat16")
    (tmp_path / "x").mkdir()
    for compression in COMPRESSIONS:
        (tmp_path / "x" / "zarr.json").write_bytes(array.metadata(37, Geometry(4, 16), compression))
        found = opened_by_tensorstore(tensorstore, tmp_path / "x").spec().to_json()["metadata"]
        assert found["data_type"] == "bfloat16" and found["shape"] == [37, 2, 3]
        assert found["codecs"][0]["configuration"]["chunk_shape"] == [4, 2, 3]
        names = [codec["name"] for codec in found["codecs"][0]["configuration"]["codecs"]]
        assert names == ["bytes", "zstd"][: 1 + (compression == "zstd")]
