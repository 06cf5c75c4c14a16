"""The folder in which an index grows until it is whole, and the order in which things become durable there.

    <name>.zarr.building/
      .owner            who is building (locked; see activation_store.ownership)
      plan.json         what is being made, and from what
      parts/            encoded rows, sorted by latent within a part (encode.py)
      ranges/           statistics of ranges of latents whose activations are in place (transpose.py)
      done/             one empty file for each step that is finished
      index/            the index itself; renamed to <name>.zarr when nothing is missing

Every step writes whole files, syncs them, and only then leaves its mark. A step that was interrupted is done again and
writes the same bytes over what it left, so the index does not depend on interruptions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from activation_store.disk import Disk, default_disk
from activation_store.ownership import Ownership
from activation_store.spec import METADATA_FILE, group_metadata
from dictlearn.feature_index.spec import BY_PATH, GROUPS, Sizes, chunk_bytes, chunk_keys, chunk_shape, metadata


class Staging:
    """An index under construction.

    Raises:
        UserError: another process builds the same index.
    """

    def __init__(self, folder: Path, plan: dict, disk: Disk | None = None):
        self.folder = folder
        self.disk = disk or default_disk()
        self.disk.make_folder(folder)
        self._unsynced: list[Path] = []
        self._owner = Ownership.take(folder / ".owner", store=folder)
        try:
            self._begin(plan)
        except BaseException:
            self._owner.release()
            raise

    def _begin(self, plan: dict) -> None:
        """Keep what is there if it is of the same plan, and remove it otherwise."""
        same = self._plan_there() == plan
        if not same:
            for entry in sorted(self.folder.iterdir()):
                if entry.name != ".owner":
                    self.disk.remove(entry, "staging")
        for name in ("parts", "ranges", "done", "index"):
            self.disk.make_folder(self.folder / name)
        if not same:
            self.replace(self.folder / "plan.json", json.dumps(plan, indent=2).encode(), "plan")

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def _plan_there(self) -> object:
        try:
            return json.loads((self.folder / "plan.json").read_bytes())
        except (OSError, ValueError):
            return None

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exception: object) -> None:
        self._owner.release()

    # --- files --------------------------------------------------------------------------------------------------------

    def write_file(self, path: Path, *contents: bytes | memoryview, subject: str) -> None:
        """Write a new file; durable after `settle`."""
        self.disk.make_folder(path.parent)
        file = self.disk.create(path)
        try:
            for content in contents:
                self.disk.write(file, content, subject)
        finally:
            os.close(file)
        self._unsynced.append(path)

    def replace(self, path: Path, content: bytes, subject: str) -> None:
        """Give a file new content in one step. Everything written before is durable when it is done."""
        self.settle()
        self.disk.replace({path: content}, self.folder, subject)

    def settle(self, subject: str = "array") -> None:
        """Make durable what was written since the last time."""
        files = [os.open(path, os.O_RDONLY) for path in dict.fromkeys(self._unsynced)]
        try:
            self.disk.sync(files, subject)
        finally:
            for file in files:
                os.close(file)
        self.disk.sync_folders({path.parent for path in self._unsynced}, subject)
        self._unsynced = []

    # --- steps --------------------------------------------------------------------------------------------------------

    def is_done(self, step: str) -> bool:
        return (self.folder / "done" / step).exists()

    @contextmanager
    def step(self, step: str) -> Iterator[None]:
        """When the block ends without an error its files are made durable, and the step is done."""
        yield
        self.replace(self.folder / "done" / step, b"", "mark")

    # --- files of the index -------------------------------------------------------------------------------------------

    def write_array(self, path: str, values: np.ndarray) -> None:
        """Write a whole array of the index, in as many files as it takes."""
        array = BY_PATH[path]
        values = np.ascontiguousarray(values, dtype=array.carrier)
        step = chunk_shape(values.shape)[0]
        for number, key in enumerate(chunk_keys(array, values.shape)):
            content = values[number * step : (number + 1) * step].tobytes()
            padding = bytes(chunk_bytes(array, values.shape) - len(content))
            self.write_file(self.index / key, content, padding, subject="array")

    def write_metadata(self, sizes: Sizes, manifest: bytes) -> None:
        """Write every zarr.json."""
        for array in BY_PATH.values():
            content = metadata(array, sizes.shape(array))
            self.write_file(self.index / array.path / METADATA_FILE, content, subject="metadata")
        for group in GROUPS:
            self.write_file(self.index / group / METADATA_FILE, group_metadata(), subject="metadata")
        self.write_file(self.index / METADATA_FILE, manifest, subject="metadata")

    def long_array(self, path: str, length: int) -> LongArray:
        """A one-dimensional array to be written piece by piece."""
        return LongArray(self, path, length)

    def finish(self, target: Path) -> None:
        """The index is whole: give it its name, and remove all else."""
        self.settle()
        self.disk.rename(self.index, target, "index")
        self.disk.sync_folders([target.parent], "index")
        self.disk.remove(self.folder, "staging")


class LongArray:
    """Entries of a one-dimensional array of the index, written anywhere in any order; see `Staging.long_array`."""

    def __init__(self, staging: Staging, path: str, length: int):
        self._staging = staging
        self._array = BY_PATH[path]
        self._keys = chunk_keys(self._array, (length,))
        self._step = chunk_shape((length,))[0]
        self._bytes = chunk_bytes(self._array, (length,))
        if self._keys:
            staging.disk.make_folder((staging.index / self._keys[0]).parent)

    def write(self, start: int, values: np.ndarray) -> None:
        """Put values (n,) at entries start..start + n; durable after `Staging.settle`."""
        disk = self._staging.disk
        values = np.ascontiguousarray(values, dtype=self._array.carrier)
        stop = start + len(values)
        for number in range(start // self._step, -(-stop // self._step)):
            base = number * self._step
            first, last = max(start, base), min(stop, base + self._step)
            path = self._staging.index / self._keys[number]
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(file).st_size != self._bytes:
                    os.ftruncate(file, self._bytes)
                disk.reach("array.write")
                rest = memoryview(values[first - start : last - start]).cast("B")
                offset = (first - base) * values.itemsize
                while len(rest):
                    written = os.pwrite(file, rest, offset)
                    rest, offset = rest[written:], offset + written
            finally:
                os.close(file)
            self._staging._unsynced.append(path)
