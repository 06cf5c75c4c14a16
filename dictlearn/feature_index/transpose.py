"""Second pass: from parts sorted by latent within, to the activations of each latent in one place, and its statistics.

Latents are taken in ranges whose activations fit in memory. For a range, each part's slice is read and every activation
goes to its place: a counting sort over parts, so nothing is read twice and rows come out in ascending order. When a
range's activations are on disk its statistics are kept under the range's name, which marks it as done.

Axes: S latents, L latents of a range, n activations, K slots per row of a part, T listed.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_store.errors import UserError
from dictlearn.feature_index.encode import Part
from dictlearn.feature_index.ranking import largest
from dictlearn.feature_index.spec import HISTOGRAM_BINS, LISTED, QUANTILE_LEVELS
from dictlearn.feature_index.staging import Staging

BYTES_PER_ACTIVATION = 32
"""Memory per activation of a range: row and value (8), a part's slice of them (8), where each goes (16)."""

PAIR_VALUES = 1 << 18
"""Pairs counted at a time, and counters they are added up in: 2 MiB each, which stay in a core's cache."""

PER_LATENT = (
    "latents/count",
    "latents/held_out_count",
    "latents/maximum",
    "latents/minimum",
    "latents/total",
    "latents/peak_row",
    "latents/quantiles",
    "latents/histogram",
    "latents/top_token",
    "latents/top_token_share",
    "coactive/latents",
    "coactive/counts",
)
"""The arrays that are made here, range by range."""


@dataclass(frozen=True)
class Texts:
    """What the statistics need to know of the text.

    Attributes:
        tokens_of: rows (n,) -> the token of each.
        held_out: (ranges, 2) ascending ranges of held-out rows.
        vocabulary: number of tokens.
    """

    tokens_of: Callable[[np.ndarray], np.ndarray]
    held_out: np.ndarray
    vocabulary: int


def count_by_latent(parts: list[Part], d_sae: int) -> np.ndarray:
    """(S,) activations of each latent."""
    counts = np.zeros(d_sae, dtype=np.int64)
    for part in parts:
        counts += np.diff(part.offsets)
    return counts


def histogram_edges(parts: list[Part]) -> np.ndarray:
    """Edges for the activations there are: a sign on both sides only if some are negative.

    The outermost edge is a power of sqrt(2), so that another store's histograms have the same edges further in.
    """
    most, negative = 0.0, False
    for part in parts:
        n = int(part.offsets[-1])
        for first in range(0, n, 1 << 20):
            values = part.values(first, min(first + (1 << 20), n))
            most = max(most, float(np.abs(values).max()))
            negative |= bool((values < 0).any())
    exponent = int(np.ceil(2 * np.log2(most))) if most else 0
    steps = 2.0 ** (np.arange(exponent - HISTOGRAM_BINS, exponent + 1) / 2)
    return np.concatenate([-steps[::-1], steps]) if negative else np.concatenate([[0.0], steps])


def plan_ranges(counts_S: np.ndarray, memory_bytes: int, coactive: bool) -> list[tuple[int, int]]:
    """Consecutive ranges of latents that each fit in memory.

    Raises:
        UserError: a single latent does not.
    """
    S = len(counts_S)
    most = memory_bytes // 2 // BYTES_PER_ACTIVATION
    if counts_S.max(initial=0) > most:
        latent = int(counts_S.argmax())
        needed = -(-int(counts_S[latent]) * BYTES_PER_ACTIVATION * 4 // 2**20)
        raise UserError(
            f"Latent {latent} fires in {int(counts_S[latent]):,} rows, more than fit into memory_mb; run the same "
            f"command with --memory-mb {needed}, and what has been encoded will be used."
        )
    most_latents = max(1, memory_bytes // 2 // (4 * S)) if coactive else S
    ranges, start, held = [], 0, 0
    for latent, count in enumerate(counts_S.tolist()):
        if latent > start and (held + count > most or latent - start == most_latents):
            ranges.append((start, latent))
            start, held = latent, 0
        held += count
    ranges.append((start, S))
    return ranges


def transpose(
    parts: list[Part],
    counts_S: np.ndarray,
    ranges: list[tuple[int, int]],
    edges: np.ndarray,
    texts: Texts,
    coactive: bool,
    staging: Staging,
    advance: Callable[[int], None],
) -> dict[str, np.ndarray]:
    """Write ``activations/*`` and return the arrays of `PER_LATENT`, whole."""
    offsets = np.concatenate([[0], np.cumsum(counts_S)])
    N = int(offsets[-1])
    all_rows, all_values = staging.long_array("activations/rows", N), staging.long_array("activations/values", N)
    staging.write_array("activations/offsets", offsets)
    statistics = []
    for start, stop in ranges:
        kept = staging.folder / "ranges" / f"{start}-{stop}.npz"
        if not kept.exists():
            rows, values, together_LS = _gather(parts, counts_S, start, stop, coactive)
            all_rows.write(int(offsets[start]), rows)
            all_values.write(int(offsets[start]), values)
            found = _describe(rows, values, offsets[start : stop + 1] - offsets[start], edges, texts)
            found["coactive/latents"], found["coactive/counts"] = _most_coactive(together_LS, counts_S, start, stop)
            content = io.BytesIO()
            named: dict[str, Any] = {name.replace("/", "."): found[name] for name in PER_LATENT}
            np.savez(content, **named)
            staging.replace(kept, content.getvalue(), "range")
        with np.load(kept) as there:
            statistics.append({name: there[name.replace("/", ".")] for name in PER_LATENT})
        advance(int(offsets[stop] - offsets[start]))
    return {name: np.concatenate([of_range[name] for of_range in statistics]) for name in PER_LATENT}


def _gather(
    parts: list[Part], counts_S: np.ndarray, start: int, stop: int, coactive: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows (n,) and values (n,) of latents start..stop, latent after latent, and if asked for the (L, S) rows in which
    each of them fired together with every latent."""
    counts_L = counts_S[start:stop]
    ends_L = np.cumsum(counts_L)
    rows = np.empty(int(ends_L[-1]), dtype=np.int32)
    values = np.empty(len(rows), dtype=np.float32)
    together_LS = np.zeros((stop - start, len(counts_S)), dtype=np.int32) if coactive else None
    next_L = ends_L - counts_L
    for part in parts:
        bounds = np.asarray(part.offsets[start : stop + 1])
        low, high = int(bounds[0]), int(bounds[-1])
        found_L = np.diff(bounds)
        goes_to = np.arange(high - low)
        goes_to += np.repeat(next_L - (bounds[:-1] - low), found_L)
        of_part = part.rows(low, high)
        rows[goes_to] = of_part
        values[goes_to] = part.values(low, high)
        del goes_to
        next_L += found_L
        if together_LS is not None:
            _count_pairs(part.slots, of_part - np.int32(part.start), bounds - low, together_LS)
    return rows, values, together_LS


# --- statistics -------------------------------------------------------------------------------------------------------


def _describe(
    rows: np.ndarray, values: np.ndarray, offsets: np.ndarray, edges: np.ndarray, texts: Texts
) -> dict[str, np.ndarray]:
    """The statistics of each of L latents, whose activations are the entries offsets[l]..offsets[l + 1]."""
    L = len(offsets) - 1
    found = {
        "latents/count": np.diff(offsets),
        "latents/held_out_count": np.zeros(L, dtype=np.int64),
        "latents/maximum": np.full(L, np.nan, dtype=np.float32),
        "latents/minimum": np.full(L, np.nan, dtype=np.float32),
        "latents/total": np.zeros(L),
        "latents/peak_row": np.full(L, -1, dtype=np.int64),
        "latents/quantiles": np.full((L, len(QUANTILE_LEVELS)), np.nan, dtype=np.float32),
        "latents/histogram": np.zeros((L, len(edges) - 1), dtype=np.int64),
        "latents/top_token": np.full(L, -1, dtype=np.int32),
        "latents/top_token_share": np.full(L, np.nan, dtype=np.float32),
    }
    for latent, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if start == end:
            continue
        its_rows, its_values = rows[start:end], values[start:end]
        in_order = np.sort(its_values)
        magnitudes = np.abs(its_values)
        found["latents/held_out_count"][latent] = _count_within(its_rows, texts.held_out)
        found["latents/maximum"][latent] = in_order[-1]
        found["latents/minimum"][latent] = in_order[0]
        found["latents/total"][latent] = its_values.sum(dtype=np.float64)
        found["latents/peak_row"][latent] = its_rows[int(magnitudes.argmax())]
        found["latents/quantiles"][latent] = in_order[quantile_entries(len(in_order))]
        found["latents/histogram"][latent] = in_bins(in_order, edges)
        token, share = _top_token(texts.tokens_of(its_rows), magnitudes, texts.vocabulary)
        found["latents/top_token"][latent], found["latents/top_token_share"][latent] = token, share
    return found


def quantile_entries(n: int) -> np.ndarray:
    """Which of n ascending activations are the quantiles at `QUANTILE_LEVELS`: the first that at least that share of
    them does not exceed."""
    return np.maximum(np.ceil(np.array(QUANTILE_LEVELS) * n - 1e-9).astype(np.int64) - 1, 0)


def in_bins(in_order: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many of the ascending values lie between consecutive edges; the last bin includes its upper edge."""
    inner = np.searchsorted(in_order, edges[1:-1], side="left")
    return np.diff(np.concatenate([[0], inner, [len(in_order)]]))


def _count_within(rows: np.ndarray, ranges: np.ndarray) -> int:
    """How many of the ascending rows lie in one of the ranges (n, 2)."""
    bounds = np.searchsorted(rows, ranges) if len(ranges) < len(rows) else np.searchsorted(ranges[:, 0], rows, "right")
    if len(ranges) < len(rows):
        return int((bounds[:, 1] - bounds[:, 0]).sum())
    inside = (bounds > 0) & (rows < ranges[np.maximum(bounds - 1, 0), 1]) if len(ranges) else np.zeros(len(rows), bool)
    return int(inside.sum())


def _top_token(tokens: np.ndarray, magnitudes: np.ndarray, vocabulary: int) -> tuple[int, float]:
    """The token with the largest sum of magnitudes (the lowest of equal ones), and its share of the whole."""
    if len(tokens) * 4 > vocabulary:
        sums = np.bincount(tokens, weights=magnitudes, minlength=vocabulary)
        best = int(sums.argmax())
        return best, float(sums[best] / sums.sum())
    present, which = np.unique(tokens, return_inverse=True)
    sums = np.bincount(which, weights=magnitudes)
    best = int(sums.argmax())
    return int(present[best]), float(sums[best] / sums.sum())


# --- which latents fire together --------------------------------------------------------------------------------------


def _count_pairs(slots_PK: np.ndarray, rows: np.ndarray, bounds: np.ndarray, together_LS: np.ndarray) -> None:
    """Add to ``together_LS[l, s]`` the rows of a part in which both fired.

    Args:
        slots_PK: the latents of each row of the part, S for none.
        rows: rows of the part in which the latents of the range fired, latent after latent.
        bounds: (L + 1,) where the rows of each latent begin.
    """
    L, S = together_LS.shape
    step = max(1, PAIR_VALUES // (S + 1))
    most_rows = max(1, PAIR_VALUES // slots_PK.shape[1])
    for first in range(0, L, step):
        last = min(first + step, L)
        for low in range(int(bounds[first]), int(bounds[last]), most_rows):
            high = min(low + most_rows, int(bounds[last]))
            others = slots_PK[rows[low:high]].astype(np.int64)
            of_latent = np.searchsorted(bounds[first : last + 1], np.arange(low, high), side="right") - 1
            others += (of_latent * (S + 1))[:, None]
            pairs = np.bincount(others.ravel(), minlength=(last - first) * (S + 1)).reshape(last - first, S + 1)
            together_LS[first:last] += pairs[:, :S].astype(np.int32)


def _most_coactive(
    together_LS: np.ndarray | None, counts_S: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(latents (L, T), rows together (L, T))`` with the largest Jaccard index; -1 and 0 where there are no more."""
    latents = np.full((stop - start, LISTED), -1, dtype=np.int32)
    counts = np.zeros((stop - start, LISTED), dtype=np.int64)
    if together_LS is None:
        return latents, counts
    for which in range(stop - start):
        together_LS[which, start + which] = 0
        others = np.flatnonzero(together_LS[which])
        both = together_LS[which, others].astype(np.int64)
        best = largest(both / (counts_S[start + which] + counts_S[others] - both), LISTED)
        latents[which, : len(best)] = others[best]
        counts[which, : len(best)] = both[best]
    return latents, counts
