"""What a writer promises while nothing kills it: see test_kills.py for the rest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.disk import Disk
from activation_store.errors import UserError
from activation_store.spec import Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import FullDisk, UnsyncedDisk, assert_same_files, files_of
from tests.activation_store.small_store import (
    BATCH_ROWS,
    HOOKS,
    PROVENANCE,
    ROWS,
    append,
    make,
    moved,
    open_writer,
    plan,
    stored,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, ROWS - 1), max_size=8))
def test_how_rows_are_cut_into_batches_changes_no_byte(fast_folder, small_path, cuts):
    path = fast_folder / f"cut at {'-'.join(map(str, cuts))}"
    shutil.rmtree(path, ignore_errors=True)
    with open_writer(path, UnsyncedDisk()) as writer:
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), ROWS], strict=True):
            append(writer, start, stop)
        writer.finish()
    assert_same_files(path, small_path)


def test_nothing_in_a_store_tells_when_or_where_it_was_made(fast_folder, small_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 12345.0)
    monkeypatch.setenv("RANK", "3")
    make(fast_folder / "elsewhere" / "under another name", UnsyncedDisk())
    assert_same_files(fast_folder / "elsewhere" / "under another name", small_path)
    everything = b"".join(file for key, file in files_of(small_path).items() if key.endswith("zarr.json"))
    assert str(small_path).encode() not in everything
    assert not re.search(rb"\b" + re.escape(os.uname().nodename.encode()) + rb"\b", everything)


def test_a_writer_left_early_keeps_its_commits_and_goes_on_from_there(fast_folder, small_path):
    with open_writer(fast_folder / "store") as writer:
        append(writer, 0, 300)
        assert writer.committed_rows == 256 and writer.next_row == 300
    assert open_store(fast_folder / "store").rows == 256
    assert not (fast_folder / "store" / ".owner").exists()
    with open_writer(fast_folder / "store") as writer:
        assert writer.next_row == 256
        append(writer, 222, ROWS)  # a whole batch: its first rows are there already and are dropped
        writer.finish()
    assert_same_files(fast_folder / "store", small_path)


def test_lost_running_sums_are_computed_again_from_the_shards(fast_folder, small_path):
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-3])):
        path = fast_folder / str(id(damage))
        with open_writer(path) as writer:
            append(writer, 0, 300)
        damage(path / ".staging" / "sums-2")
        make(path)
        assert_same_files(path, small_path)


def test_finishing_or_making_again_changes_nothing(copied, small_path):
    assert make(copied) == 0
    assert_same_files(copied, small_path)


def test_leftovers_of_a_dead_writer_are_swept(copied, small_path):
    (copied / ".staging").mkdir()
    (copied / ".staging" / "shard-0").write_bytes(b"half a shard")
    (copied / ".owner").write_text("999999\n")
    make(copied)
    assert_same_files(copied, small_path)


def test_temporary_files_are_swept_when_the_store_is_opened_again(fast_folder):
    with open_writer(fast_folder / "store") as writer:
        append(writer, 0, 300)
    (fast_folder / "store" / ".staging" / "shard-7").write_bytes(b"half a shard")
    with open_writer(fast_folder / "store"):
        left = {file.name for file in (fast_folder / "store" / ".staging").iterdir()}
        assert left == {"sums-2"}


def test_metadata_lost_in_a_power_cut_is_written_again(fast_folder, small_path):
    with open_writer(fast_folder / "store") as writer:
        append(writer, 0, 300)
    (fast_folder / "store" / "positions" / "zarr.json").write_bytes(b"")
    (fast_folder / "store" / "document_table" / "ids" / "c.0").unlink()
    make(fast_folder / "store")
    assert_same_files(fast_folder / "store", small_path)


def test_a_plain_zarr_reader_never_sees_rows_that_are_not_there(fast_folder):
    """Looked at before every operation of the writer: at most one commit ahead of the manifest, and no fill values."""
    import zarr

    path, seen = fast_folder / "store", []

    class Watching(UnsyncedDisk):
        def reach(self, point: str) -> None:
            if point.startswith(("metadata", "manifest")) and (path / "zarr.json").exists():
                tokens = zarr.open_array(path / "token_ids", mode="r")[:]
                assert np.array_equal(tokens, np.arange(len(tokens)) * 7 % 1000)
                seen.append((len(tokens), open_store(path).rows))

    make(path, Watching())
    assert {there - committed for there, committed in seen} == {0, 128, ROWS - 3 * 128}


# --- rows that do not fit ---------------------------------------------------------------------------------------------


@pytest.fixture
def writer(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        yield writer


def rows(start, stop, **changed):
    return {hook.name: stored(hook, start, stop) for hook in HOOKS} | changed


def columns(start, stop):
    documents = np.repeat(np.arange(len(plan().documents)), [document.rows for document in plan().documents])
    return np.arange(start, stop), np.arange(start, stop), documents[start:stop]


def test_a_gap_is_refused(writer):
    with pytest.raises(ValueError, match="rows from 5 on leave a gap: the next row is 0"):
        writer.append(rows(5, 10), *columns(5, 10), first_row=5)


def test_rows_of_another_document_are_refused(writer):
    tokens, positions, documents = columns(0, 200)
    documents[150] += 1
    with pytest.raises(ValueError, match=f"row 150 is said to come from document {documents[150]}, in the plan"):
        writer.append(rows(0, 200), tokens, positions, documents)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"extra": np.zeros((9, 2))}, "the store's hooks are"),
        ({HOOKS[0].name: np.zeros((9, 8), dtype=np.float32)}, "expected .*uint16 .bfloat16"),
        ({HOOKS[2].name: np.zeros((9, 5), dtype=np.float32)}, r"rows of shape \(9, 5\)"),
        ({HOOKS[2].name: np.zeros((8, 4), dtype=np.float32)}, r"rows of shape \(8, 4\)"),
    ],
)
def test_rows_of_another_hook_type_or_shape_are_refused(writer, changed, said):
    with pytest.raises(ValueError, match=said):
        writer.append(rows(0, 9, **changed), *columns(0, 9))


def test_more_or_fewer_rows_than_planned_are_refused(writer):
    append(writer, 0, ROWS)
    with pytest.raises(ValueError, match="beyond the 430 rows of the plan"):
        writer.append(rows(ROWS, ROWS + 1), [0], [0], [0])
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(rows(0, 9), *columns(0, 9))


def test_finishing_too_early_is_refused(writer):
    append(writer, 0, 100)
    with pytest.raises(ValueError, match="the plan has 430 rows, 100 were appended"):
        writer.finish()


def test_a_row_that_is_not_finite_is_named_and_not_committed(fast_folder):
    broken = stored(HOOKS[1], 0, 256)
    broken[140, 1, 2] = np.inf
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        said = r"Row 140 of hook blocks\.0\.attn\.hook_z is not a finite number in float16"
        with pytest.raises(UserError, match=said):  # when its shard is committed, at the latest
            writer.append(rows(0, 256, **{HOOKS[1].name: broken}), *columns(0, 256))
        with pytest.raises(ValueError, match="interrupted"):
            append(writer, 256, 257)
    assert open_store(fast_folder / "store").rows == 128


# --- another store at the same place ----------------------------------------------------------------------------------

OTHER_HOOKS = [*HOOKS[:2], HookSpec("blocks.1.hook_mlp_out", (4,), "float16")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hooks": HOOKS[:2]}, r"hook blocks\.1\.hook_mlp_out is \"float32 \[4\]\" there and absent now"),
        ({"hooks": OTHER_HOOKS}, r'is "float32 \[4\]" there and "float16 \[4\]" now'),
        ({"geometry": Geometry(32, 128)}, "geometry.rows_per_chunk is 16 there and 32 now"),
        (
            {"provenance": PROVENANCE | {"model": {"name": "gpt2"}}},
            r'provenance\.model\.name is "tiny" there and "gpt2" now',
        ),
        ({"plan": replace(plan(), batches={"seed": 4, "context": 50})}, r"plan\.batches\.seed is 3 there and 4 now"),
        ({"plan": plan(ROWS - 1)}, r"plan\.rows is 430 there and 429 now"),
        (
            {"plan": StorePlan(ROWS, moved(list(plan().documents), 0, id="other"), plan().excluded, plan().batches)},
            r"plan\.documents_checksum is",
        ),
    ],
)
def test_a_store_made_otherwise_is_refused_and_what_differs_is_named(copied, small_path, changed, said):
    with pytest.raises(UserError, match=rf"was made otherwise: .*{said}"):
        open_writer(copied, **changed)
    assert_same_files(copied, small_path)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty and is not an activation store \(it holds thesis.tex\)"):
        open_writer(tmp_path)
    assert files_of(tmp_path) == {"thesis.tex": b"precious"}
    with pytest.raises(UserError, match="is a file; name a folder"):
        open_writer(tmp_path / "thesis.tex")


def test_a_store_of_another_format_version_is_refused(copied):
    manifest = copied / "zarr.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 3', '"format_version": 1'))
    with pytest.raises(UserError, match="is of format version 1; this program reads version 3"):
        open_writer(copied)


# --- two writers ------------------------------------------------------------------------------------------------------


def test_a_second_live_process_is_refused_by_the_pid_of_the_first(fast_folder, small_path):
    with open_writer(fast_folder / "store") as writer:
        append(writer, 0, 200)
        second = subprocess.run(
            [sys.executable, "-m", "tests.activation_store.small_store", fast_folder / "store"],
            capture_output=True,
            text=True,
        )
        assert second.returncode != 0
        assert re.search(rf"UserError: .*store is being written by process {os.getpid()};", second.stderr)
        append(writer, 200, ROWS)
        writer.finish()
    assert_same_files(fast_folder / "store", small_path)


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def bytes_of_a_harvest(folder):
    endless = FullDisk(1 << 40)
    make(folder / "measured", endless)
    return (1 << 40) - endless.capacity


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_a_full_disk_is_one_sentence_and_loses_nothing_committed(fast_folder, small_path, share):
    path = fast_folder / "store"
    capacity = int(share * bytes_of_a_harvest(fast_folder))
    with pytest.raises(UserError, match=r"The disk of .* is full\. The \d+ rows committed so far are safe: free some"):
        make(path, FullDisk(capacity))
    if (path / "zarr.json").exists():
        committed = open_store(path)
        assert share < 0.5 or committed.rows
        for hook in HOOKS:
            assert np.array_equal(committed.read_rows(hook.name, 0, committed.rows), stored(hook, 0, committed.rows))
    make(path, UnsyncedDisk())
    assert_same_files(path, small_path)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    class ReadOnly(Disk):
        def make_folder(self, path):
            raise PermissionError(13, "Permission denied")

    with pytest.raises(UserError, match=r"store cannot be written: Permission denied\."):
        open_writer(tmp_path / "store", ReadOnly())


def test_batches_are_not_aligned_with_shards_in_these_tests():
    """Otherwise the tests above could pass without a batch ever being cut."""
    assert 128 % BATCH_ROWS and ROWS % BATCH_ROWS and ROWS % 128 and ROWS % 16
