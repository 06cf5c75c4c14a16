"""A store is read by one process while another writes it: committed rows only, each of them right, and never an error.

The writer is a process of its own and does not wait for anybody; the readers look as often as they can.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from activation_store.bfloat16 import as_float32, register
from activation_store.store import open_store
from activation_store.verify import verify
from tests.activation_store.small_store import GEOMETRY, HOOKS, document_of_row, plan, stored, token_ids

register()
ROWS = 4_000
SHARD = GEOMETRY.rows_per_shard
EXPECTED = {hook.name: stored(hook, 0, ROWS) for hook in HOOKS}
NORMS = {name: np.linalg.norm(as_float32(rows).reshape(ROWS, -1), axis=1) for name, rows in EXPECTED.items()}


WRITER = """
import sys
from tests.activation_store.small_store import append, open_writer, plan
path, compression, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open_writer(path, plan=plan(rows), compression=compression) as writer:
    for number, start in enumerate(range(0, rows, 37)):
        if number % 15 == 14:
            sys.stdin.readline()
        append(writer, start, min(rows, start + 37))
    writer.finish()
"""


class Growing:
    """A store that a process is writing. At some rows it waits until it has been looked at once more.

    Without the waiting a busy machine could make one of the two so slow that they never meet.
    """

    def __init__(self, path, compression):
        command = [sys.executable, "-c", WRITER, str(path), compression, str(ROWS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (path / "zarr.json").exists():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.001)

    def looks(self):
        """One after the other, until it is complete."""
        while self.process.poll() is None:
            yield
            with contextlib.suppress(BrokenPipeError):
                print(file=self.process.stdin, flush=True)
        assert self.process.returncode == 0, self.process.stderr.read()

    def __enter__(self):
        return self.looks()

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


def assert_right(store, first_row=0):
    """Every row from ``first_row`` on that the store shows, in every array, by ranges and by number."""
    rows = store.rows
    for hook in HOOKS:
        assert np.array_equal(store.read_rows(hook.name, first_row, rows), EXPECTED[hook.name][first_row:rows])
        assert np.allclose(store.norms(hook.name, first_row, rows), NORMS[hook.name][first_row:rows], rtol=1e-6)
    taken = np.random.default_rng(rows).integers(0, max(rows, 1), 100 if rows else 0)
    assert np.array_equal(store.take(HOOKS[0].name, taken), EXPECTED[HOOKS[0].name][taken])
    assert np.array_equal(store.token_ids(first_row, rows), token_ids(first_row, rows))
    assert np.array_equal(store.documents(first_row, rows), document_of_row(ROWS)[first_row:rows])


@pytest.mark.parametrize(("compression", "verify_reads"), [("none", False), ("zstd", False), ("zstd", True)])
def test_a_reader_sees_committed_rows_and_all_of_them_right(fast_folder, compression, verify_reads):
    seen = []
    path = fast_folder / "store"
    with Growing(path, compression) as looks:
        followed = open_store(path, verify_reads=verify_reads)
        for _ in looks:
            opened = open_store(path, verify_reads=verify_reads)
            assert_right(opened, max(0, opened.rows - 3 * SHARD))
            followed = followed.refresh()
            assert followed.rows >= opened.rows and followed.rows % SHARD in (0, ROWS % SHARD)
            assert_right(followed, max(0, followed.rows - SHARD))
            assert len(followed.document_table) == len(plan(ROWS).documents)
            seen += [opened.rows, followed.rows]
    assert seen == sorted(seen)
    assert len({*seen} - {0, ROWS}) >= 3, f"the reader was too slow to see the store grow: {seen}"
    assert followed.refresh().complete
    assert_right(followed.refresh())
    assert verify(path) == []


def test_an_opened_store_stays_as_it_was_when_it_was_opened(fast_folder):
    path = fast_folder / "store"
    with Growing(path, "none") as looks:
        snapshots = []
        for _ in looks:
            snapshots.append(open_store(path))
            time.sleep(0.01)
    for snapshot in snapshots[:: max(1, len(snapshots) // 8)]:
        assert_right(snapshot)
        assert snapshot.rows <= ROWS


def test_zarr_python_sees_no_fill_values_and_is_one_commit_ahead_at_most(fast_folder):
    path = fast_folder / "store"
    ahead = []
    names = {f"activations/{hook.name}": EXPECTED[hook.name] for hook in HOOKS} | {"token_ids": token_ids(0, ROWS)}
    with Growing(path, "zstd") as looks:
        for _ in looks:
            for name, expected in names.items():
                before = open_store(path).rows
                array = zarr.open_array(path / name, mode="r")
                rows = array.shape[0]
                first = max(0, rows - 2 * SHARD)
                found = array[first:]
                after = open_store(path).rows
                assert np.array_equal(found, expected[first:rows])
                assert before <= rows <= after + SHARD
                ahead.append(rows - before)
    assert max(ahead) > 0, "it was never looked at in the middle of a commit"


def test_verifying_a_store_that_grows_finds_nothing_wrong(fast_folder):
    path = fast_folder / "store"
    found = 0
    with Growing(path, "none") as looks:
        for _ in looks:
            assert verify(path) == []
            found += 1
    assert found > 1
