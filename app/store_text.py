"""A store as something to read: its hooks in numbers, and a page of its tokens as text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from activation_store.store import Store
from dictlearn_app.token_text import TokenTexts

PAGE_ROWS = 1024
DOCUMENTS_LISTED = 5000
"""Documents offered by name; the list is sent to the browser as a whole."""


@dataclass(frozen=True)
class HookNumbers:
    """Lengths of one hook's rows: mean, median, root of the mean square; rows far above the median; the mean row's."""

    mean_norm: float
    median_norm: float
    rms_norm: float
    outliers: int
    norm_of_mean: float


@dataclass(frozen=True)
class Passage:
    """Consecutive rows of one document."""

    document: str
    held_out: bool
    first_row: int
    tokens: list[str]
    token_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class TextPage:
    """Rows ``start`` to ``stop``; ``earlier`` and ``later`` are rows on the neighbouring pages, None at the ends."""

    start: int
    stop: int
    earlier: int | None
    later: int | None
    passages: list[Passage]


def hook_numbers(store: Store, hook: str) -> HookNumbers:
    """Raises UserError when the store is not complete, or its statistics are damaged."""
    statistics = store.statistics(hook)
    return HookNumbers(
        mean_norm=statistics.mean_norm,
        median_norm=statistics.median_norm,
        outliers=statistics.norm_outliers,
        rms_norm=float(np.sqrt(statistics.mean_squared_norm)),
        norm_of_mean=float(np.linalg.norm(statistics.mean)),
    )


def rows_in(store: Store, split: str) -> int:
    return sum(stop - start for start, stop in store.split_rows(split))


def documents_by_name(store: Store) -> dict[str, int]:
    """Id -> first row, of the documents that have rows; at most `DOCUMENTS_LISTED`."""
    there = [document for document in store.document_table if document.rows and document.first_row < store.rows]
    return {document.id: document.first_row for document in there[:DOCUMENTS_LISTED]}


def text_page(store: Store, texts: TokenTexts, row: int) -> TextPage:
    """The page of `PAGE_ROWS` rows that holds ``row``; clipped to the store."""
    row = max(0, min(row, store.rows - 1))
    start = row // PAGE_ROWS * PAGE_ROWS
    stop = min(store.rows, start + PAGE_ROWS)
    token_ids, positions = store.token_ids(start, stop), store.positions(start, stop)
    documents = store.documents(start, stop)
    edges = [0, *(np.flatnonzero(np.diff(documents)) + 1).tolist(), stop - start]
    passages = []
    for first, last in pairwise(edges):
        if first == last:
            continue
        document = store.document_table[int(documents[first])]
        ids = token_ids[first:last].tolist()
        passages.append(
            Passage(
                document=document.id,
                held_out=document.split == "held-out",
                first_row=start + first,
                tokens=texts.of(ids),
                token_ids=ids,
                positions=positions[first:last].tolist(),
            )
        )
    return TextPage(start, stop, start - 1 if start else None, stop if stop < store.rows else None, passages)
