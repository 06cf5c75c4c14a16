"""What a person wants to know of a store, as data. Drawing it is somebody else's work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from activation_store.spec import SPLITS, STAGING_FOLDER, HookSpec
from activation_store.store import Store

FIRST_TOKENS = 40
"""Token ids of the beginning that a description has."""


@dataclass(frozen=True)
class HookDescription:
    """One hook: the shape of a row, the type on disk, bytes of its files, and what is known once the store is complete.

    ``norm_outliers`` counts rows whose norm is more than `activation_store.spec.NORM_OUTLIER_RATIO` times the median.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    mean_norm: float | None
    median_norm: float | None
    norm_outliers: int | None


@dataclass(frozen=True)
class SplitDescription:
    """One split: documents with committed rows, and those rows."""

    name: str
    documents: int
    rows: int


@dataclass(frozen=True)
class StoreDescription:
    """A store at a glance. ``bytes`` counts the files of the store, without those of a commit under way.

    ``first_token_ids`` are those of the first rows.
    """

    location: str
    fingerprint: str
    rows: int
    rows_planned: int
    complete: bool
    bytes: int
    compression: str
    hooks: list[HookDescription]
    splits: list[SplitDescription]
    excluded: dict[str, int]
    rows_per_chunk: int
    rows_per_shard: int
    first_token_ids: list[int]
    provenance: dict[str, Any]


def describe(store: Store) -> StoreDescription:
    """Everything `dictlearn store info` shows. Reads metadata, the document table, statistics and the first tokens."""
    manifest = store.manifest
    sizes = {key: size for key, size in store.place.sizes().items() if not key.startswith(f"{STAGING_FOLDER}/")}
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
        location=store.location,
        fingerprint=store.fingerprint,
        rows=store.rows,
        rows_planned=manifest.rows_planned,
        complete=store.complete,
        bytes=sum(sizes.values()),
        compression=manifest.compression,
        hooks=[_describe_hook(store, hook, sizes) for hook in manifest.hooks],
        splits=splits,
        excluded=dict(manifest.excluded),
        rows_per_chunk=manifest.geometry.rows_per_chunk,
        rows_per_shard=manifest.geometry.rows_per_shard,
        first_token_ids=store.token_ids(0, min(store.rows, FIRST_TOKENS)).tolist(),
        provenance=manifest.provenance,
    )


def _describe_hook(store: Store, hook: HookSpec, sizes: dict[str, int]) -> HookDescription:
    statistics = store.statistics(hook.name) if store.complete else None
    return HookDescription(
        name=hook.name,
        shape=hook.shape,
        dtype=hook.dtype,
        bytes=sum(size for key, size in sizes.items() if key.startswith(f"{hook.array.path}/")),
        mean_norm=None if statistics is None else statistics.mean_norm,
        median_norm=None if statistics is None else statistics.median_norm,
        norm_outliers=None if statistics is None else statistics.norm_outliers,
    )
