"""Shuffled batches of aligned hooks from a store, as torch tensors, with exact resume.

The order is arithmetic (`activation_store.order`); the loader only obeys it. Reading threads run ahead: they ask the
store for the chunks of the next window and gather the rows of each batch straight from where the store has them. For a
local store that is the page cache, which is the mixing buffer, so resuming rereads nothing; for a compressed or remote
one it is the room for decoded chunks, of which the loader reserves as much as two windows take.

A loader may follow a store that is still being harvested. The plan of a store names all its rows and documents from
the start, so the order does not depend on how many rows are there yet, only the waiting does.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.bfloat16 import as_float32
from activation_store.errors import UserError
from activation_store.filters import RowFilter, Selection, select_rows
from activation_store.mixing import Mixing, measure_mixing
from activation_store.order import ConsecutiveChunks, RandomChunks
from activation_store.ownership import is_owned
from activation_store.source import CALIBRATION_ROWS, BatchSource, Planned
from activation_store.spec import OWNER_FILE, Manifest
from activation_store.statistics import HookStatistics, estimate_statistics
from activation_store.store import Store

if TYPE_CHECKING:
    import torch

DEFAULT_BUFFER_ROWS = 131_072
DEFAULT_THREADS = 2
DEFAULT_PREFETCH = 4

POLL_SECONDS = 0.5
"""Between two looks at a store that is followed; a shard of 32,768 rows takes seconds to harvest."""


class Loader(BatchSource):
    """Iterates ``dict[hook, tensor (batch, d)]``; hooks in lockstep, row for row.

    Iterating continues after the last batch delivered, also in a new ``for``: an exhausted loader stays exhausted until
    `reset`. One iteration at a time.

    Args:
        store: an opened store; the loader reads the rows it shows.
        hooks: names; their arrays are delivered flat, (batch, d) with d = heads * d_head for those by head.
        batch_size: rows in a batch.
        split: "train", "held-out" or "all": rows by the split of their document.
        row_filter: leaves further rows out; `left_out` says how many.
        seed: of the order. Two seeds never share an order, nor do two epochs.
        epochs: passes over the split; None goes on forever.
        buffer_rows: rows that are mixed with each other. More mixes better and reads less in sequence.
        rank, world_size: this process's part; parts do not overlap and have equally many batches.
        device: where the tensors are delivered.
        dtype: of the tensors; None means torch.float32.
        threads: that read batches in parallel.
        prefetch: batches read ahead, by all threads together; 0 reads in the caller's thread.
        drop_last: leave out the rows that do not fill a batch at the end of an epoch. False only with one rank.
        follow: deliver all rows that the store will have, each as soon as it is there. The first epoch then takes
            windows of consecutive rows, in the order in which they are written, and only its documents can be filtered.
        patience: seconds without a new row after which a followed store that nobody writes is given up.

    Raises:
        UserError: no such hook, split or document, no row passes the filter, a batch larger than the split; while
            iterating, a followed store that stopped growing.
    """

    def __init__(
        self,
        store: Store,
        hooks: Sequence[str],
        batch_size: int,
        *,
        split: str = "train",
        row_filter: RowFilter | None = None,
        seed: int = 0,
        epochs: int | None = None,
        buffer_rows: int = DEFAULT_BUFFER_ROWS,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        threads: int = DEFAULT_THREADS,
        prefetch: int = DEFAULT_PREFETCH,
        drop_last: bool = True,
        follow: bool = False,
        patience: float = 600.0,
    ):
        if follow and len(store.together) > 1:
            raise UserError(
                f"The stores {', '.join(each.name for each in store.together)} are read together, and stores that are "
                "read together cannot be followed; wait until their harvests are complete."
            )
        if isinstance(hooks, str):
            raise ValueError(f"hooks is a list of names: [{hooks!r}]")
        names = list(dict.fromkeys(store.hook(name).name for name in hooks))
        row_filter = row_filter or RowFilter()
        selection = _select(store, names, split, row_filter, follow)
        arguments = (
            selection.ranges,
            store.manifest.geometry.rows_per_chunk,
            batch_size,
            buffer_rows,
            seed,
            rank,
            world_size,
            drop_last,
        )
        order = RandomChunks(*arguments)
        super().__init__(
            [store.hook(name) for name in names],
            order,
            ConsecutiveChunks(*arguments) if follow else order,
            split=split,
            row_filter=row_filter,
            left_out=selection.left_out,
            epochs=epochs,
            device=device,
            dtype=dtype,
            threads=threads,
            prefetch=prefetch,
        )
        self.store = store
        self.follow = follow
        self.patience = patience
        self._announced: list[tuple[int, int]] = []
        self._asked_for = np.zeros(-(-self.total_rows // order.rows_per_chunk), dtype=bool)
        self._disk_waits = 0
        self.refuse_too_few_rows(f"Store {store.location}")
        self._reserve()

    def _identity(self) -> dict[str, Any]:
        aligned = {store.name: store.fingerprint for store in self.store.together[1:]}
        return super()._identity() | ({"aligned_stores": aligned} if aligned else {})

    @property
    def manifest(self) -> Manifest:
        return self.store.manifest

    @property
    def total_rows(self) -> int:
        """Rows that splits are taken from: those that were there, or all that are planned when following."""
        return self.store.manifest.rows_planned if self.follow else self.store.rows

    def statistics(self, hook: str) -> HookStatistics:
        """Of all rows of the store; when following, estimated from the first rows of the split.

        Raises:
            UserError: the store is not complete, and not followed.
        """
        return self._first_rows_statistics[hook] if self.follow else self.store.statistics(hook)

    @cached_property
    def _first_rows_statistics(self) -> dict[str, HookStatistics]:
        rows = self.first_rows(CALIBRATION_ROWS)
        self._wait_for(int(rows[-1]) + 1, threading.Event())
        return {hook: estimate_statistics(self.store.take(hook, rows), self.manifest.excluded) for hook in self.hooks}

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given rows as they are delivered: hook -> (n, d) on the device."""
        store = self.store  # following may replace it while this runs
        return {
            hook: self._delivery.tensor(spec, len(rows), partial(store.take, hook, rows))
            for hook, spec in self._specs.items()
        }

    def mixing(self, batches: int = 8) -> Mixing:
        """Measure how well batches of epoch 0 are mixed, against drawing from the whole split at once."""
        at_hand = self.store.rows >= int(self.order.ranges[-1, 1])
        return measure_mixing(
            self.first_order,
            self.store.document_first_rows,
            self._values if at_hand else None,
            batches,
        )

    def _values(self, rows: np.ndarray) -> list[np.ndarray]:
        return [as_float32(self.store.take(hook, rows)).reshape(len(rows), -1) for hook in self.hooks]

    # --- before a batch is read ---------------------------------------------------------------------------------------

    def _prepare(self, planned: Planned, stopping: threading.Event) -> None:
        if self.follow:
            self._wait_for(int(planned.rows.max()) + 1, stopping)
        of_epoch = self.epoch(planned.epoch)
        window = of_epoch.window_of_batch(planned.batch)
        # The next window is asked for when no batch of the last one can still be under way: two have room, not three.
        only_this = of_epoch.window_of_batch(max(0, planned.batch - self.prefetch)) == window
        for ahead in range(window, min(window + 1 + only_this, of_epoch.windows)):
            if (planned.epoch, ahead) not in self._announced:
                self._announced = [*self._announced[-1:], (planned.epoch, ahead)]
                chunks = of_epoch.chunks_of_window(ahead)
                wanted = self._not_in_memory(chunks[chunks * self.order.rows_per_chunk < self.store.rows])
                for hook in self.hooks:
                    self.store.prefetch(hook, wanted)

    def _not_in_memory(self, chunks: np.ndarray) -> np.ndarray:
        """The chunks to ask for. What is mapped and was asked for once is in the page cache, as far as we can tell: as
        long as this process has not had to wait for the disk since. Asking for it again takes a fifth of the time that
        gathering its rows takes."""
        if not self.store.is_mapped:
            return chunks
        waits = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        if waits != self._disk_waits:
            self._disk_waits = waits
            self._asked_for[:] = False
        wanted = chunks[~self._asked_for[chunks]]
        self._asked_for[wanted] = True
        return wanted

    def _reserve(self) -> None:
        """Ask for room for two windows, where chunks have to be decoded: a batch may lie in both."""
        self.store.reserve(2 * self.order.chunks_per_window * self.order.rows_per_chunk)

    def _wait_for(self, rows: int, stopping: threading.Event) -> None:
        """Return when the store has ``rows`` rows, or ``stopping`` is set.

        Raises:
            UserError: nobody writes it any more, or there is another store in its place.
        """
        quiet_since = time.monotonic()
        while self.store.rows < rows and not stopping.is_set():
            fresh = self.store.refresh()
            if fresh.fingerprint != self.store.fingerprint:
                raise UserError(
                    f"Store {self.store.location} was replaced by another one while it was followed; start again."
                )
            if fresh.rows != self.store.rows:
                self.store, quiet_since = fresh, time.monotonic()
                self._announced = []  # chunks decoded for the store as it was are not there for this one
                self._reserve()
                continue
            if time.monotonic() - quiet_since >= self.patience and not has_local_writer(self.store):
                raise UserError(
                    f"Store {self.store.location} has stopped growing: {self.store.rows:,} of {self.total_rows:,} rows "
                    f"are there, none came in {self.patience:,.0f} s, and nobody writes it. Run its harvest again, "
                    "which continues it, and continue here; or read the rows that are there without following."
                )
            stopping.wait(POLL_SECONDS)


def has_local_writer(store: Store) -> bool:
    """Whether a process of this machine, or of one that shares the folder, is writing the store at this moment."""
    return store.place.root is not None and is_owned(store.place.root / OWNER_FILE)


def _select(store: Store, hooks: Sequence[str], split: str, row_filter: RowFilter, follow: bool) -> Selection:
    """The rows to deliver."""
    if follow and (row_filter.positions or row_filter.max_norm_ratio):
        raise UserError(
            "Rows of a store that is followed cannot be filtered by position or norm, which are not known before they "
            "are there; filter by documents alone, or wait for the harvest and do not follow."
        )
    ranges = store.split_ranges(split, planned=follow)
    if row_filter == RowFilter():
        return Selection(ranges, {})
    norms = []
    if row_filter.max_norm_ratio is not None:
        norms = [(partial(store.norms, hook), store.statistics(hook).median_norm) for hook in hooks]
    return select_rows(
        ranges,
        row_filter,
        documents=store.document_table,
        positions=store.positions,
        norms=norms,
        where=f"split {split!r} of store {store.location}",
    )
