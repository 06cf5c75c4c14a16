"""All that a store shows, read through every path there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from activation_store.errors import UserError
from activation_store.store import Store


def read_everything(store: Store) -> dict[str, np.ndarray]:
    """Every row of every array, by ranges and by numbers, the statistics and the documents."""
    rows = np.arange(store.rows)
    backwards = rows[::-1].copy()
    read = {name: getattr(store, name)(0, store.rows) for name in ("token_ids", "positions", "documents")}
    for name in store.hooks:
        read[name] = store.read_rows(name, 0, store.rows)
        read[f"norms of {name}"] = store.norms(name, 0, store.rows)
        assert np.array_equal(store.take(name, backwards)[::-1], read[name])
        assert np.array_equal(store.take_norms(name, backwards)[::-1], read[f"norms of {name}"])
        if store.complete:
            statistics = dataclasses.asdict(store.statistics(name))
            statistics.pop("excluded")  # of the manifest, not of the hook
            read |= {f"{part} of {name}": np.asarray(value) for part, value in statistics.items()}
    read["split"] = store.split_ranges("train")
    table = [(entry.id, entry.split, entry.first_row, entry.rows) for entry in store.document_table]
    read["document_table"] = np.array(table, dtype=object)
    return read


def same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return {name: value.tolist() if value.dtype == object else value.tobytes() for name, value in found.items()} == {
        name: value.tolist() if value.dtype == object else value.tobytes() for name, value in expected.items()
    }


def refusal_of(read: Callable[[], object]) -> str | None:
    """The sentence with which something is refused; None when it is not."""
    try:
        read()
    except UserError as refusal:
        return str(refusal)
    return None
