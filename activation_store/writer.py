"""Appending rows to a store, in commits that survive anything.

A commit is one shard of every array (`activation_store.commit`). Its files are written under temporary names while the
rows come in, then:

1. every shard file is synced and put under its key;
2. the running sums for the statistics go to the staging folder;
3. the arrays' zarr.json get their new shapes;
4. the manifest is replaced. Only now do the rows exist.

Killed before 4, the next run starts from the rows the manifest counts, throws the temporary files away and writes the
same bytes again over whatever 1 to 3 left behind. Nothing that is on disk at the end depends on when, where or how
often the work was interrupted.

Who writes is kept in ``.owner`` for as long as the writer lives, and removed with the staging folder when it closes:
neither is part of the finished store.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from activation_store.codec import check_compression
from activation_store.commit import Commit, Published, columns_of, empty_moments
from activation_store.disk import Disk
from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.moments import Moments
from activation_store.norms import summarise_norms
from activation_store.place import Owner, Place
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
    foreign_names,
    statistics_files,
)
from activation_store.store import Store

DIFFERENCES_SHOWN = 4

SUMS_ARE_STAGED_PER = 4
"""The running sums are staged each time that this many times their bytes have been committed. At d = 4096 they take
134 MB for each hook; after a kill those of later shards are computed again from the shards."""

STAGED_SUMS = "sums-"
"""In the staging folder: the sums over so many shards, and their checksum."""


class StoreWriter:
    """Makes a store, or continues one that was left unfinished::

        with StoreWriter("stores/gpt2.zarr", plan, hooks, geometry, provenance) as writer:
            for batch in batches_from(writer.next_row):
                writer.append(rows, token_ids, positions, documents, first_row=batch.first_row)
            writer.finish()

    Leaving the block without `finish` keeps every committed row; the rest is computed again by the next run.

    Args:
        location: the store's folder, or a URL such as s3://bucket/name; made if it is not there.
        plan: what the store will hold. A continued store must have been made with the same plan.
        hooks: the arrays of activations, each with its shape and type.
        geometry: rows per chunk and per shard.
        provenance: any JSON that says what the rows are made from. No clock, host, pid or rank: it is part of what a
            rerun must repeat.
        compression: "none", or "zstd".
        disk: the file system, for tests.

    Raises:
        UserError: another process is writing here; the store was made otherwise, of another format version, or is
            damaged; the folder holds something else; the disk is full or cannot be written.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | Place,
        plan: StorePlan,
        hooks: Sequence[HookSpec],
        geometry: Geometry,
        provenance: Mapping[str, Any],
        *,
        compression: str = "none",
        disk: Disk | None = None,
    ):
        plan.check()
        check_compression(compression)
        if len({hook.name for hook in hooks}) != len(hooks) or not hooks:
            raise ValueError(f"a store needs at least one hook and no hook twice, not {[hook.name for hook in hooks]}")
        self.place = open_place(location, disk)
        self.plan = plan
        self._commit: Commit | None = None
        self._owner: Owner | None = None
        self._sums: dict[str, Moments] = {}
        self._staged_shards = 0
        self._interrupted = False
        self._first_rows = np.array([document.first_row for document in plan.documents], dtype=np.int64)
        with self._told_plainly():
            self._open(Manifest.of_plan(plan, hooks, geometry, provenance, compression))

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
        """Add rows to every array; commits by itself each time a shard is full, and after the last row of the plan.

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
        columns = columns_of(self._manifest, rows, token_ids, positions, documents)
        start, n = self._next_row - first_row, len(token_ids)
        with self._changing():
            while start < n:
                if self._commit is None:
                    self._commit = Commit(self.place, self._manifest, self._manifest.committed_shards)
                part = slice(start, min(n, start + self._commit.room))
                self._commit.append({path: column[part] for path, column in columns.items()})
                self._next_row += part.stop - part.start
                start = part.stop
                if not self._commit.room:
                    published = self._commit.publish()
                    self._commit = None
                    self._add([published])

    def add(self, published: Sequence[Published]) -> None:
        """Count the rows of the next shards, which other processes may have made (`Commit.publish`), in one commit."""
        with self._changing():
            self._add(published)
        self._next_row = self._manifest.rows

    def finish(self) -> None:
        """Write the statistics, mark the store complete, and close. Repeating it is harmless."""
        if self._interrupted:
            raise ValueError("this writer was interrupted: open the store again")
        if self._next_row != self.plan.rows:
            raise ValueError(f"the plan has {self.plan.rows} rows, {self._next_row} were appended")
        with self._changing():
            if not self.complete:
                self._complete()
        self.close()

    def close(self) -> None:
        """Let go of the store. Rows after the last commit are dropped; a finished store is swept of staging files."""
        if self._commit is not None:
            self._commit.discard()
            self._commit = None
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
        self._refuse_foreign_folder()
        self._read_same(wanted)
        self._owner = self.place.own()
        try:
            # Read once more under the lock: the owner before us may have committed since.
            existing = self._read_same(wanted)
            self._manifest = existing or wanted
            self._next_row = self._manifest.rows
            self._sweep()
            if not self._manifest.complete:
                self._prepare(new=existing is None)
                self._load_sums()
        except BaseException:
            self._owner.release()
            self._owner = None
            raise

    def _read_same(self, wanted: Manifest) -> Manifest | None:
        """The manifest on disk, if there is one; refused if it is not of the store we are asked to make."""
        self._manifest_content = self._content(METADATA_FILE)
        if self._manifest_content is None:
            return None
        existing = Manifest.from_bytes(self._manifest_content, self.place.where(METADATA_FILE))
        found = differences(existing.identity(), wanted.identity())
        if found:
            shown = found[:DIFFERENCES_SHOWN]
            if len(found) > len(shown):
                shown.append(f"and {len(found) - len(shown)} more")
            raise UserError(
                f"{self.place.location} was made otherwise: {'; '.join(shown)}. "
                "Name another store, or ask for the same as before to continue this one."
            )
        return existing

    def _refuse_foreign_folder(self) -> None:
        contents = self.place.names()
        foreign = foreign_names(contents)
        if foreign and METADATA_FILE not in contents:
            raise UserError(
                f"{self.place.location} is not empty and is not an activation store (it holds {min(foreign)}); "
                "name another folder for the store."
            )

    def _prepare(self, new: bool) -> None:
        """Bring all files that follow from the plan to what the manifest says; a kill may have come before them."""
        wanted = document_table_files(self.plan.documents) | self._manifest.fixed_files()
        self.place.replace(
            {key: content for key, content in wanted.items() if self._content(key) != content}, "metadata"
        )
        if new:
            self._replace_manifest(self._manifest)

    def _content(self, key: str) -> bytes | None:
        try:
            return self.place.read(key)
        except FileNotFoundError:
            return None

    # --- a commit -----------------------------------------------------------------------------------------------------

    def _add(self, published: Sequence[Published]) -> None:
        assert self._owner is not None
        before = manifest = self._manifest
        for part in published:
            if part.shard != manifest.committed_shards:
                raise ValueError(f"shard {part.shard} was handed over where {manifest.committed_shards} comes next")
            manifest = replace(
                manifest,
                rows=manifest.rows + part.rows,
                shards={path: [*sums, part.checksums[path]] for path, sums in manifest.shards.items()},
            )
            for hook in manifest.hooks:
                self._sums[hook.name].merge(part.sums[hook.name])
        self._owner.check()
        self._stage_sums(manifest)
        # Not synced: the manifest alone decides, and opening the store again writes whatever a power cut took.
        self.place.replace(before.array_metadata(manifest.rows), "metadata", durable=False)
        self._replace_manifest(manifest)
        self._drop_old_sums()

    def _complete(self) -> None:
        files: dict[str, bytes] = {}
        store = Store(self.place, self._manifest, verify_reads=True)
        for hook in self._manifest.hooks:
            sums = self._sums[hook.name]
            median_norm, norm_outliers = summarise_norms(store, hook.name)
            files |= statistics_files(
                hook.name,
                {
                    "count": sums.count,
                    "mean": sums.mean,
                    "mean_square": sums.mean_square,
                    "second_moment": sums.second_moment,
                    "second_moment_rows": sums.outer_count,
                    "mean_norm": sums.mean_norm,
                    "median_norm": median_norm,
                    "norm_outliers": norm_outliers,
                },
            )
        completed = replace(
            self._manifest,
            complete=True,
            files=self._manifest.files | {key: checksum(content) for key, content in files.items()},
        )
        self.place.replace(completed.fixed_files() | files, "statistics")
        self._replace_manifest(completed)

    def _replace_manifest(self, manifest: Manifest) -> None:
        content = manifest.to_bytes()
        self.place.commit(METADATA_FILE, content, expected=self._manifest_content)
        self._manifest, self._manifest_content = manifest, content

    # --- the sums behind the statistics -------------------------------------------------------------------------------

    def _stage_sums(self, manifest: Manifest) -> None:
        """Now and then keep the sums over all rows beside the store, with a checksum. They can be computed again."""
        sums_bytes = sum(8 * Moments.vector_length(hook.d) for hook in manifest.hooks)
        shard_bytes = manifest.geometry.rows_per_shard * sum(array.row_bytes for array in manifest.arrays)
        if manifest.committed_shards - self._staged_shards < SUMS_ARE_STAGED_PER * sums_bytes / shard_bytes:
            return
        content = np.concatenate([self._sums[hook.name].to_vector() for hook in manifest.hooks]).tobytes()
        key = _staged_key(manifest.committed_shards)
        self.place.replace({key: content + checksum(content).encode()}, "statistics", durable=False)
        self._staged_shards = manifest.committed_shards

    def _drop_old_sums(self) -> None:
        """Of the staged sums keep the last: called once the manifest counts the rows they are over."""
        old = sorted(_staged_shards(self.place.names(STAGING_FOLDER)) - {self._staged_shards})
        self.place.remove([_staged_key(shards) for shards in old], "statistics")

    def _load_sums(self) -> None:
        """The sums over all committed rows: as last staged, and those of later shards from the shards themselves."""
        manifest = self._manifest
        self._staged_shards, self._sums = 0, {hook.name: Moments(hook.d) for hook in manifest.hooks}
        for shards in sorted(_staged_shards(self.place.names(STAGING_FOLDER)), reverse=True):
            vector = self._staged_vector(shards) if shards <= manifest.committed_shards else None
            if vector is not None:
                self._staged_shards, self._sums = shards, self._split(vector)
                break
        left = range(self._staged_shards, manifest.committed_shards)
        store = Store(self.place, manifest, verify_reads=bool(left))  # damaged rows must not end in the statistics
        for shard in left:
            for hook in manifest.hooks:
                self._sums[hook.name].merge(self._sums_of_committed(store, hook, shard))

    def _staged_vector(self, shards: int) -> np.ndarray | None:
        content = self._content(_staged_key(shards)) or b""
        content, claimed = content[:-16], content[-16:].decode(errors="replace")
        return np.frombuffer(content, dtype=np.float64) if claimed == checksum(content) else None

    def _split(self, vector: np.ndarray) -> dict[str, Moments]:
        hooks = self._manifest.hooks
        ends = np.cumsum([Moments.vector_length(hook.d) for hook in hooks])
        parts = np.split(vector, ends[:-1])
        return {hook.name: Moments.from_vector(hook.d, part) for hook, part in zip(hooks, parts, strict=True)}

    def _sums_of_committed(self, store: Store, hook: HookSpec, shard: int) -> Moments:
        geometry = self._manifest.geometry
        first = shard * geometry.rows_per_shard
        stop = first + geometry.rows_in_shard(shard, store.rows)
        sums = empty_moments(self._manifest, hook)
        for start in range(first, stop, geometry.rows_per_chunk):
            sums.update(store.read_rows(hook.name, start, min(stop, start + geometry.rows_per_chunk)))
        return sums

    # --- order in the house -------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Remove temporary files; of a finished store, the whole staging folder."""
        if self._manifest.complete:
            self.place.remove([STAGING_FOLDER], "staging")
            return
        names = self.place.names(STAGING_FOLDER)
        swept = sorted(name for name in names if not name.startswith(STAGED_SUMS))
        self.place.remove([f"{STAGING_FOLDER}/{name}" for name in swept], "staging")

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
            committed = f"The {self._committed_or_none():,} rows committed so far are safe"
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                if self._commit is not None:  # it is what fills the disk: give its space back at once
                    self._commit.discard()
                raise UserError(
                    f"The disk of {self.place.location} is full. {committed}: free some space and run the same command "
                    "again."
                ) from problem
            goes_on = f" {committed}, and the same command continues from there." if self._committed_or_none() else ""
            raise UserError(
                f"{self.place.location} cannot be written: {problem.strerror or problem}.{goes_on}"
            ) from problem

    def _committed_or_none(self) -> int:
        return self._manifest.rows if hasattr(self, "_manifest") else 0


def sweep_complete(place: Place) -> None:
    """Remove what a writer killed in its very last step has left beside a complete store.

    Left alone where somebody is at it, or where we may not write: nothing of it is part of the store.
    """
    if place.names() & {OWNER_FILE, STAGING_FOLDER}:
        with contextlib.suppress(UserError, OSError):
            owner = place.own()
            try:
                place.remove([STAGING_FOLDER], "staging")
            finally:
                owner.release()


def _staged_key(shards: int) -> str:
    return f"{STAGING_FOLDER}/{STAGED_SUMS}{shards}"


def _staged_shards(names: set[str]) -> set[int]:
    """The numbers in the names of staged sums: over how many shards they are."""
    numbers = (name.removeprefix(STAGED_SUMS) for name in names if name.startswith(STAGED_SUMS))
    return {int(number) for number in numbers if number.isdecimal()}
