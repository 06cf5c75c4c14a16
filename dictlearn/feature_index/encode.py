"""First pass: rows of the store to activations, in parts that fit in memory and are sorted by latent within.

A part is a run of whole batches. It is written to a folder of its own under a temporary name, synced and renamed, so a
part that is there is whole; a resumed pass continues behind the last one. Batches begin at multiples of the batch size
and that size depends on the dictionary alone, so an activation has the same bits however the rows are cut into parts.

Axes: B rows of a batch, P rows of a part, K slots per row, S latents.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
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
    dictionary: Dictionary,
    store: Store,
    hooks: Sequence[str],
    rows: int,
    memory_bytes: int,
    staging: Staging,
    task: Task,
) -> list[Part]:
    """Encode rows 0..rows of ``hooks``, side by side, or what is left of them, and return all parts in order of row.

    Raises:
        UserError: an activation is not finite.
    """
    parts = _parts_there(staging)
    next_row = parts[-1].stop if parts else 0
    task.advance(next_row)
    gathered: Gathered | None = None
    for first, indices_BK, values_BK in _batches(dictionary, store, hooks, next_row, rows):
        if gathered is not None and not gathered.has_room(indices_BK):
            parts.append(_commit(staging, gathered, dictionary.d_sae))
            gathered = None
        if gathered is None:
            gathered = Gathered.to_begin(first, indices_BK, memory_bytes // BYTES_PER_SLOT)
        gathered.append(indices_BK, values_BK, dictionary.d_sae)
        task.advance(len(indices_BK))
    if gathered is not None:
        parts.append(_commit(staging, gathered, dictionary.d_sae))
    return parts


@dataclass
class Gathered:
    """Activations of consecutive rows, as they come out of the encoder, in memory that is taken once.

    (A list of batches would do, but holes between them keep the allocator from giving memory back.)

    Attributes:
        start: the first row.
        filled: rows so far.
        slots_PK, values_PK: latents and activations, of which ``filled`` rows count.
    """

    start: int
    slots_PK: np.ndarray
    values_PK: np.ndarray
    filled: int = 0

    @classmethod
    def to_begin(cls, start: int, indices_BK: np.ndarray, most_slots: int) -> Gathered:
        """Room for ``most_slots`` as wide as the first batch, and for that batch in any case."""
        rows, width = indices_BK.shape
        shape = (max(rows, most_slots // width), width)
        return cls(start, np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32))

    def has_room(self, indices_BK: np.ndarray) -> bool:
        rows, width = indices_BK.shape
        return self.filled + rows <= len(self.slots_PK) and width <= self.slots_PK.shape[1]

    def append(self, indices_BK: np.ndarray, values_BK: np.ndarray, empty: int) -> None:
        rows, width = indices_BK.shape
        here = slice(self.filled, self.filled + rows)
        self.slots_PK[here, :width] = indices_BK
        self.values_PK[here, :width] = values_BK
        self.slots_PK[here, width:] = empty
        self.filled += rows


def batch_rows(d_sae: int) -> int:
    """Rows encoded at once."""
    return max(16, min(8192, DENSE_VALUES // d_sae))


def _batches(
    dictionary: Dictionary, store: Store, hooks: Sequence[str], start: int, rows: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """``(first row, indices (B, K), values (B, K))`` of batch after batch, as `encode_rows` gives them."""
    step = batch_rows(dictionary.d_sae)
    for first in range(start, rows, step):
        yield first, *encode_rows(dictionary, store, hooks, first, min(first + step, rows))


@torch.inference_mode()
def encode_rows(
    dictionary: Dictionary, store: Store, hooks: Sequence[str], start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """``(indices (B, K) int32, values (B, K) float32)`` of rows start..stop; the index of an empty slot is d_sae.

    Raises:
        UserError: an activation is not finite.
    """
    device = next(iter(dictionary.buffers())).device
    parts = [store.tensor(hook, start, stop).to(device).float().flatten(1) for hook in hooks]
    codes = dictionary.encode(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    values_BK = codes.values.float().cpu().numpy()
    if not np.isfinite(values_BK).all():
        row = start + int(np.argmax(~np.isfinite(values_BK).all(axis=1)))
        raise UserError(
            f"Row {row} of the store {store.name!r} gives an activation that is not a number; verify the "
            "store with `dictlearn store verify`, and look at the run's loss."
        )
    indices_BK = codes.indices.to(torch.int32).cpu().numpy()
    return np.where(values_BK == 0, np.int32(dictionary.d_sae), indices_BK), values_BK


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


def _commit(staging: Staging, gathered: Gathered, d_sae: int) -> Part:
    """Sort what was gathered by latent and write it."""
    from scipy.sparse import csr_array

    slots_PK, start = gathered.slots_PK[: gathered.filled], gathered.start
    filled_PK = slots_PK != d_sae
    # int32 throughout, or scipy would work in int64: a part that fits in memory has fewer than 2**31 slots.
    row_bounds = np.zeros(len(slots_PK) + 1, dtype=np.int32)
    np.cumsum(filled_PK.sum(axis=1), out=row_bounds[1:])
    fired, values_fired = slots_PK[filled_PK], gathered.values_PK[: gathered.filled][filled_PK]
    del filled_PK
    by_latent = csr_array((values_fired, fired, row_bounds), shape=(len(slots_PK), d_sae)).tocsc()
    del fired, values_fired
    stop = start + len(slots_PK)
    # Fixed width, so that the names sort by row.
    folder = staging.folder / "parts" / f"{start:012d}-{stop:012d}"
    temporary = folder.with_name(folder.name + ".new")
    staging.disk.remove(temporary, "part")
    rows = by_latent.indices.astype(np.int32, copy=False)
    rows += np.int32(start)
    files = {
        "offsets.npy": by_latent.indptr.astype(np.int64),
        "slots.npy": slots_PK,
        "rows.bin": rows,
        "values.bin": by_latent.data,
    }
    for name, array in files.items():
        header = _npy_header(array) if name.endswith(".npy") else b""
        content = memoryview(array).cast("B") if array.size else b""
        staging.write_file(temporary / name, header, content, subject="part")
    staging.settle("part")
    staging.disk.rename(temporary, folder, "part")
    staging.disk.sync_folders([folder.parent], "part")
    return Part(folder, start, stop)


def _npy_header(array: np.ndarray) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()
