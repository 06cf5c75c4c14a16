"""A store of one hook of 10 MiB in 20 shards: for what needs some size (a full disk, a buffer that does not hold all).

Its values have few different bytes, so that compression takes some of them away; row i begins with i.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from activation_store.disk import Disk
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter

ROWS, WIDTH, BATCH = 40_960, 64, 1000
HOOK = HookSpec("x", (WIDTH,), "float32")
GEOMETRY = Geometry(rows_per_chunk=128, rows_per_shard=2048)
DOCUMENTS = [DocumentRows(str(i), "held-out" if i % 5 == 0 else "train", i * 640, 640) for i in range(ROWS // 640)]


def stored(start: int, stop: int) -> np.ndarray:
    """Rows start..stop (n, WIDTH) float32."""
    rows = np.arange(start, stop, dtype=np.uint32)[:, None] * np.uint32(0x9E3779B1) + np.arange(WIDTH, dtype=np.uint32)
    values = (rows * np.uint32(0x85EBCA6B) >> np.uint32(20)).astype(np.float32)
    values[:, 0] = np.arange(start, stop)
    return values


def make(
    path: Path | str, disk: Disk | None = None, *, compression: str = "none", geometry: Geometry = GEOMETRY
) -> None:
    """Make the store or continue it."""
    plan = StorePlan(ROWS, DOCUMENTS)
    with StoreWriter(path, plan, [HOOK], geometry, {}, compression=compression, disk=disk) as writer:
        for start in range(writer.next_row, ROWS, BATCH):
            rows = np.arange(start, min(ROWS, start + BATCH))
            writer.append({HOOK.name: stored(int(rows[0]), int(rows[-1]) + 1)}, rows, rows % 640, rows // 640)
        writer.finish()
