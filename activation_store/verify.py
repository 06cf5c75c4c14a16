"""Is what is on disk what was written? Reads every byte of a store and names each part that is not.

Shards and the files written once are compared with their checksums in the manifest; metadata follows from the manifest
and is compared byte by byte; the manifest carries a checksum of itself. A complete store holds nothing else, so a file
that does not belong is named too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import xxhash

from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.metadata import SHARDS_OF_A_COMMIT, Damage, metadata_damages
from activation_store.place import Place
from activation_store.progress import NoProgress, Progress, Task
from activation_store.spec import METADATA_FILE, OWNER_FILE, STAGING_FOLDER, STATISTICS, Manifest


def verify(location: str | os.PathLike[str], progress: Progress | None = None) -> list[Damage]:
    """Every damaged part of a store, in a fixed order; an empty list when all is well.

    An unfinished store is checked as far as it has been committed.

    Args:
        location: the store's folder or URL.
        progress: told of the bytes read.

    Raises:
        UserError: there is no store at ``location``, or it cannot be reached.
    """
    place = open_place(location)
    try:
        content = place.read(METADATA_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"There is no activation store at {place.location}: nothing to verify.") from None
    except OSError as problem:
        raise UserError(f"{place.where(METADATA_FILE)} cannot be read: {problem.strerror or problem}.") from None
    try:
        manifest = Manifest.from_bytes(content, METADATA_FILE)
    except UserError as refusal:
        return [Damage(METADATA_FILE, f"{refusal} Without the manifest nothing else can be checked.")]
    damages = [] if content == manifest.to_bytes() else [Damage(METADATA_FILE, "has been changed around the manifest")]
    damages += metadata_damages(place, manifest)
    expected = dict(_checksummed(manifest))
    try:
        sizes = place.sizes()
    except OSError as problem:
        raise UserError(f"{place.location} cannot be read: {problem.strerror or problem}.") from None
    total = sum(sizes.get(key, 0) for key in expected)
    with (progress or NoProgress()).task("Verifying", total=total, unit="B") as task:
        for key, (claimed, described) in expected.items():
            found = _content_problem(place, key, claimed, task)
            if found:
                damages.append(Damage(key, found + described))
    return damages + _strays(sizes, manifest, {METADATA_FILE, *manifest.fixed_files(), *expected})


def _checksummed(manifest: Manifest) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (checksum, what is in the file)) of every file whose checksum the manifest holds."""
    for key, claimed in manifest.files.items():
        yield key, (claimed, "")
    for array in manifest.arrays:
        for number, claimed in enumerate(manifest.shards[array.path]):
            first = number * manifest.geometry.rows_per_shard
            last = first + manifest.geometry.rows_in_shard(number, manifest.rows) - 1
            yield array.shard_key(number), (claimed, f" (rows {first} to {last} of {array.path})")


def _content_problem(place: Place, key: str, claimed: str, task: Task) -> str | None:
    digest = xxhash.xxh3_64()
    try:
        for block in place.blocks(key):
            digest.update(block)
            task.advance(len(block))
    except FileNotFoundError:
        return "is missing"
    except OSError as problem:
        return f"cannot be read: {problem.strerror or problem}"
    return None if digest.hexdigest() == claimed else "does not match its checksum in the manifest"


def _strays(found: Iterable[str], manifest: Manifest, known: set[str]) -> list[Damage]:
    if not manifest.complete:
        shards = range(manifest.committed_shards, manifest.committed_shards + SHARDS_OF_A_COMMIT)
        known = known | {array.shard_key(shard) for array in manifest.arrays for shard in shards}
    strays = []
    for key in sorted(found):
        being_written = key == OWNER_FILE or key.startswith(f"{STAGING_FOLDER}/")
        being_written = being_written or (not manifest.complete and key.startswith(f"{STATISTICS}/"))
        if key not in known and not being_written:
            strays.append(Damage(key, "does not belong to the store"))
    return strays
