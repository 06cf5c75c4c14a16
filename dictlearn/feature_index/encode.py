"""First pass: rows of the store to activations, in parts that fit in memory and are sorted by latent within.

A part is a run of whole batches. It is written to a folder of its own under a temporary name, synced and renamed, so a
part that is there is whole; a resumed pass continues behind the last one. Batches begin at multiples of the batch size
and that size depends on the dictionary alone, so an activation has the same bits however the rows are cut into parts.

Axes: B rows of a batch, P rows of a part, K slots per row, S latents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from activation_store.errors import UserError
from activation_store.progress import Task
from activation_store.store import Store
from dictlearn.feature_index.staging import Staging

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

DENSE_VALUES = 1 << 22
"""Pre-activations of one batch: 16 MiB in float32, of which encoders need about three."""

BYTES_PER_SLOT = 36
"""Memory per slot while a part is sorted: slots (8), the non-zero ones of them (8), row numbers, sorted copy (8), and
what scipy needs to turn one into the other."""


@dataclass(frozen=True)
class Part:
    """Activations of rows start..stop, by latent; rows ascend within a latent.

    Files: offsets (S + 1,) int64; rows (n,) int32, numbers in the store; values (n,) float32; slots (P, K) int32, the
    latents that fired in each row, S for an empty slot.
    """

    folder: Path
    start: int
    stop: int

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.load(self.folder / "offsets.npy", mmap_mode="r")

    @cached_property
    def slots(self) -> np.ndarray:
        return np.load(self.folder / "slots.npy", mmap_mode="r")

    def rows(self, first: int, last: int) -> np.ndarray:
        return self._read("rows.bin", np.int32, first, last)

    def values(self, first: int, last: int) -> np.ndarray:
        return self._read("values.bin", np.float32, first, last)

    def _read(self, name: str, dtype: type, first: int, last: int) -> np.ndarray:
        # Not mapped: each entry is wanted once, and mapped pages would count as ours.
        return np.fromfile(self.folder / name, dtype, count=last - first, offset=first * np.dtype(dtype).itemsize)


def encode_parts(
    dictionary: Dictionary, store: Store, hook: str, rows: int, memory_bytes: int, staging: Staging, task: Task
) -> list[Part]:
    """Encode rows 0..rows of ``hook``, or what is left of them, and return all parts in order of row.

    Raises:
        UserError: an activation is not finite.
    """
    parts = _parts_there(staging)
    next_row = parts[-1].stop if parts else 0
    task.advance(next_row)
    most_slots = memory_bytes // BYTES_PER_SLOT
    indices: list[np.ndarray] = []
    values: list[np.ndarray] = []
    start, slots = next_row, 0
    for stop, indices_BK, values_BK in _batches(dictionary, store, hook, next_row, rows):
        if indices and slots + indices_BK.size > most_slots:
            parts.append(_commit(staging, start, indices, values, dictionary.d_sae))
            start, slots, indices, values = parts[-1].stop, 0, [], []
        indices.append(indices_BK)
        values.append(values_BK)
        slots += indices_BK.size
        task.advance(len(indices_BK))
        if stop == rows:
            parts.append(_commit(staging, start, indices, values, dictionary.d_sae))
    return parts


def batch_rows(d_sae: int) -> int:
    """Rows encoded at once."""
    return max(16, min(8192, DENSE_VALUES // d_sae))


@torch.inference_mode()
def _batches(
    dictionary: Dictionary, store: Store, hook: str, start: int, rows: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """``(row after the last, indices (B, K) int32, values (B, K) float32)``; the index of an empty slot is d_sae."""
    step = batch_rows(dictionary.d_sae)
    device = next(iter(dictionary.buffers())).device
    for first in range(start, rows, step):
        stop = min(first + step, rows)
        x_BD = store.tensor(hook, first, stop).to(device).float().flatten(1)
        codes = dictionary.encode(x_BD)
        values_BK = codes.values.float().cpu().numpy()
        if not np.isfinite(values_BK).all():
            row = first + int(np.argmax(~np.isfinite(values_BK).all(axis=1)))
            raise UserError(
                f"Row {row} of the store {store.path.name!r} gives an activation that is not a number; verify the "
                "store with `dictlearn store verify`, and look at the run's loss."
            )
        indices_BK = codes.indices.to(torch.int32).cpu().numpy()
        yield stop, np.where(values_BK == 0, np.int32(dictionary.d_sae), indices_BK), values_BK


def _parts_there(staging: Staging) -> list[Part]:
    """The parts that follow each other from row 0 on; anything else in the folder is removed."""
    parts: list[Part] = []
    for folder in sorted((staging.folder / "parts").iterdir()):
        start, _, stop = folder.name.partition("-")
        if start.isdigit() and stop.isdigit() and int(start) == (parts[-1].stop if parts else 0):
            parts.append(Part(folder, int(start), int(stop)))
        else:
            staging.disk.remove(folder, "part")
    return parts


def _commit(staging: Staging, start: int, indices: list[np.ndarray], values: list[np.ndarray], d_sae: int) -> Part:
    """Sort what was gathered by latent and write it; the lists are emptied on the way."""
    from scipy.sparse import csr_array

    slots_PK = _joined(indices, fill=d_sae)
    values_PK = _joined(values, fill=0)
    filled_PK = slots_PK != d_sae
    row_ends = np.cumsum(filled_PK.sum(axis=1), dtype=np.int64)
    by_row = csr_array(
        (values_PK[filled_PK], slots_PK[filled_PK], np.concatenate([[0], row_ends])), shape=(len(slots_PK), d_sae)
    )
    del values_PK, filled_PK
    by_latent = by_row.tocsc()
    del by_row
    stop = start + len(slots_PK)
    # Fixed width, so that the names sort by row.
    folder = staging.folder / "parts" / f"{start:012d}-{stop:012d}"
    temporary = folder.with_name(folder.name + ".new")
    staging.disk.remove(temporary, "part")
    staging.disk.make_folder(temporary)
    rows = by_latent.indices.astype(np.int32)
    rows += np.int32(start)
    _save(staging, temporary / "offsets.npy", by_latent.indptr.astype(np.int64), with_header=True)
    _save(staging, temporary / "slots.npy", slots_PK, with_header=True)
    _save(staging, temporary / "rows.bin", rows, with_header=False)
    _save(staging, temporary / "values.bin", by_latent.data, with_header=False)
    staging.disk.sync_folder(temporary, "part")
    staging.disk.rename(temporary, folder, "part")
    staging.disk.sync_folder(folder.parent, "part")
    return Part(folder, start, stop)


def _joined(blocks: list[np.ndarray], fill: int) -> np.ndarray:
    """Blocks (B, K) one below the other, padded to the widest; empties the list as it goes."""
    width = max(block.shape[1] for block in blocks)
    joined = np.full((sum(map(len, blocks)), width), fill, dtype=blocks[0].dtype)
    row = 0
    blocks.reverse()
    while blocks:
        block = blocks.pop()
        joined[row : row + len(block), : block.shape[1]] = block
        row += len(block)
    return joined


def _save(staging: Staging, path: Path, array: np.ndarray, with_header: bool) -> None:
    disk = staging.disk
    file = disk.create(path)
    try:
        array = np.ascontiguousarray(array)
        if with_header:
            disk.write(file, _npy_header(array), "part")
        disk.write(file, memoryview(array).cast("B") if array.size else b"", "part")
        disk.sync(file, "part")
    finally:
        os.close(file)


def _npy_header(array: np.ndarray) -> bytes:
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()
