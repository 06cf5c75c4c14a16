"""Reading a store: rows by number, the text around a row, statistics.

A `Store` is a snapshot: it shows the rows that were committed when it was opened, however far the writer gets
meanwhile; `refresh` looks again. Uncompressed shards on a local disk are memory-mapped, so what was read once comes
from the system's page cache, and nothing is copied but the rows asked for. Others are fetched and decoded chunk by
chunk into a buffer of bounded size (`activation_store.chunks`). Needs numpy alone; torch only for `tensor`.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from activation_store.chunks import Arena, missing_shard, room
from activation_store.codec import decoder
from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.metadata import metadata_damages
from activation_store.place import Place
from activation_store.shard import MappedShard, ShardIndex, index_bytes
from activation_store.side_by_side import SideBySide
from activation_store.spec import (
    DOCUMENT_COLUMNS,
    DOCUMENT_TABLE,
    DOCUMENTS,
    METADATA_FILE,
    POSITIONS,
    ROW_ARRAYS,
    SPLITS,
    STATISTICS,
    STATISTICS_ARRAYS,
    STATISTICS_AXES,
    STORED_TYPES,
    TOKEN_IDS,
    ArraySpec,
    DocumentRows,
    HookSpec,
    Manifest,
    checksum,
    whole_array_key,
)
from activation_store.statistics import HookStatistics

if TYPE_CHECKING:
    import torch

MAPPED_SHARDS = 16_384
"""Shard files mapped at a time: the system allows a process 65,530 maps by default."""

KEPT_ROWS = 65_536
"""Rows of each array kept decoded when shards cannot be mapped, unless `Store.reserve` says how many."""

FETCHED_AT_ONCE = 16
"""Requests under way at a time. An object store answers each after tens of milliseconds."""


@dataclass(frozen=True)
class Text:
    """Tokens of consecutive rows of one document; ``token_ids[index]`` is the token of the row asked for."""

    token_ids: np.ndarray
    index: int
    first_row: int
    document: int


def open_store(location: str | os.PathLike[str], *, verify_reads: bool = False) -> Store:
    """Open a store for reading; it may still be growing.

    Args:
        location: a folder, or a URL such as s3://bucket/name.
        verify_reads: compare every file with its checksum before anything of it is used: each shard is then read whole
            the first time that a row of it is.

    Raises:
        UserError: there is no store, it is damaged, it is of another format version, or it cannot be reached.
    """
    place = open_place(location)
    return Store(place, read_manifest(place, exact=verify_reads), verify_reads=verify_reads)


class Store:
    """A store opened for reading: see `open_store`.

    Attributes:
        place: where its files are.
        manifest: `activation_store.spec.Manifest` as it was when the store was opened.
    """

    def __init__(self, place: Place, manifest: Manifest, *, verify_reads: bool = False):
        self.place = place
        self.manifest = manifest
        self.verify_reads = verify_reads
        self._arrays = {array.path: array for array in self.manifest.arrays}
        self._mapped: OrderedDict[tuple[str, int], MappedShard] = OrderedDict()
        self._indexes: dict[tuple[str, int], ShardIndex] = {}
        self._arenas: dict[str, Arena] = {}
        self._reserved_rows = 0
        self._in_one: dict[str, SideBySide | None] = {}
        self._lock = threading.Lock()
        if verify_reads:
            self._refuse_damaged_metadata()

    @property
    def location(self) -> str:
        """The folder or URL, as it was given."""
        return self.place.location

    @property
    def name(self) -> str:
        """The last part of the location, without ``.zarr``."""
        return self.place.name

    @property
    def path(self) -> Path:
        """The folder of a local store.

        Raises:
            UserError: it is not local.
        """
        if self.place.root is None:
            raise UserError(f"The store {self.location} is not on a local disk, which is needed for this.")
        return self.place.root

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"of {self.manifest.rows_planned:,} planned"
        return f"<Store {self.location}: {self.rows:,} rows ({state}), hooks {', '.join(self.hooks)}>"

    def __len__(self) -> int:
        return self.rows

    def refresh(self) -> Store:
        """The same store as it is now."""
        manifest = read_manifest(self.place, exact=self.verify_reads)
        return Store(self.place, manifest, verify_reads=self.verify_reads)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def hooks(self) -> dict[str, HookSpec]:
        """The hooks by name, in the order of the manifest."""
        return {hook.name: hook for hook in self.manifest.hooks}

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self.manifest.rows

    @property
    def complete(self) -> bool:
        """Whether all planned rows and the statistics are there."""
        return self.manifest.complete

    @property
    def fingerprint(self) -> str:
        """Hash of what the store is (plan, hooks, geometry, provenance), the same while it grows."""
        return self.manifest.fingerprint

    @property
    def provenance(self) -> dict:
        """What the rows were made from, as the harvester recorded it."""
        return self.manifest.provenance

    def hook(self, name: str) -> HookSpec:
        """The hook called ``name``.

        Raises:
            UserError: the store has no such hook; the sentence names those it has.
        """
        if name not in self.hooks:
            near = difflib.get_close_matches(name, self.hooks, n=1)
            meant = f" Did you mean {near[0]}?" if near else " Harvest it into a store of its own."
            raise UserError(
                f"Store {self.location} has hooks {', '.join(self.hooks)}; {name} is not among them.{meant}"
            )
        return self.hooks[name]

    @property
    def together(self) -> list[Store]:
        """The stores whose hooks are here: this one, or all that `activation_store.aligned` has put side by side."""
        return [self]

    def home(self, name: str) -> tuple[Store, str]:
        """The store that holds a hook, and what it is called there.

        Raises:
            UserError: there is no such hook.
        """
        return self, self.hook(name).name

    def d(self, hook: str) -> int:
        """Values in one row of a hook: d, or heads times d_head."""
        return self.hook(hook).d

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read_rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as (n, *shape): float32, float16, or bfloat16 as uint16 bits. A copy."""
        return self._read(self.hook(hook).array, start, stop)

    def take(self, hook: str, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows at ``indices`` (n,), in their order, as (n, *shape); types as in `read_rows`.

        Args:
            out: where to put them, if given; of that shape and type, contiguous.
        """
        return self._take(self.hook(hook).array, np.asarray(indices, dtype=np.int64), out)

    def tensor(self, hook: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop as a torch tensor (n, *shape) in the type they are stored in."""
        return as_tensor(self.read_rows(hook, start, stop))

    def token_ids(self, start: int, stop: int) -> np.ndarray:
        """The token of each row start..stop, int32."""
        return self._read(self._arrays[TOKEN_IDS], start, stop)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """The place of each row's token in the window the model saw, int32."""
        return self._read(self._arrays[POSITIONS], start, stop)

    def documents(self, start: int, stop: int) -> np.ndarray:
        """The index of each row's document in `document_table`, int32."""
        return self._read(self._arrays[DOCUMENTS], start, stop)

    def take_row_array(self, name: str, indices: np.ndarray) -> np.ndarray:
        """``token_ids``, ``positions`` or ``documents`` of the rows at ``indices`` (n,), int32."""
        if name not in (array.path for array in ROW_ARRAYS):
            raise ValueError(f"{name!r} is none of {', '.join(array.path for array in ROW_ARRAYS)}")
        return self._take(self._arrays[name], np.asarray(indices, dtype=np.int64), None)

    def norms(self, hook: str, start: int, stop: int) -> np.ndarray:
        """The Euclidean length of each row start..stop of a hook as stored, float32."""
        return self._read(self.hook(hook).norms, start, stop)

    def take_norms(self, hook: str, indices: np.ndarray) -> np.ndarray:
        """The lengths of the rows of a hook at ``indices`` (n,), float32."""
        return self._take(self.hook(hook).norms, np.asarray(indices, dtype=np.int64), None)

    def text_around(self, row: int, before: int, after: int) -> Text:
        """Tokens of up to ``before`` rows before ``row`` and ``after`` rows after it, within its document."""
        self._check_range(row, row + 1)
        document = int(self.documents(row, row + 1)[0])
        first = stop = 0
        if 0 <= document < self.manifest.documents:
            first, stop = int(self.document_first_rows[document]), int(self._document_stops[document])
        if not first <= row < stop:
            raise UserError(
                f"{self.place.where(DOCUMENTS)} is damaged: it says that row {row} is of document {document}."
            )
        start, stop = max(first, row - before), min(stop, self.rows, row + after + 1)
        return Text(self.token_ids(start, stop), row - start, start, document)

    # --- documents and splits -----------------------------------------------------------------------------------------

    @cached_property
    def document_table(self) -> list[DocumentRows]:
        """Every document of the plan, also those whose rows are not there yet."""
        ids = self._whole_array(f"{DOCUMENT_TABLE}/ids", "uint8", (-1,)).tobytes()
        columns = {name: column.tolist() for name, column in self._documents.items()}
        ends, starts = columns["id_ends"], [0, *columns["id_ends"][:-1]]
        try:
            names = [ids[start:end].decode() for start, end in zip(starts, ends, strict=True)]
        except UnicodeDecodeError:
            names = None
        if names is None or ends[-1] != len(ids) or starts != sorted(starts):
            raise UserError(f"{self.place.where(DOCUMENT_TABLE)} is damaged: it cannot be told where its ids end.")
        return [
            DocumentRows(name, SPLITS[split], first_row, n)
            for name, split, first_row, n in zip(
                names, columns["splits"], columns["first_rows"], columns["rows"], strict=True
            )
        ]

    def split_rows(self, split: str) -> list[tuple[int, int]]:
        """Ranges (start, stop) of the committed rows whose documents are in ``split`` (train, held-out or all).

        Ascending, never empty, neighbours joined.
        """
        return [(int(start), int(stop)) for start, stop in self.split_ranges(split)]

    def split_ranges(self, split: str, planned: bool = False) -> np.ndarray:
        """`split_rows` as an array (n, 2); of all planned rows, if asked, also those that are not there yet."""
        end = self.manifest.rows_planned if planned else self.rows
        if split == "all":
            return np.array([[0, end]] if end else [], dtype=np.int64).reshape(-1, 2)
        if split not in SPLITS:
            raise UserError(f"There is no split {split!r}; use {', '.join(SPLITS)} or all.")
        chosen = self._documents["splits"] == SPLITS.index(split)
        starts, stops = self.document_first_rows[chosen], np.minimum(self._document_stops[chosen], end)
        starts, stops = starts[starts < stops], stops[starts < stops]
        if not len(starts):
            return np.empty((0, 2), dtype=np.int64)
        new = np.append(True, starts[1:] != stops[:-1])
        return np.stack([starts[new], stops[np.append(np.flatnonzero(new)[1:] - 1, len(starts) - 1)]], axis=1)

    @cached_property
    def document_first_rows(self) -> np.ndarray:
        """The first row of each document in `document_table`, int64, ascending."""
        return self._documents["first_rows"]

    @cached_property
    def _document_stops(self) -> np.ndarray:
        return self.document_first_rows + self._documents["rows"]

    @cached_property
    def _documents(self) -> dict[str, np.ndarray]:
        """The columns of the document table, but the ids: one number for each document."""
        shape = (self.manifest.documents,)
        columns = {
            name: self._whole_array(f"{DOCUMENT_TABLE}/{name}", dtype, shape)
            for name, dtype in DOCUMENT_COLUMNS.items()
            if name != "ids"
        }
        rows = columns["rows"]
        in_line = rows.min() >= 0 and np.array_equal(columns["first_rows"], np.cumsum(rows) - rows)
        if not in_line or rows.sum() != self.manifest.rows_planned or columns["splits"].max() >= len(SPLITS):
            raise UserError(f"{self.place.where(DOCUMENT_TABLE)} is damaged: its documents do not fill the store.")
        return columns

    # --- statistics ---------------------------------------------------------------------------------------------------

    def statistics(self, hook: str) -> HookStatistics:
        """Count, mean, second moment and mean norm of a hook over all rows.

        Raises:
            UserError: the store is not complete.
        """
        d = self.hook(hook).d
        if not self.complete:
            raise UserError(
                f"Store {self.location} has no statistics yet: {self.rows:,} of {self.manifest.rows_planned:,} rows "
                "are there. Run its harvest again to finish it."
            )
        read = {
            name: self._whole_array(f"{STATISTICS}/{hook}/{name}", dtype, (d,) * STATISTICS_AXES.get(name, 0))
            for name, dtype in STATISTICS_ARRAYS.items()
        }
        single = {name: value.item() for name, value in read.items() if name not in STATISTICS_AXES}
        return HookStatistics(**{**read, **single}, excluded=dict(self.manifest.excluded))

    def _whole_array(self, path: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        key = whole_array_key(path, len(shape))
        if key not in self.manifest.files:  # an array of no values has no chunk
            return np.empty(0, dtype=STORED_TYPES[dtype].carrier)
        content, carrier = self._read_checked(key), STORED_TYPES[dtype].carrier
        expected = prod(shape) * carrier.itemsize
        if shape != (-1,) and len(content) != expected:
            raise UserError(
                f"{self.place.where(key)} is damaged: it has {len(content)} bytes where {expected} should be."
            )
        return np.frombuffer(content, dtype=carrier).reshape(shape)

    def _refuse_damaged_metadata(self) -> None:
        for damage in metadata_damages(self.place, self.manifest):
            raise UserError(f"{self.place.where(damage.part)} is damaged: it {damage.problem}.")
        for key in self.manifest.files:
            if key.endswith(METADATA_FILE):
                self._read_checked(key)

    def _read_checked(self, key: str) -> bytes:
        where = self.place.where(key)
        try:
            content = self.place.read(key)
        except OSError as problem:
            raise UserError(f"{where} cannot be read: {problem.strerror or problem}; the store is damaged.") from None
        if checksum(content) != self.manifest.files[key]:
            raise UserError(f"{where} is damaged: it does not match its checksum in the manifest.")
        return content

    # --- shards -------------------------------------------------------------------------------------------------------

    def prefetch(self, hook: str, chunks: np.ndarray) -> None:
        """Begin to read chunks (numbers of ``rows_per_chunk`` rows) before their rows are wanted; returns at once."""
        array, per_shard = self.hook(hook).array, self.manifest.geometry.chunks_per_shard
        if not self.is_mapped:
            self._arena(array).prefetch(np.asarray(chunks))
            return
        for chunk in chunks.tolist():
            self._shard(array, chunk // per_shard).prefetch(chunk % per_shard)

    def reserve(self, rows: int) -> None:
        """Keep the last ``rows`` rows of each array in memory if they cannot be mapped, and no more than asked for.

        What a mixing buffer needs. Of several who ask, the one who asks for most is followed.
        """
        with self._lock:
            if rows > self._reserved_rows:
                self._reserved_rows = rows
                self._arenas = {}

    @cached_property
    def is_mapped(self) -> bool:
        """Whether rows are read through memory maps: an uncompressed store on a local disk."""
        return self.place.root is not None and self.manifest.compression == "none"

    def _read(self, array: ArraySpec, start: int, stop: int) -> np.ndarray:
        self._check_range(start, stop)
        out = self._room(array, stop - start)
        per_shard = self.manifest.geometry.rows_per_shard
        if not self.is_mapped:
            self._arena(array).take(np.arange(start, stop), out)
            return out
        for number in range(start // per_shard, -(-stop // per_shard)):
            base = number * per_shard
            first, last = max(start, base), min(stop, base + per_shard)
            self._shard(array, number).read(first - base, last - base, out[first - start : last - start])
        return out

    def _room(self, array: ArraySpec, rows: int) -> np.ndarray:
        return room((rows, *array.row_shape), array.carrier, f"{rows:,} rows of {self.place.where(array.path)}")

    def _take(self, array: ArraySpec, indices: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        if len(indices) and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"rows {indices.min()}..{indices.max()} asked for, the store has rows 0..{self.rows - 1}")
        if out is None:
            out = self._room(array, len(indices))
        if not self.is_mapped:
            self._arena(array).take(indices, out)
            return out
        per_shard = self.manifest.geometry.rows_per_shard
        side_by_side = self._side_by_side(array, indices)
        if side_by_side is not None:
            # mode="clip" lets numpy copy straight into `out`; the bounds are checked above.
            return np.take(side_by_side.rows, indices, axis=0, out=out, mode="clip")
        numbers, within = np.divmod(indices, per_shard)
        if not len(indices) or (numbers[0] == numbers).all():
            if len(indices):
                self._shard(array, int(numbers[0])).take(within, out)
            return out
        # One gather per shard into rows grouped by shard, then one permutation of what is then still in the cache:
        # faster than writing each shard's rows to scattered places. (numpy sorts 16-bit numbers by radix.)
        order = np.argsort(numbers.astype(np.uint16) if self.rows < per_shard << 16 else numbers, kind="stable")
        grouped = np.empty_like(out)
        numbers, within = numbers[order], within[order]
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            self._shard(array, int(numbers[start])).take(within[start:stop], grouped[start:stop])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return np.take(grouped, back, axis=0, out=out, mode="clip")

    def _side_by_side(self, array: ArraySpec, indices: np.ndarray) -> SideBySide | None:
        """All rows as one array, those at ``indices`` mapped; None where shards cannot be laid side by side."""
        geometry = self.manifest.geometry
        shards = geometry.shards(self.rows)
        if array.path not in self._in_one:
            few = shards * len(self._arrays) <= MAPPED_SHARDS
            self._in_one[array.path] = SideBySide.of(array, geometry, shards) if few else None
        in_one = self._in_one[array.path]
        if in_one is None or in_one.there.all():
            return in_one
        touched = np.bincount(indices // geometry.rows_per_shard, minlength=shards) > 0
        for number in np.flatnonzero(touched & ~in_one.there).tolist():
            shard = self._shard(array, number)
            try:
                with self._lock:
                    fits = shard.is_one_array and in_one.add(number, self.path / array.shard_key(number), shard.rows)
            except OSError:  # too many maps, or the file is gone since it was mapped on its own
                fits = False
            if not fits:
                self._in_one[array.path] = None
                return None
        return in_one

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} asked for, the store has {self.rows} rows")

    def _shard(self, array: ArraySpec, number: int) -> MappedShard:
        key = (array.path, number)
        with self._lock:
            shard = self._mapped.get(key)
            if shard is None:
                shard = self._mapped[key] = self._map(array, number)
                if len(self._mapped) > MAPPED_SHARDS:
                    self._mapped.popitem(last=False)
            return shard

    def _map(self, array: ArraySpec, number: int) -> MappedShard:
        key = array.shard_key(number)
        where = self.place.where(key)
        try:
            mapped = self.place.mapped(key)
        except FileNotFoundError:
            raise missing_shard(where) from None
        except OSError as problem:
            raise UserError(f"{where} cannot be read: {problem.strerror or problem}.") from None
        except ValueError:
            raise UserError(f"{where} is damaged: the file is empty.") from None
        assert mapped is not None
        self._check_shard(array, number, mapped)
        rows = self.manifest.geometry.rows_in_shard(number, self.rows)
        return MappedShard(mapped, where, rows, array, self.manifest.geometry)

    def _index(self, array: ArraySpec, number: int) -> ShardIndex:
        """Where the chunks of a shard that is not mapped lie. Two threads may read it at once; both get the same."""
        known = self._indexes.get((array.path, number))
        if known is not None:
            return known
        geometry, key = self.manifest.geometry, array.shard_key(number)
        where = self.place.where(key)
        try:
            if self.verify_reads:
                content = self.place.read(key)
                self._check_shard(array, number, content)
                tail, size = content[-index_bytes(geometry) :], len(content)
            else:
                tail, size = self.place.tail(key, index_bytes(geometry))
        except FileNotFoundError:
            raise missing_shard(where) from None
        except OSError as problem:
            raise UserError(f"{where} cannot be read: {problem.strerror or problem}.") from problem
        rows = geometry.rows_in_shard(number, self.rows)
        index = ShardIndex.decode(tail, size, rows, geometry, where)
        if self.manifest.compression == "none":
            index.refuse_other_lengths(geometry.rows_per_chunk * array.row_bytes, where)
        self._indexes[array.path, number] = index
        return index

    def _check_shard(self, array: ArraySpec, number: int, content: np.ndarray | bytes) -> None:
        if self.verify_reads and checksum(content) != self.manifest.shards[array.path][number]:
            raise UserError(
                f"{self.place.where(array.shard_key(number))} is damaged: it does not match its checksum in the "
                "manifest. Nothing was read from it."
            )

    def _arena(self, array: ArraySpec) -> Arena:
        if self.rows:  # that many chunks there are, before memory is taken to keep account of them
            self._index(array, 0)
        with self._lock:
            arena = self._arenas.get(array.path)
            if arena is None:
                geometry = self.manifest.geometry
                arena = self._arenas[array.path] = Arena(
                    self.place,
                    array,
                    geometry,
                    chunks=-(-self.rows // geometry.rows_per_chunk),
                    slots=-(-(self._reserved_rows or KEPT_ROWS) // geometry.rows_per_chunk),
                    decode=decoder(self.manifest.compression),
                    index=self._index,
                    pool=self._pool,
                )
            return arena

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(FETCHED_AT_ONCE, thread_name_prefix="activation store fetcher")


def as_tensor(rows: np.ndarray) -> torch.Tensor:
    """Rows as read from a store as a torch tensor that shares their memory; uint16 bits become bfloat16."""
    import torch

    if rows.dtype == np.uint16:
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)


def read_manifest(place: Place, exact: bool = False) -> Manifest:
    """The manifest of the store at ``place``.

    Args:
        exact: look also at what is around it in its file, which does not matter to us.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    try:
        content = place.read(METADATA_FILE)
    except FileNotFoundError:
        raise UserError(
            f"There is no activation store at {place.location}; make one with `dictlearn harvest`."
        ) from None
    except NotADirectoryError:
        raise UserError(f"{place.location} is a file, not the folder of an activation store.") from None
    except OSError as problem:
        raise UserError(f"{place.where(METADATA_FILE)} cannot be read: {problem.strerror or problem}.") from None
    manifest = Manifest.from_bytes(content, place.where(METADATA_FILE))
    if exact and content != manifest.to_bytes():
        raise UserError(f"{place.where(METADATA_FILE)} is damaged: it has been changed around the manifest.")
    return manifest
