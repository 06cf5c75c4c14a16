"""What is damaged is found by `verify` and named; reading a damaged store is refused, by the name of the file.

Reading does not compare the shards' contents with their checksums unless asked to: see test_verify_reads.py.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from activation_store.local_folder import LocalFolder
from activation_store.spec import arrays_of
from activation_store.store import open_store
from activation_store.verify import Damage, verify
from tests.activation_store.reading import read_everything, refusal_of
from tests.activation_store.small_store import HOOKS, ROWS, append, open_writer


def flip(file, place, bit):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_an_undamaged_store_is_found_to_be_so(small_path):
    assert verify(small_path) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_is_named(copy, data):
    key = data.draw(st.sampled_from(sorted(copy.files)))
    place, bit = data.draw(st.integers(0, len(copy.files[key]) - 1)), data.draw(st.integers(0, 7))
    with copy.flipped(key, place, bit):
        assert [damage.part for damage in verify(copy.place)] == [key]
        assert key in (refusal_of(lambda: read_everything(open_store(copy.place))) or key)
    assert verify(copy.place) == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_is_found_and_a_reader_is_told_its_name(copy, data):
    key = data.draw(st.sampled_from(sorted(copy.files)))
    kept = data.draw(st.integers(0, len(copy.files[key]) - 1))
    with copy.restored(key):
        copy.put(key, copy.files[key][:kept])
        assert [damage.part for damage in verify(copy.place)] == [key]
        if not key.endswith("zarr.json"):  # the arrays' own metadata is for other readers: ours does not use it
            with pytest.raises(UserError, match=f"{key}.* damaged"):
                read_everything(open_store(copy.place))


def test_each_shard_of_each_kind_of_array_is_checked(copy):
    """Norms among them: sampling above could pass without ever having drawn one."""
    for array in arrays_of(HOOKS):
        for shard in range(4):
            with copy.flipped(array.shard_key(shard), 3, 1):
                assert [damage.part for damage in verify(copy.place)] == [array.shard_key(shard)]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"attributes": 3}', b"\xff\xfe", b"nan"]
)
def test_a_manifest_that_is_not_one_is_refused_by_name(copied, content):
    (copied / "zarr.json").write_bytes(content)
    with pytest.raises(UserError, match=r"copied/zarr\.json (is damaged|belongs to a Zarr group that is not)"):
        open_store(copied)
    assert verify(copied)[0].part == "zarr.json"


def test_a_changed_row_count_is_not_believed(copied):
    manifest = json.loads((copied / "zarr.json").read_text())
    manifest["attributes"]["activation_store"]["rows"] = 400
    (copied / "zarr.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not match its own checksum"):
        open_store(copied)


def test_a_missing_shard_is_named_with_its_rows(copied):
    key = HOOKS[1].array.shard_key(1)
    (copied / key).unlink()
    assert verify(copied) == [Damage(key, f"is missing (rows 128 to 255 of activations/{HOOKS[1].name})")]
    with pytest.raises(UserError, match=f"{key} is missing, though the manifest counts its rows"):
        open_store(copied).read_rows(HOOKS[1].name, 0, ROWS)
    open_store(copied).read_rows(HOOKS[1].name, 0, 128)


def test_an_index_that_names_other_chunks_is_not_believed(copied):
    """Two offsets swapped: every chunk is in the file, and only the crc32c tells."""
    key = HOOKS[0].array.shard_key(0)
    content = (copied / key).read_bytes()
    first, second = len(content) - 4 - 8 * 16, len(content) - 4 - 7 * 16
    swapped = content[:first] + content[second : second + 16] + content[first : first + 16] + content[second + 16 :]
    (copied / key).write_bytes(swapped)
    with pytest.raises(UserError, match=f"{key} is damaged: the index at its end does not match its crc32c"):
        open_store(copied).read_rows(HOOKS[0].name, 0, 1)


def test_shards_that_were_swapped_are_found(copied):
    first, second = (copied / HOOKS[0].array.shard_key(i) for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert [damage.part for damage in verify(copied)] == [HOOKS[0].array.shard_key(i) for i in (0, 1)]


def test_a_file_that_does_not_belong_is_named(copied):
    (copied / "notes.txt").write_text("x")
    assert verify(copied) == [Damage("notes.txt", "does not belong to the store")]


def test_an_unfinished_store_is_checked_as_far_as_it_goes(fast_folder):
    path = fast_folder / "store"
    with open_writer(path) as writer:
        append(writer, 0, 300)
        assert verify(path) == []
    assert verify(path) == []
    flip(path / HOOKS[2].array.shard_key(1), 5, 0)
    assert [str(damage) for damage in verify(path)] == [
        f"{HOOKS[2].array.shard_key(1)}: does not match its checksum in the manifest "
        f"(rows 128 to 255 of activations/{HOOKS[2].name})"
    ]


def test_verifying_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no activation store at .*: nothing to verify"):
        verify(tmp_path)


def test_a_place_that_cannot_be_listed_is_one_sentence(copied, monkeypatch):
    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFolder, "sizes", forbidden)
    with pytest.raises(UserError, match=f"{copied} cannot be read: Permission denied"):
        verify(copied)


def test_progress_counts_every_byte_that_is_checked(small_path):
    class Listener:
        done = 0.0

        def task(self, title, total=None, unit=""):
            self.total = total
            return self

        def advance(self, n=1, **shown):
            self.done += n

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    listener = Listener()
    verify(small_path, listener)
    assert listener.done == listener.total > 10_000


# --- a writer that goes on from what is damaged -----------------------------------------------------------------------


def test_sums_are_not_computed_again_from_a_damaged_shard(fast_folder):
    """It would end in the statistics of a store that is otherwise whole, and nothing could ever find it."""
    path = fast_folder / "store"
    with open_writer(path) as writer:
        append(writer, 0, 300)
    (path / ".staging" / "sums-2").unlink()
    key = HOOKS[2].array.shard_key(1)
    flip(path / key, 2, 6)
    with pytest.raises(UserError, match=f"{key} is damaged: it does not match its checksum in the manifest"):
        open_writer(path)


def test_a_store_is_not_completed_over_damaged_norms(fast_folder):
    path = fast_folder / "store"
    with open_writer(path) as writer:
        append(writer, 0, ROWS)
        flip(path / HOOKS[1].norms.shard_key(3), 3, 6)
        with pytest.raises(UserError, match=rf"{HOOKS[1].norms.shard_key(3)} is damaged"):
            writer.finish()
    assert not open_store(path).complete
