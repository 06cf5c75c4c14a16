"""Shuffled batches of aligned hooks as torch tensors, with exact resume.

The order is arithmetic (`activation_store.order`); the loader only obeys it. A reading thread runs ahead: it asks the
system for the chunks of the next window, gathers the rows of each batch straight from the memory-mapped shards (the
page cache is the mixing buffer, so resuming rereads nothing), and converts them. Position means delivered: what the
thread has read ahead is not counted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.errors import UserError
from activation_store.order import Order
from activation_store.seeds import permutation
from activation_store.store import Store, as_tensor

if TYPE_CHECKING:
    import torch

STATE_VERSION = 1
DEFAULT_BUFFER_ROWS = 131_072


class Loader:
    """Iterates ``dict[hook, tensor (batch, d)]``; hooks in lockstep, row for row.

    Iterating continues after the last batch delivered, also in a new ``for``: an exhausted loader stays exhausted until
    `reset`. One iteration at a time.

    Args:
        store: an opened store; the loader reads the rows it shows.
        hooks: names; their arrays are delivered flat, (batch, d) with d = heads * d_head for those by head.
        batch_size: rows in a batch.
        split: "train", "held-out" or "all": rows by the split of their document.
        seed: of the order. Two seeds never share an order, nor do two epochs.
        epochs: passes over the split; None goes on forever.
        buffer_rows: rows that are mixed with each other. More mixes better and reads less in sequence.
        rank, world_size: this process's part; parts do not overlap and have equally many batches.
        device: where the tensors are delivered.
        dtype: of the tensors; None means torch.float32.
        prefetch: batches read ahead; 0 reads in the caller's thread.
        drop_last: leave out the rows that do not fill a batch at the end of an epoch. False only with one rank.

    Raises:
        UserError: no such hook or split, a split without rows, a batch larger than the split.
    """

    def __init__(
        self,
        store: Store,
        hooks: Sequence[str],
        batch_size: int,
        *,
        split: str = "train",
        seed: int = 0,
        epochs: int | None = None,
        buffer_rows: int = DEFAULT_BUFFER_ROWS,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        prefetch: int = 2,
        drop_last: bool = True,
    ):
        if isinstance(hooks, str):
            raise ValueError(f"hooks is a list of names: [{hooks!r}]")
        if not 0 <= rank < world_size or (world_size > 1 and not drop_last):
            raise ValueError(f"rank {rank} of {world_size} with drop_last={drop_last} cannot be dealt rows")
        self.store = store
        self.hooks = list(dict.fromkeys(store.hook(name).name for name in hooks))
        self.split = split
        self.epochs = epochs
        self.device = device
        self.dtype = dtype
        self.prefetch = prefetch
        self.order = Order(
            store.split_ranges(split),
            store.manifest.geometry.rows_per_chunk,
            batch_size,
            buffer_rows,
            seed,
            rank,
            world_size,
            drop_last,
        )
        if not self.order.rows or not self.order.epoch(0).batches:
            parts = f" for each of {world_size} ranks" if world_size > 1 else ""
            raise UserError(
                f"Store {store.location} has {self.order.rows:,} rows in split {split!r}: "
                f"not enough for one batch of {batch_size:,}{parts}."
            )
        self._epoch = 0
        self._batch = 0
        self._iteration = 0

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def rows(self) -> int:
        """Rows of the split, over all ranks."""
        return self.order.rows

    def batches_in_epoch(self, epoch: int = 0) -> int:
        """Batches of one epoch on this rank (the same on every rank; epochs may differ by a few with several ranks)."""
        return self.order.epoch(epoch).batches

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

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self.store.fingerprint,
            "rows": self.store.rows,
            "hooks": self.hooks,
            "split": self.split,
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
        for epoch, batch, tensors in self._read_ahead(self._epoch, self._batch):
            if self._iteration != mine:
                raise RuntimeError("the loader was moved, or iterated anew, while this iteration was running")
            self._epoch, self._batch = epoch, batch + 1
            yield tensors

    def rows_from(self, epoch: int, batch: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, batch, row numbers) of this batch and all that follow: the plan, without reading anything."""
        while self.epochs is None or epoch < self.epochs:
            of_epoch = self.order.epoch(epoch)
            for number in range(batch, of_epoch.batches):
                yield epoch, number, of_epoch.batch(number)
            epoch, batch = epoch + 1, 0

    def read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """The given rows as they would be delivered."""
        return {hook: self._deliver(self.store.take(hook, rows).reshape(len(rows), -1)) for hook in self.hooks}

    def _deliver(self, rows: np.ndarray) -> torch.Tensor:
        import torch

        tensor = as_tensor(rows).to(self.dtype or torch.float32)
        device = torch.device(self.device)
        if device.type == "cuda":
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    def _produce(self, epoch: int, batch: int) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        announced: tuple[int, int] | None = None
        for epoch_number, number, rows in self.rows_from(epoch, batch):
            of_epoch = self.order.epoch(epoch_number)
            window = of_epoch.window_of_batch(number)
            if announced != (epoch_number, window):
                announced = (epoch_number, window)
                for ahead in range(window, min(window + 2, of_epoch.windows)):
                    for hook in self.hooks:
                        self.store.prefetch(hook, of_epoch.chunks_of_window(ahead))
            yield epoch_number, number, self.read(rows)

    def _read_ahead(self, epoch: int, batch: int) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        if self.prefetch == 0:
            yield from self._produce(epoch, batch)
            return
        reader = _Reader(self._produce(epoch, batch), self.prefetch)
        try:
            yield from reader
        finally:
            reader.stop()

    # --- mixing -------------------------------------------------------------------------------------------------------

    def mixing(self, batches: int = 8) -> Mixing:
        """Measure how well the first batches of epoch 0 are mixed, against drawing from the whole split at once."""
        of_epoch = self.order.epoch(0)
        measured = [_spread(self.store, of_epoch.batch(b)) for b in range(min(batches, of_epoch.batches))]
        everything = self.order.rows_of_chunks(np.arange(len(self.order.chunks)))
        shuffled = everything[permutation(len(everything), self.order.seed, "mixing reference")]
        size = min(self.order.batch_size, len(everything))
        drawn = [
            _spread(self.store, shuffled[b * size : (b + 1) * size])
            for b in range(min(batches, len(everything) // size))
        ]
        entropy, documents, neighbours = np.mean(measured, axis=0).tolist()
        global_entropy, global_documents, global_neighbours = np.mean(drawn, axis=0).tolist()
        return Mixing(
            entropy=entropy,
            entropy_of_global_shuffle=global_entropy,
            documents=documents,
            documents_of_global_shuffle=global_documents,
            same_document_neighbours=neighbours,
            same_document_neighbours_of_global_shuffle=global_neighbours,
            buffer_rows=self.order.buffer_rows,
            rows=self.order.rows,
        )


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed, each number beside what a shuffle of the whole split would give.

    Attributes:
        entropy: of the documents in a batch, in nats (mean over batches).
        documents: different documents in a batch.
        same_document_neighbours: share of neighbouring rows of a batch that come from one document.
    """

    entropy: float
    entropy_of_global_shuffle: float
    documents: float
    documents_of_global_shuffle: float
    same_document_neighbours: float
    same_document_neighbours_of_global_shuffle: float
    buffer_rows: int
    rows: int

    @property
    def missing_entropy(self) -> float:
        """Nats by which batches fall short of a global shuffle; 0 is perfect."""
        return max(0.0, self.entropy_of_global_shuffle - self.entropy)

    @property
    def excess_neighbours(self) -> float:
        """Share of neighbours from one document beyond what chance gives; 0 is perfect, near 1 is not shuffled."""
        return max(0.0, self.same_document_neighbours - self.same_document_neighbours_of_global_shuffle)

    @property
    def well_mixed(self) -> bool:
        """Within 0.5 nats of a global shuffle, and neighbours as unrelated as by chance, to within 5 %."""
        return self.missing_entropy < 0.5 and self.excess_neighbours < 0.05

    def __str__(self) -> str:
        sentence = (
            f"A batch holds {self.documents:.0f} documents with entropy {self.entropy:.2f} nats "
            f"(a shuffle of all {self.rows:,} rows: {self.documents_of_global_shuffle:.0f} and "
            f"{self.entropy_of_global_shuffle:.2f})."
        )
        if not self.well_mixed:
            sentence += f" A buffer of {self.buffer_rows:,} rows is too small to mix this store: make it larger."
        return sentence


def _spread(store: Store, rows: np.ndarray) -> tuple[float, int, float]:
    documents = store.take_row_array("documents", rows)
    counts = np.unique(documents, return_counts=True)[1]
    shares = counts / counts.sum()
    same = float((documents[1:] == documents[:-1]).mean()) if len(documents) > 1 else 0.0
    return float(-(shares * np.log(shares)).sum()), len(counts), same


class _Reader:
    """A thread that keeps a few items of an iterator ready. What it raises is raised where the items are taken."""

    def __init__(self, source: Iterator[Any], ahead: int):
        self._source = source
        self._ready: queue.Queue[tuple[bool, Any]] = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="activation store reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while True:
            is_item, value = self._ready.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value

    def stop(self) -> None:
        """End the thread. Returns when it is gone, so that nothing reads a store that is then removed."""
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)  # it may be waiting for room

    def _run(self) -> None:
        try:
            for item in self._source:
                self._ready.put((True, item))
                if self._stopped.is_set():
                    return
            self._ready.put((False, None))
        except BaseException as problem:  # handed to the thread that takes the items
            self._ready.put((False, problem))
