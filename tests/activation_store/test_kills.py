"""kill -9 at any instant, the same command again: the bytes of an undisturbed store, at most one commit recomputed.

Many kills happen inside this process, where an exception that nothing catches stands for the signal; the others are
real signals to real processes, at named operations and at random instants, the real command among them. A power cut is
not tested: what was written stays written here.
"""

from __future__ import annotations

import argparse
import inspect
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from activation_store.disk import KILL_VARIABLE
from activation_store.spec import COMPRESSIONS
from activation_store.store import open_store
from activation_store.testing import (
    Killed,
    KillingDisk,
    RecordingDisk,
    UnsyncedDisk,
    assert_same_files,
    assert_survives_kills,
)
from activation_store.verify import verify
from activation_store.writer import sweep_complete
from tests.activation_store.small_store import BATCH_ROWS, GEOMETRY, HOOKS, ROWS, append, make, open_writer

BATCHES = -(-ROWS // BATCH_ROWS)
BATCHES_OF_A_COMMIT = GEOMETRY.rows_per_shard // BATCH_ROWS + 2
"""A commit begins and ends inside a batch."""

NAMED_POINTS = {
    "none": [
        "manifest.write:1",
        "metadata.write:9",
        "shard.write:40",
        "shard.sync:2",
        "shard.rename:8",
        "shard.sync_folders:2",
        "statistics.write:2",
        "metadata.rename:40",
        "manifest.rename:3",
        "statistics.remove:2",
        "statistics.rename:20",
        "staging.remove:1",
    ],
    "zstd": ["shard.write:20", "metadata.rename:30", "manifest.rename:4"],
}


@pytest.fixture
def undisturbed(request, small_path, small_zstd_path):
    """The store as it should be, by its compression."""
    return {"none": small_path, "zstd": small_zstd_path}


def command(path, compression="none"):
    return [sys.executable, "-m", "tests.activation_store.small_store", str(path), compression]


def run(path, kill_at=None, compression="none"):
    environment = os.environ | ({KILL_VARIABLE: kill_at} if kill_at else {})
    return subprocess.run(command(path, compression), capture_output=True, text=True, env=environment)


# --- at named operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kill_at", "compression"),
    [(point, compression) for compression, points in NAMED_POINTS.items() for point in points],
)
def test_a_process_killed_at_a_named_point_is_made_good_by_the_next(fast_folder, undisturbed, kill_at, compression):
    path = fast_folder / "store"
    killed = run(path, kill_at, compression)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    committed = open_store(path).rows if (path / "zarr.json").exists() else 0
    computed = make(path, compression=compression)
    assert_same_files(path, undisturbed[compression])
    # What a run computes is what is missing, and not more than the one batch that the last commit has cut.
    missing = ROWS - committed
    assert computed <= -(-missing // BATCH_ROWS) + 1


def test_at_most_one_commit_is_computed_twice(fast_folder):
    """Killed in the last step of the third commit: the rows of two commits are there and stay."""
    path = fast_folder / "store"
    assert run(path, "manifest.rename:4").returncode == -signal.SIGKILL
    assert open_store(path).rows == 256
    assert make(path) <= BATCHES - 256 // BATCH_ROWS


def operations(folder, compression):
    recording = RecordingDisk()
    make(folder / "recorded", recording, compression=compression)
    return recording.points


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_killed_at_every_thirtieth_operation_and_made_again(fast_folder, compression):
    points = operations(fast_folder, compression)
    make_it = partial(make, compression=compression)
    assert_survives_kills(make_it, fast_folder / "kills", list(range(3, len(points), 30)))


@pytest.mark.heavy
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_killed_at_every_operation_and_made_again(fast_folder, compression):
    killed = assert_survives_kills(partial(make, compression=compression), fast_folder / "kills")
    assert sum(killed.values()) == len(operations(fast_folder, compression))
    assert {"shard.write", "shard.rename", "metadata.rename", "manifest.write", "statistics.write"} <= set(killed)


@pytest.mark.heavy
def test_killed_again_in_the_recovery_from_a_kill(fast_folder, undisturbed):
    """After a kill at the last operation of each kind, another at every seventh of the run that makes it good."""
    points = operations(fast_folder, "none")
    firsts = {point: number for number, point in enumerate(points, start=1)}.values()
    twice = 0
    for first in sorted(firsts):
        for second in range(1, len(points), 7):
            path = fast_folder / f"{first}-{second}"
            assert is_killed(path, first)
            twice += is_killed(path, second)
            make(path, UnsyncedDisk())
            assert_same_files(path, undisturbed["none"])
            shutil.rmtree(path)
    assert twice > 100


def is_killed(path, number):
    try:
        make(path, KillingDisk("*", number, by_signal=False))
    except Killed:
        return True
    return False


# --- at random instants -----------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """Those that came while there was work left, by how many shards had been committed then."""

    by_shards: Counter

    @property
    def total(self) -> int:
        return sum(self.by_shards.values())


def kill_at_random(folder: Path, whole: Path, compression: str, kills: int) -> Kills:
    """Make stores by processes that are killed, until so many were killed at work; each store ends as it should."""
    chance = random.Random(f"{compression} {kills}")
    landed = Kills(Counter())
    duration = working_time(folder / "measured", compression)
    store = 0
    while landed.total < kills:
        store += 1
        path = folder / str(store)
        rows, ended = 0, False
        while not ended:
            process = started(path, compression)
            time.sleep(chance.uniform(0, duration))
            process.kill()
            printed, _ = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL)
            ended = process.returncode == 0
            if ended:
                assert int(printed) <= -(-(ROWS - rows) // BATCH_ROWS) + 1
            there = open_store(path) if (path / "zarr.json").exists() else None
            assert rows <= (there.rows if there else 0), "committed rows were lost"
            rows = there.rows if there else 0
            if not ended and not (there and there.complete):
                landed.by_shards[GEOMETRY.shards(rows)] += 1
        make(path, compression=compression)
        assert_same_files(path, whole)
    return landed


def started(path: Path, compression: str) -> subprocess.Popen:
    process = subprocess.Popen(command(path, compression), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline().strip() == b"begins"
    return process


def working_time(path: Path, compression: str) -> float:
    """Seconds from the beginning of the work to its end."""
    process = started(path, compression)
    began = time.perf_counter()
    assert process.wait() == 0
    return time.perf_counter() - began


def test_killed_at_a_few_random_instants_it_still_ends_well(tmp_path, undisturbed):
    assert kill_at_random(tmp_path, undisturbed["none"], "none", kills=5).total >= 5


@pytest.mark.heavy
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_killed_a_hundred_times_at_random_instants_it_still_ends_well(tmp_path, undisturbed, compression):
    landed = kill_at_random(tmp_path, undisturbed[compression], compression, kills=100)
    assert landed.total >= 100
    assert len(landed.by_shards) >= 4, (
        f"the kills came at {landed.by_shards} committed shards: not spread over the work"
    )


# --- the real command -------------------------------------------------------------------------------------------------


HARVEST = "--hooks blocks.1.hook_resid_post blocks.1.attn.hook_z --tokens 6000 --context 64 --batch-size 4 --device cpu"
HARVEST += " --rows-per-chunk 64 --rows-per-shard 512 --threads 1"


@dataclass
class RealHarvest:
    """``python -m dictlearn harvest`` with the bundled language model, its forward passes counted."""

    folder: Path
    store: Path

    @property
    def arguments(self) -> list[str]:
        return ["harvest", *HARVEST.split(), "--store", str(self.store), "--corpus", str(self.folder / "corpus")]

    @property
    def log(self) -> Path:
        return self.store.with_name("passes")

    @property
    def passes(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    @property
    def rows(self) -> int:
        return open_store(self.store).rows if (self.store / "zarr.json").exists() else 0

    def start(self, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.activation_store.counted_command", self.log, *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def run(self) -> None:
        process = self.start()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    def stop(self, process: subprocess.Popen, passes: int, after: float, by: signal.Signals) -> tuple[str, str]:
        """Send a signal so many seconds after that many forward passes; returns what was printed."""
        until = self.passes + passes
        deadline = time.monotonic() + 200
        while self.passes < until:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the harvest does not get going"
            time.sleep(0.002)
        time.sleep(after)
        process.send_signal(by)
        return process.communicate(timeout=200)


@pytest.fixture(scope="module")
def real_store(tmp_path_factory):
    """An undisturbed harvest, and the forward passes it took. In this process, to load torch and the model but once."""
    from activation_store.harvest.capture import Capture
    from dictlearn.cli import main
    from tests.activation_store.counted_command import counted

    folder = tmp_path_factory.mktemp("real")
    (folder / "corpus").mkdir()
    for module in (argparse, random, subprocess):
        (folder / "corpus" / f"{module.__name__}.txt").write_text(inspect.getsource(module))
    harvest = RealHarvest(folder, folder / "undisturbed.zarr")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Capture, "run", counted(Capture.run, harvest.log))
        main(harvest.arguments)
    assert verify(harvest.store) == []
    return harvest


@pytest.fixture
def real_harvest(real_store, tmp_path):
    return RealHarvest(real_store.folder, tmp_path / "store.zarr")


ROWS_OF_A_PASS = 4 * 63
"""At least: of each window one token is BOS, or more where documents begin."""
PASSES_OF_A_COMMIT = -(-512 // ROWS_OF_A_PASS) + 2
"""It begins and ends inside a pass; and one more may be under way while the writer is at work."""


def killed_and_run_again(real_store, real_harvest, kills):
    chance = random.Random(kills)
    for _ in range(kills):
        before, rows = real_harvest.passes, real_harvest.rows
        left = (real_store.rows - rows) // (ROWS_OF_A_PASS + 1)
        process = real_harvest.start()
        passes = chance.randint(1 + min(left // 4, PASSES_OF_A_COMMIT), 1 + left // 2)
        real_harvest.stop(process, passes, chance.uniform(0, 0.05), signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        done = real_harvest.passes - before
        committed = (real_harvest.rows - rows) // ROWS_OF_A_PASS
        assert done <= committed + PASSES_OF_A_COMMIT, "more than one commit was lost"
    assert 0 < real_harvest.rows < real_store.rows, "no kill came in the middle of the work"
    real_harvest.run()
    assert_same_files(real_harvest.store, real_store.store)
    assert real_harvest.passes <= real_store.passes + kills * PASSES_OF_A_COMMIT


def test_the_real_command_killed_and_run_again_ends_with_the_same_bytes(real_store, real_harvest):
    killed_and_run_again(real_store, real_harvest, kills=1)


@pytest.mark.heavy
def test_the_real_command_killed_several_times_ends_with_the_same_bytes(real_store, real_harvest):
    killed_and_run_again(real_store, real_harvest, kills=6)


@pytest.mark.heavy
def test_sigterm_ends_the_real_command_with_a_sentence_and_it_continues(real_store, real_harvest):
    process = real_harvest.start()
    _, errors = real_harvest.stop(process, 8, 0.0, signal.SIGTERM)
    assert process.returncode == 130
    assert 0 < real_harvest.rows < real_store.rows
    said = f"Stopped with {real_harvest.rows:,} of 6,000 rows safe in {real_harvest.store}; the same command continues"
    assert said in errors.replace("\n", " ") and "Traceback" not in errors
    assert not (real_harvest.store / ".owner").exists()
    real_harvest.run()
    assert_same_files(real_harvest.store, real_store.store)
    assert real_harvest.passes <= real_store.passes + PASSES_OF_A_COMMIT


@pytest.mark.heavy
def test_a_second_real_command_is_refused_by_the_pid_of_the_first(real_store, real_harvest):
    first = real_harvest.start()
    while not (real_harvest.store / ".owner").exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    try:
        second = real_harvest.start()
        _, errors = second.communicate(timeout=200)
        assert second.returncode == 2
        assert f"is being written by process {first.pid}; wait for it to end" in errors.replace("\n", " ")
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert_same_files(real_harvest.store, real_store.store)


@pytest.mark.heavy
@pytest.mark.parametrize("kill_at", ["staging.remove:1", "manifest.rename:4", "statistics.rename:9"])
def test_the_real_command_killed_at_a_named_point_is_made_good_by_the_next(real_store, real_harvest, kill_at):
    process = real_harvest.start(**{KILL_VARIABLE: kill_at})
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    real_harvest.run()
    assert_same_files(real_harvest.store, real_store.store)


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_what_a_kill_in_the_last_step_leaves_beside_a_complete_store_is_swept(fast_folder, undisturbed):
    path = fast_folder / "store"
    assert run(path, "staging.remove:1").returncode == -signal.SIGKILL
    assert open_store(path).complete and (path / ".staging").exists() and (path / ".owner").exists()
    sweep_complete(open_store(path).place)
    assert_same_files(path, undisturbed["none"])
    sweep_complete(open_store(path).place)
    assert_same_files(path, undisturbed["none"])


def test_a_store_that_somebody_is_writing_is_not_swept(fast_folder, undisturbed):
    path = fast_folder / "store"
    with open_writer(path) as writer:
        append(writer, 0, 300)
        sweep_complete(writer.place)
        assert (path / ".staging" / "sums-2").exists() and (path / ".owner").exists()
        append(writer, 300, ROWS)
        writer.finish()
    assert_same_files(path, undisturbed["none"])


def test_every_hook_is_in_the_store_that_the_kills_make(small):
    """Guards the tests above against a store that is trivially equal to itself because nothing is in it."""
    assert list(small.hooks) == [hook.name for hook in HOOKS] and small.rows == ROWS and small.complete
    assert BATCHES_OF_A_COMMIT < BATCHES
