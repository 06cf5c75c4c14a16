"""A store as one HDF5 file, and back.

The file has the store's own names: ``activations/<hook>``, ``norms/<hook>``, ``token_ids``, ``positions``,
``documents``, ``document_table/...``, ``statistics/<hook>/...``, every one a plain uncompressed dataset. HDF5 has no
bfloat16, so such activations are uint16 bits with the attribute ``dtype = "bfloat16"``; a reader gets numbers from
``(bits.astype("uint32") << 16).view("float32")``. The attribute ``activation_store`` of the root is the store's
manifest, as in the Zarr group, so the way back makes the same store, byte for byte (from a compressed store: with the
same zstd library). Each dataset with rows has their checksum in its attribute ``xxh3``.

Writing is all or nothing: a temporary file is synced and then takes its name. Reading back is done twice, once to
check every byte and once to write.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from activation_store.disk import sync_path
from activation_store.errors import UserError
from activation_store.ownership import Ownership
from activation_store.progress import NoProgress, Progress, Task
from activation_store.spec import (
    DOCUMENT_COLUMNS,
    DOCUMENT_TABLE,
    DOCUMENTS,
    MANIFEST_ATTRIBUTE,
    POSITIONS,
    SPLITS,
    STATISTICS,
    STATISTICS_ARRAYS,
    TOKEN_IDS,
    ArraySpec,
    DocumentRows,
    Manifest,
    StorePlan,
    differences,
    document_columns,
)
from activation_store.store import Store, open_store
from activation_store.writer import StoreWriter

if TYPE_CHECKING:
    import h5py

BFLOAT16_ATTRIBUTE = "dtype"
CHECKSUM_ATTRIBUTE = "xxh3"

BLOCK_BYTES = 16 << 20
"""Of all row arrays together in memory at a time."""

HDF5_VERSION = ("v110", "v110")
"""Since this one (2016) the file's own metadata has checksums, and an attribute may have more than 64 KiB."""


# --- out --------------------------------------------------------------------------------------------------------------


def to_hdf5(location: str | os.PathLike[str], file: str | os.PathLike[str], progress: Progress | None = None) -> None:
    """Write a complete store, a folder or URL, to one HDF5 file. Its shards are compared with their checksums.

    Raises:
        UserError: no store, a damaged or a growing one; the file exists, or another process is writing it; the disk is
            full.
    """
    file = Path(file)
    _refuse_existing(file)
    store = open_store(location, verify_reads=True)
    if not store.complete:
        raise UserError(
            f"Store {store.location} is not complete: {store.rows:,} of {store.manifest.rows_planned:,} rows are "
            "there. Run its harvest again to finish it, then export it."
        )
    _refuse_full_disk(file, sum(store.rows * array.row_bytes for array in store.manifest.arrays))
    unnamed = file.with_name(file.name + ".partial")
    with _told_plainly(file), contextlib.ExitStack() as stack:
        owner = Ownership.take(file.with_name(file.name + ".owner"), store=file)
        stack.callback(owner.release)
        _refuse_existing(file)
        stack.callback(unnamed.unlink, missing_ok=True)
        _write(store, unnamed, progress or NoProgress())
        sync_path(unnamed)
        _give_name(unnamed, file)
        sync_path(file.parent)


def _write(store: Store, file: Path, progress: Progress) -> None:
    import h5py

    arrays, readers = store.manifest.arrays, _readers(store)
    with (
        h5py.File(file, "w", libver=HDF5_VERSION) as opened,
        progress.task("Writing HDF5", total=store.rows, unit="rows") as task,
    ):
        opened.attrs[MANIFEST_ATTRIBUTE] = json.dumps(_body(store.manifest), ensure_ascii=False)
        datasets, digests = {}, {}
        for array in arrays:
            shape = (store.rows, *array.row_shape)
            datasets[array.path] = opened.create_dataset(array.path, shape, dtype=array.carrier)
            digests[array.path] = xxhash.xxh3_64()
            if array.dtype == "bfloat16":
                datasets[array.path].attrs[BFLOAT16_ATTRIBUTE] = array.dtype
        for start, stop in _blocks(store.manifest):
            for array in arrays:
                rows = readers[array.path](start, stop)
                datasets[array.path][start:stop] = rows
                digests[array.path].update(rows.reshape(-1).view(np.uint8))
            task.advance(stop - start)
        for path, dataset in datasets.items():
            dataset.attrs[CHECKSUM_ATTRIBUTE] = digests[path].hexdigest()
        for name, column in document_columns(store.document_table).items():
            opened.create_dataset(f"{DOCUMENT_TABLE}/{name}", data=column)  # item assignment would date it
        opened[DOCUMENT_TABLE].attrs["splits"] = list(SPLITS)
        for hook in store.hooks:
            statistics = store.statistics(hook)
            for name, dtype in STATISTICS_ARRAYS.items():
                value = np.asarray(getattr(statistics, name), dtype=dtype)
                opened.create_dataset(f"{STATISTICS}/{hook}/{name}", data=value)


def _body(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON object that is the root's attribute in Zarr too."""
    return json.loads(manifest.to_bytes())["attributes"][MANIFEST_ATTRIBUTE]


def _readers(store: Store) -> dict[str, Callable[[int, int], np.ndarray]]:
    """For every array with a row axis, by its path: (start, stop) -> rows."""
    hooks = store.manifest.hooks
    return (
        {hook.array.path: partial(store.read_rows, hook.name) for hook in hooks}
        | {hook.norms.path: partial(store.norms, hook.name) for hook in hooks}
        | {TOKEN_IDS: store.token_ids, POSITIONS: store.positions, DOCUMENTS: store.documents}
    )


def _blocks(manifest: Manifest, first_row: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of rows, from ``first_row`` to the last, that fit into memory together."""
    rows = max(1, BLOCK_BYTES // sum(array.row_bytes for array in manifest.arrays))
    for start in range(first_row, manifest.rows, rows):
        yield start, min(manifest.rows, start + rows)


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise UserError(f"{file} exists already and is not overwritten; name another file, or remove it first.")
    if not file.absolute().parent.is_dir():
        raise UserError(f"There is no folder {file.parent} to put {file.name} into; make it first.")


def _refuse_full_disk(file: Path, needed: int) -> None:
    free = shutil.disk_usage(file.absolute().parent).free
    if needed > free:
        raise UserError(
            f"{file} needs {needed / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} MB free; "
            "free some space, or name another place."
        )


def _give_name(unnamed: Path, file: Path) -> None:
    """Rename, but never over a file that came to be meanwhile."""
    try:
        os.link(unnamed, file)
    except FileExistsError:
        _refuse_existing(file)
    except OSError:  # a file system without hard links
        _refuse_existing(file)
        os.rename(unnamed, file)


@contextlib.contextmanager
def _told_plainly(file: Path) -> Iterator[None]:
    """Turn what the disk refuses, and how HDF5 words it, into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as problem:
        full = any(f"errno = {number}," in str(problem) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        if full or getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"There is no room for {file}: the disk is full. Nothing was left behind.") from problem
        reason = getattr(problem, "strerror", None) or str(problem)
        raise UserError(f"{file} cannot be written: {reason}.") from problem


# --- and back ---------------------------------------------------------------------------------------------------------


def from_hdf5(file: str | os.PathLike[str], location: str, progress: Progress | None = None) -> None:
    """Make the store that `to_hdf5` wrote to ``file``, or continue to make it.

    Raises:
        UserError: no such file, not HDF5, damaged, or not written by `to_hdf5`; what `StoreWriter` refuses.
    """
    progress = progress or NoProgress()
    with open_hdf5(file) as opened:
        manifest = read_manifest(opened)
        if manifest is None:
            raise UserError(
                f"{opened.filename} has no attribute {MANIFEST_ATTRIBUTE!r}: it was not made by `dictlearn store "
                "to-hdf5`. To import a dataset of somebody else's, name it with --dataset and its hook with --hook."
            )
        datasets = {array.path: _dataset(opened, array, manifest.rows) for array in manifest.arrays}
        plan = _plan(opened, manifest)
        with progress.task(f"Checking {opened.filename}", total=manifest.rows, unit="rows") as task:
            _refuse_changed(datasets, manifest, task)
        with (
            StoreWriter(
                location,
                plan,
                manifest.hooks,
                manifest.geometry,
                manifest.provenance,
                compression=manifest.compression,
            ) as writer,
            progress.task("Writing the store", total=manifest.rows, unit="rows") as task,
        ):
            task.advance(writer.next_row)
            for start, stop in _blocks(manifest, writer.next_row):
                writer.append(
                    {hook.name: read_block(datasets[hook.array.path], start, stop) for hook in manifest.hooks},
                    *(read_block(datasets[name], start, stop) for name in (TOKEN_IDS, POSITIONS, DOCUMENTS)),
                )
                task.advance(stop - start)
            writer.finish()


@contextlib.contextmanager
def open_hdf5(file: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading; whatever goes wrong in it is one sentence.

    Raises:
        UserError: no such file, not HDF5, truncated, or a part of it cannot be read.
    """
    import h5py

    path = Path(file)
    if not path.is_file():
        raise UserError(f"There is no file {path}." if not path.exists() else f"{path} is a folder, not an HDF5 file.")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: permission denied.")
    if not h5py.is_hdf5(path):
        raise UserError(f"{path} is not an HDF5 file, or its beginning is lost.")
    with reading(path, "it"):
        opened = h5py.File(path, "r")
    with opened:
        yield opened


@contextlib.contextmanager
def reading(file: str | os.PathLike[str], part: str) -> Iterator[None]:
    """What HDF5 raises while ``part`` of a file is read, as a sentence that says so."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as problem:
        raise UserError(f"{file} is damaged or truncated: {part} cannot be read. HDF5 says: {problem}.") from problem


def read_block(dataset: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """Rows of a dataset; raises UserError when they cannot be read."""
    with reading(dataset.file.filename, f"{dataset.name[1:]}, rows {start} to {stop - 1},"):
        return dataset[start:stop]


def read_manifest(opened: h5py.File) -> Manifest | None:
    """The manifest that `to_hdf5` put there; None when the file has none.

    Raises:
        UserError: a manifest of another version, or a damaged one.
    """
    with reading(opened.filename, "its manifest"):
        text = opened.attrs.get(MANIFEST_ATTRIBUTE)
        if text is None:
            return None
        body = json.loads(str(text).encode())  # encoded, because damaged text may be what UTF-8 cannot say
    manifest = Manifest.from_bytes(json.dumps({"attributes": {MANIFEST_ATTRIBUTE: body}}).encode(), opened.filename)
    if not manifest.complete or manifest.rows != manifest.rows_planned:
        raise _damaged(opened, "its manifest is that of an unfinished store")
    return manifest


def _dataset(opened: h5py.File, array: ArraySpec, rows: int) -> h5py.Dataset:
    dataset = _get(opened, array.path)
    if dataset.shape != (rows, *array.row_shape) or dataset.dtype != array.carrier:
        raise _damaged(
            opened,
            f"{array.path} has shape {dataset.shape} and type {dataset.dtype}, "
            f"its manifest says {(rows, *array.row_shape)} and {array.carrier}",
        )
    return dataset


def _get(opened: h5py.File, path: str) -> h5py.Dataset:
    import h5py

    with reading(opened.filename, path):
        found = opened.get(path)
    if not isinstance(found, h5py.Dataset):
        raise _damaged(opened, f"it has no dataset {path}")
    return found


def _plan(opened: h5py.File, manifest: Manifest) -> StorePlan:
    """The plan behind the manifest, from the document table."""
    columns = {name: _get(opened, f"{DOCUMENT_TABLE}/{name}") for name in DOCUMENT_COLUMNS}
    try:
        ids, ends, splits, first_rows, rows = (read_block(column, 0, len(column)) for column in columns.values())
        starts = [0, *ends[:-1].tolist()]
        documents = [
            DocumentRows(ids[start:end].tobytes().decode(), SPLITS[split], first_row, n)
            for start, end, split, first_row, n in zip(
                starts, ends.tolist(), splits.tolist(), first_rows.tolist(), rows.tolist(), strict=True
            )
        ]
        plan = StorePlan(manifest.rows, documents, manifest.excluded, manifest.batches)
        plan.check()
    except (ValueError, IndexError, TypeError) as problem:
        raise _damaged(opened, f"its document table cannot be ({problem})") from problem
    wanted = Manifest.of_plan(plan, manifest.hooks, manifest.geometry, manifest.provenance, manifest.compression)
    if found := differences(wanted.identity(), manifest.identity()):
        raise _damaged(opened, f"its document table is not the one its manifest describes ({found[0]})")
    return plan


def _refuse_changed(datasets: dict[str, h5py.Dataset], manifest: Manifest, task: Task) -> None:
    digests = {path: xxhash.xxh3_64() for path in datasets}
    for start, stop in _blocks(manifest):
        for path, dataset in datasets.items():
            digests[path].update(read_block(dataset, start, stop).reshape(-1).view(np.uint8))
        task.advance(stop - start)
    for path, dataset in datasets.items():
        with reading(dataset.file.filename, f"the checksum of {path}"):
            claimed = dataset.attrs.get(CHECKSUM_ATTRIBUTE)
        if claimed != digests[path].hexdigest():
            raise _damaged(dataset.file, f"the rows of {path} do not match their checksum")


def _damaged(opened: h5py.File, reason: str) -> UserError:
    return UserError(f"{opened.filename} is damaged: {reason}. Restore it from a copy, or export the store again.")
