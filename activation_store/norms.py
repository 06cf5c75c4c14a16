"""The median of a hook's norms and the rows far above it, exactly, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from activation_store.spec import NORM_OUTLIER_RATIO
from activation_store.store import Store

READ_AT_ONCE = 1 << 20


def summarise_norms(store: Store, hook: str) -> tuple[float, int]:
    """(median norm, rows above `NORM_OUTLIER_RATIO` times it) over the committed rows of ``hook``."""
    median = _lower_median(store, hook)
    limit = np.float64(NORM_OUTLIER_RATIO * median)  # a Python float would be rounded to float32 first
    above = sum(int((norms > limit).sum()) for norms in _blocks(store, hook))
    return median, above


def _lower_median(store: Store, hook: str) -> float:
    """The (n + 1) // 2-th smallest norm.

    Floats that are not negative are ordered as their bits are, so two passes count them by their upper and then by
    their lower 16 bits: 65,536 counters instead of a sorted copy.
    """
    wanted = (store.rows - 1) // 2
    counts = np.zeros(1 << 16, dtype=np.int64)
    for norms in _blocks(store, hook):
        counts += np.bincount(norms.view(np.uint32) >> 16, minlength=1 << 16)
    upper = int(np.searchsorted(np.cumsum(counts), wanted, side="right"))
    wanted -= int(counts[:upper].sum())
    counts[:] = 0
    for norms in _blocks(store, hook):
        bits = norms.view(np.uint32)
        counts += np.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=1 << 16)
    lower = int(np.searchsorted(np.cumsum(counts), wanted, side="right"))
    return float(np.array(upper << 16 | lower, dtype=np.uint32).view(np.float32))


def _blocks(store: Store, hook: str) -> Iterator[np.ndarray]:
    for start in range(0, store.rows, READ_AT_ONCE):
        yield store.norms(hook, start, min(store.rows, start + READ_AT_ONCE))
