"""A store in a local folder: temporary files, fsync, rename.

A file is written under a temporary name in ``.staging``, synced, renamed to its key, and its folder synced. Whoever
writes holds the lock on ``.owner`` (`activation_store.ownership`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.disk import Disk, default_disk
from activation_store.errors import UserError
from activation_store.ownership import Ownership
from activation_store.place import OpenFile, Place
from activation_store.spec import OWNER_FILE, STAGING_FOLDER

BLOCK_BYTES = 4 << 20


class LocalFolder(Place):
    """``folder``, by way of ``disk`` for every change."""

    def __init__(self, folder: Path, disk: Disk | None = None):
        self.location = str(folder)
        self._folder = folder
        self._disk = disk or default_disk()
        self._staging = folder / STAGING_FOLDER

    @property
    def root(self) -> Path:
        return self._folder

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> Sequence[Any]:
        with (self._folder / key).open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in zip(starts, stops, strict=True)]

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        with (self._folder / key).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - length))
            return file.read(), size

    def blocks(self, key: str) -> Iterator[bytes]:
        with (self._folder / key).open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def sizes(self) -> dict[str, int]:
        sizes = {}
        for folder, _, names in os.walk(self._folder, onerror=_refuse_unless_gone):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    sizes[path.relative_to(self._folder).as_posix()] = path.stat().st_size
        return sizes

    def names(self, folder: str = "") -> set[str]:
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{self.location} is a file; name a folder for the store.")
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(self._folder / folder)}
        return set()

    def mapped(self, key: str) -> np.ndarray | None:
        return np.memmap(self._folder / key, dtype=np.uint8, mode="r")

    # --- writing ------------------------------------------------------------------------------------------------------

    def own(self) -> Ownership:
        self._disk.make_folder(self._folder)
        return Ownership.take(self._folder / OWNER_FILE, store=self._folder)

    def create(self, name: str, subject: str) -> _TemporaryFile:
        self._disk.make_folder(self._staging)
        return _TemporaryFile(self._disk, self._staging / name, subject)

    def publish(self, files: Mapping[str, OpenFile], subject: str) -> None:
        temporary = {self._folder / key: file for key, file in files.items() if isinstance(file, _TemporaryFile)}
        self._make_folders(temporary)
        self._disk.sync([file.descriptor for file in temporary.values()], subject)
        for target, file in temporary.items():
            file.close()
            self._disk.rename(file.path, target, subject)
        self._disk.sync_folders((target.parent for target in temporary), subject)

    def replace(self, contents: Mapping[str, bytes], subject: str, durable: bool = True) -> None:
        files = {self._folder / key: content for key, content in contents.items()}
        self._make_folders([self._staging / "any", *files])  # it first: it says that what lies there is a store's
        self._disk.replace(files, self._staging, subject, durable)

    def commit(self, key: str, content: bytes, expected: bytes | None) -> None:
        self.replace({key: content}, "manifest")  # the lock on .owner has kept everybody else away

    def remove(self, keys: Sequence[str], subject: str) -> None:
        for key in keys:
            if (self._folder / key).exists():
                self._disk.remove(self._folder / key, subject)

    def _make_folders(self, files: Iterable[Path]) -> None:
        for folder in dict.fromkeys(file.parent for file in files):
            self._disk.make_folder(folder)


def _refuse_unless_gone(problem: OSError) -> None:
    """What a writer sweeps away while we look is no problem."""
    if not isinstance(problem, FileNotFoundError):
        raise problem


class _TemporaryFile:
    """A file in the staging folder. One that is not published stays behind and is swept by the next owner."""

    def __init__(self, disk: Disk, path: Path, subject: str):
        self.path = path
        self._disk = disk
        self._subject = subject
        self._descriptor: int | None = disk.create(path)

    @property
    def descriptor(self) -> int:
        assert self._descriptor is not None, "this file is closed"
        return self._descriptor

    def write(self, content: bytes | memoryview) -> None:
        self._disk.write(self.descriptor, content, self._subject)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        if self._descriptor is not None:
            self.close()
            with contextlib.suppress(OSError):  # what fills a full disk: give its space back at once
                self.path.unlink()
