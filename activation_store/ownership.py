"""Who writes a store: one process at a time, told apart by a lock that dies with its holder.

The lock is the system's (flock) on a file that holds the owner's pid. A pid alone would not do: after a crash it may
belong to somebody else. The lock goes away with the process, whatever kills it, and the pid is only there to be named.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from activation_store.errors import UserError


class Ownership:
    """The right to write a store, until `release`."""

    def __init__(self, path: Path, file: int):
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path, store: Path) -> Ownership:
        """Lock ``path`` and put our pid there; a lock file left by a dead process is taken over.

        Raises:
            UserError: a live process has it; the sentence names its pid.
        """
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(file, 32, 0).decode(errors="replace").strip() or "that has just started"
                os.close(file)
                raise UserError(
                    f"{store} is being written by process {owner}; wait for it to end, or stop it and run this again."
                ) from None
            if _is_the_file_at(path, file):
                taken = cls(path, file)
                try:
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
                except OSError:  # a full disk: let go, or this very process would refuse itself the next time
                    taken.release()
                    raise
                return taken
            os.close(file)  # the owner before us removed the file after we had opened it

    def check(self) -> None:
        """Nothing to do: while we live, nobody can take the lock."""

    def moved(self, path: Path) -> None:
        """The file is now at ``path``: its folder was renamed."""
        self._path = path

    def release(self) -> None:
        """Remove the file, then let go of the lock (in this order: whoever opened it meanwhile looks again)."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)


def is_owned(path: Path) -> bool:
    """Whether a live process holds the lock ``path``. Looking takes the lock for an instant, shared: do it rarely."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _is_the_file_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
