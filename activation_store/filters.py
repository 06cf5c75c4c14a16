"""Which rows of a split a loader delivers: by document, by position, by norm; worked out as ranges of rows."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from activation_store.errors import UserError
from activation_store.spec import SPLITS, DocumentRows

BLOCK_ROWS = 1 << 18
"""Rows looked at together: 2 MiB of norms for each hook."""


@dataclass(frozen=True)
class RowFilter:
    """Leaves rows out of a split; a row that is delivered passes all that is given."""

    positions: tuple[int, int] | None = None
    """First and last place, in the window of tokens that the model saw, of the rows to deliver. BOS, which gives no
    row, is at 0."""
    documents: tuple[str, ...] = ()
    """Documents whose rows to deliver: ids, or shell patterns such as *.py; none means all of them."""
    max_norm_ratio: float | None = None
    """Largest norm of a row, at each of the loader's hooks, in units of that hook's median norm."""

    def __post_init__(self) -> None:
        if isinstance(self.documents, str):
            raise UserError(f"documents is a list of ids or patterns: [{self.documents!r}].")
        object.__setattr__(self, "documents", tuple(self.documents))
        if self.positions is not None:
            first, last = self.positions
            object.__setattr__(self, "positions", (int(first), int(last)))
            if not 0 <= first <= last:
                raise UserError(
                    f"positions={first},{last} holds no position; give the first and the last to keep, from 0 on."
                )
        ratio = self.max_norm_ratio
        if ratio is not None and not (math.isfinite(ratio) and ratio > 0):
            raise UserError(f"max_norm_ratio is {ratio}; it must be a number above 0, such as 10.")

    def to_json(self) -> dict[str, Any] | None:
        """What is set, as it is recorded; None when nothing is."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value not in (None, ())
        } or None


@dataclass(frozen=True)
class Selection:
    """Rows that pass, as ascending ranges (n, 2), and how many each part of the filter left out of those that had
    passed the parts before it (documents, positions, norms)."""

    ranges: np.ndarray
    left_out: dict[str, int]


def select_rows(
    ranges: np.ndarray,
    row_filter: RowFilter,
    *,
    documents: Sequence[DocumentRows],
    positions: Callable[[int, int], np.ndarray],
    norms: Sequence[tuple[Callable[[int, int], np.ndarray], float]],
    where: str,
) -> Selection:
    """The rows of ``ranges`` that pass the filter. Streams over them: memory follows the ranges that come out.

    Args:
        documents: all documents of the rows.
        positions: (start, stop) -> position of each row.
        norms: for each hook (start, stop) -> norm of each row, and the hook's median norm.
        where: what an error calls the rows, such as "split 'train' of store s".

    Raises:
        UserError: a document that is not there, or nothing passes.
    """
    left_out: dict[str, int] = {}
    before = _count(ranges)
    if row_filter.documents:
        ranges = _intersect(ranges, _ranges_of_documents(row_filter.documents, documents, where))
        left_out["documents"] = before - _count(ranges)
    tests: dict[str, Callable[[int, int], np.ndarray]] = {}
    if row_filter.positions is not None:
        first, last = row_filter.positions
        tests["positions"] = lambda start, stop: _between(positions(start, stop), first, last)
    if row_filter.max_norm_ratio is not None:
        limits = [(read, row_filter.max_norm_ratio * median) for read, median in norms]
        tests["norms"] = lambda start, stop: np.all([read(start, stop) <= limit for read, limit in limits], axis=0)
    if tests:
        left_out |= dict.fromkeys(tests, 0)
        ranges = _joined(list(_passing(ranges, tests, left_out)))
    if not len(ranges):
        counts = ", ".join(f"{name} {count:,}" for name, count in left_out.items())
        raise UserError(f"No row of {where} passes the filter (left out of {before:,} rows: {counts}); make it wider.")
    return Selection(ranges, left_out)


def ranges_of_split(documents: Sequence[DocumentRows], split: str) -> np.ndarray:
    """The rows of the documents in a split (train, held-out or all), as ascending ranges (n, 2).

    Raises:
        UserError: there is no such split.
    """
    if split not in (*SPLITS, "all"):
        raise UserError(f"There is no split {split!r}; use {', '.join(SPLITS)} or all.")
    chosen = [(d.first_row, d.first_row + d.rows) for d in documents if split in (d.split, "all")]
    return _joined([np.array(chosen, dtype=np.int64).reshape(-1, 2)])


def _passing(
    ranges: np.ndarray, tests: dict[str, Callable[[int, int], np.ndarray]], left_out: dict[str, int]
) -> Iterator[np.ndarray]:
    """Block after block, the ranges of rows that pass all tests; counts in ``left_out`` those that do not."""
    for start in range(int(ranges[:1, 0].sum()), int(ranges[-1:, 1].sum()), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, int(ranges[-1, 1]))
        first, last = np.searchsorted(ranges[:, 1], start, side="right"), np.searchsorted(ranges[:, 0], stop)
        if first == last:
            continue
        inside = np.clip(ranges[first:last], start, stop) - start
        edges = np.zeros(stop - start + 1, dtype=np.int8)
        np.add.at(edges, inside[:, 0], 1)
        np.add.at(edges, inside[:, 1], -1)
        passes = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
        for name, test in tests.items():
            kept = passes & test(start, stop)
            left_out[name] += int(passes.sum()) - int(kept.sum())
            passes = kept
        bounds = np.flatnonzero(np.diff(passes, prepend=False, append=False))
        yield start + bounds.reshape(-1, 2)


def _between(values: np.ndarray, first: int, last: int) -> np.ndarray:
    return (values >= first) & (values <= last)


def _ranges_of_documents(asked: Sequence[str], documents: Sequence[DocumentRows], where: str) -> np.ndarray:
    wanted, found = set(asked), set()
    patterns = {pattern: re.compile(fnmatch.translate(pattern)) for pattern in asked if re.search(r"[*?\[]", pattern)}
    chosen = []
    for document in documents:
        matching = {document.id} & wanted | {p for p, compiled in patterns.items() if compiled.match(document.id)}
        if matching:
            found |= matching
            chosen.append((document.first_row, document.first_row + document.rows))
    if missing := [pattern for pattern in asked if pattern not in found]:
        raise UserError(
            f"No document of {where} is called {missing[0]!r}; documents are called, for example, "
            f"{documents[0].id!r}. Correct the name, or use * for what may vary."
        )
    return _joined([np.array(chosen, dtype=np.int64).reshape(-1, 2)])


def _intersect(ranges: np.ndarray, others: np.ndarray) -> np.ndarray:
    """What is in both; each (n, 2), ascending and disjoint."""
    first = np.searchsorted(others[:, 1], ranges[:, 0], side="right")
    counts = np.maximum(np.searchsorted(others[:, 0], ranges[:, 1], side="left") - first, 0)
    mine = np.repeat(np.arange(len(ranges)), counts)
    theirs = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(mine))
    starts = np.maximum(ranges[mine, 0], others[theirs, 0])
    stops = np.minimum(ranges[mine, 1], others[theirs, 1])
    return _joined([np.stack([starts, stops], axis=1)])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Ascending ranges as one array, empty ones dropped and neighbours joined."""
    ranges = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    if not len(ranges):
        return ranges
    new = np.append(True, ranges[1:, 0] != ranges[:-1, 1])
    last = np.append(new[1:], True)
    return np.stack([ranges[new, 0], ranges[last, 1]], axis=1)


def _count(ranges: np.ndarray) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())
