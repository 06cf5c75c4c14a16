"""The files that follow from the manifest alone: are they what it says?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from activation_store.place import Place
from activation_store.spec import Manifest

SHARDS_OF_A_COMMIT = 64
"""Processes that may harvest into one store together: a commit has one shard for each."""


@dataclass(frozen=True)
class Damage:
    """One damaged part: its path within the store, and what is wrong with it."""

    part: str
    problem: str

    def __str__(self) -> str:
        return f"{self.part}: {self.problem}"


def metadata_damages(place: Place, manifest: Manifest) -> Iterator[Damage]:
    """The files that follow from the manifest alone and are not as they should be."""
    allowed = {key: {content} for key, content in manifest.fixed_files().items()}
    if not manifest.complete:
        # A commit changes the arrays' shapes just before the manifest: some may be one commit ahead, which is one
        # shard, or as many as there were processes. Any whole number of shards is no damage.
        per_shard = manifest.geometry.rows_per_shard
        ahead = min(manifest.rows + SHARDS_OF_A_COMMIT * per_shard, manifest.rows_planned)
        for rows in {*range(manifest.rows, ahead, per_shard), ahead}:
            for key, content in manifest.array_metadata(rows).items():
                allowed[key].add(content)
    for key, contents in allowed.items():
        try:
            found = place.read(key)
        except FileNotFoundError:
            yield Damage(key, "is missing")
            continue
        except OSError as problem:
            yield Damage(key, f"cannot be read: {problem.strerror or problem}")
            continue
        if found not in contents:
            yield Damage(key, "is not the metadata that was written")
