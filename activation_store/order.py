"""Which rows come when, as arithmetic: (seed, epoch, batch) -> row numbers. Nothing here reads a store.

Legend. chunk: ``rows_per_chunk`` consecutive rows, the unit of reading. window: some chunks whose rows are mixed with
each other. batch: ``batch_size`` rows, the next ones of the current window.

An epoch deals the chunks that hold rows of the split to the ranks, in windows of about ``buffer_rows`` rows, and
permutes the rows of each window. Every row of the split comes once, except for those left over at the end when only
full batches are given. All permutations are derived from (seed, epoch, window), so any batch can be asked for at any
time; nothing is remembered but for speed. The two orders differ in which chunks make a window:

- `RandomChunks`: chunks drawn at random from the whole split. For rows that are all there.
- `ConsecutiveChunks`: neighbouring chunks, in row order. For rows that come into being in row order, a store that is
  still growing or a live model: the first batches need the first rows alone. It mixes what lies within a window, and
  relies on the harvest, which has shuffled the documents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from activation_store.seeds import add_positions, permutation


@dataclass(frozen=True, eq=False)
class Order(ABC):
    """The order of one rank's batches.

    Args:
        ranges: (n, 2) ascending, disjoint row ranges: the rows to deliver.
        rows_per_chunk: the store's.
        batch_size: rows in a batch.
        buffer_rows: rows that are mixed with each other. At least one chunk is taken.
        seed, rank, world_size: ranks of one seed share out the rows without overlap.
        drop_last: give only full batches, and as many on each rank. False needs a single rank.
    """

    ranges: np.ndarray
    rows_per_chunk: int
    batch_size: int
    buffer_rows: int
    seed: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = True
    _epochs: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False)

    in_row_order: ClassVar[bool]
    """Whether windows come in the order of their rows."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or (self.world_size > 1 and not self.drop_last):
            raise ValueError(
                f"rank {self.rank} of {self.world_size} with drop_last={self.drop_last} cannot be dealt rows"
            )
        if min(self.batch_size, self.buffer_rows) < 1:
            raise ValueError(f"batches of {self.batch_size} rows from a buffer of {self.buffer_rows}: give at least 1")

    @abstractmethod
    def _deal(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each rank its chunks in reading order, as indices into `chunks`, and where among them each window begins,
        and the end."""

    @property
    def rows(self) -> int:
        """Rows of the split, over all ranks."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    @property
    def chunks_per_window(self) -> int:
        """The most chunks that a window has."""
        return max(1, self.buffer_rows // self.rows_per_chunk)

    @cached_property
    def _pieces(self) -> np.ndarray:
        """(pieces, 3): chunk, first row, number of rows of each part of a range that lies in one chunk; ascending."""
        starts, stops = self.ranges[:, 0], self.ranges[:, 1]
        first_chunks = starts // self.rows_per_chunk
        counts = (stops - 1) // self.rows_per_chunk - first_chunks + 1
        chunks = _each_counted_from(first_chunks, counts)
        firsts = np.maximum(np.repeat(starts, counts), chunks * self.rows_per_chunk)
        ends = np.minimum(np.repeat(stops, counts), (chunks + 1) * self.rows_per_chunk)
        return np.stack([chunks, firsts, ends - firsts], axis=1)

    @cached_property
    def chunks(self) -> np.ndarray:
        """Numbers of the chunks that hold rows of the split, ascending."""
        return np.unique(self._pieces[:, 0])

    @cached_property
    def _first_pieces(self) -> np.ndarray:
        return np.searchsorted(self._pieces[:, 0], np.append(self.chunks, np.iinfo(np.int64).max))

    @cached_property
    def rows_of_each_chunk(self) -> np.ndarray:
        """How many rows of the split each of `chunks` holds."""
        if not len(self.chunks):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self._pieces[:, 2], self._first_pieces[:-1])

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        made = self._epochs.get(epoch)
        if made is None:
            made = self._make_epoch(epoch)
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = made
        return made

    def _make_epoch(self, epoch: int) -> Epoch:
        dealt = self._deal(epoch)
        if self.drop_last:
            batches = min(int(self.rows_of_each_chunk[chunks].sum()) for chunks, _ in dealt) // self.batch_size
        else:
            batches = -(-self.rows // self.batch_size)
        return Epoch(self, epoch, *dealt[self.rank], batches)

    def rows_of_chunks(self, positions: np.ndarray) -> np.ndarray:
        """The rows of the split in the chunks at ``positions`` (indices into `chunks`), chunk after chunk."""
        firsts = self._first_pieces[positions]
        pieces = _each_counted_from(firsts, self._first_pieces[positions + 1] - firsts)
        return _each_counted_from(self._pieces[pieces, 1], self._pieces[pieces, 2])


class RandomChunks(Order):
    """Windows of chunks drawn at random from the whole split, anew in each epoch."""

    in_row_order = False

    def _deal(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        drawn = permutation(len(self.chunks), self.seed, "chunk order", epoch)
        dealt = [drawn[rank :: self.world_size] for rank in range(self.world_size)]
        return [(chunks, _cut(len(chunks), -(-len(chunks) // self.chunks_per_window))) for chunks in dealt]


class ConsecutiveChunks(Order):
    """Windows of neighbouring chunks, in row order in every epoch; the ranks take them in turn.

    Ranks are dealt windows, not chunks, so that a live model computes each row on one rank alone.
    """

    in_row_order = True

    def _deal(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        windows_each = -(-len(self.chunks) // (self.chunks_per_window * self.world_size))
        bounds = _cut(len(self.chunks), windows_each * self.world_size)
        dealt = []
        for rank in range(self.world_size):
            firsts, stops = bounds[:-1][rank :: self.world_size], bounds[1:][rank :: self.world_size]
            firsts, counts = firsts[firsts < stops], (stops - firsts)[firsts < stops]  # few chunks make fewer windows
            dealt.append((_each_counted_from(firsts, counts), np.append(0, np.cumsum(counts))))
        return dealt


@dataclass(frozen=True, eq=False)
class Epoch:
    """One rank's batches in one epoch.

    Attributes:
        positions: the rank's chunks in reading order, as indices into ``order.chunks``.
        window_bounds: where in ``positions`` each window begins, and the end.
    """

    order: Order
    number: int
    positions: np.ndarray
    window_bounds: np.ndarray
    batches: int
    _recent: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _window_starts(self) -> np.ndarray:
        """(windows + 1,): how many rows come before each window."""
        before = np.append(0, np.cumsum(self.order.rows_of_each_chunk[self.positions]))
        return before[self.window_bounds]

    @property
    def windows(self) -> int:
        return len(self.window_bounds) - 1

    def window_of_batch(self, batch: int) -> int:
        """The window in which a batch begins."""
        return int(np.searchsorted(self._window_starts, batch * self.order.batch_size, side="right")) - 1

    def chunks_of_window(self, window: int) -> np.ndarray:
        """Numbers of the chunks that a window reads, in the order in which they were dealt."""
        return self.order.chunks[self._positions_of_window(window)]

    def rows_of_window(self, window: int) -> np.ndarray:
        """The rows of a window in the order in which they are delivered."""
        rows = self._recent.get(window)
        if rows is None:
            rows = self._mix(window)
            if len(self._recent) > 1:  # two are kept: a batch may begin in one window and end in the next
                self._recent.clear()
            self._recent[window] = rows
        return rows

    def sorted_rows_of_window(self, window: int) -> np.ndarray:
        """The rows of a window, ascending."""
        return self.order.rows_of_chunks(np.sort(self._positions_of_window(window)))

    def _mix(self, window: int) -> np.ndarray:
        rows = self.order.rows_of_chunks(self._positions_of_window(window))
        return rows[permutation(len(rows), self.order.seed, "rows of a window", self.number, window)]

    def _positions_of_window(self, window: int) -> np.ndarray:
        return self.positions[self.window_bounds[window] : self.window_bounds[window + 1]]

    def batch(self, batch: int) -> np.ndarray:
        """Row numbers of a batch, int64 (batch_size,), or fewer for a last one that is not full."""
        if not 0 <= batch < self.batches:
            raise IndexError(f"batch {batch} of an epoch of {self.batches}")
        start = batch * self.order.batch_size
        stop = min(start + self.order.batch_size, int(self._window_starts[-1]))
        parts, window = [], self.window_of_batch(batch)
        while start < stop:
            first = int(self._window_starts[window])
            parts.append(self.rows_of_window(window)[start - first : stop - first])
            start, window = start + len(parts[-1]), window + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _cut(items: int, parts: int) -> np.ndarray:
    """Bounds (parts + 1,) of nearly equal parts: a small last window would be a badly mixed end of every epoch."""
    return np.arange(parts + 1) * items // max(1, parts)


def _each_counted_from(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, .. (counts[0] numbers), then starts[1], starts[1] + 1, .., and so on."""
    ends = np.cumsum(counts)
    return add_positions(np.repeat(starts - (ends - counts), counts))
