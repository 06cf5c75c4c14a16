"""The largest of many numbers, in an order that does not depend on luck."""

from __future__ import annotations

import numpy as np


def largest(values: np.ndarray, n: int) -> np.ndarray:
    """Positions of the ``n`` largest of values (m,), largest first; among equals the earlier ones first."""
    if n < len(values):
        least = np.partition(values, len(values) - n)[len(values) - n]
        positions = np.flatnonzero(values >= least)
    else:
        positions = np.arange(len(values))
    return positions[np.argsort(-values[positions], kind="stable")][:n]
