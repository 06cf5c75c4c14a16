"""What an index will take on disk, from a sample of rows of the very store: how many latents fire in a row, a config
need not know.

Axes: B rows of a batch, K slots per row, S latents.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from activation_store.errors import UserError
from dictlearn.feature_index.encode import batch_rows, encode_rows
from dictlearn.feature_index.spec import ARRAYS, HISTOGRAM_BINS, LISTED, QUANTILE_LEVELS
from dictlearn.feature_index.work import IndexPlan, IndexWork, building_folder

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

BLOCKS, BLOCK_ROWS = 8, 1024
"""Sampled: this many blocks of rows, evenly spaced over the store, because neighbours share a text."""

BYTES_IN_INDEX = BYTES_IN_PARTS = 8
"""An activation's row and value, in the index and, while it is built, in the part that it is sorted from."""

BYTES_OF_SLOT = 4
"""A latent's number in a part, where a row has as many slots as the busiest row of its batch."""

BYTES_OF_ROW = 8
"""Token and position."""


@dataclass(frozen=True)
class Sampled:
    """Of ``rows`` rows: how many latents fired in one on average, and the slots that the codes of one took at most."""

    rows: int
    active: float
    slots: int


def sample(dictionary: Dictionary, work: IndexWork) -> Sampled:
    """Encode blocks of rows spread over those to be indexed."""
    rows = work.made_from.rows
    block = min(BLOCK_ROWS, batch_rows(dictionary.d_sae), rows)
    starts = np.unique(np.linspace(0, rows - block, BLOCKS).astype(np.int64)).tolist()
    active, slots = 0, 0
    for start in starts:
        indices_BK, _ = encode_rows(dictionary, work.store, work.hooks_in, start, start + block)
        active += int((indices_BK != dictionary.d_sae).sum())
        slots = max(slots, indices_BK.shape[1])
    return Sampled(block * len(starts), active / (block * len(starts)), slots)


def plan(work: IndexWork, sampled: Sampled) -> IndexPlan:
    """Activations and bytes that are to be expected."""
    made = work.made_from
    activations = round(made.rows * sampled.active)
    lengths = {"S": 1, "F": 1, "Q": len(QUANTILE_LEVELS), "H": 2 * HISTOGRAM_BINS + 1, "T": LISTED}
    of_latent = sum(
        array.carrier.itemsize * prod(lengths[axis] for axis in array.axes)
        for array in ARRAYS
        if lengths.keys() >= set(array.axes)
    )
    index = BYTES_IN_INDEX * activations + BYTES_OF_ROW * made.rows + of_latent * made.d_sae
    return IndexPlan(
        index=str(work.path),
        rows=made.rows,
        d_sae=made.d_sae,
        rows_sampled=sampled.rows,
        active_per_row=round(sampled.active, 2),
        activations=activations,
        bytes_on_disk=index,
        bytes_while_building=index + BYTES_IN_PARTS * activations + BYTES_OF_SLOT * made.rows * sampled.slots,
    )


def refuse_full_disk(path: Path, planned: IndexPlan) -> None:
    """Raises UserError when the disk has no room for what is planned at ``path``."""
    folder = next(parent for parent in (path.parent, *path.parent.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    # What an interrupted build has left there will be used again, or removed.
    building = building_folder(path)
    if building.exists():
        free += sum(file.stat().st_blocks * 512 for file in building.rglob("*") if file.is_file())
    if free < planned.bytes_while_building:
        raise UserError(
            f"Building the index {path.name!r} takes about {planned.bytes_while_building / 1e9:.1f} GB "
            f"({planned.active_per_row:,} latents fire in a row), the disk of {str(folder)!r} has {free / 1e9:.1f} GB "
            "free; free some space, or set rows."
        )
