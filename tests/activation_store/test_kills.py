"""kill -9 at any instant, the same command again: the bytes of an undisturbed store, at most one commit recomputed.

Most kills happen inside this process, where an exception that nothing catches stands for the signal; some are real
signals to a real process, at each kind of operation. A power cut is not tested: what was written stays written here.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from activation_store.disk import KILL_VARIABLE
from activation_store.store import open_store
from activation_store.testing import RecordingDisk, assert_same_files, assert_survives_kills
from tests.activation_store.small_store import BATCH_ROWS, GEOMETRY, HOOKS, ROWS, make

BATCHES = -(-ROWS // BATCH_ROWS)
BATCHES_OF_A_COMMIT = GEOMETRY.rows_per_shard // BATCH_ROWS + 2
"""A commit begins and ends inside a batch."""

NAMED_POINTS = [
    "manifest.write:1",
    "metadata.write:9",
    "shard.write:40",
    "shard.sync:2",
    "shard.rename:8",
    "shard.sync_folders:2",
    "statistics.write:2",
    "metadata.rename:40",
    "manifest.write:3",
    "manifest.rename:3",
    "manifest.sync_folders:3",
    "statistics.remove:2",
    "statistics.rename:20",
    "manifest.rename:6",
    "staging.remove:1",
]


def run(path, kill_at=None):
    environment = os.environ | ({KILL_VARIABLE: kill_at} if kill_at else {})
    command = [sys.executable, "-m", "tests.activation_store.small_store", path]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kill_at", NAMED_POINTS)
def test_a_process_killed_at_a_named_point_is_made_good_by_the_next(fast_folder, small_path, kill_at):
    path = fast_folder / "store"
    killed = run(path, kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    committed = open_store(path).rows if (path / "zarr.json").exists() else 0
    computed = make(path)
    assert_same_files(path, small_path)
    # What a run computes is what is missing, and not more than the one batch that the last commit has cut.
    missing = ROWS - committed
    assert computed <= -(-missing // BATCH_ROWS) + 1


def test_at_most_one_commit_is_computed_twice(fast_folder):
    """Killed in the last step of the third commit: the rows of two commits are there and stay."""
    path = fast_folder / "store"
    assert run(path, "manifest.rename:4").returncode == -signal.SIGKILL
    assert open_store(path).rows == 256
    assert make(path) <= BATCHES - 256 // BATCH_ROWS


def operations(folder):
    recording = RecordingDisk()
    make(folder / "recorded", recording)
    return recording.points


def test_killed_at_every_twentieth_operation_and_made_again(fast_folder):
    points = operations(fast_folder)
    assert_survives_kills(make, fast_folder / "kills", list(range(3, len(points), 20)))


@pytest.mark.heavy
def test_killed_at_every_operation_and_made_again(fast_folder):
    killed = assert_survives_kills(make, fast_folder / "kills")
    assert sum(killed.values()) == len(operations(fast_folder))
    assert {"shard.write", "shard.rename", "metadata.rename", "manifest.write", "statistics.write"} <= set(killed)


@pytest.mark.heavy
def test_killed_again_and_again_at_random_instants_it_still_ends_well(tmp_path, small_path):
    chance = random.Random(0)
    for attempt in range(30):
        path = tmp_path / str(attempt)
        for _ in range(100):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.activation_store.small_store", path], stdout=subprocess.DEVNULL
            )
            time.sleep(chance.uniform(0.05, 0.8))
            process.kill()
            if process.wait() == 0:
                break
        make(path)
        assert_same_files(path, small_path)


def test_every_hook_is_in_the_store_that_the_kills_make(small):
    """Guards the tests above against a store that is trivially equal to itself because nothing is in it."""
    assert list(small.hooks) == [hook.name for hook in HOOKS] and small.rows == ROWS and small.complete
    assert BATCHES_OF_A_COMMIT < BATCHES
