"""Examples of a latent's activations: which are shown, and the text around each.

Axes: n activations of the latent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dictlearn.feature_index.index import FeatureIndex
from dictlearn.feature_index.ranking import largest

BEFORE, AFTER = 24, 10
"""Tokens of a strip before and after its peak: what a reader takes in at a glance on one line or two."""

ALIKE_BEFORE, ALIKE_AFTER = 8, 4
"""Two examples are the same text when these many tokens around their peaks are: source code is full of passages that
differ only further out, and twenty of them teach a reader no more than one."""

LOOKED_AT_PER_EXAMPLE = 20
"""Candidates looked at for each example wanted, before a band gives up finding one with another text."""


@dataclass(frozen=True)
class TokenStrip:
    """Consecutive tokens of one document around an activation.

    Attributes:
        tokens: the text of each token, safe to show as text.
        token_ids: their numbers in the vocabulary.
        activations: the latent's activation on each token; 0 where it did not fire.
        peak: which of the tokens this example is about; ``activations[peak]`` is its ``value``.
        row: the row of the store of the peak; the strip begins at row ``row - peak``.
        seen_from: the first token that the language model had before it when it computed the peak. Earlier tokens are
            the document's text, but were in another window.
        document, split: id of the document, and "train" or "held-out".
        begins_document, ends_document: whether the strip reaches the document's first or last row.
        copies: further candidates for this place with the same text around the peak; they are not shown.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    activations: tuple[float, ...]
    peak: int
    value: float
    row: int
    seen_from: int
    document: str
    split: str
    begins_document: bool
    ends_document: bool
    copies: int = 0


@dataclass(frozen=True)
class Band:
    """Examples from one range of activations.

    Attributes:
        kind: "top" (the largest), "bottom" (the most negative, where there are negative ones) or "quantile".
        title: the same in words.
        low, high: smallest and largest activation in the band.
        count: activations in the band, of which ``strips`` are shown; strongest first.
        same_text, overlapping: candidates passed over because a strip already chosen has the same text, or shows that
            very token.
    """

    kind: str
    title: str
    low: float
    high: float
    count: int
    strips: tuple[TokenStrip, ...]
    same_text: int
    overlapping: int


class StripCutter:
    """Cuts strips out of the text around activations of one latent, given as rows (n,) ascending and values (n,)."""

    def __init__(self, index: FeatureIndex, rows: np.ndarray, values: np.ndarray, before: int, after: int):
        self.index = index
        self.rows = rows
        self.values = values
        self.before = before
        self.after = after
        self._first_rows = index.array("documents/first_rows")
        self._document_rows = index.array("documents/rows")

    def bounds(self, row: int) -> tuple[int, int, int]:
        """First row of the strip around ``row``, the row after its last, and the document."""
        document = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        first = int(self._first_rows[document])
        stop = min(first + int(self._document_rows[document]), self.index.rows)
        return max(first, row - self.before), min(stop, row + self.after + 1), document

    def strip(self, entry: int, copies: int) -> TokenStrip:
        """The strip around activation number ``entry`` of the latent."""
        row = int(self.rows[entry])
        start, stop, document = self.bounds(row)
        ids = self.index.read("text/token_ids", start, stop).tolist()
        activations = np.zeros(stop - start, dtype=np.float32)
        low, high = np.searchsorted(self.rows, (start, stop))
        activations[self.rows[low:high] - start] = self.values[low:high]
        first = int(self._first_rows[document])
        return TokenStrip(
            tokens=tuple(map(self.index.token_text, ids)),
            token_ids=tuple(ids),
            activations=tuple(activations.tolist()),
            peak=row - start,
            value=float(self.values[entry]),
            row=row,
            seen_from=self._seen_from(start, row),
            document=self.index.document_id(document),
            split="held-out" if self.index.array("documents/held_out")[document] else "train",
            begins_document=start == first,
            ends_document=stop == first + int(self._document_rows[document]),
            copies=copies,
        )

    def _seen_from(self, start: int, row: int) -> int:
        """Positions count upwards within a window of the model, and fall back where the next one begins."""
        positions = self.index.read("text/positions", start, row + 1)
        breaks = np.flatnonzero(np.diff(positions) <= 0)
        return int(breaks[-1]) + 1 if len(breaks) else 0

    def choose(self, candidates: np.ndarray, wanted: int) -> tuple[tuple[TokenStrip, ...], int, int]:
        """Strips for up to ``wanted`` of the candidate entries, in order, no two alike.

        A candidate is passed over when the text around it (`ALIKE_BEFORE`, `ALIKE_AFTER`) is that of one chosen before,
        or when its token stands in the strip of one chosen before. Returns the strips and how many were passed over for
        either reason.
        """
        chosen: dict[tuple[int, bytes], list[int]] = {}
        covered: list[tuple[int, int]] = []
        same_text = overlapping = 0
        for entry in candidates.tolist():
            row = int(self.rows[entry])
            if any(begin <= row < end for begin, end in covered):
                overlapping += 1
                continue
            start, stop, _ = self.bounds(row)
            first, last = max(start, row - ALIKE_BEFORE), min(stop, row + ALIKE_AFTER + 1)
            key = (row - first, self.index.read("text/token_ids", first, last).tobytes())
            if key in chosen:
                chosen[key][1] += 1
                same_text += 1
                continue
            if len(chosen) == wanted:
                break
            chosen[key] = [entry, 0]
            covered.append((start, stop))
        return tuple(self.strip(entry, copies) for entry, copies in chosen.values()), same_text, overlapping


def bands(cut: StripCutter, values: np.ndarray, examples: int, bins: int, examples_per_bin: int) -> tuple[Band, ...]:
    """The top, the bottom where there is one, and ``bins`` bands of equal numbers of activations."""
    if not len(values):
        return ()
    found = []
    positive, negative = np.flatnonzero(values > 0), np.flatnonzero(values < 0)
    if len(positive) and examples:
        strongest = positive[largest(values[positive], examples * LOOKED_AT_PER_EXAMPLE)]
        found.append(_band("top", "Largest activations", cut, values[positive], strongest, examples))
    if len(negative) and examples:
        strongest = negative[largest(-values[negative], examples * LOOKED_AT_PER_EXAMPLE)]
        found.append(_band("bottom", "Most negative activations", cut, values[negative], strongest, examples))
    bins = min(bins, len(values))
    if bins < 1:
        return tuple(found)
    edges = np.linspace(0, len(values), bins + 1).round().astype(np.int64)
    spaced = [
        np.unique(np.linspace(start, stop - 1, 2 * examples_per_bin + 1).round().astype(np.int64))
        for start, stop in itertools.pairwise(edges)
    ]
    # Only the entries at these ranks have to be in order: a partition is linear in the number of activations.
    by_rank = np.argpartition(values, np.unique(np.concatenate([*spaced, edges[1:] - 1])))
    for number in reversed(range(bins)):
        ranks = spaced[number]
        # The odd ones are the middles of equal parts of the band; the even ones stand in for those that are alike.
        candidates = ranks if len(ranks) <= examples_per_bin else np.concatenate([ranks[1::2], ranks[::2]])
        strips, same_text, overlapping = cut.choose(by_rank[candidates], examples_per_bin)
        found.append(
            Band(
                kind="quantile",
                title=f"{number * 100 / bins:.0f} % to {(number + 1) * 100 / bins:.0f} % of activations by size",
                low=float(values[by_rank[edges[number]]]),
                high=float(values[by_rank[edges[number + 1] - 1]]),
                count=int(edges[number + 1] - edges[number]),
                strips=tuple(sorted(strips, key=lambda strip: -strip.value)),
                same_text=same_text,
                overlapping=overlapping,
            )
        )
    return tuple(found)


def _band(kind: str, title: str, cut: StripCutter, of: np.ndarray, candidates: np.ndarray, examples: int) -> Band:
    strips, same_text, overlapping = cut.choose(candidates, examples)
    return Band(kind, title, float(of.min()), float(of.max()), len(of), strips, same_text, overlapping)
