"""A commit in the making: one shard of every array, with the sums over its rows.

`Commit` writes under temporary names; `publish` puts the shard files under their keys, where nobody sees them until the
manifest counts their rows (`activation_store.writer`). Several processes may each make the commit of another shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from activation_store.errors import UserError
from activation_store.moments import Moments, second_moment_stride
from activation_store.place import Place
from activation_store.shard import ShardWriter
from activation_store.spec import DOCUMENTS, POSITIONS, TOKEN_IDS, HookSpec, Manifest


@dataclass(frozen=True)
class Published:
    """A shard of every array whose files are in place: what the manifest needs to count its rows.

    Attributes:
        shard: its number.
        rows: in it.
        checksums: array path -> checksum of the shard's file.
        sums: hook name -> the sums over its rows.
    """

    shard: int
    rows: int
    checksums: dict[str, str]
    sums: dict[str, Moments]


def empty_moments(manifest: Manifest, hook: HookSpec) -> Moments:
    """Sums for the rows of a shard, which know which rows go into the second moment."""
    return Moments(hook.d, second_moment_stride(manifest.rows_planned, hook.d))


def columns_of(
    manifest: Manifest,
    rows: Mapping[str, np.ndarray],
    token_ids: np.ndarray,
    positions: np.ndarray,
    documents: np.ndarray,
) -> dict[str, np.ndarray]:
    """Rows as `Commit.append` takes them: by the path of the array they go to, in its carrier type.

    Args:
        rows: hook name -> (n, *shape) in the hook's type; bfloat16 as uint16 bits.
        token_ids, positions, documents: (n,) integers.
    """
    about = {TOKEN_IDS: token_ids, POSITIONS: positions, DOCUMENTS: documents}
    return {hook.array.path: rows[hook.name] for hook in manifest.hooks} | {
        name: np.asarray(values).astype(np.int32) for name, values in about.items()
    }


class Commit:
    """Shard number ``shard`` of every array of ``manifest``, at ``place``."""

    def __init__(self, place: Place, manifest: Manifest, shard: int):
        self.shard = shard
        self.rows = 0
        self._place = place
        self._manifest = manifest
        self._shards: dict[str, ShardWriter] = {}
        try:
            for i, array in enumerate(manifest.arrays):
                file = place.create(f"shard-{shard}-{i}", "shard")
                self._shards[array.path] = ShardWriter(file, array, manifest.geometry, manifest.compression)
        except BaseException:  # such as too many open files
            self.discard()
            raise
        self._moments = {hook.name: empty_moments(manifest, hook) for hook in manifest.hooks}

    @property
    def room(self) -> int:
        """Rows that still fit."""
        return self._manifest.geometry.rows_in_shard(self.shard, self._manifest.rows_planned) - self.rows

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows: the path of each array but the norms -> (n, *row_shape) in its carrier type."""
        for path, column in columns.items():
            self._shards[path].append(column)
        for hook in self._manifest.hooks:
            self._moments[hook.name].update(columns[hook.array.path])
        self.rows += len(next(iter(columns.values())))

    def publish(self) -> Published:
        """Finish the shard files and put them under their keys.

        Raises:
            UserError: an activation that is not a finite number.
        """
        self._refuse_non_finite()
        for hook in self._manifest.hooks:
            self._shards[hook.norms.path].append(self._moments[hook.name].take_row_norms())
        checksums = {path: shard.seal() for path, shard in self._shards.items()}
        keys = {array.path: array.shard_key(self.shard) for array in self._manifest.arrays}
        self._place.publish({keys[path]: shard.file for path, shard in self._shards.items()}, "shard")
        return Published(self.shard, self.rows, checksums, self._moments)

    def discard(self) -> None:
        """Give the shard files up."""
        for shard in self._shards.values():
            shard.file.discard()

    def _refuse_non_finite(self) -> None:
        for hook in self._manifest.hooks:
            moments = self._moments[hook.name]
            moments.settle()
            if moments.non_finite is not None:
                row = self.shard * self._manifest.geometry.rows_per_shard + moments.non_finite
                raise UserError(
                    f"Row {row} of hook {hook.name} is not a finite number in {hook.dtype}; the shard that holds it "
                    "was not committed. float16 overflows above 65504: store as bfloat16 or float32, or look at what "
                    "the model is given there."
                )
