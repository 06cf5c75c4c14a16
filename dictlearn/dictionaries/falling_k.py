"""A k that falls during training: latents get a share of the rows before few are active.

Makhzani and Frey 2013 (arXiv 1312.5663), who saw units that were never used where a small k was there from the start.
"""

from __future__ import annotations


def falling_k(k_start: int | None, k: int, share: float, step: int, steps: int) -> int:
    """From ``k_start`` linearly to ``k`` over the first ``share`` of a run; ``k`` throughout without a start."""
    if k_start is None:
        return k
    last = max(1, round(share * steps) - 1)
    return k_start - round((k_start - k) * min(1.0, step / last))
