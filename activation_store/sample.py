"""Rows drawn at random, each with the tokens around it and its length at every hook: to look a store in the eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream
from activation_store.store import Store


@dataclass(frozen=True)
class SampledRow:
    """One row. ``token_ids[index]`` is its own token, the others are those around it in its document."""

    row: int
    document: str
    split: str
    position: int
    token_ids: list[int]
    index: int
    norms: dict[str, float]


def draw_rows(
    store: Store, rows: int, seed: int = 0, hooks: Sequence[str] | None = None, before: int = 16, after: int = 8
) -> list[SampledRow]:
    """``rows`` different rows of those that are committed, in ascending order; all of them when there are not so many.

    Args:
        seed: the same seed draws the same rows.
        hooks: the hooks whose norms are wanted; all of the store's when None.
        before, after: how many tokens around each.

    Raises:
        UserError: a number of rows below 1, an unknown hook, or a store without rows.
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; it must be at least 1.")
    names = [store.hook(name).name for name in hooks] if hooks is not None else list(store.hooks)
    if not store.rows:
        raise UserError(f"Store {store.location} has no rows yet.")
    chosen = np.sort(numpy_stream(seed, "sample").choice(store.rows, min(rows, store.rows), replace=False))
    norms = {name: store.take_norms(name, chosen) for name in names}
    positions = store.take_row_array("positions", chosen)
    drawn = []
    for number, row in enumerate(chosen.tolist()):
        around = store.text_around(row, before, after)
        document = store.document_table[around.document]
        drawn.append(
            SampledRow(
                row=row,
                document=document.id,
                split=document.split,
                position=int(positions[number]),
                token_ids=around.token_ids.tolist(),
                index=around.index,
                norms={name: float(norms[name][number]) for name in names},
            )
        )
    return drawn
