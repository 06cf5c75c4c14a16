"""A store of known rows, small enough to make in a blink: three hooks of three types, three full shards and a tail.

Run as ``python -m tests.activation_store.small_store LOCATION [COMPRESSION [ROWS]]`` it makes or continues the store,
as a harvest would, says so when it begins, and prints how many batches it computed: the process that is killed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from activation_store.bfloat16 import from_float32
from activation_store.disk import Disk
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter

ROWS = 430
BATCH_ROWS = 37
GEOMETRY = Geometry(rows_per_chunk=16, rows_per_shard=128)
HOOKS = [
    HookSpec("blocks.0.hook_resid_post", (8,), "bfloat16"),
    HookSpec("blocks.0.attn.hook_z", (2, 3), "float16"),
    HookSpec("blocks.1.hook_mlp_out", (4,), "float32"),
]
PROVENANCE = {"model": {"name": "tiny", "fingerprint": "sha256:00"}, "versions": {"numpy": "2"}}


def plan(rows: int = ROWS) -> StorePlan:
    """Documents of 0 to 59 rows; every fourth is held out; one has a name beyond ASCII."""
    documents: list[DocumentRows] = []
    row = 0
    while row < rows:
        n = min(rows - row, len(documents) * 22 % 60)
        split = "held-out" if len(documents) % 4 == 1 else "train"
        documents.append(DocumentRows(f"lib/é{len(documents)}.py", split, row, n))
        row += n
    return StorePlan(rows, documents, excluded={"bos": len(documents)}, batches={"seed": 3, "context": 50})


def document_of_row(rows: int = ROWS) -> np.ndarray:
    documents = plan(rows).documents
    return np.repeat(np.arange(len(documents)), [document.rows for document in documents])


def values(hook: HookSpec, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of a hook as float32, within -1..1, without a random generator that could change.

    The first value of row i is i, and rows 48..63 are a chunk of zeros.
    """
    places = np.arange(start * hook.d, stop * hook.d, dtype=np.uint64) + np.uint64(hook.d)
    scattered = (places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    rows = (scattered.astype(np.float32) / np.float32(1 << 23) - 1).reshape(stop - start, *hook.shape)
    rows.reshape(stop - start, hook.d)[:, 0] = np.arange(start, stop)
    rows[(np.arange(start, stop) >= 48) & (np.arange(start, stop) < 64)] = 0
    return rows


def stored(hook: HookSpec, start: int, stop: int) -> np.ndarray:
    """The same as it is on disk."""
    rows = values(hook, start, stop)
    return from_float32(rows) if hook.dtype == "bfloat16" else rows.astype(hook.array.carrier)


def token_ids(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop) * 7 % 1000


def append(writer: StoreWriter, start: int, stop: int, hooks: list[HookSpec] = HOOKS) -> None:
    writer.append(
        {hook.name: stored(hook, start, stop) for hook in hooks},
        token_ids(start, stop),
        np.arange(start, stop) % 50,
        document_of_row(writer.plan.rows)[start:stop],
        first_row=start,
    )


def open_writer(path: Path | str, disk: Disk | None = None, **changed: object) -> StoreWriter:
    """A writer of the small store at a path or URL; ``changed`` replaces any of what it is made from."""
    arguments = {"plan": plan(), "hooks": HOOKS, "geometry": GEOMETRY, "provenance": PROVENANCE} | changed
    return StoreWriter(path, disk=disk, **arguments)  # type: ignore[arg-type]


def make(path: Path | str, disk: Disk | None = None, *, compression: str = "none", rows: int = ROWS) -> int:
    """Make the store or continue it; returns how many batches were computed."""
    batches = 0
    with open_writer(path, disk, plan=plan(rows), compression=compression) as writer:
        for start in range(writer.next_row // BATCH_ROWS * BATCH_ROWS, rows, BATCH_ROWS):
            if writer.complete:
                break
            append(writer, start, min(rows, start + BATCH_ROWS))
            batches += 1
        writer.finish()
    return batches


def moved(documents: list[DocumentRows], index: int, **changed: object) -> list[DocumentRows]:
    """The documents with one of them changed."""
    return [replace(d, **changed) if i == index else d for i, d in enumerate(documents)]  # type: ignore[arg-type]


if __name__ == "__main__":
    location, *options = sys.argv[1:]
    asked = dict(zip(("compression", "rows"), options, strict=False))
    print("begins", file=sys.stderr, flush=True)
    print(make(location, compression=asked.get("compression", "none"), rows=int(asked.get("rows", ROWS))))
