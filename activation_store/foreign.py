"""Rows that somebody else's file holds, on their way into a store.

A file is read twice. The first pass looks at every value and takes a fingerprint, so that a file that cannot be used
is refused before anything is made, and an import that was interrupted is not continued from a file that has changed.
The second pass writes; interrupted, the same import continues at the first row that is not committed.

What a file does not tell is not invented: a token id or a position that is not known is `UNKNOWN`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from activation_store.bfloat16 import from_float32, to_float32
from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from activation_store.spec import ACTIVATION_TYPES, UNKNOWN, DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store
from activation_store.writer import StoreWriter

UNKNOWN_MODEL = {"name": "(unknown)", "fingerprint": None}
"""What provenance says of the model when nobody does: a name that no model can have."""

BLOCK_BYTES = 16 << 20
"""Bytes of one row array in memory at a time."""

HELD_OUT_SHARE = 10
"""One row in ten, at the end of the file, is held out: neighbours in a file usually come from one text, so drawing lots
row by row would put both halves of a sentence on either side."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows from ``first_row`` on: hook name -> (n, *shape) as in the file; ids and positions (n,)."""

    first_row: int
    rows: Mapping[str, np.ndarray]
    token_ids: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class ForeignRows:
    """Somebody else's rows, whatever the format.

    Attributes:
        name: what errors call the file.
        hooks: as they will be stored; ``dtype`` need not be the file's.
        rows: how many there are.
        blocks: ``blocks(row)`` yields the rows from the block on that holds ``row``.
        documents: ``documents(fingerprint)`` are the documents, given the fingerprint of the token ids, or of all
            values where there are none.
        batches: for the plan, in which windows the model saw the tokens; left out where these are unknown.
        origin: for the provenance, what the file is.
    """

    name: str
    hooks: tuple[HookSpec, ...]
    rows: int
    blocks: Callable[[int], Iterator[Block]]
    documents: Callable[[str], list[DocumentRows]]
    batches: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)


def import_rows(
    source: ForeignRows,
    location: str,
    model: Mapping[str, Any] | None = None,
    geometry: Geometry | None = None,
    compression: str = "none",
    progress: Progress | None = None,
) -> None:
    """Make a store of foreign rows, or continue one.

    Args:
        location: the store to make.
        model: provenance of the language model, if it is known.
        geometry: rows per chunk and shard; the default when not given.
        compression: "none" or "zstd".

    Raises:
        UserError: a value that is not a finite number in the type asked for; what `StoreWriter` refuses.
    """
    progress = progress or NoProgress()
    of_values, of_tokens = _fingerprints(source, progress)
    documents = source.documents(of_tokens or of_values)
    plan = StorePlan(
        rows=source.rows,
        documents=documents,
        # Stores of the same tokens can be merged hook by hook: the plan names the tokens, the provenance the values.
        batches={"bos_token_id": None, **(source.batches if of_tokens else {}), "fingerprint": of_tokens or of_values},
    )
    provenance = {
        "model": dict(model or UNKNOWN_MODEL),
        "corpus": {"name": source.name, "fingerprint": of_tokens},
        "imported": {**source.origin, "fingerprint": of_values},
    }
    first_rows = np.array([document.first_row for document in documents])
    geometry = geometry or Geometry()
    with (
        StoreWriter(location, plan, source.hooks, geometry, provenance, compression=compression) as writer,
        progress.task(f"Importing {source.name}", total=source.rows, unit="rows") as task,
    ):
        if writer.complete:
            return
        task.advance(writer.next_row)
        for block in source.blocks(writer.next_row):
            before, numbers = writer.next_row, block.first_row + np.arange(len(block.token_ids))
            writer.append(
                {hook.name: as_stored(block.rows[hook.name], hook.dtype) for hook in source.hooks},
                block.token_ids,
                block.positions,
                np.searchsorted(first_rows, numbers, side="right") - 1,
                first_row=block.first_row,
            )
            task.advance(writer.next_row - before)
        writer.finish()


def has_tokens(store: Store) -> bool:
    """Whether the tokens of a store's rows are known."""
    return store.rows > 0 and int(store.token_ids(0, 1)[0]) != UNKNOWN


def two_splits(name: str, rows: int) -> list[DocumentRows]:
    """The documents of rows that come without any: the first nine tenths, and the held-out rest."""
    held_out = rows // HELD_OUT_SHARE
    parts = [DocumentRows(f"{name} (training rows)", "train", 0, rows - held_out)]
    if held_out:
        parts.append(DocumentRows(f"{name} (held-out rows)", "held-out", rows - held_out, held_out))
    return parts


def stored_dtype(found: str, asked: str | None, where: str) -> str:
    """The type in which values of the type ``found`` are stored: the same, unless another is asked for by name.

    Raises:
        UserError: a type that a store does not have, and none was asked for.
    """
    if asked is not None and asked not in ACTIVATION_TYPES:
        raise UserError(f"Activations cannot be stored as {asked!r}; use {', '.join(ACTIVATION_TYPES)}.")
    if found in ACTIVATION_TYPES:
        return asked or found
    if found == "float64":
        if asked is None:
            raise UserError(
                f"{where} holds float64, which a store does not: rounding it is yours to decide, with "
                f"--dtype {', '.join(ACTIVATION_TYPES[:-1])} or {ACTIVATION_TYPES[-1]}."
            )
        return asked
    raise UserError(f"{where} holds {found}; activations are {', '.join(ACTIVATION_TYPES)} or float64.")


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats, or bfloat16 as uint16 bits, in the carrier of ``dtype``. Exact where the type stays the same."""
    if values.dtype == np.uint16:
        return values if dtype == "bfloat16" else as_stored(to_float32(values), dtype)
    with np.errstate(over="ignore"):  # what overflows is found and named by the first pass
        if dtype == "bfloat16":
            return from_float32(values)
        return values.astype(dtype)


def _fingerprints(source: ForeignRows, progress: Progress) -> tuple[str, str | None]:
    """Of the values in the file and of the token ids; None where these are not known. Refuses what is not finite."""
    of_values, of_tokens = xxhash.xxh3_128(), xxhash.xxh3_128()
    tokens_known = True
    with progress.task(f"Checking {source.name}", total=source.rows, unit="rows") as task:
        for block in source.blocks(0):
            for hook in source.hooks:
                values = np.ascontiguousarray(block.rows[hook.name])
                _refuse_non_finite(values, hook, block.first_row, source.name)
                of_values.update(values.reshape(-1).view(np.uint8))
            of_tokens.update(block.token_ids.astype("<i4").view(np.uint8))
            tokens_known = tokens_known and bool((block.token_ids >= 0).all())
            task.advance(len(block.token_ids))
    return "xxh3:" + of_values.hexdigest(), "xxh3:" + of_tokens.hexdigest() if tokens_known else None


def _refuse_non_finite(values: np.ndarray, hook: HookSpec, first_row: int, name: str) -> None:
    stored = as_stored(values, hook.dtype)
    finite = np.isfinite(to_float32(stored) if stored.dtype == np.uint16 else stored)
    if finite.all():
        return
    place = np.unravel_index(int(np.argmin(finite)), finite.shape)
    found = to_float32(values[place][None])[0] if values.dtype == np.uint16 else values[place]
    where = f"Row {first_row + int(place[0])} of {hook.name} in {name}"
    if np.isfinite(found):
        wider = ": ask for --dtype bfloat16 or --dtype float32" if hook.dtype == "float16" else ""
        raise UserError(f"{where} holds {found:.6g}, too large for {hook.dtype}{wider}. Nothing was imported.")
    raise UserError(f"{where} holds {found}; a store takes finite numbers only. Nothing was imported.")
