"""Where the files of a store are: a local folder, or a prefix of an object store. One contract for both.

A key is a path within the store, such as ``token_ids/c.0``. `activation_store.location.open_place` makes a `Place` of
what a user typed. Reader, writer and audit know nothing else of where a store is.

What every place promises: a file appears whole or not at all, under its key or as before; `read` of a key that is not
there raises FileNotFoundError; whatever else goes wrong is an OSError whose ``strerror`` a person can read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class OpenFile(Protocol):
    """A file in the making, not yet under its key."""

    def write(self, content: bytes | memoryview) -> None:
        """Add ``content`` at its end."""

    def discard(self) -> None:
        """Give it up. Harmless after it was published."""


class Owner(Protocol):
    """The right to write a store."""

    def check(self) -> None:
        """Raises UserError when another process has taken the store over."""

    def release(self) -> None:
        """Let go of it."""


class Place(ABC):
    """The files of one store. ``location`` is how a person names it."""

    location: str

    @property
    def name(self) -> str:
        """The last part of the location, without ``.zarr``."""
        return self.location.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")

    @property
    def root(self) -> Path | None:
        """The local folder, if it is one."""
        return None

    def where(self, key: str) -> str:
        """How messages call a file."""
        return f"{self.location.rstrip('/')}/{key}"

    # --- reading ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole file."""

    @abstractmethod
    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> Sequence[Any]:
        """Byte ranges of a file, as buffers."""

    @abstractmethod
    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        """The last ``length`` bytes of a file (or all, if it has fewer), and how many it has."""

    @abstractmethod
    def blocks(self, key: str) -> Iterator[Any]:
        """The whole file in parts that fit into memory."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Every file there is: {key: bytes}."""

    @abstractmethod
    def names(self, folder: str = "") -> set[str]:
        """What lies directly in a folder, or in the place itself; an empty set if there is none."""

    def mapped(self, key: str) -> np.ndarray | None:
        """The file as uint8 without reading it, or None where memory cannot be mapped.

        Raises:
            ValueError: the file is empty.
        """
        return None

    # --- writing ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def own(self) -> Owner:
        """Become the only process that writes here.

        Raises:
            UserError: another process is; the sentence names it.
        """

    @abstractmethod
    def create(self, name: str, subject: str) -> OpenFile:
        """Begin a file; ``name`` tells it from the others that are open, ``subject`` is what kill points call it."""

    @abstractmethod
    def publish(self, files: Mapping[str, OpenFile], subject: str) -> None:
        """Put finished files under their keys, durably. Not at once for all: only each of them."""

    @abstractmethod
    def replace(self, contents: Mapping[str, bytes], subject: str, durable: bool = True) -> None:
        """Give each file its new content in one step.

        Args:
            durable: False leaves out what makes it survive a power cut. A killed process loses nothing by that.
        """

    @abstractmethod
    def commit(self, key: str, content: bytes, expected: bytes | None) -> None:
        """Replace the manifest: `replace`, but refused when it is no longer ``expected`` (None: not there)."""

    @abstractmethod
    def remove(self, keys: Sequence[str], subject: str) -> None:
        """Remove files, or folders with all that is in them; nothing happens where there is none."""
