"""Rows of shards that cannot be memory-mapped, because they are compressed or far away: the mixing buffer, in memory.

Of each array a fixed number of decoded chunks is kept in one block of memory (an arena, cut into slots of one chunk);
the least recently used makes room for the next. Chunks are fetched and decoded by a few threads, several of one shard
in one request. A batch is then one gather from the arena, as it is from a memory map; the slots bound the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from math import prod

import numpy as np

from activation_store.codec import Decode
from activation_store.errors import UserError
from activation_store.place import Place
from activation_store.shard import ShardIndex
from activation_store.spec import ArraySpec, Geometry

NOWHERE = -1

TO_BE_USED = 1 << 40
"""Added to the time of a chunk that was fetched ahead, so that chunks already used make room before it does."""


class Arena:
    """The decoded chunks of one array.

    Args:
        place: where the shards are.
        array, geometry: the array and how it is cut.
        chunks: how many it has.
        slots: how many are kept.
        decode: puts the chunk of the stored bytes into its slot.
        index: shard number -> where its chunks are.
        pool: what fetches.
    """

    def __init__(
        self,
        place: Place,
        array: ArraySpec,
        geometry: Geometry,
        chunks: int,
        slots: int,
        decode: Decode,
        index: Callable[[ArraySpec, int], ShardIndex],
        pool: ThreadPoolExecutor,
    ):
        self._place, self._array, self._geometry = place, array, geometry
        self._decode, self._index, self._pool = decode, index, pool
        slots = max(1, min(slots, chunks))
        self._chunk_bytes = geometry.rows_per_chunk * array.row_bytes
        self._bytes = room((slots, self._chunk_bytes), np.dtype(np.uint8), f"The buffer for {place.where(array.path)}")
        self._rows = self._bytes.view(array.carrier).reshape(slots * geometry.rows_per_chunk, *array.row_shape)
        self._slot_of_chunk = np.full(chunks, NOWHERE, dtype=np.int32)
        self._chunk_of_slot = np.full(slots, NOWHERE, dtype=np.int64)
        self._used = np.zeros(slots, dtype=np.int64)  # when: larger is later
        self._pins = np.zeros(slots, dtype=np.int32)  # by those who gather from it or are filling it
        self._filling: dict[int, Future[None]] = {}  # chunk -> who fetches it
        self._clock = 0
        self._free = threading.Condition()

    @property
    def slots(self) -> int:
        return len(self._used)

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._bytes.nbytes

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the array's rows at ``rows`` (n,) int64, in any order, into ``out`` (n, *row_shape)."""
        per_chunk = self._geometry.rows_per_chunk
        chunk_of_row, within = np.divmod(rows, per_chunk)
        chunks = np.unique(chunk_of_row)
        if len(chunks) <= self.slots:
            self._take_block(chunks, chunk_of_row, within, out)
            return
        for start in range(0, len(chunks), self.slots):  # more than fits: part by part
            block = chunks[start : start + self.slots]
            chosen = np.flatnonzero((chunk_of_row >= block[0]) & (chunk_of_row <= block[-1]))
            part = np.empty((len(chosen), *self._array.row_shape), dtype=self._array.carrier)
            self._take_block(block, chunk_of_row[chosen], within[chosen], part)
            out[chosen] = part

    def prefetch(self, chunks: np.ndarray) -> None:
        """Begin to fetch chunks, those named first first, as far as there is room beside those in use."""
        chunks = chunks[np.sort(np.unique(chunks, return_index=True)[1])]  # a chunk in two slots would be lost in both
        with self._free:
            absent = chunks[self._slot_of_chunk[chunks] == NOWHERE]
            room = int((self._pins == 0).sum())
            self._begin(absent[:room], used=self._clock + TO_BE_USED)

    def _take_block(self, chunks: np.ndarray, chunk_of_row: np.ndarray, within: np.ndarray, out: np.ndarray) -> None:
        slots, filling = self._pin(chunks)
        try:
            wait(filling)
            for future in filling:
                future.result()
            first_rows = slots[np.searchsorted(chunks, chunk_of_row)] * self._geometry.rows_per_chunk
            np.take(self._rows, first_rows + within, axis=0, out=out, mode="clip")
        finally:
            with self._free:
                self._pins[slots] -= 1
                self._free.notify_all()

    def _pin(self, chunks: np.ndarray) -> tuple[np.ndarray, list[Future[None]]]:
        """Hold the slots of chunks, sending for those that are absent; returns them and what must be waited for.

        Waits while others hold too many slots, and holds none itself meanwhile, so nobody waits for ever.
        """
        with self._free:
            while True:
                slots = self._slot_of_chunk[chunks]
                present = slots[slots != NOWHERE]
                held = self._pins > 0
                held[present] = True
                if len(chunks) - len(present) <= self.slots - int(held.sum()):
                    break
                self._free.wait()
            self._pins[present] += 1  # before `_begin` looks for slots that nobody holds
            self._begin(chunks[slots == NOWHERE])
            self._pins[present] -= 1
            slots = self._slot_of_chunk[chunks].astype(np.int64)
            self._pins[slots] += 1
            self._clock += 1
            self._used[slots] = self._clock
            return slots, [self._filling[chunk] for chunk in chunks.tolist() if chunk in self._filling]

    def _begin(self, chunks: np.ndarray, used: int = 0) -> None:
        """Give absent chunks slots and send for them, one request for each shard. The caller holds the lock."""
        if not len(chunks):
            return
        free = np.flatnonzero(self._pins == 0)
        slots = free[np.argsort(self._used[free], kind="stable")[: len(chunks)]]
        before = self._chunk_of_slot[slots]
        self._slot_of_chunk[before[before != NOWHERE]] = NOWHERE
        self._slot_of_chunk[chunks] = slots
        self._chunk_of_slot[slots] = chunks
        self._used[slots] = used
        self._pins[slots] += 1  # until it is filled
        shards = chunks // self._geometry.chunks_per_shard
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            numbers, places = chunks[mine].tolist(), slots[mine].tolist()
            future = self._pool.submit(self._fill, shard, numbers, places)
            for chunk in numbers:
                self._filling[chunk] = future

    def _fill(self, shard: int, chunks: list[int], slots: list[int]) -> None:
        failed = True
        try:
            self._fetch(shard, [chunk - shard * self._geometry.chunks_per_shard for chunk in chunks], slots)
            failed = False
        finally:
            with self._free:
                for chunk, slot in zip(chunks, slots, strict=True):
                    self._filling.pop(chunk, None)
                    self._pins[slot] -= 1
                    if failed:  # the next who asks sends for it again
                        self._slot_of_chunk[chunk] = self._chunk_of_slot[slot] = NOWHERE
                self._free.notify_all()

    def _fetch(self, shard: int, chunks: Sequence[int], slots: Sequence[int]) -> None:
        index = self._index(self._array, shard)
        key = self._array.shard_key(shard)
        there = [(chunk, slot) for chunk, slot in zip(chunks, slots, strict=True) if index.lengths[chunk]]
        for slot in {*slots} - {slot for _, slot in there}:
            self._bytes[slot] = 0  # left out because it is all zeros
        if not there:
            return
        starts = [int(index.offsets[chunk]) for chunk, _ in there]
        stops = [start + int(index.lengths[chunk]) for start, (chunk, _) in zip(starts, there, strict=True)]
        try:
            stored = self._place.read_ranges(key, starts, stops)
        except FileNotFoundError:
            raise missing_shard(self._place.where(key)) from None
        except OSError as problem:
            raise UserError(f"{self._place.where(key)} cannot be read: {problem.strerror or problem}.") from problem
        for (chunk, slot), content in zip(there, stored, strict=True):
            try:
                self._decode(content, self._bytes[slot])
            except ValueError as problem:
                raise UserError(
                    f"{self._place.where(key)} is damaged: its chunk {chunk} cannot be decoded ({problem})."
                ) from None


def room(shape: tuple[int, ...], dtype: np.dtype, what: str) -> np.ndarray:
    """An array with any content. Raises UserError when there is no such memory."""
    try:
        return np.empty(shape, dtype=dtype)
    except MemoryError:
        asked = prod(shape) * dtype.itemsize
        raise UserError(
            f"{what} takes {asked:,} bytes, which this machine does not have; ask for fewer rows."
        ) from None


def missing_shard(name: str) -> UserError:
    return UserError(f"{name} is missing, though the manifest counts its rows: the store is damaged.")
