"""Is what is on disk what was written? Reads every byte of a store and names each part that is not.

Shards and the files written once are compared with their checksums in the manifest; metadata follows from the manifest
and is compared byte by byte; the manifest carries a checksum of itself. A complete store holds nothing else, so a file
that does not belong is named too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress, Task
from activation_store.spec import METADATA_FILE, OWNER_FILE, STAGING_FOLDER, ArraySpec, Manifest

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Damage:
    """One damaged part: its path within the store, and what is wrong with it."""

    part: str
    problem: str

    def __str__(self) -> str:
        return f"{self.part}: {self.problem}"


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[Damage]:
    """Every damaged part of a store, in a fixed order; an empty list when all is well.

    An unfinished store is checked as far as it has been committed.

    Args:
        path: the store's folder.
        progress: told of the bytes read.

    Raises:
        UserError: there is no store at ``path``.
    """
    root = Path(path)
    try:
        content = (root / METADATA_FILE).read_bytes()
    except OSError:
        raise UserError(f"There is no activation store at {root}: nothing to verify.") from None
    try:
        manifest = Manifest.from_bytes(content, METADATA_FILE)
    except UserError as refusal:
        return [Damage(METADATA_FILE, f"{refusal} Without the manifest nothing else can be checked.")]
    damages = [] if content == manifest.to_bytes() else [Damage(METADATA_FILE, "has been changed around the manifest")]
    damages += _metadata_damages(root, manifest)
    expected = dict(_checksummed(manifest))
    total = sum(_size(root / key) for key in expected)
    with (progress or NoProgress()).task("Verifying", total=total, unit="B") as task:
        for key, (claimed, described) in expected.items():
            problem = _content_problem(root / key, claimed, task)
            if problem:
                damages.append(Damage(key, problem + described))
    return damages + _strays(root, manifest, {METADATA_FILE, *manifest.fixed_files(), *expected})


def _checksummed(manifest: Manifest) -> Iterator[tuple[str, tuple[str, str]]]:
    """(key, (checksum, what is in the file)) of every file whose checksum the manifest holds."""
    for key, claimed in manifest.files.items():
        yield key, (claimed, "")
    for array in manifest.arrays:
        for number, claimed in enumerate(manifest.shards[array.path]):
            first = number * manifest.geometry.rows_per_shard
            last = first + manifest.geometry.rows_in_shard(number, manifest.rows) - 1
            yield array.shard_key(number), (claimed, f" (rows {first} to {last} of {array.path})")


def _content_problem(file: Path, claimed: str, task: Task) -> str | None:
    digest = xxhash.xxh3_64()
    try:
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
                task.advance(len(block))
    except FileNotFoundError:
        return "is missing"
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    return None if digest.hexdigest() == claimed else "does not match its checksum in the manifest"


def _metadata_damages(root: Path, manifest: Manifest) -> Iterator[Damage]:
    allowed = {key: {content} for key, content in manifest.fixed_files().items()}
    if not manifest.complete:
        # A commit changes the arrays' shapes just before the manifest: some may be one commit ahead.
        for array in manifest.arrays:
            allowed[array.metadata_key].add(_one_commit_ahead(array, manifest))
    for key, contents in allowed.items():
        try:
            found = (root / key).read_bytes()
        except OSError:
            yield Damage(key, "is missing")
            continue
        if found not in contents:
            yield Damage(key, "is not the metadata that was written")


def _one_commit_ahead(array: ArraySpec, manifest: Manifest) -> bytes:
    rows = min(manifest.rows + manifest.geometry.rows_per_shard, manifest.rows_planned)
    return array.metadata(rows, manifest.geometry)


def _strays(root: Path, manifest: Manifest, known: set[str]) -> list[Damage]:
    if not manifest.complete:
        known = known | {array.shard_key(manifest.committed_shards) for array in manifest.arrays}
    strays = []
    for file in sorted(root.rglob("*")):
        key = file.relative_to(root).as_posix()
        being_written = key == OWNER_FILE or key.startswith(f"{STAGING_FOLDER}/")
        being_written = being_written or (not manifest.complete and key.startswith("statistics/"))
        if file.is_file() and key not in known and not being_written:
            strays.append(Damage(key, "does not belong to the store"))
    return strays


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
