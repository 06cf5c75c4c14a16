"""Copies of the small store to be damaged: in a folder or among objects, compressed or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from activation_store.location import open_place
from activation_store.place import Place
from activation_store.testing import files_of

KINDS = ("folder", "zstd folder", "objects", "zstd objects")


class Copy:
    """A copy of the store at ``source``; ``files`` are those of the source, and `restored` brings one of them back."""

    def __init__(self, source: Path, kind: str, folder: Path):
        self.kind = kind
        self.files = files_of(source)
        self.place: Place
        if kind.endswith("objects"):
            from obstore.store import MemoryStore

            from activation_store.object_folder import ObjectFolder

            self._objects: Any = MemoryStore()
            self.place = ObjectFolder(self._objects, f"memory://{folder.name}")
        else:
            self.place = open_place(folder)
        for key, content in self.files.items():
            self.put(key, content)

    def put(self, key: str, content: bytes) -> None:
        if self.place.root is None:
            self._objects.put(key, content)
            return
        (self.place.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.place.root / key).write_bytes(content)

    def remove(self, key: str) -> None:
        if self.place.root is None:
            self._objects.delete(key)
        else:
            (self.place.root / key).unlink()

    @contextlib.contextmanager
    def restored(self, key: str) -> Iterator[bytearray]:
        """The content of a file, to be changed and put; afterwards it is as it was."""
        try:
            yield bytearray(self.files[key])
        finally:
            self.put(key, self.files[key])

    @contextlib.contextmanager
    def flipped(self, key: str, place: int, bit: int) -> Iterator[None]:
        """With one bit of a file turned over."""
        with self.restored(key) as content:
            content[place] ^= 1 << bit
            self.put(key, bytes(content))
            yield
