"""What a person wants to know of a store, as data. Drawing it is somebody else's work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from activation_store.spec import SPLITS
from activation_store.store import Store


@dataclass(frozen=True)
class HookDescription:
    """One hook: the shape of a row, the type on disk, bytes of committed rows, and the mean norm once it is known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    mean_norm: float | None


@dataclass(frozen=True)
class SplitDescription:
    """One split: documents with committed rows, and those rows."""

    name: str
    documents: int
    rows: int


@dataclass(frozen=True)
class StoreDescription:
    """A store at a glance. ``bytes`` counts the rows of all arrays; metadata and indexes add little."""

    path: str
    fingerprint: str
    rows: int
    rows_planned: int
    complete: bool
    bytes: int
    hooks: list[HookDescription]
    splits: list[SplitDescription]
    excluded: dict[str, int]
    rows_per_chunk: int
    rows_per_shard: int
    provenance: dict[str, Any]


def describe(store: Store) -> StoreDescription:
    """Everything `dictlearn store info` shows. Reads metadata, the document table and the statistics; no rows."""
    manifest = store.manifest
    hooks = [
        HookDescription(
            name=hook.name,
            shape=hook.shape,
            dtype=hook.dtype,
            bytes=store.rows * hook.array.row_bytes,
            mean_norm=store.statistics(hook.name).mean_norm if store.complete else None,
        )
        for hook in manifest.hooks
    ]
    started = [document for document in store.document_table if document.rows and document.first_row < store.rows]
    splits = [
        SplitDescription(
            name=split,
            documents=sum(document.split == split for document in started),
            rows=sum(stop - start for start, stop in store.split_rows(split)),
        )
        for split in SPLITS
    ]
    return StoreDescription(
        path=store.location,
        fingerprint=store.fingerprint,
        rows=store.rows,
        rows_planned=manifest.rows_planned,
        complete=store.complete,
        bytes=sum(store.rows * array.row_bytes for array in manifest.arrays),
        hooks=hooks,
        splits=splits,
        excluded=dict(manifest.excluded),
        rows_per_chunk=manifest.geometry.rows_per_chunk,
        rows_per_shard=manifest.geometry.rows_per_shard,
        provenance=manifest.provenance,
    )
