"""One shard file: rows, then the index that says where each chunk is, then the index's crc32c.

The layout is Zarr's sharding codec with the index at the end. We write chunks in row order, so an uncompressed shard is
its rows as one contiguous array; readers do not rely on it. Other writers leave out chunks of zeros and order the rest
as they like, so `Shard` takes every offset from the index and only then looks whether the chunks happen to be in order.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import google_crc32c
import numpy as np
import xxhash

from activation_store.disk import Disk
from activation_store.errors import UserError
from activation_store.spec import ArraySpec, Geometry

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


def encode_index(offsets_lengths: np.ndarray) -> bytes:
    """The bytes after the chunks: (chunks, 2) offsets and lengths as uint64, and their crc32c."""
    index = np.ascontiguousarray(offsets_lengths, dtype="<u8").tobytes()
    return index + google_crc32c.value(index).to_bytes(CRC_BYTES, "little")


class ShardWriter:
    """Writes one shard of one array to a temporary file, as the rows come in."""

    def __init__(self, disk: Disk, temporary: Path, array: ArraySpec, geometry: Geometry):
        self.array = array
        self.geometry = geometry
        self.temporary = temporary
        self.rows = 0
        self._disk = disk
        self._hash = xxhash.xxh3_64()
        self._file: int | None = disk.create(temporary)

    def append(self, rows: np.ndarray) -> None:
        """Write rows of the array's carrier type (n, *row_shape)."""
        content = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        self._write(content)
        self.rows += len(rows)

    def seal(self) -> str:
        """Pad the last chunk and write the index; syncing is left to the caller. Returns the file's checksum."""
        per_chunk = self.geometry.rows_per_chunk
        chunk_bytes = per_chunk * self.array.row_bytes
        chunks = -(-self.rows // per_chunk)
        self._write(bytes((chunks * per_chunk - self.rows) * self.array.row_bytes))
        index = np.full((self.geometry.chunks_per_shard, 2), ABSENT, dtype=np.uint64)
        index[:chunks, 0] = np.arange(chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
        index[:chunks, 1] = chunk_bytes
        self._write(encode_index(index))
        return self._hash.hexdigest()

    @property
    def file(self) -> int:
        """The descriptor, for syncing."""
        assert self._file is not None, "this shard is closed"
        return self._file

    def close(self) -> None:
        """Give the file back. A shard that was not sealed stays behind in the staging folder and is swept."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, content: bytes | memoryview) -> None:
        if len(content):
            self._disk.write(self.file, content, "shard")
            self._hash.update(content)


class Shard:
    """A committed shard file, memory-mapped: rows by position.

    Raises:
        UserError: missing, truncated, or an index that does not fit; the sentence names the file.
    """

    def __init__(self, path: Path, name: str, rows: int, array: ArraySpec, geometry: Geometry):
        self.array = array
        self.geometry = geometry
        self.rows = rows
        index_bytes = geometry.chunks_per_shard * 16
        try:
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
        except FileNotFoundError:
            raise UserError(f"{name} is missing, though the manifest counts its rows: the store is damaged.") from None
        except ValueError:
            raise UserError(f"{name} is damaged: the file is empty.") from None
        if len(mapped) < index_bytes + CRC_BYTES:
            raise UserError(f"{name} is damaged: {len(mapped)} bytes cannot hold the index of a shard.")
        index = mapped[-index_bytes - CRC_BYTES : -CRC_BYTES].tobytes()
        if google_crc32c.value(index).to_bytes(CRC_BYTES, "little") != mapped[-CRC_BYTES:].tobytes():
            raise UserError(
                f"{name} is damaged: the index at its end does not match its crc32c (truncated or changed)."
            )
        offsets_lengths = np.frombuffer(index, dtype="<u8").reshape(-1, 2)
        self._mmap: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]  # numpy's own name for it, since 1.x
        self._mapped = np.asarray(mapped)
        self._chunk_bytes = geometry.rows_per_chunk * array.row_bytes
        self._offsets = self._checked_offsets(offsets_lengths, len(mapped) - index_bytes - CRC_BYTES, name)
        self._contiguous = self._as_one_array()

    def _checked_offsets(self, offsets_lengths: np.ndarray, payload_bytes: int, name: str) -> np.ndarray:
        """Offset of each chunk that holds rows, -1 for one left out because it is all zeros."""
        needed = offsets_lengths[: -(-self.rows // self.geometry.rows_per_chunk)]
        present = ~(needed == ABSENT).all(axis=1)
        offsets, lengths = needed[present, 0], needed[present, 1]
        if (lengths != self._chunk_bytes).any() or (offsets > max(0, payload_bytes - self._chunk_bytes)).any():
            raise UserError(f"{name} is damaged: its index points to chunks that are not in the file.")
        result = np.full(len(needed), -1, dtype=np.int64)
        result[present] = offsets.astype(np.int64)
        return result

    def _as_one_array(self) -> np.ndarray | None:
        """The rows as one array without a copy, when the chunks lie in row order without gaps."""
        in_order = self._offsets[:1] + np.arange(len(self._offsets)) * self._chunk_bytes
        if self._offsets[0] < 0 or not np.array_equal(self._offsets, in_order):
            return None
        start = int(self._offsets[0])
        return self._view(start, self.rows)

    def _view(self, start: int, rows: int) -> np.ndarray:
        content = self._mapped[start : start + rows * self.array.row_bytes]
        return content.view(self.array.carrier).reshape(rows, *self.array.row_shape)

    def _chunk(self, chunk: int) -> np.ndarray:
        offset = int(self._offsets[chunk])
        if offset < 0:
            return np.zeros((self.geometry.rows_per_chunk, *self.array.row_shape), dtype=self.array.carrier)
        return self._view(offset, self.geometry.rows_per_chunk)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows start..stop of this shard into ``out`` (stop - start, *row_shape)."""
        if self._contiguous is not None:
            out[:] = self._contiguous[start:stop]
            return
        per_chunk = self.geometry.rows_per_chunk
        for chunk in range(start // per_chunk, -(-stop // per_chunk)):
            first, last = max(start, chunk * per_chunk), min(stop, (chunk + 1) * per_chunk)
            out[first - start : last - start] = self._chunk(chunk)[first - chunk * per_chunk : last - chunk * per_chunk]

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows at the positions ``rows`` (n,) int64, in any order, into ``out`` (n, *row_shape)."""
        if self._contiguous is not None:
            # mode="clip" lets numpy copy straight into `out`; the caller has checked the bounds.
            np.take(self._contiguous, rows, axis=0, out=out, mode="clip")
            return
        chunks, within = np.divmod(rows, self.geometry.rows_per_chunk)
        for chunk in np.unique(chunks):
            chosen = chunks == chunk
            out[chosen] = self._chunk(int(chunk))[within[chosen]]

    def prefetch(self, chunk: int) -> None:
        """Ask the system to read a chunk from the disk before it is needed."""
        offset = int(self._offsets[chunk])
        if offset >= 0 and hasattr(self._mmap, "madvise"):
            page_start = offset - offset % mmap.PAGESIZE
            self._mmap.madvise(mmap.MADV_WILLNEED, page_start, offset + self._chunk_bytes - page_start)
