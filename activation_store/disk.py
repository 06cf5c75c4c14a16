"""The file-system operations by which a store changes, one method each.

Everything the writer does to the disk goes through a `Disk`, so that a test can make any single operation fail, or stop
the process right there: `activation_store.testing` has such disks. Each operation says what it is about ("shard",
"metadata", "manifest", "statistics", "owner"), and (operation, subject) is a named point such as ``shard.rename``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KILL_VARIABLE = "ACTIVATION_STORE_KILL_AT"
"""Environment variable of the kill tests, such as ``shard.rename:2``: see `activation_store.testing.KillingDisk`."""

SYNCED_AT_ONCE = 16

OPEN_AT_ONCE = 128
"""Files replaced together. The statistics of one hook are 17 files, and a process may often open only 256."""


class Disk:
    """The local file system."""

    def reach(self, point: str) -> None:
        """Called before each operation with its name. Does nothing here."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and those above it, durably; nothing happens if it is there."""
        if path.is_dir():
            return
        self.make_folder(path.parent)
        self.reach("folder.make")
        path.mkdir(exist_ok=True)
        self.sync_folders([path.parent], "folder")

    def create(self, path: Path) -> int:
        """Open a new or emptied file for writing; returns its descriptor."""
        self.reach("file.create")
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def write(self, file: int, content: bytes | memoryview, subject: str) -> None:
        """Write all of ``content`` at the end of what was written before."""
        self.reach(f"{subject}.write")
        rest = memoryview(content)
        while len(rest):
            rest = rest[os.write(file, rest) :]

    def sync(self, files: Sequence[int], subject: str) -> None:
        """Make the content of files durable. All at once: the file system then needs few commits of its journal."""
        self.reach(f"{subject}.sync")
        _at_once(os.fsync, files)

    def rename(self, source: Path, target: Path, subject: str) -> None:
        """Replace ``target`` by ``source`` in one step."""
        self.reach(f"{subject}.rename")
        os.replace(source, target)

    def sync_folders(self, folders: Iterable[Path], subject: str) -> None:
        """Make the names in folders durable."""
        self.reach(f"{subject}.sync_folders")
        _at_once(sync_path, sorted(set(folders)))

    def remove(self, path: Path, subject: str) -> None:
        """Remove a file or a folder with all in it; nothing happens if there is none."""
        self.reach(f"{subject}.remove")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def replace(self, contents: Mapping[Path, bytes], staging: Path, subject: str, durable: bool = True) -> None:
        """Give each file its new content in one step: written aside, synced, renamed, the folders synced.

        Args:
            durable: False leaves out the syncing. A killed process loses nothing by that; a power cut may.
        """
        targets = list(contents)
        for start in range(0, len(targets), OPEN_AT_ONCE):
            part = {target: contents[target] for target in targets[start : start + OPEN_AT_ONCE]}
            self._replace_together(part, staging, subject, durable)

    def _replace_together(self, contents: Mapping[Path, bytes], staging: Path, subject: str, durable: bool) -> None:
        files = []
        try:
            for i, content in enumerate(contents.values()):
                files.append(self.create(staging / f"{subject}-{i}"))
                self.write(files[-1], content, subject)
            if durable:
                self.sync(files, subject)
        finally:
            for file in files:
                os.close(file)
        for i, target in enumerate(contents):
            self.rename(staging / f"{subject}-{i}", target, subject)
        if durable:
            self.sync_folders((target.parent for target in contents), subject)


def replace_text(path: Path, text: str) -> None:
    """Give a file its new content in one step, durably: there is the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync_path(temporary)
    os.replace(temporary, path)


def sync_path(path: Path) -> None:
    """Make the content of a file durable, or the names in a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _at_once(sync: Callable[[Any], None], targets: Sequence[Any]) -> None:
    if len(targets) == 1:
        sync(targets[0])
    elif targets:
        with ThreadPoolExecutor(min(len(targets), SYNCED_AT_ONCE)) as pool:
            list(pool.map(sync, targets))


def default_disk() -> Disk:
    """The local file system, or the one a kill test asks for through the environment."""
    if os.environ.get(KILL_VARIABLE):
        from activation_store.testing import KillingDisk

        return KillingDisk.from_environment()
    return Disk()
