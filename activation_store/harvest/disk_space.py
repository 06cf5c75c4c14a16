"""What a harvest will take on disk, exactly, and the refusal where there is too little of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from activation_store.errors import UserError
from activation_store.place import Place
from activation_store.spec import Geometry, HookSpec, Manifest, arrays_of


def bytes_on_disk(rows: int, hooks: Sequence[HookSpec], geometry: Geometry) -> int:
    """Size of an uncompressed store with ``rows`` rows: whole chunks, shard indexes, statistics; no document table."""
    chunks = -(-rows // geometry.rows_per_chunk)
    index = geometry.shards(rows) * (16 * geometry.chunks_per_shard + 4)
    arrays = sum(chunks * geometry.rows_per_chunk * array.row_bytes + index for array in arrays_of(hooks))
    return arrays + sum(8 * (hook.d * hook.d + 2 * hook.d + 5) for hook in hooks)


def bytes_free(place: Place) -> int | None:
    """Free space where the store will be; None in an object store."""
    if place.root is None:
        return None
    folder = place.root.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def refuse_full_disk(
    place: Place, rows: int, hooks: Sequence[HookSpec], geometry: Geometry, existing: Manifest | None
) -> None:
    """What is committed already does not count; a shard is written beside the others, so nothing is needed twice."""
    free = bytes_free(place)
    if free is None or (existing is not None and existing.compression != "none"):
        return
    needed = bytes_on_disk(rows, hooks, geometry)
    if existing is not None:
        needed -= bytes_on_disk(existing.rows, hooks, geometry)
    if needed > free:
        raise UserError(
            f"{rows:,} rows of {len(hooks)} {'hook' if len(hooks) == 1 else 'hooks'} need "
            f"{_size(needed)} on the disk of {place.location}, where {_size(free)} are free; ask for fewer tokens or "
            "hooks, or name another place."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
