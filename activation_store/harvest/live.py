"""Batches from a language model at work, without a store: the interface of a `Loader`, computed as it is asked for.

The order is that of a loader that follows a store while it is harvested: windows of consecutive rows, each permuted.
The rows are those that a harvest of the same config would store, rounded to the type they would be stored in, computed
in the same batches. So a following `Loader` on that store delivers, in its first epoch, the same batches bit for bit.

Two windows are held in memory: the one that is delivered, and the next, which is computed meanwhile at the pace of the
delivery. A resume computes the window it is in again, and nothing before it. Later epochs take the windows in the same
order and permute each anew: in any other order the forward passes, whose rows lie together, would be more than one for
each batch of rows. Rows of different windows never meet, so it is the harvest's shuffle of the documents that mixes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from activation_store.errors import UserError
from activation_store.filters import RowFilter, Selection, ranges_of_split, select_rows
from activation_store.harvest.batches import Batch, BatchPlan
from activation_store.harvest.compute import capture_of, computed_batches
from activation_store.harvest.request import HarvestConfig, Request
from activation_store.loader import DEFAULT_BUFFER_ROWS, DEFAULT_PREFETCH
from activation_store.mixing import Mixing, measure_mixing
from activation_store.order import ConsecutiveChunks
from activation_store.progress import NoProgress, Progress
from activation_store.source import CALIBRATION_ROWS, BatchSource, Planned
from activation_store.spec import DocumentRows, Manifest
from activation_store.statistics import HookStatistics, estimate_statistics

if TYPE_CHECKING:
    import torch

    from activation_store.harvest.capture import Capture


class LiveLoader(BatchSource):
    """Iterates ``dict[hook, tensor (batch, d)]`` of all hooks of a config; arguments as of `Loader`, but for these.

    The model is loaded when it is first needed: for a batch, a position, or statistics.

    Args:
        config: what to compute; nothing is stored, and ``store`` is not looked at.
        row_filter: by documents and positions; norms are not known before they are computed.
        device: where the tensors are delivered; the model computes on ``config.device``.
        progress: told about the tokenizing of the corpus.

    Raises:
        UserError: what a harvest of ``config`` would be refused for, and what a `Loader` would be.
    """

    def __init__(
        self,
        config: HarvestConfig,
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
        prefetch: int = DEFAULT_PREFETCH,
        drop_last: bool = True,
        progress: Progress | None = None,
    ):
        self._request = Request.of(config, to_store=False)
        self._batches = self._request.plan(progress or NoProgress())
        documents = self._request.store_plan(self._batches).documents
        row_filter = row_filter or RowFilter()
        selection = _select(self._batches, documents, split, row_filter)
        geometry = self._request.geometry
        order = ConsecutiveChunks(
            selection.ranges, geometry.rows_per_chunk, batch_size, buffer_rows, seed, rank, world_size, drop_last
        )
        super().__init__(
            self._request.hooks,
            order,
            order,
            split=split,
            row_filter=row_filter,
            left_out=selection.left_out,
            epochs=epochs,
            device=device,
            dtype=dtype,
            threads=1,
            prefetch=prefetch,
        )
        self._document_starts = np.array([document.first_row for document in documents])
        self._windows: dict[int, Window] = {}
        self._last_batch: tuple[Batch, dict[str, np.ndarray]] | None = None
        self._rows_owed = 0
        self._computing = threading.Lock()
        self._opened: tuple[Capture, Manifest] | None = None
        self._opening = threading.Lock()
        self.refuse_too_few_rows(f"The harvest of {self._request.spec.name}")

    @property
    def manifest(self) -> Manifest:
        """Of the store that a harvest would make. Loads the model, which decides how its activations are read."""
        return self._open()[1]

    @property
    def total_rows(self) -> int:
        """Rows that splits are taken from: all that a harvest would store."""
        return self._batches.rows

    def statistics(self, hook: str) -> HookStatistics:
        """Estimated from the first rows of the split, which are computed for it."""
        return self._first_rows_statistics[hook]

    @cached_property
    def _first_rows_statistics(self) -> dict[str, HookStatistics]:
        with self._computing:
            first = self._empty_window(self.first_rows(CALIBRATION_ROWS))
            while first.rows_left:
                self._compute_into(first)
        return {hook: estimate_statistics(values, self._batches.excluded) for hook, values in first.values.items()}

    def mixing(self, batches: int = 8) -> Mixing:
        """Measure how well the documents of epoch 0 are mixed; nothing is computed for it."""
        return measure_mixing(self.order, self._document_starts, None, batches)

    # --- windows ------------------------------------------------------------------------------------------------------

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given rows as they are delivered: hook -> (n, d) on the device. Computes the windows they lie in."""
        with self._computing:
            windows = self._windows_of(rows, threading.Event())
            return {
                hook: self._delivery.tensor(spec, len(rows), partial(_gather, windows, hook, rows))
                for hook, spec in self._specs.items()
            }

    def _prepare(self, planned: Planned, stopping: threading.Event) -> None:
        """Compute the windows of a batch, and as many rows of the next window as the batch has."""
        with self._computing:
            windows = self._windows_of(planned.rows, stopping)
            self._rows_owed += len(planned.rows)
            if len(windows) > 1 or (following := self._window_after(planned)) is None:
                return
            while following.rows_left and self._rows_owed > 0 and not stopping.is_set():
                self._rows_owed -= self._compute_into(following)
            if not following.rows_left:
                self._rows_owed = 0

    def _windows_of(self, rows: np.ndarray, stopping: threading.Event) -> list[Window]:
        """The windows that hold ``rows``, computed, unless ``stopping``; beside a single one the next is held."""
        numbers = self._windows_with(rows)
        kept = numbers if len(numbers) > 1 else [numbers[0], (numbers[0] + 1) % len(self._window_firsts)]
        self._windows = {number: window for number, window in self._windows.items() if number in kept}
        windows = [self._window(number) for number in numbers]
        for window in windows:
            while window.rows_left and not stopping.is_set():
                self._compute_into(window)
        return windows

    def _window_after(self, planned: Planned) -> Window | None:
        """The window that comes after the one of this batch; None when it is the last of all."""
        following = (self._windows_with(planned.rows)[-1] + 1) % len(self._window_firsts)
        ends_here = following == 0 and self.epochs is not None and planned.epoch + 1 >= self.epochs
        return None if ends_here else self._window(following)

    def _windows_with(self, rows: np.ndarray) -> list[int]:
        """Numbers of the windows that hold ``rows``, ascending."""
        return np.unique(np.searchsorted(self._window_firsts, rows, side="right") - 1).tolist()

    @cached_property
    def _window_firsts(self) -> np.ndarray:
        """A row at the beginning of each window, ascending: the first of its first chunk."""
        of_epoch = self.order.epoch(0)
        return self.order.chunks[of_epoch.positions[of_epoch.window_bounds[:-1]]] * self.order.rows_per_chunk

    def _window(self, number: int) -> Window:
        if number not in self._windows:
            self._windows[number] = self._empty_window(self.order.epoch(0).sorted_rows_of_window(number))
        return self._windows[number]

    def _empty_window(self, rows: np.ndarray) -> Window:
        hooks = self._specs.values()
        return Window(rows, {hook.name: np.empty((len(rows), *hook.shape), hook.array.carrier) for hook in hooks})

    # --- computing ----------------------------------------------------------------------------------------------------

    def _compute_into(self, window: Window) -> int:
        """Fill in the rows that one forward pass gives; returns how many."""
        batch, computed = self._batch_with(int(window.rows[window.filled]))
        return window.fill(batch.first_row, batch.rows, computed)

    def _batch_with(self, row: int) -> tuple[Batch, dict[str, np.ndarray]]:
        """The batch that holds a row; the last one is kept, as a window may end within it and another begin."""
        last = self._last_batch
        if last is None or not last[0].first_row <= row < last[0].first_row + last[0].rows:
            import torch

            capture, _ = self._open()
            threads_before = torch.get_num_threads()
            torch.set_num_threads(self._request.config.threads or threads_before)
            try:
                with capture:
                    last = next(computed_batches(capture, self._batches, row, self._request.device))
            finally:
                torch.set_num_threads(threads_before)
            self._last_batch = last
        return last

    def _open(self) -> tuple[Capture, Manifest]:
        """The model with its hooks, and what a store of its activations would say of itself."""
        with self._opening:  # the thread that computes and the one that asks for the position may come together
            if self._opened is None:
                capture, way, _ = capture_of(self._request, self._batches)
                self._opened = capture, replace(self._request, capture=way).manifest(self._batches)
            return self._opened


@dataclass
class Window:
    """Rows, ascending, and their values at each hook (n, *shape) as stored; the first ``filled`` of them are there."""

    rows: np.ndarray
    values: dict[str, np.ndarray]
    filled: int = 0

    @property
    def rows_left(self) -> int:
        return len(self.rows) - self.filled

    def fill(self, first_row: int, count: int, computed: Mapping[str, np.ndarray]) -> int:
        """Take what comes next from the consecutive rows ``first_row``, ..; returns how many it took."""
        before, self.filled = self.filled, int(np.searchsorted(self.rows, first_row + count))
        within = self.rows[before : self.filled] - first_row
        for hook, values in self.values.items():
            np.take(computed[hook], within, axis=0, out=values[before : self.filled], mode="clip")
        return len(within)


def _gather(windows: list[Window], hook: str, rows: np.ndarray, out: np.ndarray) -> None:
    """Copy rows (n,), each in one of the windows, into ``out`` (n, *shape)."""
    if len(windows) == 1:
        np.take(windows[0].values[hook], np.searchsorted(windows[0].rows, rows), axis=0, out=out, mode="clip")
        return
    for window in windows:
        inside = np.flatnonzero((rows >= window.rows[0]) & (rows <= window.rows[-1]))
        out[inside] = window.values[hook][np.searchsorted(window.rows, rows[inside])]


def _select(plan: BatchPlan, documents: Sequence[DocumentRows], split: str, row_filter: RowFilter) -> Selection:
    """The rows to deliver."""
    if row_filter.max_norm_ratio:
        raise UserError(
            "Rows of a live model cannot be filtered by norm, which is not known before they are computed; filter by "
            "documents or positions, or harvest a store."
        )
    ranges = ranges_of_split(documents, split)
    if row_filter == RowFilter():
        return Selection(ranges, {})
    return select_rows(
        ranges,
        row_filter,
        documents=documents,
        positions=partial(_positions, plan),
        norms=[],
        where=f"split {split!r} of this harvest",
    )


def _positions(plan: BatchPlan, start: int, stop: int) -> np.ndarray:
    """The place of each row start..stop in the window that the model sees."""
    parts, at = [], start
    for batch, skipped in plan.batches_from(start):
        parts.append(batch.positions_N[skipped:])
        at = batch.first_row + batch.rows
        if at >= stop:
            break
    return np.concatenate(parts)[: stop - start]
