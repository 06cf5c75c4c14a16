"""Shards with any index and any content, the index's crc32c being right: the rows that zarr-python reads, or an error.

A valid crc32c is no proof that the numbers before it make sense: they may point out of the file, into each other or to
chunks of another size. What our readers accept is compared with what zarr-python's own reader makes of the same file.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.bfloat16 import register
from activation_store.shard import ABSENT, encode_index
from activation_store.spec import checksum
from activation_store.store import open_store
from tests.activation_store.copies import Copy
from tests.activation_store.reading import refusal_of
from tests.activation_store.small_store import GEOMETRY, HOOKS, ROWS
from tests.activation_store.test_fuzz_manifest import body_of, write

register()
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INDEX_BYTES = 16 * GEOMETRY.chunks_per_shard + 4
ROWS_OF_SHARD = [128, 128, 128, ROWS - 384]


@pytest.fixture(scope="module", params=["folder", "zstd folder"])
def shards(request, small_path, small_zstd_path, tmp_path_factory):
    source = small_zstd_path if request.param.startswith("zstd") else small_path
    return Copy(source, request.param, tmp_path_factory.mktemp("copies") / "copy")


def read_as_zarr_does_or_refused(copy, hook, shard):
    """Read the rows of one shard by every way there is."""
    start = 128 * shard
    stop = start + ROWS_OF_SHARD[shard]
    found = {}

    def read():
        store = open_store(copy.place)
        found["range"] = store.read_rows(hook.name, start, stop)
        found["rows"] = store.take(hook.name, np.arange(stop - 1, start - 1, -1))[::-1]

    said = refusal_of(read)
    if said is not None:
        assert copy.place.where(hook.array.shard_key(shard)) in said
        return said
    expected = zarr.open_array(copy.place.root / "activations" / hook.name, mode="r")[start:stop]
    assert found["range"].tobytes() == found["rows"].tobytes() == expected.tobytes()
    return None


OFFSETS = st.one_of(
    st.integers(0, 40_000),
    st.sampled_from([0, 1, 256, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 257, 2**64 - 2, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)


@settings(SHARED, max_examples=60)
@given(data=st.data(), hook=st.sampled_from(HOOKS), shard=st.integers(0, 3))
def test_any_index_with_a_valid_crc_is_read_as_zarr_reads_it_or_refused(shards, data, hook, shard):
    key = hook.array.shard_key(shard)
    content = shards.files[key]
    index = np.frombuffer(content[-INDEX_BYTES:-4], dtype="<u8").reshape(-1, 2).copy()
    lengths = st.one_of(st.sampled_from(index[:, 1].tolist()), OFFSETS)
    for _ in range(data.draw(st.integers(1, 4))):
        chunk = data.draw(st.integers(0, len(index) - 1))
        what = data.draw(st.sampled_from(["offset", "length", "both", "absent", "exchange"]))
        if what in ("offset", "both"):
            index[chunk, 0] = data.draw(OFFSETS)
        if what in ("length", "both"):
            index[chunk, 1] = data.draw(lengths)
        if what == "absent":
            index[chunk] = ABSENT
        if what == "exchange":
            other = data.draw(st.integers(0, len(index) - 1))
            index[[chunk, other]] = index[[other, chunk]]
    with shards.restored(key):
        shards.put(key, content[:-INDEX_BYTES] + encode_index(index))
        read_as_zarr_does_or_refused(shards, hook, shard)


@settings(SHARED, max_examples=40)
@given(data=st.data(), hook=st.sampled_from(HOOKS), shard=st.integers(0, 3))
def test_chunks_put_elsewhere_in_the_file_are_found(shards, data, hook, shard):
    """Valid, only other: chunks in any order, with gaps, shared by two places, left out, rubbish before and after."""
    key = hook.array.shard_key(shard)
    content = shards.files[key]
    index = np.frombuffer(content[-INDEX_BYTES:-4], dtype="<u8").reshape(-1, 2)
    moved, payload = np.full_like(index, ABSENT), b""
    for chunk in data.draw(st.permutations(range(len(index)))):
        source = data.draw(st.sampled_from([chunk, chunk, int(np.argmax(index[:, 1] != ABSENT))]))
        if index[source, 1] == ABSENT or data.draw(st.integers(0, 5)) == 0:
            continue
        payload += data.draw(st.binary(max_size=9))
        moved[chunk] = len(payload), index[source, 1]
        payload += content[int(index[source, 0]) : int(index[source, 0] + index[source, 1])]
    payload += data.draw(st.binary(max_size=9))
    with shards.restored(key):
        shards.put(key, payload + encode_index(moved))
        assert read_as_zarr_does_or_refused(shards, hook, shard) is None


@pytest.mark.parametrize("shards", ["zstd folder"], indirect=True)
@settings(SHARED, max_examples=60)
@given(data=st.data(), hook=st.sampled_from(HOOKS), shard=st.integers(0, 3))
def test_any_bytes_in_the_place_of_a_compressed_chunk_are_read_as_zarr_reads_them_or_refused(shards, data, hook, shard):
    key = hook.array.shard_key(shard)
    content = bytearray(shards.files[key])
    index = np.frombuffer(bytes(content[-INDEX_BYTES:-4]), dtype="<u8").reshape(-1, 2).copy()
    start, length = index[0].tolist()
    magic = bytes.fromhex("28b52ffd")
    rubbish = st.one_of(
        st.binary(min_size=1, max_size=length),
        st.binary(max_size=40).map(lambda rest: magic + rest),  # a frame that might say that it becomes an exabyte
        st.integers(0, length - 1).map(lambda cut: bytes(content[start : start + max(1, cut)])),
        st.just(bytes(content[start : start + length]) * 2),  # two frames: twice as many bytes as a chunk
    )
    replaced = data.draw(rubbish)
    index[0] = len(content) - INDEX_BYTES, len(replaced)
    with shards.restored(key):
        shards.put(key, bytes(content[:-INDEX_BYTES]) + replaced + encode_index(index))
        read_as_zarr_does_or_refused(shards, hook, shard)


@settings(SHARED, max_examples=40)
@given(data=st.data(), hook=st.sampled_from(HOOKS), shard=st.integers(0, 3))
def test_cut_or_overwritten_shards_are_read_as_zarr_reads_them_or_refused(shards, data, hook, shard):
    key = hook.array.shard_key(shard)
    content = bytearray(shards.files[key])
    where = data.draw(st.integers(0, len(content)))
    what = data.draw(st.sampled_from(["cut", "cut before", "insert", "overwrite", "repeat"]))
    with shards.restored(key):
        changed = {
            "cut": content[:where],
            "cut before": content[where:],
            "insert": content[:where] + data.draw(st.binary(max_size=30)) + content[where:],
            "overwrite": content[:where] + data.draw(st.binary(max_size=30)) + content[where + 30 :],
            "repeat": content + content,
        }[what]
        shards.put(key, bytes(changed))
        read_as_zarr_does_or_refused(shards, hook, shard)


# --- the document table and the statistics, with checksums that are right ---------------------------------------------


COLUMNS = st.lists(
    st.one_of(st.integers(-3, 500), st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1])), min_size=1, max_size=40
)


@settings(SHARED, max_examples=60)
@given(values=COLUMNS, column=st.sampled_from(["id_ends", "first_rows", "rows", "splits", "ids"]), keep=st.booleans())
def test_a_document_table_that_cannot_be_right_is_refused(shards, values, column, keep):
    """Written with a valid checksum. What it says must fill the store's rows, document after document."""
    key = f"document_table/{column}/c.0"
    dtype = "u1" if column in ("ids", "splits") else "<i8"
    was = np.frombuffer(shards.files[key], dtype=dtype)
    with np.errstate(over="ignore"):
        new = np.array(values, dtype=object).astype(np.int64).astype(dtype)
    if keep:  # as many values as before
        new = np.resize(new, len(was))
    body = body_of(shards.place.root)
    with shards.restored("zarr.json"), shards.restored(key):
        shards.put(key, new.tobytes())
        write(shards.place.root, body | {"files": body["files"] | {key: checksum(new.tobytes())}})
        store = open_store(shards.place)
        found = []
        said = refusal_of(lambda: found.extend(store.document_table))
        split = refusal_of(lambda: store.split_ranges("train"))
        text = refusal_of(lambda: store.text_around(ROWS - 1, 3, 3))
        for sentence in (said, split, text):
            assert sentence is None or str(shards.place.where("document_table")) in sentence
        if said is None:
            rows = [entry.rows for entry in found]
            assert min(rows) >= 0 and sum(rows) == ROWS and len(found) == body["plan"]["documents"]
            assert [entry.first_row for entry in found] == (np.cumsum(rows) - rows).tolist()


def test_a_row_that_is_said_to_be_of_no_document_is_refused(copied):
    """A flipped bit in an uncompressed shard: without verify_reads only what it leads to can tell."""
    key = "documents/c.2"
    content = np.frombuffer((copied / key).read_bytes(), dtype=np.uint8).copy()
    for document in (2**31 - 1, -1, 0, 99):
        content[: 4 * 128].view("<i4")[:] = document
        (copied / key).write_bytes(content.tobytes())
        said = refusal_of(lambda: open_store(copied).text_around(300, 5, 5))
        assert said == f"{copied}/documents is damaged: it says that row 300 is of document {document}."


@pytest.mark.parametrize("part", ["mean", "second_moment", "count"])
def test_statistics_of_another_width_are_refused(shards, part):
    hook = HOOKS[0]
    n_axes = {"mean": 1, "second_moment": 2, "count": 0}[part]
    key = f"statistics/{hook.name}/{part}/c" + ".0" * n_axes
    body = body_of(shards.place.root)
    content = shards.files[key] + bytes(8)
    with shards.restored("zarr.json"), shards.restored(key):
        shards.put(key, content)
        write(shards.place.root, body | {"files": body["files"] | {key: checksum(content)}})
        said = refusal_of(lambda: open_store(shards.place).statistics(hook.name))
        assert said is not None and f"{key} is damaged: it has {len(content)} bytes where {len(content) - 8}" in said


def test_the_metadata_of_an_array_may_say_anything(shards):
    """Our reader takes nothing from it, so no lie of it leads anywhere; other readers and `verify` do look."""
    hook = HOOKS[1]
    key = hook.array.metadata_key
    metadata = json.loads(shards.files[key])
    before = open_store(shards.place).read_rows(hook.name, 0, ROWS)
    for changed in ({"shape": [2**60, 2, 3]}, {"data_type": "float64"}, {"codecs": []}, {"zarr_format": 2}):
        with shards.restored(key):
            shards.put(key, json.dumps(metadata | changed).encode())
            assert open_store(shards.place).read_rows(hook.name, 0, ROWS).tobytes() == before.tobytes()
