"""What tests of stores and loaders need, here and elsewhere: disks that fail on demand, and checks of the promises.

`KillingDisk` ends the process in the middle of a named operation; with ``ACTIVATION_STORE_KILL_AT=shard.rename:2`` in
the environment every `StoreWriter` of a process uses one, so real commands can be killed at a point of one's choice.
The points are the operations of `activation_store.disk.Disk`: shard.write, shard.sync, shard.rename,
shard.sync_folders, the same four of metadata, manifest and statistics, statistics.remove, staging.remove, file.create,
folder.make and folder.sync_folders.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from activation_store.disk import KILL_VARIABLE, Disk

if TYPE_CHECKING:
    from activation_store.source import ActivationSource


class Killed(BaseException):
    """Stands for SIGKILL inside a test's own process. No ``except Exception`` catches it."""


class UnsyncedDisk(Disk):
    """The local file system without fsync: a killed process loses nothing the system holds, and tests run faster."""

    def sync(self, files: Sequence[int], subject: str) -> None:
        self.reach(f"{subject}.sync")

    def sync_folders(self, folders: Iterable[Path], subject: str) -> None:
        self.reach(f"{subject}.sync_folders")


class RecordingDisk(UnsyncedDisk):
    """Remembers every operation: ``points`` is the list of named points in order."""

    def __init__(self) -> None:
        self.points: list[str] = []

    def reach(self, point: str) -> None:
        self.points.append(point)


class KillingDisk(UnsyncedDisk):
    """Stops at one operation, before it happens; a write is stopped after its first half.

    Args:
        point: a named point such as "shard.rename", or "*" for any operation.
        count: at the count-th time that it is reached, from 1.
        by_signal: send SIGKILL to this process; otherwise raise `Killed`, after which the disk refuses everything, as
            if the process had gone (a writer's `close` then changes nothing either).
    """

    def __init__(self, point: str, count: int = 1, by_signal: bool = True):
        self.point, self.left, self.by_signal = point, count, by_signal
        self.dead = False

    @classmethod
    def from_environment(cls) -> KillingDisk:
        """As ``ACTIVATION_STORE_KILL_AT=point:count`` says."""
        point, _, count = os.environ[KILL_VARIABLE].partition(":")
        return cls(point, int(count or 1))

    def reach(self, point: str) -> None:
        if self._is_now(point):
            self._die()

    def write(self, file: int, content: bytes | memoryview, subject: str) -> None:
        if self._is_now(f"{subject}.write"):
            os.write(file, memoryview(content)[: len(content) // 2])
            self._die()
        os.write(file, content)

    def _is_now(self, point: str) -> bool:
        if self.dead:
            raise Killed
        if self.point in (point, "*"):
            self.left -= 1
        return self.left == 0

    def _die(self) -> None:
        if self.by_signal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.dead = True
        raise Killed


class FullDisk(UnsyncedDisk):
    """A disk with room for ``capacity`` more bytes, then ENOSPC. Removing files gives nothing back."""

    def __init__(self, capacity: int):
        self.capacity = capacity

    def write(self, file: int, content: bytes | memoryview, subject: str) -> None:
        fits = min(self.capacity, len(content))
        self.capacity -= fits
        super().write(file, memoryview(content)[:fits], subject)
        if fits < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def assert_same_files(folder: Path, expected: Path) -> None:
    """Both folders hold the same files with the same bytes; the error names those that differ."""
    found, wanted = files_of(folder), files_of(expected)
    differing = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    assert not differing, f"{folder} differs from {expected} in {', '.join(differing)}"


def assert_survives_kills(
    make: Callable[[Path, Disk | None], int], folder: Path, points: list[int] | None = None
) -> Counter[str]:
    """Kill a job at every operation it does on the disk, rerun it, and compare the store with an undisturbed one.

    Args:
        make: ``make(path, disk)`` makes the store at ``path`` from the beginning or continues it, and returns how many
            batches it computed.
        folder: an empty folder to work in.
        points: numbers of the operations to kill at, from 1; None means every one.

    Returns:
        How often each named point was killed at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recording = RecordingDisk()
    undisturbed = folder / "undisturbed"
    make(undisturbed, recording)
    killed: Counter[str] = Counter()
    for number in points if points is not None else range(1, len(recording.points) + 1):
        path = folder / f"killed-{number}"
        where = f"killed at operation {number}, {recording.points[number - 1]}"
        try:
            make(path, KillingDisk("*", number, by_signal=False))
        except Killed:
            killed[recording.points[number - 1]] += 1
        else:
            raise AssertionError(f"not {where}: the job came to its end")
        make(path, UnsyncedDisk())
        try:
            assert_same_files(path, undisturbed)
        except AssertionError as difference:
            raise AssertionError(f"{where}: {difference}") from None
        shutil.rmtree(path)
    return killed


def assert_resumes_everywhere(make_loader: Callable[[], ActivationSource], batches: int | None = None) -> None:
    """Whatever a loader delivers after a resume is what it would have delivered, at every position.

    Walks a loader once and keeps the state after each batch; restores each state into a fresh loader and compares all
    that follows, the restored state itself, and the keys of the state.

    Args:
        make_loader: a fresh loader, always of the same order.
        batches: look at this many batches only; needed for loaders that go on forever.
    """
    import itertools

    import torch

    walked = make_loader()
    states, delivered = [walked.state_dict()], []
    for batch in itertools.islice(walked, batches):
        delivered.append(batch)
        states.append(walked.state_dict())
    assert delivered, "the loader delivered nothing"
    for position, state in enumerate(states):
        assert state.keys() == states[0].keys(), f"the state after {position} batches has other keys"
        resumed = make_loader()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state, f"the state after {position} batches is not restored as it was"
        rest = itertools.islice(resumed, None if batches is None else batches - position)
        for offset, (found, wanted) in enumerate(itertools.zip_longest(rest, delivered[position:])):
            where = f"resumed after {position} batches, batch {position + offset}"
            assert found is not None and wanted is not None, f"{where}: one of the two ended early"
            assert found.keys() == wanted.keys(), f"{where}: other hooks"
            for hook in wanted:
                assert torch.equal(found[hook], wanted[hook]), f"{where}: {hook} differs"
