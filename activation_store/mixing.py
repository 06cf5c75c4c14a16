"""How well the batches of an order are mixed, beside what a shuffle of the whole split would give.

Two measures. Documents: the entropy of their shares in a batch, and how often neighbouring rows are of one document.
They need the order and the document table alone. Rows: the cosine of neighbouring rows of a batch, the mean
subtracted; it sees what documents do not show, such as a corpus in which like follows like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from activation_store.order import Order
from activation_store.seeds import numpy_stream

ENTROPY_MISSING = 0.5
"""Nats that a batch may lack: 0.5 is as if 4 of 10 documents were missing from it."""
NEIGHBOURS_EXCESS = 0.05
"""How much more often than by chance neighbours may be of one document, and how much larger their cosine may be."""
ROWS_MEASURED = 2048
"""At least: pairs whose cosine scatters by 0.3 then give its mean to within 0.01."""
NEIGHBOURS_READ = 256
"""Rows of each batch whose values are read."""

Values = Callable[[np.ndarray], list[np.ndarray]]
"""Rows by number -> for each hook (n, d) as float."""


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed, each number beside what a shuffle of the whole split would give.

    Attributes:
        entropy: of the documents in a batch, in nats (mean over batches).
        documents: different documents in a batch.
        same_document_neighbours: share of neighbouring rows of a batch that come from one document.
        neighbour_cosine: mean cosine of neighbouring rows, the mean row subtracted, of the hook where it exceeds that
            of the global shuffle by most. None when rows are not at hand: a growing store, a live model.
        buffer_rows_enough: a buffer that would mix well, found by trying; None when this one does.
    """

    entropy: float
    entropy_of_global_shuffle: float
    documents: float
    documents_of_global_shuffle: float
    same_document_neighbours: float
    same_document_neighbours_of_global_shuffle: float
    neighbour_cosine: float | None
    neighbour_cosine_of_global_shuffle: float | None
    buffer_rows: int
    rows: int
    buffer_rows_enough: int | None = None

    @property
    def missing_entropy(self) -> float:
        """Nats by which batches fall short of a global shuffle; 0 is perfect."""
        return max(0.0, self.entropy_of_global_shuffle - self.entropy)

    @property
    def excess_neighbours(self) -> float:
        """Share of neighbours from one document beyond what chance gives; 0 is perfect, near 1 is not shuffled."""
        return max(0.0, self.same_document_neighbours - self.same_document_neighbours_of_global_shuffle)

    @property
    def excess_cosine(self) -> float:
        """Cosine of neighbours beyond that of a global shuffle; 0 where it was not measured."""
        if self.neighbour_cosine is None or self.neighbour_cosine_of_global_shuffle is None:
            return 0.0
        return max(0.0, self.neighbour_cosine - self.neighbour_cosine_of_global_shuffle)

    @property
    def well_mixed(self) -> bool:
        """Within 0.5 nats of a global shuffle, and neighbours as unrelated as by chance, to within 0.05."""
        return self.within(1.0)

    def within(self, share: float) -> bool:
        """Whether each of the three measures is within this share of what `well_mixed` allows."""
        return (
            self.missing_entropy < share * ENTROPY_MISSING
            and self.excess_neighbours < share * NEIGHBOURS_EXCESS
            and self.excess_cosine < share * NEIGHBOURS_EXCESS
        )

    def __str__(self) -> str:
        sentence = (
            f"A batch holds {self.documents:.0f} documents with entropy {self.entropy:.2f} nats "
            f"(a shuffle of all {self.rows:,} rows: {self.documents_of_global_shuffle:.0f} and "
            f"{self.entropy_of_global_shuffle:.2f})"
        )
        if self.neighbour_cosine is not None:
            sentence += (
                f"; the cosine of neighbouring rows is {self.neighbour_cosine:.2f} "
                f"({self.neighbour_cosine_of_global_shuffle:.2f})"
            )
        sentence += "."
        if self.buffer_rows_enough is not None:
            sentence += (
                f" A buffer of {self.buffer_rows:,} rows is too small to mix them: "
                f"use buffer_rows={self.buffer_rows_enough:,}."
            )
        return sentence


def measure_mixing(order: Order, document_starts: np.ndarray, values: Values | None, batches: int) -> Mixing:
    """Measure batches of epoch 0, spread over it, and where they mix badly find a buffer that does not.

    Args:
        document_starts: first row of each document, ascending.
        values: reads rows; None leaves their cosine out.
        batches: how many; more when they are small, so that they hold enough rows.
    """
    batch_rows = min(order.batch_size, order.rows)
    batches = max(batches, -(-ROWS_MEASURED // batch_rows))
    drawn = _drawn_from_all(order, batch_rows, min(batches, order.rows // batch_rows))
    means = None if values is None else [rows.mean(axis=0) for rows in values(np.concatenate(_beginnings(drawn)))]
    chance = _Spread.of(drawn, document_starts, values, means)

    def measured(buffer_rows: int) -> Mixing:
        tried = replace(order, buffer_rows=buffer_rows)
        return chance.compare(_Spread.of(_delivered(tried, batches), document_starts, values, means), tried)

    mixing = measured(order.buffer_rows)
    everything = len(order.chunks) * order.rows_per_chunk
    if mixing.well_mixed or order.buffer_rows >= everything:
        return mixing
    enough = max(order.buffer_rows, order.rows_per_chunk)
    while (enough := 2 * enough) < everything:
        if measured(enough).within(0.5):  # half of what is allowed, so that it is enough for another seed, too
            return replace(mixing, buffer_rows_enough=enough)
    return replace(mixing, buffer_rows_enough=everything)  # which is a shuffle of the whole split


@dataclass(frozen=True)
class _Spread:
    """What is measured of some batches: means over them; ``cosines`` by hook."""

    entropy: float
    documents: float
    neighbours: float
    cosines: np.ndarray | None

    @classmethod
    def of(
        cls,
        batches: list[np.ndarray],
        document_starts: np.ndarray,
        values: Values | None,
        means: list[np.ndarray] | None,
    ) -> _Spread:
        by_documents = [_spread_over_documents(document_starts, rows) for rows in batches]
        entropy, documents, neighbours = np.mean(by_documents, axis=0).tolist()
        if values is None or means is None:
            return cls(entropy, documents, neighbours, None)
        cosines = [
            [_neighbour_cosine(rows - mean) for rows, mean in zip(values(beginning), means, strict=True)]
            for beginning in _beginnings(batches)
        ]
        return cls(entropy, documents, neighbours, np.mean(cosines, axis=0))

    def compare(self, delivered: _Spread, order: Order) -> Mixing:
        """``delivered`` beside this, the spread of a global shuffle."""
        cosine = cosine_of_shuffle = None
        if self.cosines is not None and delivered.cosines is not None:
            worst = int(np.argmax(delivered.cosines - self.cosines))
            cosine, cosine_of_shuffle = float(delivered.cosines[worst]), float(self.cosines[worst])
        return Mixing(
            entropy=delivered.entropy,
            entropy_of_global_shuffle=self.entropy,
            documents=delivered.documents,
            documents_of_global_shuffle=self.documents,
            same_document_neighbours=delivered.neighbours,
            same_document_neighbours_of_global_shuffle=self.neighbours,
            neighbour_cosine=cosine,
            neighbour_cosine_of_global_shuffle=cosine_of_shuffle,
            buffer_rows=order.buffer_rows,
            rows=order.rows,
        )


def _delivered(order: Order, batches: int) -> list[np.ndarray]:
    """Rows of batches of epoch 0, evenly spread over it."""
    of_epoch = order.epoch(0)
    numbers = np.unique(np.linspace(0, of_epoch.batches - 1, min(batches, of_epoch.batches)).astype(np.int64))
    return [of_epoch.batch(number) for number in numbers.tolist()]


def _drawn_from_all(order: Order, batch_rows: int, batches: int) -> list[np.ndarray]:
    """Batches as a shuffle of the whole split gives them, without shuffling it."""
    stream = numpy_stream(order.seed, "mixing reference")
    places = stream.choice(order.rows, size=batches * batch_rows, replace=False)
    starts, lengths = order.ranges[:, 0], order.ranges[:, 1] - order.ranges[:, 0]
    ends = np.cumsum(lengths)
    in_range = np.searchsorted(ends, places, side="right")
    return np.split(places - (ends - lengths)[in_range] + starts[in_range], batches)


def _beginnings(batches: list[np.ndarray]) -> list[np.ndarray]:
    return [rows[:NEIGHBOURS_READ] for rows in batches]


def _spread_over_documents(document_starts: np.ndarray, rows: np.ndarray) -> tuple[float, int, float]:
    """Entropy, number of documents, and how often neighbours are of one."""
    documents = np.searchsorted(document_starts, rows, side="right")
    counts = np.unique(documents, return_counts=True)[1]
    shares = counts / counts.sum()
    same = float((documents[1:] == documents[:-1]).mean()) if len(documents) > 1 else 0.0
    return float(-(shares * np.log(shares)).sum()), len(counts), same


def _neighbour_cosine(rows: np.ndarray) -> float:
    """Mean cosine of each row (n, d) with the next; a row of zeros has none with any."""
    if len(rows) < 2:
        return 0.0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return float((unit[1:] * unit[:-1]).sum(axis=1).mean())
