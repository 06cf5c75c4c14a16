"""Activations in somebody else's HDF5 file: one dataset of rows, float or bfloat16 as bits.

Such a file tells nothing of tokens, positions and documents. Token ids and positions become `UNKNOWN`, and there are
two "documents": the first nine tenths of the rows, to train on, and the held-out rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from activation_store.errors import UserError
from activation_store.foreign import BLOCK_BYTES, Block, ForeignRows, import_rows, stored_dtype, two_splits
from activation_store.hdf5 import BFLOAT16_ATTRIBUTE, open_hdf5, read_block, reading
from activation_store.progress import Progress
from activation_store.spec import UNKNOWN, Geometry, HookSpec

if TYPE_CHECKING:
    import h5py

DATASETS_NAMED = 5


def import_dataset(
    file: str | os.PathLike[str],
    dataset: str,
    hook: str,
    location: str,
    *,
    dtype: str | None = None,
    model: dict | None = None,
    geometry: Geometry | None = None,
    compression: str = "none",
    progress: Progress | None = None,
) -> None:
    """Make a store of one dataset (rows, d) of an HDF5 file, or continue to.

    Args:
        dataset: its path in the file. float16, float32, float64, or bfloat16 as uint16 with ``dtype = "bfloat16"``.
        hook: the name of the hook in the store.
        dtype: on disk; the dataset's own when None.
        model: provenance of the language model, if it is known.

    Raises:
        UserError: no such file or dataset, damaged, another shape or type, a value that is not finite.
    """
    with open_hdf5(file) as opened:
        import_rows(_source(opened, dataset, hook, dtype), location, model, geometry, compression, progress)


def _source(opened: h5py.File, path: str, hook: str, dtype: str | None) -> ForeignRows:
    dataset = _find(opened, path)
    where = f"{path} in {opened.filename}"
    if dataset.ndim != 2 or not dataset.size:
        raise UserError(f"{where} has shape {dataset.shape}; activations have two axes, (rows, d), and none is empty.")
    rows, d = dataset.shape
    found = _dtype_in_words(dataset)
    if found == "uint16":
        raise UserError(
            f"{where} holds uint16. If these are the bits of bfloat16, say so in the file: "
            f'f["{path}"].attrs["{BFLOAT16_ATTRIBUTE}"] = "bfloat16".'
        )
    name = Path(opened.filename).name
    return ForeignRows(
        name=name,
        hooks=(HookSpec(hook, (d,), stored_dtype(found, dtype, where)),),
        rows=rows,
        blocks=lambda row: _blocks(dataset, hook, row),
        documents=lambda fingerprint: two_splits(f"{name}:{path}", rows),
        origin={"format": "hdf5", "file": name, "dataset": path, "dtype": found},
    )


def _find(opened: h5py.File, path: str) -> h5py.Dataset:
    import h5py

    datasets: list[str] = []
    with reading(opened.filename, path):
        found = opened.get(path)
        if isinstance(found, h5py.Dataset):
            return found
        opened.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
    there_are = ", ".join(datasets[:DATASETS_NAMED]) + (", ..." if len(datasets) > DATASETS_NAMED else "")
    raise UserError(
        f"{opened.filename} has no dataset {path}; " + (f"it has {there_are}." if datasets else "it has none.")
    )


def _dtype_in_words(dataset: h5py.Dataset) -> str:
    found = dataset.dtype.newbyteorder("=").name
    if found == "uint16" and dataset.attrs.get(BFLOAT16_ATTRIBUTE) in ("bfloat16", b"bfloat16"):
        return "bfloat16"
    return found


def _blocks(dataset: h5py.Dataset, hook: str, row: int) -> Iterator[Block]:
    rows = max(1, BLOCK_BYTES // (dataset.shape[1] * dataset.dtype.itemsize))
    for start in range(row, len(dataset), rows):
        values = read_block(dataset, start, min(len(dataset), start + rows))
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        unknown = np.full(len(values), UNKNOWN)
        yield Block(start, {hook: values}, unknown, unknown)
