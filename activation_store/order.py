"""Which rows come when, as arithmetic: (seed, epoch, batch) -> row numbers. Nothing here reads a store.

Legend. chunk: ``rows_per_chunk`` consecutive rows, the unit of reading. window: some chunks, drawn at random from the
whole split, whose rows are mixed with each other. batch: ``batch_size`` rows, the next ones of the current window.

An epoch permutes the chunks that hold rows of the split, deals them to the ranks, cuts each rank's chunks into windows
of about ``buffer_rows`` rows, and permutes the rows of each window. Every row of the split comes once, except for those
left over at the end when only full batches are given. All permutations are derived from (seed, epoch, window), so any
batch can be asked for at any time; nothing is remembered but for speed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from activation_store.seeds import permutation


@dataclass(frozen=True, eq=False)
class Order:
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

    @property
    def rows(self) -> int:
        """Rows of the split, over all ranks."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    @property
    def chunks_per_window(self) -> int:
        return max(1, self.buffer_rows // self.rows_per_chunk)

    @cached_property
    def _pieces(self) -> np.ndarray:
        """(pieces, 3): chunk, first row, number of rows of each part of a range that lies in one chunk; ascending."""
        starts, stops = self.ranges[:, 0], self.ranges[:, 1]
        first_chunks = starts // self.rows_per_chunk
        counts = (stops - 1) // self.rows_per_chunk - first_chunks + 1
        chunks = np.repeat(first_chunks, counts) + _counting(counts)
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
    def _rows_per_chunk_used(self) -> np.ndarray:
        return (
            np.add.reduceat(self._pieces[:, 2], self._first_pieces[:-1]) if len(self.chunks) else np.zeros(0, np.int64)
        )

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
        dealt = permutation(len(self.chunks), self.seed, "chunk order", epoch)
        rows_of_ranks = [
            int(self._rows_per_chunk_used[dealt[r :: self.world_size]].sum()) for r in range(self.world_size)
        ]
        if self.drop_last:
            batches = min(rows_of_ranks) // self.batch_size
        else:
            batches = -(-rows_of_ranks[0] // self.batch_size)
        return Epoch(self, epoch, dealt[self.rank :: self.world_size], batches)

    def rows_of_chunks(self, positions: np.ndarray) -> np.ndarray:
        """The rows of the split in the chunks at ``positions`` (indices into `chunks`), chunk after chunk."""
        firsts, stops = self._first_pieces[positions], self._first_pieces[positions + 1]
        pieces = np.repeat(firsts, stops - firsts) + _counting(stops - firsts)
        starts, counts = self._pieces[pieces, 1], self._pieces[pieces, 2]
        return np.repeat(starts, counts) + _counting(counts)


@dataclass(frozen=True, eq=False)
class Epoch:
    """One rank's batches in one epoch. ``positions``: its chunks in reading order, as indices into ``order.chunks``."""

    order: Order
    number: int
    positions: np.ndarray
    batches: int
    _recent: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _window_bounds(self) -> np.ndarray:
        """Where in ``positions`` each window begins, and the end. Equal sizes: a small last window would mix badly."""
        windows = -(-len(self.positions) // self.order.chunks_per_window)
        return np.arange(windows + 1) * len(self.positions) // max(1, windows)

    @cached_property
    def _window_starts(self) -> np.ndarray:
        """(windows + 1,): how many rows come before each window."""
        before = np.append(0, np.cumsum(self.order._rows_per_chunk_used[self.positions]))
        return before[self._window_bounds]

    @property
    def windows(self) -> int:
        return len(self._window_bounds) - 1

    def window_of_batch(self, batch: int) -> int:
        """The window in which a batch begins."""
        return int(np.searchsorted(self._window_starts, batch * self.order.batch_size, side="right")) - 1

    def chunks_of_window(self, window: int) -> np.ndarray:
        """Numbers of the chunks that a window reads, in the order in which they were drawn."""
        return self.order.chunks[self.positions[self._window_bounds[window] : self._window_bounds[window + 1]]]

    def rows_of_window(self, window: int) -> np.ndarray:
        """The rows of a window in the order in which they are delivered."""
        rows = self._recent.get(window)
        if rows is None:
            rows = self._mix(window)
            if len(self._recent) > 1:  # two are kept: a batch may begin in one window and end in the next
                self._recent.clear()
            self._recent[window] = rows
        return rows

    def _mix(self, window: int) -> np.ndarray:
        rows = self.order.rows_of_chunks(self.positions[self._window_bounds[window] : self._window_bounds[window + 1]])
        return rows[permutation(len(rows), self.order.seed, "rows of a window", self.number, window)]

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


def _counting(counts: np.ndarray) -> np.ndarray:
    """0, 1, .., counts[0] - 1, 0, 1, .., counts[1] - 1, and so on."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
