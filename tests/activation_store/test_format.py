"""Any Zarr v3 reader opens a store, and we read shards that others wrote.

TensorStore, and our readers against those of other programs: test_interop.py.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.bfloat16 import register
from activation_store.errors import UserError
from activation_store.local_folder import LocalFolder
from activation_store.shard import ABSENT, MappedShard, ShardWriter, encode_index
from activation_store.spec import FORMAT_VERSION, STORED_TYPES, ArraySpec, Geometry, HookSpec, array_metadata
from activation_store.testing import files_of
from tests.activation_store import small_store
from tests.activation_store.small_store import HOOKS, ROWS, stored

register()
GEOMETRY = Geometry(rows_per_chunk=4, rows_per_shard=16)


@pytest.fixture
def group(small_path):
    return zarr.open_group(small_path, mode="r")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dtype)
def test_zarr_python_reads_the_rows_that_were_written(group, hook):
    array = group[f"activations/{hook.name}"]
    assert array.shape == (ROWS, *hook.shape)
    assert np.array_equal(array[:], stored(hook, 0, ROWS))
    assert array.metadata.to_dict()["data_type"] == hook.dtype


def test_zarr_python_finds_everything_and_nothing_it_does_not_know(group, recwarn):
    names = {name for name, _ in group.members(max_depth=None)}
    assert {"token_ids", "positions", "documents", "document_table/ids"} <= names
    assert {f"statistics/{hook.name}/second_moment" for hook in HOOKS} <= names
    assert not [warning for warning in recwarn if "not recognized" in str(warning.message)]


def test_chunks_of_zeros_are_written_too(small_path):
    """Left out, they would make a shard's rows lie where arithmetic does not expect them."""
    shard = (small_path / HOOKS[0].array.shard_key(0)).read_bytes()
    index = np.frombuffer(shard[-4 - 16 * 8 : -4], dtype="<u8").reshape(-1, 2)
    assert index[:, 0].tolist() == [i * 16 * 16 for i in range(8)]


def test_the_manifest_says_what_the_store_is(group):
    manifest = group.attrs["activation_store"]
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["rows"] == ROWS and manifest["complete"]
    assert [hook["name"] for hook in manifest["hooks"]] == [hook.name for hook in HOOKS]


def test_the_files_match_the_pinned_checksum(small, small_path):
    """The format on disk. If this fails, existing stores read or continue differently: raise the format version.

    Without the statistics and norms (their last bits belong to the machine), and so without the manifest, which has
    their checksums.
    """
    left_out = ("statistics/", "norms/", "zarr.json")
    files = {key: file for key, file in files_of(small_path).items() if not key.startswith(left_out)}
    digest = hashlib.sha256(b"".join(key.encode() + file for key, file in files.items())).hexdigest()
    assert (small.fingerprint[:23], digest[:16]) == ("sha256:df5e78004caf5dce", "ff268903fae90105")


@pytest.mark.parametrize("dtype", STORED_TYPES)
def test_every_type_of_the_table_is_one_that_zarr_knows(dtype, tmp_path):
    codec = {"name": "bytes"} if dtype == "uint8" else {"name": "bytes", "configuration": {"endian": "little"}}
    (tmp_path / "zarr.json").write_text(json.dumps(array_metadata([3], [2], dtype, [codec])))
    array = zarr.open_array(tmp_path, mode="r")
    assert array.dtype == STORED_TYPES[dtype].carrier
    assert array[:].tolist() == [0, 0, 0]


# --- shards by others -------------------------------------------------------------------------------------------------

ZERO_CHUNKS = st.lists(st.booleans(), min_size=4, max_size=4)


def opened(path, array, rows, name="the shard"):
    return MappedShard(np.memmap(path, dtype=np.uint8, mode="r"), name, rows, array, GEOMETRY)


def read_back(path, array, rows, start=0):
    shard = opened(path, array, rows)
    read = np.empty((rows - start, *array.row_shape), dtype=array.carrier)
    shard.read(start, rows, read)
    order = np.random.default_rng(rows).permutation(rows)
    taken = np.empty((rows, *array.row_shape), dtype=array.carrier)
    shard.take(order, taken)
    return read, taken, order


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 16), zero=ZERO_CHUNKS, start=st.integers(0, 15))
def test_shards_written_by_zarr_python_read_the_same(tmp_path_factory, rows, zero, start):
    """zarr-python leaves out chunks of zeros."""
    folder = tmp_path_factory.mktemp("zarr")
    array = ArraySpec("x", (2, 3), "float32")
    values = np.random.default_rng(rows).normal(size=(rows, 2, 3)).astype(np.float32)
    values[np.repeat(zero, 4)[:rows]] = 0
    metadata = json.loads(array.metadata(rows, GEOMETRY, "none"))
    (folder / "zarr.json").write_text(json.dumps(metadata))
    zarr.open_array(folder, mode="r+")[:] = values
    path = folder / "c.0.0.0"
    if not values.any():
        assert not path.exists()
        return
    start = min(start, rows - 1)
    read, taken, order = read_back(path, array, rows, start)
    assert np.array_equal(read, values[start:])
    assert np.array_equal(taken, values[order])


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), gap=st.integers(0, 9), absent=st.lists(st.integers(0, 3), max_size=2))
def test_chunks_may_lie_in_any_order_with_gaps_and_holes(tmp_path_factory, order, gap, absent):
    path = tmp_path_factory.mktemp("shard") / "shard"
    array = ArraySpec("x", (2,), "float16")
    values = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float16)
    content, index = b"", np.full((4, 2), ABSENT)
    for chunk in order:
        if chunk in absent:
            values[chunk * 4 : chunk * 4 + 4] = 0
            continue
        content += bytes(gap)
        index[chunk] = len(content), 16
        content += values[chunk * 4 : chunk * 4 + 4].tobytes()
    path.write_bytes(content + encode_index(index))
    read, taken, rows = read_back(path, array, 16)
    assert np.array_equal(read, values)
    assert np.array_equal(taken, values[rows])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 16), cut=st.integers(0, 16))
def test_our_own_shards_read_back_and_are_one_contiguous_array(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("shard") / "shard"
    array = ArraySpec("x", (3,), "bfloat16")
    values = np.random.default_rng(rows).integers(0, 2**16, (rows, 3), dtype=np.uint16)
    place = LocalFolder(path.parent)
    writer = ShardWriter(place.create("x", "shard"), array, GEOMETRY, "none")
    writer.append(values[:cut])
    writer.append(values[cut:])
    writer.seal()
    place.publish({path.name: writer.file}, "shard")
    read, taken, order = read_back(path, array, rows)
    assert np.array_equal(read, values)
    assert np.array_equal(taken, values[order])
    assert path.read_bytes().startswith(values.tobytes())


@pytest.mark.parametrize("offset", [0, 1, 63, 64, 10_000, 2**63])
def test_an_index_that_points_outside_the_file_is_refused(tmp_path, offset):
    array = ArraySpec("x", (), "int32")
    index = np.full((4, 2), ABSENT)
    index[0] = offset, 16
    path = tmp_path / "shard"
    path.write_bytes(bytes(64) + encode_index(index))
    if offset + 16 <= 64:
        opened(path, array, 3, "c.0")
    else:
        with pytest.raises(UserError, match=r"c\.0 is damaged: its index points to chunks that are not in the file"):
            opened(path, array, 3, "c.0")


# --- what cannot be stored --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "__x", "zarr.json"])
def test_hook_names_that_cannot_name_an_array_are_refused(name):
    with pytest.raises(UserError, match="cannot name an array"):
        HookSpec(name, (3,))


def test_a_type_or_shape_that_is_not_stored_is_refused():
    with pytest.raises(UserError, match="cannot be stored as 'int8'; use bfloat16, float16, float32"):
        HookSpec("x", (3,), "int8")
    with pytest.raises(UserError, match="rows of shape"):
        HookSpec("x", ())


def test_shards_must_be_whole_chunks():
    with pytest.raises(UserError, match="A shard of 100 rows cannot be cut into chunks of 16 rows"):
        Geometry(16, 100)


def test_a_plan_that_contradicts_itself_is_refused():
    plan = small_store.plan()
    for documents, said in [
        (small_store.moved(list(plan.documents), 3, first_row=999), "should begin at row"),
        (small_store.moved(list(plan.documents), 2, split="test"), "is in split 'test'"),
        (list(plan.documents)[:-1], "the plan says 430"),
    ]:
        with pytest.raises(ValueError, match=said):
            type(plan)(plan.rows, documents).check()
