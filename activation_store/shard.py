"""One shard file: chunks of rows, then the index that says where each chunk is, then the index's crc32c.

The layout is Zarr's sharding codec with the index at the end. We write chunks in row order, so an uncompressed shard is
its rows as one contiguous array; readers do not rely on it. Other writers leave out chunks of zeros and order the rest
as they like, so every offset is taken from the index; only then is it seen whether the chunks happen to be in order.

`ShardWriter` writes one, `ShardIndex` says where its chunks are, `MappedShard` reads an uncompressed one from a local
disk. Compressed and remote ones are read chunk by chunk: see `activation_store.chunks`.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import xxhash

from activation_store.codec import encoder
from activation_store.errors import UserError
from activation_store.place import OpenFile
from activation_store.spec import ArraySpec, Geometry

ABSENT = np.uint64(2**64 - 1)
CRC_BYTES = 4


def index_bytes(geometry: Geometry) -> int:
    """Bytes at the end of a shard: offset and length of each chunk, and the crc32c."""
    return geometry.chunks_per_shard * 16 + CRC_BYTES


def encode_index(offsets_lengths: np.ndarray) -> bytes:
    """The bytes after the chunks: (chunks, 2) offsets and lengths as uint64, and their crc32c."""
    index = np.ascontiguousarray(offsets_lengths, dtype="<u8").tobytes()
    return index + google_crc32c.value(index).to_bytes(CRC_BYTES, "little")


class ShardWriter:
    """Writes one shard of one array into ``file``, as the rows come in."""

    def __init__(self, file: OpenFile, array: ArraySpec, geometry: Geometry, compression: str):
        self.array = array
        self.geometry = geometry
        self.file = file
        self.rows = 0
        self._hash = xxhash.xxh3_64()
        self._encode = encoder(compression)
        self._chunk_bytes = geometry.rows_per_chunk * array.row_bytes
        self._waiting = bytearray()  # of a compressed shard: rows that do not fill a chunk yet
        self._bytes = 0
        self._lengths: list[int] = []

    def append(self, rows: np.ndarray) -> None:
        """Write rows of the array's carrier type (n, *row_shape)."""
        self.rows += len(rows)
        content = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        if self._encode is None:
            self._write(content)
            return
        self._waiting += content
        while len(self._waiting) >= self._chunk_bytes:
            self._write_encoded(self._waiting[: self._chunk_bytes])
            del self._waiting[: self._chunk_bytes]

    def seal(self) -> str:
        """Pad the last chunk and write the index. Returns the file's checksum."""
        per_chunk = self.geometry.rows_per_chunk
        chunks = -(-self.rows // per_chunk)
        padding = bytes((chunks * per_chunk - self.rows) * self.array.row_bytes)
        if self._encode is None:
            self._write(padding)
            self._lengths = [self._chunk_bytes] * chunks
        elif self._waiting:
            self._write_encoded(self._waiting + padding)
        lengths = np.array(self._lengths, dtype=np.uint64)
        index = np.full((self.geometry.chunks_per_shard, 2), ABSENT, dtype=np.uint64)
        index[:chunks, 0] = np.cumsum(lengths) - lengths
        index[:chunks, 1] = lengths
        self._write(encode_index(index))
        return self._hash.hexdigest()

    def _write_encoded(self, chunk: bytes | bytearray) -> None:
        assert self._encode is not None
        encoded = self._encode(bytes(chunk))
        self._lengths.append(len(encoded))
        self._write(encoded)

    def _write(self, content: bytes | memoryview) -> None:
        if len(content):
            self.file.write(content)
            self._hash.update(content)


@dataclass(frozen=True)
class ShardIndex:
    """Where the chunks of a shard lie, as its index says. A chunk left out because it is all zeros has length 0.

    Attributes:
        offsets, lengths: (chunks that hold rows,) int64.
    """

    offsets: np.ndarray
    lengths: np.ndarray

    @classmethod
    def decode(cls, tail: Any, file_bytes: int, rows: int, geometry: Geometry, name: str) -> ShardIndex:
        """Read the last `index_bytes` of a shard of ``file_bytes`` bytes.

        Raises:
            UserError: truncated, changed, or pointing outside of the file; the sentence names the file.
        """
        tail = bytes(tail)
        if len(tail) < index_bytes(geometry):
            raise UserError(f"{name} is damaged: {file_bytes} bytes cannot hold the index of a shard.")
        index, crc = tail[:-CRC_BYTES], tail[-CRC_BYTES:]
        if google_crc32c.value(index).to_bytes(CRC_BYTES, "little") != crc:
            raise UserError(
                f"{name} is damaged: the index at its end does not match its crc32c (truncated or changed)."
            )
        needed = np.frombuffer(index, dtype="<u8").reshape(-1, 2)[: -(-rows // geometry.rows_per_chunk)]
        present = ~(needed == ABSENT).all(axis=1)
        payload = np.uint64(file_bytes - len(tail))
        offsets, lengths = np.where(present, needed[:, 0], 0), np.where(present, needed[:, 1], 0)
        if (present & ((offsets > payload) | (lengths > payload - offsets) | (lengths == 0))).any():
            raise UserError(f"{name} is damaged: its index points to chunks that are not in the file.")
        return cls(offsets.astype(np.int64), lengths.astype(np.int64))

    def refuse_other_lengths(self, chunk_bytes: int, name: str) -> None:
        """Of an uncompressed shard: raises UserError when a chunk that is there has not ``chunk_bytes`` bytes."""
        if ((self.lengths != chunk_bytes) & (self.lengths > 0)).any():
            raise UserError(f"{name} is damaged: its index points to chunks that are not in the file.")


class MappedShard:
    """An uncompressed shard on a local disk, memory-mapped: rows by position.

    Args:
        mapped: the file as uint8.

    Raises:
        UserError: truncated, or an index that does not fit; the sentence names the file.
    """

    def __init__(self, mapped: np.ndarray, name: str, rows: int, array: ArraySpec, geometry: Geometry):
        self.array = array
        self.geometry = geometry
        self.rows = rows
        self._chunk_bytes = geometry.rows_per_chunk * array.row_bytes
        index = ShardIndex.decode(mapped[-index_bytes(geometry) :], len(mapped), rows, geometry, name)
        index.refuse_other_lengths(self._chunk_bytes, name)
        self._offsets = np.where(index.lengths > 0, index.offsets, -1)
        self._mmap: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]  # numpy's own name for it, since 1.x
        self._mapped = np.asarray(mapped)
        self._contiguous = self._as_one_array()

    def _as_one_array(self) -> np.ndarray | None:
        """The rows as one array without a copy, when the chunks lie in row order without gaps."""
        in_order = self._offsets[:1] + np.arange(len(self._offsets)) * self._chunk_bytes
        if self._offsets[0] < 0 or not np.array_equal(self._offsets, in_order):
            return None
        return self._view(int(self._offsets[0]), self.rows)

    @property
    def is_one_array(self) -> bool:
        """Whether the file begins with its rows, in order and without gaps."""
        return self._contiguous is not None and not self._offsets[0]

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
