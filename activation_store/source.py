"""Where a trainer gets its batches from, whatever is behind them: the interface, and all of it but the rows.

`ActivationSource` is what a trainer may use. `BatchSource` is everything that does not depend on where rows come from:
the position, the iteration, the reading ahead, the delivery to a device. A `Loader` takes the rows from a store, a
`LiveLoader` (`activation_store.harvest.live`) from a language model at work.

Position means delivered: what was read ahead is not counted, so the position is the same whatever the number of
threads, and any of them continues it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.mixing import Mixing
from activation_store.order import Epoch, Order
from activation_store.read_ahead import ReadAhead
from activation_store.spec import HookSpec, Manifest
from activation_store.statistics import HookStatistics

if TYPE_CHECKING:
    import torch

    from activation_store.delivery import Delivery

STATE_VERSION = 1
ROW_ORDER = {(False, False): None, (True, False): "in the first epoch", (True, True): "in every epoch"}
CALIBRATION_ROWS = 16_384
"""Rows from which statistics are estimated where not all rows are there: 16 times a width of 1024."""


class ActivationSource(Protocol):
    """Shuffled batches of aligned hooks, row for row, and what they were made from."""

    split: str

    part_of_batch: tuple[int, int]

    @property
    def manifest(self) -> Manifest:
        """Of the store that holds the rows, or would hold them: hooks, provenance, fingerprint."""

    @property
    def hooks(self) -> Sequence[str]:
        """The hooks delivered."""

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""

    @property
    def rows(self) -> int:
        """Rows of the split that pass the filter, over all ranks."""

    def d(self, hook: str) -> int:
        """Values in one row of a hook."""

    def statistics(self, hook: str) -> HookStatistics:
        """Mean, second moment and norms of a hook: ``count`` says over how many rows."""

    def batches_in_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch on this rank."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the one after the last delivered: hook -> (batch, d)."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""

    def reset(self) -> None:
        """Back to the first batch of epoch 0."""

    def last_rows(self) -> np.ndarray:
        """Numbers of the rows delivered last, int64 (n,)."""

    def rows_before(self, state: dict[str, Any], ago: int = 0) -> np.ndarray:
        """Numbers of the rows that were delivered last at a position, or so many batches before."""

    def mixing(self, batches: int = 8) -> Mixing:
        """How well batches are mixed."""


@dataclass(frozen=True)
class Planned:
    """A batch to be read: its place and its row numbers, int64 (n,)."""

    epoch: int
    batch: int
    rows: np.ndarray


class BatchSource(ABC):
    """Iterates ``dict[hook, tensor (batch, d)]``; see `Loader` for what is promised.

    Attributes:
        left_out: how many rows of the split each part of the filter left out, of those the parts before it let pass.
        part_of_batch: (which, of how many): the part of every batch's rows that is delivered here. Batches, and so
            positions, are the same whatever it is. (0, 1) to begin with.
        order, first_order: of all epochs but the first, and of the first.
    """

    def __init__(
        self,
        hooks: Sequence[HookSpec],
        order: Order,
        first_order: Order,
        *,
        split: str,
        row_filter: RowFilter,
        left_out: Mapping[str, int],
        epochs: int | None,
        device: str | torch.device,
        dtype: torch.dtype | None,
        threads: int,
        prefetch: int,
    ):
        if threads < 1 or prefetch < 0:
            raise ValueError(f"{threads} threads cannot read {prefetch} batches ahead; give 1 or more, and 0 or more")
        self.hooks = [hook.name for hook in hooks]
        self._specs = {hook.name: hook for hook in hooks}
        self.order = order
        self.first_order = first_order
        self.split = split
        self.row_filter = row_filter
        self.left_out = dict(left_out)
        self.epochs = epochs
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.prefetch = prefetch
        self.part_of_batch = (0, 1)
        self._epoch = 0
        self._batch = 0
        self._iteration = 0

    # --- what a source of its own kind says ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def manifest(self) -> Manifest:
        """Of the store that holds the rows, or would hold them."""

    @property
    @abstractmethod
    def total_rows(self) -> int:
        """Rows that splits are taken from."""

    @abstractmethod
    def statistics(self, hook: str) -> HookStatistics:
        """Mean, second moment and norms of a hook."""

    @abstractmethod
    def mixing(self, batches: int = 8) -> Mixing:
        """Measure how well batches of epoch 0 are mixed, against drawing from the whole split at once."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given rows as they are delivered: hook -> (n, d) on the device."""

    @abstractmethod
    def _prepare(self, planned: Planned, stopping: threading.Event) -> None:
        """Before a batch is read. Batches come one at a time, in order; waiting ends when ``stopping`` is set."""

    # --- what is delivered --------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def rows(self) -> int:
        """Rows of the split that pass the filter, over all ranks."""
        return self.order.rows

    def d(self, hook: str) -> int:
        """Values in one row of a hook, as it is delivered."""
        return self._specs[hook].d

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        return (self.order if epoch else self.first_order).epoch(epoch)

    def batches_in_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch on this rank (the same on every rank; epochs may differ by a few with several ranks)."""
        return self.epoch(epoch).batches

    def first_rows(self, count: int) -> np.ndarray:
        """Numbers of the first rows, in row order, that are delivered: ``count`` of them, or all."""
        lengths = self.order.ranges[:, 1] - self.order.ranges[:, 0]
        needed = int(np.searchsorted(np.cumsum(lengths), count)) + 1
        return np.concatenate([np.arange(start, stop) for start, stop in self.order.ranges[:needed]])[:count]

    def refuse_too_few_rows(self, where: str) -> None:
        """Refuse to begin when there is not one batch. Raises UserError."""
        if not self.rows or not self.epoch(0).batches:
            parts = f" for each of {self.order.world_size} ranks" if self.order.world_size > 1 else ""
            raise UserError(
                f"{where} has {self.rows:,} rows in split {self.split!r}: "
                f"not enough for one batch of {self.batch_size:,}{parts}."
            )

    # --- position -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position and what it is a position in. Counts delivered batches; the same on every rank; JSON."""
        return {"version": STATE_VERSION, "epoch": self._epoch, "batch": self._batch, "order": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that was delivered when ``state`` was taken.

        Raises:
            UserError: the state belongs to another order; the sentence says what differs.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            found = state.get("version") if isinstance(state, dict) else state
            raise UserError(
                f"The loader's state is of version {found!r}; this program continues version {STATE_VERSION}."
            )
        here, there = self._identity(), dict(state["order"])
        changed = [
            f"{name} was {there.get(name)!r} and is {here.get(name)!r}"
            for name in dict.fromkeys([*there, *here])
            if there.get(name) != here.get(name)
        ]
        if changed:
            raise UserError(
                f"The loader cannot continue where it was: {'; '.join(changed)}. "
                "With these the batches come in another order; restore them, or start again."
            )
        self._iteration += 1
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])

    def reset(self) -> None:
        """Back to the first batch of epoch 0."""
        self._iteration += 1
        self._epoch = self._batch = 0

    def last_rows(self) -> np.ndarray:
        """Numbers of the rows delivered last, in their order."""
        return self.rows_before(self.state_dict())

    def rows_before(self, state: dict[str, Any], ago: int = 0) -> np.ndarray:
        """Numbers of the rows of the batch delivered last when ``state`` was taken, or of one so many before it."""
        epoch, batch = int(state["epoch"]), int(state["batch"]) - 1 - ago
        while batch < 0:
            epoch -= 1
            batch += self.epoch(epoch).batches
        return self._own_part(self.epoch(epoch).batch(batch))

    def _own_part(self, rows: np.ndarray) -> np.ndarray:
        part, parts = self.part_of_batch
        return rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]

    def _identity(self) -> dict[str, Any]:
        """What a position is a position in, as JSON. A value of None says the same as no value."""
        return {
            "store": self.manifest.fingerprint,
            "rows": self.total_rows,
            "hooks": self.hooks,
            "split": self.split,
            "row_filter": self.row_filter.to_json(),
            "row_order": ROW_ORDER[self.first_order.in_row_order, self.order.in_row_order],
            "seed": self.order.seed,
            "batch_size": self.order.batch_size,
            "buffer_rows": self.order.buffer_rows,
            "rows_per_chunk": self.order.rows_per_chunk,
            "world_size": self.order.world_size,
            "drop_last": self.order.drop_last,
        }

    # --- batches ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._iteration += 1
        mine = self._iteration
        with closing(self._delivered(self._epoch, self._batch)) as delivered:
            for planned, tensors in delivered:
                if self._iteration != mine:
                    raise RuntimeError("the loader was moved, or iterated anew, while this iteration was running")
                self._epoch, self._batch = planned.epoch, planned.batch + 1
                yield tensors

    def rows_from(self, epoch: int, batch: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, batch, row numbers) of this batch and all that follow: the plan, without reading anything."""
        while self.epochs is None or epoch < self.epochs:
            of_epoch = self.epoch(epoch)
            for number in range(batch, of_epoch.batches):
                yield epoch, number, of_epoch.batch(number)
            epoch, batch = epoch + 1, 0

    def _delivered(self, epoch: int, batch: int) -> Generator[tuple[Planned, dict[str, torch.Tensor]], None, None]:
        if self.prefetch == 0:
            for planned in self._plan(epoch, batch, threading.Event()):
                yield planned, self.read(planned.rows)
            return
        delivery = self._delivery
        ahead = ReadAhead(partial(self._plan, epoch, batch), self._read_ahead, self.threads, self.prefetch)
        try:
            for planned, tensors, copied in ahead:
                delivery.receive(tensors, copied)
                yield planned, tensors
        finally:
            ahead.stop()

    def _plan(self, epoch: int, batch: int, stopping: threading.Event) -> Iterator[Planned]:
        for at_epoch, at_batch, rows in self.rows_from(epoch, batch):
            planned = Planned(at_epoch, at_batch, self._own_part(rows))
            self._prepare(planned, stopping)
            if stopping.is_set():
                return
            yield planned

    def _read_ahead(self, planned: Planned) -> tuple[Planned, dict[str, torch.Tensor], torch.cuda.Event | None]:
        return planned, *self._delivery.ahead(self.read, planned.rows)

    @cached_property
    def _delivery(self) -> Delivery:
        from activation_store.delivery import Delivery

        return Delivery(self.device, self.dtype, kept=self.prefetch + 2)


if TYPE_CHECKING:  # every loader is one, or mypy says why not

    def _as_seen_by_a_trainer(loader: BatchSource) -> ActivationSource:
        return loader
