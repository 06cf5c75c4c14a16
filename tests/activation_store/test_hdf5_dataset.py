"""Activations in somebody else's HDF5 file become a store: the same values, and nothing invented about them."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store import hdf5_dataset
from activation_store.bfloat16 import from_float32, to_float32
from activation_store.errors import UserError
from activation_store.hdf5_dataset import import_dataset
from activation_store.spec import UNKNOWN, Geometry
from activation_store.store import open_store
from activation_store.testing import assert_same_files
from activation_store.verify import verify
from activation_store.writer import StoreWriter
from tests.activation_store.random_stores import finite

GEOMETRY = Geometry(16, 64)
ROWS = 200


@pytest.fixture
def theirs(fast_folder):
    """Writes datasets to theirs.h5: name -> array, or (array, attributes)."""

    def write(**datasets):
        with h5py.File(fast_folder / "theirs.h5", "w") as opened:
            for name, content in datasets.items():
                values, attributes = content if isinstance(content, tuple) else (content, {})
                opened.create_dataset(name, data=values).attrs.update(attributes)
        return fast_folder / "theirs.h5"

    return write


def imported(file, name="store", dataset="x", **options):
    location = file.parent / name
    import_dataset(file, dataset, "blocks.3.hook_resid_post", location, geometry=GEOMETRY, **options)
    return open_store(location)


def rows_of(store):
    return store.read_rows("blocks.3.hook_resid_post", 0, store.rows)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    rows=st.integers(1, 300),
    d=st.integers(1, 9),
    packed=st.booleans(),
    swapped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_values_of_a_type_that_a_store_has_keep_every_bit(theirs, monkeypatch, dtype, rows, d, packed, swapped, seed):
    monkeypatch.setattr(hdf5_dataset, "BLOCK_BYTES", 500)
    values = finite(np.random.default_rng(seed), (rows, d), dtype)
    file = theirs()
    with h5py.File(file, "w") as opened:
        there = values.astype(values.dtype.newbyteorder(">")) if swapped else values
        options = {"chunks": (min(rows, 7), d), "compression": "gzip"} if packed else {}
        said = np.bytes_(dtype) if swapped else dtype  # as C programs write text, or as Python does
        opened.create_dataset("deep/down/x", data=there, **options).attrs["dtype"] = said
    store = imported(file, name=f"store-{dtype}-{rows}-{d}-{packed}-{swapped}-{seed}", dataset="deep/down/x")
    found = rows_of(store)
    assert store.hook("blocks.3.hook_resid_post").dtype == dtype
    assert found.dtype == values.dtype and found.tobytes() == values.tobytes()
    assert verify(store.location) == []


def test_what_the_file_does_not_tell_is_unknown_and_not_invented(theirs):
    store = imported(theirs(x=np.ones((ROWS, 4), np.float32)))
    assert set(store.token_ids(0, ROWS)) == set(store.positions(0, ROWS)) == {UNKNOWN}
    assert [(d.id, d.split, d.rows) for d in store.document_table] == [
        ("theirs.h5:x (training rows)", "train", 180),
        ("theirs.h5:x (held-out rows)", "held-out", 20),
    ]
    assert np.array_equal(store.documents(0, ROWS), np.arange(ROWS) >= 180)
    assert store.provenance["model"] == {"name": "(unknown)", "fingerprint": None}
    assert store.provenance["imported"]["file"] == "theirs.h5" and store.provenance["imported"]["dataset"] == "x"


def test_a_model_that_is_named_is_recorded(theirs):
    model = {"name": "gpt2", "fingerprint": "sha256:00"}
    assert imported(theirs(x=np.ones((20, 4), np.float32)), model=model).provenance["model"] == model


def test_few_rows_are_all_for_training(theirs):
    assert imported(theirs(x=np.ones((9, 4), np.float32))).split_rows("held-out") == []


def test_float64_is_rounded_only_when_asked(theirs):
    values = np.random.default_rng(0).normal(size=(50, 4))
    file = theirs(x=values)
    with pytest.raises(UserError, match=r"x in .*theirs.h5 holds float64, .* --dtype bfloat16, float16 or float32"):
        imported(file)
    assert np.array_equal(rows_of(imported(file, dtype="float32")), values.astype(np.float32))
    assert np.array_equal(rows_of(imported(file, "store16", dtype="float16")), values.astype(np.float16))
    bits = rows_of(imported(file, "storeb", dtype="bfloat16"))
    assert np.array_equal(bits, from_float32(values.astype(np.float32)))


def test_another_type_can_be_asked_for(theirs):
    bits = from_float32(np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    file = theirs(x=(bits, {"dtype": "bfloat16"}))
    assert np.array_equal(rows_of(imported(file, dtype="float32")), to_float32(bits))


def test_compressed_on_request(theirs):
    store = imported(theirs(x=np.ones((ROWS, 4), np.float32)), compression="zstd")
    assert store.manifest.compression == "zstd" and (rows_of(store) == 1).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(file, **options):
    with pytest.raises(UserError) as refused:
        imported(file, **options)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    return str(refused.value)


def with_value(value, dtype):
    values = np.ones((ROWS, 4), dtype)
    values[150, 2] = value
    return values


def test_the_first_value_that_is_not_finite_is_named_and_nothing_is_made(theirs, monkeypatch):
    monkeypatch.setattr(hdf5_dataset, "BLOCK_BYTES", 500)
    words = refusal(theirs(x=with_value(np.nan, np.float32)))
    assert "Row 150 of blocks.3.hook_resid_post in theirs.h5 holds nan; a store takes finite numbers only" in words
    assert "holds -inf" in refusal(theirs(x=(from_float32(with_value(-np.inf, np.float32)), {"dtype": "bfloat16"})))


def test_a_value_too_large_for_the_type_asked_for_is_named(theirs):
    words = refusal(theirs(x=with_value(70000, np.float32)), dtype="float16")
    assert (
        "Row 150" in words
        and "holds 70000, too large for float16: ask for --dtype bfloat16 or --dtype float32" in words
    )
    assert "holds 1e+39, too large for float32. Nothing" in refusal(theirs(x=with_value(1e39, float)), dtype="float32")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones(8, np.float32), "has shape (8,); activations have two axes, (rows, d)"),
        (np.ones((2, 3, 4), np.float32), "has shape (2, 3, 4); activations have two axes"),
        (np.ones((0, 4), np.float32), "has shape (0, 4)"),
        (np.ones((8, 4), np.int64), "holds int64; activations are bfloat16, float16, float32 or float64"),
        (np.ones((8, 4), np.uint16), """say so in the file: f["x"].attrs["dtype"] = "bfloat16"."""),
        (np.full((8, 4), b"ab"), "holds bytes16; activations are"),
    ],
)
def test_what_is_not_rows_of_floats_is_refused(theirs, values, words):
    assert words in refusal(theirs(x=values))


def test_a_dataset_that_is_not_there_is_answered_with_those_that_are(theirs):
    file = theirs(**{f"group/{i}": np.ones((2, 2)) for i in range(7)})
    assert "has no dataset y; it has group/0, group/1, group/2, group/3, group/4, ..." in refusal(file, dataset="y")
    assert "has no dataset group; it has" in refusal(file, dataset="group")
    assert "has no dataset x; it has none." in refusal(theirs())


def test_an_unknown_type_on_disk_is_refused(theirs):
    assert "cannot be stored as 'int8'; use bfloat16" in refusal(theirs(x=np.ones((8, 4), np.float32)), dtype="int8")


def test_a_damaged_chunk_is_found_before_anything_is_made(theirs):
    file = theirs()
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    with h5py.File(file, "w") as opened:
        chunk = opened.create_dataset("x", data=values, chunks=(50, 4), fletcher32=True).id.get_chunk_info(2)
    content = bytearray(file.read_bytes())
    content[chunk.byte_offset + 10] ^= 1
    file.write_bytes(content)
    words = refusal(file)
    assert "theirs.h5 is damaged or truncated: x, rows 0 to 199, cannot be read. HDF5 says:" in words


# --- interrupted ------------------------------------------------------------------------------------------------------


def interrupt_after(monkeypatch, rows):
    append = StoreWriter.append

    def interrupted(writer, *columns, **named):
        if writer.next_row >= rows:
            raise KeyboardInterrupt
        append(writer, *columns, **named)

    monkeypatch.setattr(StoreWriter, "append", interrupted)


def test_an_interrupted_import_continues_where_it_was(theirs, monkeypatch):
    monkeypatch.setattr(hdf5_dataset, "BLOCK_BYTES", 500)
    file = theirs(x=np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32))
    imported(file, "undisturbed")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 150)
        with pytest.raises(KeyboardInterrupt):
            imported(file)
    assert open_store(file.parent / "store").rows == 128
    imported(file)
    assert_same_files(file.parent / "store", file.parent / "undisturbed")


def test_an_import_is_not_continued_from_a_file_that_has_changed(theirs, monkeypatch):
    values = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    with monkeypatch.context() as patched:
        patched.setattr(hdf5_dataset, "BLOCK_BYTES", 500)
        interrupt_after(patched, 150)
        with pytest.raises(KeyboardInterrupt):
            imported(theirs(x=values))
    values[0, 0] += 1
    with pytest.raises(UserError, match=r"was made otherwise: .*fingerprint"):
        imported(theirs(x=values))
