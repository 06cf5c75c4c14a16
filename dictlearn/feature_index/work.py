"""What the steps of building an index hand to each other: what is to be done, what it will take, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dictlearn.feature_index.spec import MadeFrom
from dictlearn.workspace import RunFiles

if TYPE_CHECKING:
    from activation_store.harvest.language_model import ModelSpec
    from activation_store.store import Store


@dataclass(frozen=True)
class IndexPlan:
    """What `dictlearn index --dry-run` prints; the last four as ``rows_sampled`` rows of the store let expect them."""

    index: str
    rows: int
    d_sae: int
    rows_sampled: int
    active_per_row: float
    activations: int
    bytes_on_disk: int
    bytes_while_building: int


@dataclass(frozen=True)
class IndexWork:
    """Everything that was checked, handed on to `dictlearn.feature_index.build`."""

    path: Path
    made_from: MadeFrom
    files: RunFiles
    store: Store
    hooks_in: tuple[str, ...]
    hooks_out: tuple[str, ...]
    model: ModelSpec
    memory_mb: int
    device: str


def building_folder(path: Path) -> Path:
    """Where an index lies while it is being built."""
    return path.with_name(path.name + ".building")
