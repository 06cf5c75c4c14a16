"""Appending rows to a store, in commits that survive anything.

A commit is one shard of every array. Its files are written under temporary names while the rows come in, then:

1. every shard file is synced and renamed into place, and the folders are synced;
2. the running sums for the statistics go to the staging folder;
3. the arrays' zarr.json get their new shapes;
4. the manifest is replaced. Only now do the rows exist.

Killed before 4, the next run starts from the rows the manifest counts, throws the temporary files away and writes the
same bytes again over whatever 1 to 3 left behind. Nothing that is on disk at the end depends on when, where or how
often the work was interrupted.

Who writes is kept in ``.owner``, locked for as long as the writer lives, and removed with the staging folder when it
closes: neither is part of the finished store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.disk import Disk, default_disk
from activation_store.errors import UserError
from activation_store.moments import Moments
from activation_store.ownership import Ownership
from activation_store.shard import Shard, ShardWriter
from activation_store.spec import (
    METADATA_FILE,
    OWNER_FILE,
    STAGING_FOLDER,
    Geometry,
    HookSpec,
    Manifest,
    StorePlan,
    checksum,
    differences,
    document_table_files,
    statistics_files,
)

DIFFERENCES_SHOWN = 4


class StoreWriter:
    """Makes a store, or continues one that was left unfinished::

        with StoreWriter(path, plan, hooks, geometry, provenance) as writer:
            for batch in batches_from(writer.next_row):
                writer.append(rows, token_ids, positions, documents, first_row=batch.first_row)
            writer.finish()

    Leaving the block without `finish` keeps every committed row; the rest is computed again by the next run.

    Args:
        path: the store's folder; made if it is not there.
        plan: what the store will hold. A continued store must have been made with the same plan.
        hooks: the arrays of activations, each with its shape and type.
        geometry: rows per chunk and per shard.
        provenance: any JSON that says what the rows are made from. No clock, host, pid or rank: it is part of what a
            rerun must repeat.
        disk: the file system, for tests.

    Raises:
        UserError: another process is writing here; the store was made otherwise, of another format version, or is
            damaged; the folder holds something else; the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plan: StorePlan,
        hooks: Sequence[HookSpec],
        geometry: Geometry,
        provenance: Mapping[str, Any],
        *,
        disk: Disk | None = None,
    ):
        plan.check()
        if len({hook.name for hook in hooks}) != len(hooks) or not hooks:
            raise ValueError(f"a store needs at least one hook and no hook twice, not {[hook.name for hook in hooks]}")
        self.path = Path(path)
        self.plan = plan
        self._disk = disk or default_disk()
        self._staging = self.path / STAGING_FOLDER
        self._shards: dict[str, ShardWriter] = {}
        self._owner: Ownership | None = None
        self._interrupted = False
        self._first_rows = np.array([document.first_row for document in plan.documents], dtype=np.int64)
        with self._told_plainly():
            self._open(Manifest.of_plan(plan, hooks, geometry, provenance))

    # --- what a harvester uses ----------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        """As it is on disk."""
        return self._manifest

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self._manifest.complete

    @property
    def committed_rows(self) -> int:
        """Rows that a kill cannot take away."""
        return self._manifest.rows

    @property
    def next_row(self) -> int:
        """The row that the next `append` continues at. After opening: the first row not yet committed."""
        return self._next_row

    def append(
        self,
        rows: Mapping[str, np.ndarray],
        token_ids: np.ndarray,
        positions: np.ndarray,
        documents: np.ndarray,
        *,
        first_row: int | None = None,
    ) -> None:
        """Add rows to every array; commits by itself each time a shard is full.

        Args:
            rows: hook name -> (n, *shape) in the hook's type; bfloat16 as uint16 bits.
            token_ids, positions, documents: (n,) integers. ``documents`` are indices into ``plan.documents``.
            first_row: the store's row number of the first of these rows. Rows that the store already has are dropped,
                so a batch can be handed over whole after a resume. Default: `next_row`.

        Raises:
            ValueError: rows that do not fit the hooks or the plan.
            UserError: an activation that is not a finite number; a disk that is full or cannot be written.
        """
        first_row = self._next_row if first_row is None else first_row
        self._check(rows, token_ids, positions, documents, first_row)
        columns = {hook.array.path: rows[hook.name] for hook in self._manifest.hooks}
        columns |= {
            name: np.asarray(values).astype(np.int32)
            for name, values in (("token_ids", token_ids), ("positions", positions), ("documents", documents))
        }
        geometry = self._manifest.geometry
        start, n = self._next_row - first_row, len(token_ids)
        with self._changing():
            while start < n:
                part = slice(start, min(n, start + geometry.rows_per_shard - self._rows_in_hand))
                self._begin_shard()
                for path, column in columns.items():
                    self._shards[path].append(column[part])
                for hook in self._manifest.hooks:
                    self._shard_moments[hook.name].update(rows[hook.name][part])
                self._next_row += part.stop - part.start
                start = part.stop
                if self._rows_in_hand == geometry.rows_per_shard:
                    self._commit()

    def finish(self) -> None:
        """Commit the short tail, write the statistics, mark the store complete, and close. Repeating it is harmless."""
        if self._interrupted:
            raise ValueError("this writer was interrupted: open the store again")
        if self._next_row != self.plan.rows:
            raise ValueError(f"the plan has {self.plan.rows} rows, {self._next_row} were appended")
        with self._changing():
            if self._rows_in_hand:
                self._commit()
            if not self.complete:
                self._complete()
        self.close()

    def close(self) -> None:
        """Let go of the store. Rows after the last commit are dropped; a finished store is swept of staging files."""
        for shard in self._shards.values():
            shard.close()
        self._shards = {}
        if self._owner is None:
            return
        try:
            with self._told_plainly():
                self._sweep()
        finally:
            self._owner.release()
            self._owner = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self, wanted: Manifest) -> None:
        manifest_file = self.path / METADATA_FILE
        self._refuse_foreign_folder()
        self._read_same(manifest_file, wanted)
        self._disk.make_folder(self.path)
        self._owner = Ownership.take(self.path / OWNER_FILE, store=self.path)
        try:
            # Read once more under the lock: the owner before us may have committed since.
            existing = self._read_same(manifest_file, wanted)
            self._manifest = existing or wanted
            self._next_row = self._manifest.rows
            self._sweep()
            if not self._manifest.complete:
                self._prepare(new=existing is None)
                self._moments = self._load_moments()
        except BaseException:
            self._owner.release()
            self._owner = None
            raise

    def _read_same(self, file: Path, wanted: Manifest) -> Manifest | None:
        """The manifest on disk, if there is one; refused if it is not of the store we are asked to make."""
        try:
            existing = Manifest.from_bytes(file.read_bytes(), str(file))
        except FileNotFoundError:
            return None
        found = differences(existing.identity(), wanted.identity())
        if found:
            shown = found[:DIFFERENCES_SHOWN]
            if len(found) > len(shown):
                shown.append(f"and {len(found) - len(shown)} more")
            raise UserError(
                f"{self.path} was made otherwise: {'; '.join(shown)}. "
                "Name another store, or ask for the same as before to continue this one."
            )
        return existing

    def _refuse_foreign_folder(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a folder for the store.")
        contents = {entry.name for entry in self.path.iterdir()}
        if contents - {OWNER_FILE, STAGING_FOLDER} and METADATA_FILE not in contents:
            raise UserError(
                f"{self.path} is not empty and is not an activation store (it holds {min(contents)}); "
                "name another folder for the store."
            )

    def _prepare(self, new: bool) -> None:
        """Bring all files that follow from the plan to what the manifest says; a kill may have come before them."""
        self._disk.make_folder(self._staging)
        if new:
            self._replace({METADATA_FILE: self._manifest.to_bytes()}, "manifest")
        wanted = document_table_files(self.plan.documents) | self._manifest.fixed_files()
        self._replace({key: content for key, content in wanted.items() if self._content(key) != content}, "metadata")

    def _content(self, key: str) -> bytes | None:
        try:
            return (self.path / key).read_bytes()
        except FileNotFoundError:
            return None

    def _replace(self, contents: Mapping[str, bytes], subject: str, durable: bool = True) -> None:
        for key in contents:
            self._disk.make_folder((self.path / key).parent)
        files = {self.path / key: content for key, content in contents.items()}
        self._disk.replace(files, self._staging, subject, durable)

    # --- a commit -----------------------------------------------------------------------------------------------------

    @property
    def _rows_in_hand(self) -> int:
        return self._next_row - self._manifest.rows

    def _begin_shard(self) -> None:
        if self._shards:
            return
        self._shards = {
            array.path: ShardWriter(self._disk, self._staging / f"shard-{i}", array, self._manifest.geometry)
            for i, array in enumerate(self._manifest.arrays)
        }
        self._shard_moments = {hook.name: Moments(hook.d) for hook in self._manifest.hooks}

    def _commit(self) -> None:
        self._refuse_non_finite()
        manifest = self._manifest
        number = manifest.committed_shards
        checksums = {path: shard.seal() for path, shard in self._shards.items()}
        self._disk.sync([shard.file for shard in self._shards.values()], "shard")
        targets = {array.path: self.path / array.shard_key(number) for array in manifest.arrays}
        for path, shard in self._shards.items():
            shard.close()
            self._disk.rename(shard.temporary, targets[path], "shard")
        self._disk.sync_folders((target.parent for target in targets.values()), "shard")
        self._shards = {}
        committed = replace(
            manifest,
            rows=self._next_row,
            shards={path: [*before, checksums[path]] for path, before in manifest.shards.items()},
        )
        for hook in manifest.hooks:
            self._moments[hook.name].merge(self._shard_moments[hook.name])
        self._stage_moments(committed.rows)
        shapes = {array.metadata_key: array.metadata(committed.rows, manifest.geometry) for array in manifest.arrays}
        # Not synced: the manifest alone decides, and opening the store again writes whatever a power cut took.
        self._replace(shapes, "metadata", durable=False)
        self._replace({METADATA_FILE: committed.to_bytes()}, "manifest")
        self._manifest = committed
        self._disk.remove(self._moments_file(manifest.rows), "statistics")

    def _refuse_non_finite(self) -> None:
        for hook in self._manifest.hooks:
            moments = self._shard_moments[hook.name]
            moments.settle()
            if moments.non_finite is not None:
                raise UserError(
                    f"Row {self._manifest.rows + moments.non_finite} of hook {hook.name} is not a finite number in "
                    f"{hook.dtype}; the shard that holds it was not committed. float16 overflows above 65504: store as "
                    "bfloat16 or float32, or look at what the model is given there."
                )

    def _complete(self) -> None:
        manifest = self._manifest
        files: dict[str, bytes] = {}
        for hook in manifest.hooks:
            moments = self._moments[hook.name]
            files |= statistics_files(
                hook.name,
                {
                    "count": moments.count,
                    "mean": moments.mean,
                    "second_moment": moments.second_moment,
                    "mean_norm": moments.mean_norm,
                },
            )
        completed = replace(
            manifest, complete=True, files=manifest.files | {key: checksum(content) for key, content in files.items()}
        )
        self._replace(completed.fixed_files() | files, "statistics")
        self._replace({METADATA_FILE: completed.to_bytes()}, "manifest")
        self._manifest = completed

    # --- the sums behind the statistics -------------------------------------------------------------------------------

    def _moments_file(self, rows: int) -> Path:
        return self._staging / f"moments-{rows}"

    def _stage_moments(self, rows: int) -> None:
        """Keep the sums up to ``rows`` beside the store, with a checksum. Not synced: they can be computed again."""
        content = np.concatenate([self._moments[hook.name].to_vector() for hook in self._manifest.hooks]).tobytes()
        file = self._disk.create(self._moments_file(rows))
        try:
            self._disk.write(file, content + checksum(content).encode(), "statistics")
        finally:
            os.close(file)

    def _load_moments(self) -> dict[str, Moments]:
        """The sums over all committed rows: as staged, or from the shards if the staged ones are lost or torn."""
        with contextlib.suppress(OSError):
            content = self._moments_file(self._manifest.rows).read_bytes()
            content, claimed = content[:-16], content[-16:].decode(errors="replace")
            if claimed == checksum(content):
                return self._split_moments(np.frombuffer(content, dtype=np.float64))
        return {hook.name: self._moments_from_shards(hook) for hook in self._manifest.hooks}

    def _split_moments(self, vector: np.ndarray) -> dict[str, Moments]:
        moments, start = {}, 0
        for hook in self._manifest.hooks:
            stop = start + 2 + hook.d + hook.d * hook.d
            moments[hook.name] = Moments.from_vector(hook.d, vector[start:stop])
            start = stop
        return moments

    def _moments_from_shards(self, hook: HookSpec) -> Moments:
        manifest = self._manifest
        moments = Moments(hook.d)
        for number in range(manifest.committed_shards):
            rows = manifest.geometry.rows_in_shard(number, manifest.rows)
            key = hook.array.shard_key(number)
            shard = Shard(self.path / key, str(self.path / key), rows, hook.array, manifest.geometry)
            of_shard = Moments(hook.d)
            for start in range(0, rows, manifest.geometry.rows_per_chunk):
                stop = min(rows, start + manifest.geometry.rows_per_chunk)
                content = np.empty((stop - start, *hook.shape), dtype=hook.array.carrier)
                shard.read(start, stop, content)
                of_shard.update(content)
            moments.merge(of_shard)
        return moments

    # --- order in the house -------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove temporary files; of a finished store, the whole staging folder."""
        if not self._staging.exists():
            return
        if self._manifest.complete:
            self._disk.remove(self._staging, "staging")
            return
        for entry in self._staging.iterdir():
            if entry != self._moments_file(self._manifest.rows):
                self._disk.remove(entry, "staging")

    def _check(
        self,
        rows: Mapping[str, np.ndarray],
        token_ids: np.ndarray,
        positions: np.ndarray,
        documents: np.ndarray,
        first_row: int,
    ) -> None:
        if self.complete or self._owner is None or self._interrupted:
            raise ValueError("this store is complete, or its writer was closed or interrupted: open it again")
        n = len(token_ids)
        if not 0 <= first_row <= self._next_row:
            raise ValueError(f"rows from {first_row} on leave a gap: the next row is {self._next_row}")
        if first_row + n > self.plan.rows:
            raise ValueError(f"{n} rows from row {first_row} on go beyond the {self.plan.rows} rows of the plan")
        if set(rows) != {hook.name for hook in self._manifest.hooks}:
            raise ValueError(f"rows for {sorted(rows)}, but the store's hooks are {sorted(self._names)}")
        for hook in self._manifest.hooks:
            given = rows[hook.name]
            if given.shape != (n, *hook.shape) or given.dtype != hook.array.carrier:
                raise ValueError(
                    f"{hook.name}: rows of shape {given.shape} and type {given.dtype}, "
                    f"expected {(n, *hook.shape)} and {hook.array.carrier} ({hook.dtype})"
                )
        if len(positions) != n or len(documents) != n:
            raise ValueError(f"{n} token ids, {len(positions)} positions and {len(documents)} documents do not match")
        expected = np.searchsorted(self._first_rows, first_row + np.arange(n), side="right") - 1
        if not np.array_equal(documents, expected):
            wrong = int(np.argmax(np.asarray(documents) != expected))
            raise ValueError(
                f"row {first_row + wrong} is said to come from document {documents[wrong]}, "
                f"in the plan it belongs to document {expected[wrong]}"
            )

    @property
    def _names(self) -> list[str]:
        return [hook.name for hook in self._manifest.hooks]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """An interruption in here may leave some arrays with rows that others lack: this writer is then done with."""
        try:
            with self._told_plainly():
                yield
        except BaseException:
            self._interrupted = True
            raise

    @contextlib.contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turn what the disk refuses into one sentence."""
        try:
            yield
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                # The unfinished shard is what fills the disk: give its space back at once.
                for shard in self._shards.values():
                    with contextlib.suppress(OSError):
                        shard.temporary.unlink()
                raise UserError(
                    f"The disk of {self.path} is full. The {self._committed_or_none()} rows committed so far are safe: "
                    "free some space and run the same command again."
                ) from problem
            raise UserError(f"{self.path} cannot be written: {problem.strerror or problem}.") from problem

    def _committed_or_none(self) -> int:
        return self._manifest.rows if hasattr(self, "_manifest") else 0
