"""A store as one HDF5 file: anybody's HDF5 reader sees the rows, and the way back gives the same bytes.

Whatever happens on the way, no file and no store is left that is not whole; a damaged file is refused before anything
is made. Not checked here: that libhdf5 itself keeps what it is given.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store import hdf5
from activation_store.bfloat16 import to_float32
from activation_store.errors import UserError
from activation_store.hdf5 import from_hdf5, to_hdf5
from activation_store.ownership import Ownership
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk, assert_same_files, files_of
from activation_store.writer import StoreWriter
from tests.activation_store.object_servers import new_url, objects_of
from tests.activation_store.random_stores import random_stores
from tests.activation_store.small_store import HOOKS, ROWS, append, open_writer, values

BFLOAT16_HOOK, HEADS_HOOK, FLOAT32_HOOK = HOOKS


@pytest.fixture(scope="module")
def exported(small_path, tmp_path_factory):
    """The small store as HDF5. Not to be changed: copy it first."""
    file = tmp_path_factory.mktemp("hdf5") / "small.h5"
    to_hdf5(small_path, file)
    return file


@pytest.fixture
def file(exported, fast_folder):
    """A copy of it, to be damaged."""
    return shutil.copy(exported, fast_folder / "small.h5")


# --- there and back ---------------------------------------------------------------------------------------------------


def test_there_and_back_gives_the_same_files_byte_for_byte(exported, small_path, fast_folder):
    from_hdf5(exported, fast_folder / "again")
    assert_same_files(fast_folder / "again", small_path)
    assert open_store(fast_folder / "again").fingerprint == open_store(small_path).fingerprint


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=random_stores(), block_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_any_store_there_and_back_is_the_same(fast_folder, monkeypatch, made, block_bytes):
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", block_bytes)
    for leftover in fast_folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    store = made.write(fast_folder / "store")
    to_hdf5(store, fast_folder / "store.h5")
    from_hdf5(fast_folder / "store.h5", fast_folder / "again")
    assert_same_files(fast_folder / "again", store)


def test_any_reader_of_hdf5_sees_the_rows_under_the_names_of_the_store(exported, small):
    with h5py.File(exported) as opened:
        bits = opened[f"activations/{BFLOAT16_HOOK.name}"]
        assert bits.dtype == np.uint16 and bits.attrs["dtype"] == "bfloat16"
        assert np.array_equal(
            (bits[:].astype("uint32") << 16).view("float32"), to_float32(small.read_rows(BFLOAT16_HOOK.name, 0, ROWS))
        )
        heads = opened[f"activations/{HEADS_HOOK.name}"]
        assert heads.shape == (ROWS, 2, 3)
        assert np.array_equal(heads[:], values(HEADS_HOOK, 0, ROWS).astype(np.float16))
        assert np.array_equal(opened[f"activations/{FLOAT32_HOOK.name}"][:], values(FLOAT32_HOOK, 0, ROWS))
        assert np.array_equal(opened[f"norms/{HEADS_HOOK.name}"][:], small.norms(HEADS_HOOK.name, 0, ROWS))
        for name in ("token_ids", "positions", "documents"):
            assert np.array_equal(opened[name][:], getattr(small, name)(0, ROWS))
        of_hook = small.statistics(HEADS_HOOK.name)
        assert np.array_equal(opened[f"statistics/{HEADS_HOOK.name}/second_moment"][:], of_hook.second_moment)
        assert opened[f"statistics/{HEADS_HOOK.name}/count"][()] == ROWS
        last = small.document_table[-1]
        ends = opened["document_table/id_ends"][:]
        assert opened["document_table/ids"][ends[-2] : ends[-1]].tobytes().decode() == last.id
        assert opened["document_table"].attrs["splits"][opened["document_table/splits"][-1]] == last.split
        assert json.loads(opened.attrs["activation_store"])["fingerprint"] == small.fingerprint


def test_nothing_in_the_file_tells_when_it_was_made(exported, small_path, fast_folder):
    time.sleep(1.1)  # HDF5 counts seconds
    to_hdf5(small_path, fast_folder / "later.h5")
    assert (fast_folder / "later.h5").read_bytes() == exported.read_bytes()


def test_a_file_repacked_by_another_program_still_comes_back(exported, small_path, fast_folder):
    """As h5repack does it: every dataset written anew, in chunks and compressed."""
    with h5py.File(exported) as source, h5py.File(fast_folder / "repacked.h5", "w") as target:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                packed = {"chunks": True, "compression": "gzip"} if item.shape else {}
                target.create_dataset(name, data=item[()], **packed).attrs.update(item.attrs)

        source.visititems(copy)
        target.attrs.update(source.attrs)
    from_hdf5(fast_folder / "repacked.h5", fast_folder / "again")
    assert_same_files(fast_folder / "again", small_path)


def test_memory_is_bounded_by_blocks_and_not_by_the_store(fast_folder, monkeypatch):
    rows, d = 40_000, 64
    plan = StorePlan(rows, [DocumentRows("a", "train", 0, rows)])
    activations = np.random.default_rng(0).normal(size=(rows, d)).astype(np.float32)
    with StoreWriter(
        fast_folder / "store", plan, [HookSpec("h", (d,), "float32")], Geometry(256, 4096), {}, disk=UnsyncedDisk()
    ) as writer:
        zeros = np.zeros(rows, dtype=np.int32)
        writer.append({"h": activations}, zeros, zeros, zeros)
        writer.finish()
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 1 << 18)
    for work in (
        lambda: to_hdf5(fast_folder / "store", fast_folder / "store.h5"),
        lambda: from_hdf5(fast_folder / "store.h5", fast_folder / "again"),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < activations.nbytes / 3  # 10 MB of rows; a few blocks and the writer's own are 2


@pytest.mark.needs("s3")
def test_there_and_back_by_way_of_an_object_store(small_path, fast_folder, s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    url = new_url("small.zarr")
    to_hdf5(small_path, fast_folder / "there.h5")
    from_hdf5(fast_folder / "there.h5", url)
    assert objects_of(url, s3_server.environment()) == files_of(small_path)
    to_hdf5(url, fast_folder / "back.h5")
    assert (fast_folder / "back.h5").read_bytes() == (fast_folder / "there.h5").read_bytes()


# --- writing is all or nothing ----------------------------------------------------------------------------------------


def test_a_file_that_exists_is_not_overwritten(small_path, fast_folder):
    (fast_folder / "mine.h5").write_bytes(b"precious")
    with pytest.raises(UserError, match="mine.h5 exists already and is not overwritten; name another file"):
        to_hdf5(small_path, fast_folder / "mine.h5")
    assert (fast_folder / "mine.h5").read_bytes() == b"precious"


def test_a_file_that_comes_to_be_meanwhile_is_not_overwritten_either(small_path, fast_folder, monkeypatch):
    sync = hdf5.sync_path

    def somebody_else_is_first(path):
        sync(path)
        (fast_folder / "mine.h5").write_bytes(b"precious")

    monkeypatch.setattr(hdf5, "sync_path", somebody_else_is_first)
    with pytest.raises(UserError, match="exists already"):
        to_hdf5(small_path, fast_folder / "mine.h5")
    assert {entry.name: entry.read_bytes() for entry in fast_folder.iterdir()} == {"mine.h5": b"precious"}


def test_a_growing_store_is_not_exported(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
    with pytest.raises(UserError, match="is not complete: 256 of 430 rows are there. Run its harvest again"):
        to_hdf5(fast_folder / "store", fast_folder / "a.h5")
    assert not (fast_folder / "a.h5").exists()


def test_damage_is_found_and_not_exported(copied, fast_folder):
    """The file would have a checksum of its own, and what was copied unseen would never be found again."""
    shard = copied / "activations" / FLOAT32_HOOK.name / "c.1.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"activations/blocks.1.hook_mlp_out/c.1.0 is damaged"):
        to_hdf5(copied, fast_folder / "a.h5")
    assert [entry.name for entry in fast_folder.iterdir()] == ["copied"]


def test_no_folder_for_the_file(small_path, fast_folder):
    with pytest.raises(UserError, match="There is no folder .*nowhere to put a.h5 into"):
        to_hdf5(small_path, fast_folder / "nowhere" / "a.h5")


def test_an_interruption_leaves_nothing(small_path, fast_folder, monkeypatch):
    class Interrupting:
        def task(self, *args, **kwargs):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def advance(self, n):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_hdf5(small_path, fast_folder / "a.h5", Interrupting())
    assert list(fast_folder.iterdir()) == []


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60)


def test_killed_before_the_end_there_is_no_file_and_the_next_run_makes_it(small_path, exported, fast_folder):
    killed = run(
        "import os, sys\n"
        "from activation_store import hdf5\n"
        "hdf5._give_name = lambda *files: os.kill(os.getpid(), 9)\n"
        "hdf5.to_hdf5(sys.argv[1], sys.argv[2])\n",
        small_path,
        fast_folder / "a.h5",
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(entry.name for entry in fast_folder.iterdir()) == ["a.h5.owner", "a.h5.partial"]
    to_hdf5(small_path, fast_folder / "a.h5")
    assert [entry.name for entry in fast_folder.iterdir()] == ["a.h5"]
    from_hdf5(fast_folder / "a.h5", fast_folder / "again")
    assert_same_files(fast_folder / "again", small_path)


def test_two_at_once_are_told_apart(small_path, fast_folder):
    owner = Ownership.take(fast_folder / "a.h5.owner", store=fast_folder / "a.h5")
    with pytest.raises(UserError, match=f"a.h5 is being written by process {os.getpid()}"):
        to_hdf5(small_path, fast_folder / "a.h5")
    owner.release()


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(small_path, fast_folder, monkeypatch):
    """Found before anything is written; or, where room is lost on the way (here, by a limit on a file's size), then."""
    limited = run(
        "import resource, sys\n"
        "from activation_store import hdf5\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "hdf5.to_hdf5(sys.argv[1], sys.argv[2])\n",
        small_path,
        fast_folder / "a.h5",
    )
    assert "UserError: There is no room for" in limited.stderr and "a.h5: the disk is full" in limited.stderr
    assert list(fast_folder.iterdir()) == []
    usage = shutil.disk_usage(fast_folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 0.0 MB, and its disk has 0.0 MB free"):
        to_hdf5(small_path, fast_folder / "a.h5")


# --- files that are not what they should be ---------------------------------------------------------------------------


def refusal(file, folder):
    with pytest.raises(UserError) as refused:
        from_hdf5(file, folder / "refused")
    assert not (folder / "refused").exists()
    assert str(refused.value).count("\n") == 0
    return str(refused.value)


@pytest.mark.parametrize(
    "path",
    [
        f"activations/{BFLOAT16_HOOK.name}",
        f"activations/{HEADS_HOOK.name}",
        f"activations/{FLOAT32_HOOK.name}",
        f"norms/{HEADS_HOOK.name}",
        "token_ids",
        "positions",
        "documents",
    ],
)
def test_a_flipped_bit_is_found_before_anything_is_made(file, fast_folder, path):
    with h5py.File(file, "r+") as opened:
        bits = opened[path][:].reshape(-1).view(np.uint8)
        bits[len(bits) // 2] ^= 4
        opened[path][:] = bits.view(opened[path].dtype).reshape(opened[path].shape)
    assert f"small.h5 is damaged: the rows of {path} do not match their checksum" in refusal(file, fast_folder)


@pytest.mark.parametrize("column", ["ids", "splits", "rows", "first_rows", "id_ends"])
def test_a_changed_document_table_is_found(file, fast_folder, column):
    with h5py.File(file, "r+") as opened:
        opened[f"document_table/{column}"][3] += 1
    assert "its document table" in refusal(file, fast_folder)


@pytest.mark.parametrize("column", ["ids", "splits", "rows", "first_rows", "id_ends"])
@pytest.mark.parametrize("other", [3, np.zeros((2, 2)), np.zeros(17), "text"])
def test_a_document_table_of_another_kind_is_refused(file, fast_folder, column, other):
    with h5py.File(file, "r+") as opened:
        del opened[f"document_table/{column}"]
        opened[f"document_table/{column}"] = other
    assert "its document table" in refusal(file, fast_folder)


def test_what_is_missing_is_named(file, fast_folder):
    with h5py.File(file, "r+") as opened:
        del opened["positions"]
    assert "small.h5 is damaged: it has no dataset positions" in refusal(file, fast_folder)


def test_a_dataset_of_another_shape_or_type_is_named(file, fast_folder):
    with h5py.File(file, "r+") as opened:
        del opened["token_ids"]
        opened["token_ids"] = np.zeros(ROWS - 1, dtype=np.int32)
    assert "token_ids has shape (429,) and type int32, its manifest says (430,) and int32" in refusal(file, fast_folder)


def test_a_changed_manifest_is_found(file, fast_folder):
    with h5py.File(file, "r+") as opened:
        opened.attrs["activation_store"] = opened.attrs["activation_store"].replace("tiny", "tinu")
    assert "small.h5 is damaged: the manifest does not match its own checksum" in refusal(file, fast_folder)


def test_a_truncated_file_is_refused_at_whatever_length(exported, fast_folder):
    content = exported.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        (fast_folder / "short.h5").write_bytes(content[:length])
        words = refusal(fast_folder / "short.h5", fast_folder)
        assert "short.h5 is not an HDF5 file" in words or "short.h5 is damaged or truncated" in words


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_any_bit_flipped_is_refused_or_gives_the_same_store(exported, small_path, fast_folder, data):
    """In a process of its own, with a limit: libhdf5 may fall over its own metadata, and in rare cases never ends."""
    content = bytearray(exported.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file, again = fast_folder / "flipped.h5", fast_folder / "again"
    file.write_bytes(content)
    shutil.rmtree(again, ignore_errors=True)
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            from_hdf5(file, again)
            os._exit(0)
        except UserError:
            os._exit(2)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return
    assert os.waitstatus_to_exitcode(status) in (0, 2)
    if os.waitstatus_to_exitcode(status):
        assert not again.exists()
    else:
        assert_same_files(again, small_path)


def test_what_is_no_hdf5_file_at_all(fast_folder):
    (fast_folder / "text.h5").write_text("not this")
    assert "text.h5 is not an HDF5 file" in refusal(fast_folder / "text.h5", fast_folder)
    assert "There is no file" in refusal(fast_folder / "none.h5", fast_folder)
    (fast_folder / "folder.h5").mkdir()
    assert "is a folder, not an HDF5 file" in refusal(fast_folder / "folder.h5", fast_folder)


def test_somebody_elses_file_is_pointed_at_the_other_way_in(fast_folder):
    with h5py.File(fast_folder / "theirs.h5", "w") as opened:
        opened["x"] = np.zeros((3, 2))
    assert "name it with --dataset and its hook with --hook" in refusal(fast_folder / "theirs.h5", fast_folder)


# --- an import that was interrupted -----------------------------------------------------------------------------------


def test_an_interrupted_import_goes_on_at_the_first_row_not_committed(exported, small_path, fast_folder, monkeypatch):
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 50 * 60)
    append, started_at = StoreWriter.append, []

    def interrupted(writer, *columns, **named):
        started_at.append(writer.next_row)
        if writer.next_row > 300 and started_at[0] == 0:
            raise KeyboardInterrupt
        append(writer, *columns, **named)

    monkeypatch.setattr(StoreWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_hdf5(exported, fast_folder / "again")
    assert open_store(fast_folder / "again").rows == 256
    started_at.clear()
    from_hdf5(exported, fast_folder / "again")
    assert started_at[0] == 256
    assert_same_files(fast_folder / "again", small_path)


def test_a_store_that_is_there_already_is_left_as_it_is(exported, copied, small_path):
    from_hdf5(exported, copied)
    assert_same_files(copied, small_path)


def test_another_store_of_that_name_is_not_touched(exported, fast_folder):
    with open_writer(fast_folder / "other", UnsyncedDisk(), provenance={"model": {"name": "another"}}) as writer:
        append(writer, 0, 300)
    with pytest.raises(UserError, match="was made otherwise"):
        from_hdf5(exported, fast_folder / "other")
    assert open_store(fast_folder / "other").rows == 256
