"""With verify_reads nothing is believed: what is read from a damaged file is an error that names it.

Without it, a reader of uncompressed shards trusts their rows, as comparing them with their checksums takes as long as
reading them. Compressed chunks carry zstd's own checksum and are always compared with that.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from tests.activation_store.copies import Copy
from tests.activation_store.reading import read_everything, refusal_of, same_bits
from tests.activation_store.small_store import HOOKS, ROWS, append, open_writer, stored

SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_verified(copy: Copy):
    return read_everything(open_store(copy.place, verify_reads=True))


def test_what_is_whole_is_read(copy):
    assert same_bits(read_verified(copy), read_everything(open_store(copy.place)))


@settings(SHARED, max_examples=25)
@given(data=st.data())
def test_a_bit_flipped_anywhere_is_found_by_reading(copy, data):
    key = data.draw(st.sampled_from(sorted(copy.files)))
    with copy.flipped(key, data.draw(st.integers(0, len(copy.files[key]) - 1)), data.draw(st.integers(0, 7))):
        assert copy.place.where(key) in (refusal_of(lambda: read_verified(copy)) or "nothing was found")


@settings(SHARED, max_examples=10)
@given(data=st.data())
def test_a_file_that_is_cut_or_goes_on_is_found_by_reading(copy, data):
    key = data.draw(st.sampled_from(sorted(copy.files)))
    kept = data.draw(st.integers(0, len(copy.files[key]) - 1))
    for content in (copy.files[key][:kept], copy.files[key] + bytes(1 + kept)):
        with copy.restored(key):
            copy.put(key, content)
            assert copy.place.where(key) in (refusal_of(lambda: read_verified(copy)) or "nothing was found")


def test_a_bit_flipped_in_the_metadata_of_any_array_is_found_when_the_store_is_opened(copy):
    """Each metadata file there is, though our own reader needs none of them but the manifest."""
    metadata = [key for key in copy.files if key.endswith("zarr.json")]
    assert len(metadata) > 2 * len(HOOKS) + 10
    for number, key in enumerate(metadata):
        with copy.flipped(key, number * 7 % len(copy.files[key]), number % 8):
            said = refusal_of(lambda: open_store(copy.place, verify_reads=True)) or "nothing was found"
            assert said.startswith(copy.place.where(key))


def test_a_missing_file_is_found_by_reading(copy):
    for key in ["zarr.json", *sorted(copy.files)[::4]]:
        with copy.restored(key):
            copy.remove(key)
            said = refusal_of(lambda: read_verified(copy)) or "nothing was found"
            assert copy.place.where(key) in said or (key == "zarr.json" and copy.place.location in said)


def test_only_the_damaged_shard_is_refused(copy):
    key = HOOKS[2].array.shard_key(1)
    with copy.flipped(key, 17, 3):
        store = open_store(copy.place, verify_reads=True)
        with pytest.raises(UserError, match=r"c\.1\.0 is damaged: it does not match its checksum in the manifest"):
            store.take(HOOKS[2].name, np.array([5, 200]))
        with pytest.raises(UserError, match=r"c\.1\.0 is damaged"):  # asked again, it is refused again
            store.read_rows(HOOKS[2].name, 128, 129)
        assert np.array_equal(store.read_rows(HOOKS[2].name, 0, 128), stored(HOOKS[2], 0, 128))
        assert np.array_equal(store.read_rows(HOOKS[2].name, 256, ROWS), stored(HOOKS[2], 256, ROWS))


def test_refreshing_goes_on_verifying(fast_folder):
    path = fast_folder / "store"
    with open_writer(path, UnsyncedDisk()) as writer:
        append(writer, 0, 200)
        early = open_store(path, verify_reads=True)
        append(writer, 200, ROWS)
        writer.finish()
    key = HOOKS[0].array.shard_key(2)
    content = bytearray((path / key).read_bytes())
    content[0] ^= 1
    (path / key).write_bytes(content)
    assert early.refresh().rows == ROWS
    with pytest.raises(UserError, match=r"c\.2\.0 is damaged"):
        early.refresh().read_rows(HOOKS[0].name, 0, ROWS)


# --- without verify_reads ---------------------------------------------------------------------------------------------


@settings(SHARED, max_examples=100)
@given(data=st.data())
def test_a_bit_flipped_in_a_compressed_shard_is_an_error_and_never_other_rows(zstd_copy, data):
    copy, expected = zstd_copy
    key = data.draw(st.sampled_from(sorted(key for key in copy.files if "/c." in key)))
    with copy.flipped(key, data.draw(st.integers(0, len(copy.files[key]) - 1)), data.draw(st.integers(0, 7))):
        found = {}
        said = refusal_of(lambda: found.update(read_everything(open_store(copy.place))))
        # A few bits of a frame's header say how it is decoded, not what it becomes: with them the rows are the same.
        assert copy.place.where(key) in said if said else same_bits(found, expected)


@pytest.fixture(scope="module")
def zstd_copy(small_zstd_path, tmp_path_factory):
    copy = Copy(small_zstd_path, "zstd folder", tmp_path_factory.mktemp("copies") / "copy")
    return copy, read_everything(open_store(copy.place))


def test_each_bit_of_a_compressed_chunk_matters_or_changes_nothing(zstd_copy):
    copy, _ = zstd_copy
    key = HOOKS[2].array.shard_key(3)
    expected, errors = stored(HOOKS[2], 384, ROWS), 0
    bits = 8 * (len(copy.files[key]) - 4 - 8 * 16)
    for number in range(0, bits, 101):
        with copy.flipped(key, number // 8, number % 8):
            found = []
            store = open_store(copy.place)
            said = refusal_of(lambda: found.append(store.read_rows(HOOKS[2].name, 384, ROWS)))  # noqa: B023
            errors += said is not None
            assert said is not None or np.array_equal(found[0], expected)
    assert errors > 0.95 * len(range(0, bits, 101))


def test_a_flipped_value_in_an_uncompressed_shard_is_found_by_verify_reads_alone(copied):
    """What the promise above is worth: without it this row would have been read as another."""
    key = HOOKS[2].array.shard_key(0)
    content = bytearray((copied / key).read_bytes())
    content[2] ^= 0x40
    (copied / key).write_bytes(content)
    assert not np.array_equal(open_store(copied).read_rows(HOOKS[2].name, 0, 1), stored(HOOKS[2], 0, 1))
    with pytest.raises(UserError, match=rf"{key} is damaged"):
        open_store(open_place(copied), verify_reads=True).read_rows(HOOKS[2].name, 0, 1)
