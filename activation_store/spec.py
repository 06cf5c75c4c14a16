"""What is on disk: the names, the shapes and the JSON of an activation store. No other file spells them.

A store is a Zarr v3 group::

    zarr.json                          the root group; its attribute "activation_store" is the manifest
    activations/<hook_name>/           (rows, ...) bfloat16, float16 or float32, one array per hook
    norms/<hook_name>/                 (rows,) float32: the Euclidean length of each row of the hook, as stored
    token_ids/  positions/  documents/ (rows,) int32: the token, its place in the window, the index of its document
    document_table/                    ids (UTF-8 bytes), id_ends, splits, first_rows, rows: one entry per document
    statistics/<hook_name>/            sums over the rows in float64 (`STATISTICS_ARRAYS`), once the store is complete
    .owner  .staging/                  only while somebody writes

Arrays with a row axis are sharded: a shard is one commit of exactly ``rows_per_shard`` rows (the last may be short), an
inner chunk of ``rows_per_chunk`` rows is the unit of shuffling. A shard file holds its chunks in row order, each
padded to full size with zeros and then compressed if the store is, then the index (offset and length of each chunk as
little-endian uint64, all ones for a chunk that begins beyond the last row) and the index's crc32c.

The manifest lives in the root group's attributes, so that one atomic rename of one file commits, any Zarr reader sees
it, and the hierarchy holds nothing that Zarr does not know. Its row count is the truth: shards beyond it do not exist.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import xxhash

from activation_store.errors import UserError
from activation_store.json_values import LARGEST, checksums, list_, object_, refusal, text, whole

FORMAT_VERSION = 3
MANIFEST_ATTRIBUTE = "activation_store"

METADATA_FILE = "zarr.json"
OWNER_FILE = ".owner"
STAGING_FOLDER = ".staging"

ACTIVATIONS = "activations"
NORMS = "norms"
TOKEN_IDS = "token_ids"
POSITIONS = "positions"
DOCUMENTS = "documents"
DOCUMENT_TABLE = "document_table"
STATISTICS = "statistics"

UNKNOWN = -1
"""Token id or position of a row whose source does not tell it, as an imported file may not."""

SPLITS = ("train", "held-out")
"""What a document can belong to; the table stores the index into this tuple."""

COMPRESSIONS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": True}}],
}
"""What may follow the bytes of a chunk, as Zarr codecs. Uncompressed, a chunk is one contiguous byte range that can be
memory-mapped: the default. zstd is for object stores and slow disks."""

NORM_OUTLIER_RATIO = 10.0
"""A row is flagged as an outlier when its norm is more than this many times the median norm of its hook."""

STATISTICS_ARRAYS = {
    "count": "int64",
    "mean": "float64",
    "mean_square": "float64",
    "second_moment": "float64",
    "second_moment_rows": "int64",
    "mean_norm": "float64",
    "median_norm": "float64",
    "norm_outliers": "int64",
}
"""The arrays of statistics/<hook_name>: see `activation_store.statistics.HookStatistics`."""

STATISTICS_AXES = {"mean": 1, "mean_square": 1, "second_moment": 2}
"""Of those, the ones with axes of width d; the others are single numbers."""

DOCUMENT_COLUMNS = {"ids": "uint8", "id_ends": "int64", "splits": "uint8", "first_rows": "int64", "rows": "int64"}
"""The arrays of document_table, one value per document, but ids: the UTF-8 bytes of all ids."""


@dataclass(frozen=True)
class StoredType:
    """A data type on disk: its Zarr name, the numpy type that carries its bytes, and its fill value in JSON."""

    name: str
    carrier: np.dtype
    fill_value: float | int


STORED_TYPES = {
    stored.name: stored
    for stored in (
        StoredType("bfloat16", np.dtype("<u2"), 0.0),  # registered in zarr-extensions; carried as bits
        StoredType("float16", np.dtype("<f2"), 0.0),
        StoredType("float32", np.dtype("<f4"), 0.0),
        StoredType("float64", np.dtype("<f8"), 0.0),
        StoredType("int32", np.dtype("<i4"), 0),
        StoredType("int64", np.dtype("<i8"), 0),
        StoredType("uint8", np.dtype("u1"), 0),
    )
}
ACTIVATION_TYPES = ("bfloat16", "float16", "float32")
MOST_AXES = 8
"""Of a row. No activation has more than three."""


@dataclass(frozen=True)
class HookSpec:
    """One array of activations: the TransformerLens name, the shape of one row, and the type on disk."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.dtype not in ACTIVATION_TYPES:
            raise UserError(f"Hook {self.name} cannot be stored as {self.dtype!r}; use {', '.join(ACTIVATION_TYPES)}.")
        if not 1 <= len(self.shape) <= MOST_AXES or min(self.shape) < 1:
            raise UserError(
                f"Hook {self.name} has rows of shape {self.shape}; it needs 1 to {MOST_AXES} axes, each of at least "
                "one value."
            )
        no_name = not self.name.isprintable() or "/" in self.name or self.name.startswith((".", "__"))
        if not self.name or no_name or self.name == METADATA_FILE:
            raise UserError(f"{self.name!r} cannot name an array in a Zarr group.")

    @property
    def d(self) -> int:
        """Values in one row."""
        return prod(self.shape)

    @property
    def array(self) -> ArraySpec:
        return ArraySpec(f"{ACTIVATIONS}/{self.name}", self.shape, self.dtype)

    @property
    def norms(self) -> ArraySpec:
        return ArraySpec(f"{NORMS}/{self.name}", (), "float32")


@dataclass(frozen=True)
class Geometry:
    """How rows are cut.

    256 rows of 256 bfloat16 values are 128 KiB: large enough to read at full speed, small enough that a buffer of
    100,000 rows mixes 400 places of the corpus. 65,536 rows are 32 MiB a shard, or a few seconds of harvesting: twice
    as many would save a tenth of the writer's work and double what a kill can cost.
    """

    rows_per_chunk: int = 256
    rows_per_shard: int = 65_536

    def __post_init__(self) -> None:
        if self.rows_per_chunk < 1 or self.rows_per_shard < 1 or self.rows_per_shard % self.rows_per_chunk:
            raise UserError(
                f"A shard of {self.rows_per_shard} rows cannot be cut into chunks of {self.rows_per_chunk} rows; "
                "make the first a multiple of the second."
            )

    @property
    def chunks_per_shard(self) -> int:
        return self.rows_per_shard // self.rows_per_chunk

    def shards(self, rows: int) -> int:
        """Shards that hold ``rows`` rows."""
        return -(-rows // self.rows_per_shard)

    def rows_in_shard(self, shard: int, rows: int) -> int:
        """Rows in shard number ``shard`` of a store of ``rows`` rows."""
        return min(self.rows_per_shard, rows - shard * self.rows_per_shard)


@dataclass(frozen=True)
class ArraySpec:
    """An array with a row axis: where it is, the shape of a row, its type on disk."""

    path: str
    row_shape: tuple[int, ...]
    dtype: str

    @property
    def carrier(self) -> np.dtype:
        return STORED_TYPES[self.dtype].carrier

    @cached_property
    def row_bytes(self) -> int:
        return prod(self.row_shape) * self.carrier.itemsize

    @property
    def metadata_key(self) -> str:
        return f"{self.path}/{METADATA_FILE}"

    def shard_key(self, shard: int) -> str:
        return f"{self.path}/c.{shard}" + ".0" * len(self.row_shape)

    def metadata(self, rows: int, geometry: Geometry, compression: str) -> bytes:
        """The array's zarr.json when it has ``rows`` rows."""
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [geometry.rows_per_chunk, *self.row_shape],
            "codecs": [little_endian, *COMPRESSIONS[compression]],
            "index_codecs": [little_endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return render_json(
            array_metadata(
                shape=(rows, *self.row_shape),
                chunk_shape=(geometry.rows_per_shard, *self.row_shape),
                dtype=self.dtype,
                codecs=[{"name": "sharding_indexed", "configuration": sharding}],
                axes=("row", *(("d",), ("head", "d_head"))[len(self.row_shape) - 1])
                if 1 <= len(self.row_shape) <= 2
                else None,
            )
        )


ROW_ARRAYS = tuple(ArraySpec(name, (), "int32") for name in (TOKEN_IDS, POSITIONS, DOCUMENTS))


def array_metadata(
    shape: Sequence[int],
    chunk_shape: Sequence[int],
    dtype: str,
    codecs: list[dict[str, Any]],
    axes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The zarr.json of an array as a dict. Chunk files lie flat in the array's folder: one folder to sync a commit."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": STORED_TYPES[dtype].fill_value,
        "codecs": codecs,
        "attributes": {},
    }
    if axes is not None:
        metadata["dimension_names"] = list(axes)
    return metadata


def group_metadata(attributes: Mapping[str, Any] | None = None) -> bytes:
    """The zarr.json of a group."""
    return render_json({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})})


def whole_array_files(path: str, values: np.ndarray, dtype: str) -> dict[str, bytes]:
    """The files of a small array that is written once, in one chunk: {key: content}."""
    stored = STORED_TYPES[dtype]
    values = np.asarray(values).astype(stored.carrier)
    codec = (
        {"name": "bytes"} if stored.carrier.itemsize == 1 else {"name": "bytes", "configuration": {"endian": "little"}}
    )
    chunk_shape = [max(1, n) for n in values.shape]
    files = {f"{path}/{METADATA_FILE}": render_json(array_metadata(values.shape, chunk_shape, dtype, [codec]))}
    if values.size:
        files[whole_array_key(path, values.ndim)] = values.tobytes()
    return files


def whole_array_key(path: str, n_axes: int) -> str:
    """The one chunk of an array that `whole_array_files` wrote."""
    return f"{path}/c" + ".0" * n_axes


# --- the plan of a store, and its documents ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentRows:
    """Which rows came from one document: ``rows`` of them, from ``first_row`` on; ``split`` is one of `SPLITS`."""

    id: str
    split: str
    first_row: int
    rows: int


@dataclass(frozen=True)
class StorePlan:
    """What a store will hold when it is complete, known before the first forward pass.

    ``documents`` lie one after the other on the row axis and fill it; ``documents[i]`` is what the row array
    ``documents`` means by i. ``excluded`` counts tokens that give no row, by reason. ``batches`` is any JSON that fixes
    how rows are computed (seed, batch size, context length, corpus fingerprint): a rerun must bring the same.
    """

    rows: int
    documents: Sequence[DocumentRows]
    excluded: Mapping[str, int] = field(default_factory=dict)
    batches: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a plan that contradicts itself. Raises ValueError: no user can write one."""
        if self.rows < 1:
            raise ValueError("a store needs at least one row")
        if len(self.documents) >= 1 << 31:
            raise ValueError("the row array `documents` counts documents in int32")
        row = 0
        for index, document in enumerate(self.documents):
            if document.split not in SPLITS:
                raise ValueError(f"document {index} ({document.id}) is in split {document.split!r}, not in {SPLITS}")
            if document.first_row != row or document.rows < 0:
                raise ValueError(
                    f"document {index} ({document.id}) should begin at row {row}, has {document.first_row}"
                )
            row += document.rows
        if row != self.rows:
            raise ValueError(f"the documents of the plan have {row} rows, the plan says {self.rows}")


def document_columns(documents: Sequence[DocumentRows]) -> dict[str, np.ndarray]:
    """The arrays of the document table by name.

    Ids are kept as one run of UTF-8 bytes and the end of each, because Zarr's string type is not yet a settled one.
    """
    encoded = [document.id.encode() for document in documents]
    columns: dict[str, np.ndarray] = {
        "ids": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "id_ends": np.cumsum([len(id_) for id_ in encoded], dtype=np.int64),
        "splits": np.array([SPLITS.index(document.split) for document in documents]),
        "first_rows": np.array([document.first_row for document in documents]),
        "rows": np.array([document.rows for document in documents]),
    }
    return {name: columns[name].astype(STORED_TYPES[dtype].carrier) for name, dtype in DOCUMENT_COLUMNS.items()}


def document_table_files(documents: Sequence[DocumentRows]) -> dict[str, bytes]:
    """The files of the document table: {key: content}."""
    files = {f"{DOCUMENT_TABLE}/{METADATA_FILE}": group_metadata({"splits": list(SPLITS)})}
    for name, column in document_columns(documents).items():
        files |= whole_array_files(f"{DOCUMENT_TABLE}/{name}", column, DOCUMENT_COLUMNS[name])
    return files


def statistics_files(hook_name: str, values: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of one hook's statistics, one for each of `STATISTICS_ARRAYS`."""
    files = {f"{STATISTICS}/{hook_name}/{METADATA_FILE}": group_metadata()}
    for name, dtype in STATISTICS_ARRAYS.items():
        files |= whole_array_files(f"{STATISTICS}/{hook_name}/{name}", np.asarray(values[name]), dtype)
    return files


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """Identity (what the store is, fixed when it is made) and progress (how much of it is there).

    Attributes:
        hooks, geometry, compression: the arrays, how they are cut, and what is done to their chunks.
        rows_planned, documents, documents_checksum, excluded, batches: the plan; the documents are in their table.
        provenance: what the rows were made from, as the harvester tells it (model, tokenizer, corpus, versions).
        rows: committed rows.
        complete: whether all planned rows and the statistics are there.
        shards: array path -> one xxh3 checksum (64 bits, hex) per committed shard file.
        files: key -> xxh3 checksum of each file written once (document table, statistics).
    """

    hooks: tuple[HookSpec, ...]
    geometry: Geometry
    rows_planned: int
    documents: int
    documents_checksum: str
    excluded: dict[str, int]
    batches: dict[str, Any]
    provenance: dict[str, Any]
    compression: str = "none"
    rows: int = 0
    complete: bool = False
    shards: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_plan(
        cls,
        plan: StorePlan,
        hooks: Sequence[HookSpec],
        geometry: Geometry,
        provenance: Mapping[str, Any],
        compression: str = "none",
    ) -> Manifest:
        """The manifest of a store in which nothing has been committed."""
        table = document_table_files(plan.documents)
        return cls(
            hooks=tuple(hooks),
            geometry=geometry,
            rows_planned=plan.rows,
            documents=len(plan.documents),
            documents_checksum=checksum(b"".join(table[key] for key in sorted(table))),
            excluded={reason: int(count) for reason, count in plan.excluded.items()},
            batches=as_json(plan.batches, "the plan's batches"),
            provenance=as_json(provenance, "the provenance"),
            compression=compression,
            shards={array.path: [] for array in arrays_of(hooks)},
            files={key: checksum(content) for key, content in table.items()},
        )

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every array with a row axis."""
        return arrays_of(self.hooks)

    @property
    def committed_shards(self) -> int:
        return self.geometry.shards(self.rows)

    def identity(self) -> dict[str, Any]:
        """What the store is, whatever has been committed of it, as JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "compression": self.compression,
            "hooks": [{"name": h.name, "shape": list(h.shape), "dtype": h.dtype} for h in self.hooks],
            "geometry": dataclasses.asdict(self.geometry),
            "plan": {
                "rows": self.rows_planned,
                "documents": self.documents,
                "documents_checksum": self.documents_checksum,
                "excluded": self.excluded,
                "batches": self.batches,
            },
            "provenance": self.provenance,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the identity: stores with the same fingerprint hold the same rows."""
        return "sha256:" + hashlib.sha256(canonical_json(self.identity())).hexdigest()

    def to_bytes(self) -> bytes:
        """The root zarr.json."""
        body = {
            **self.identity(),
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "complete": self.complete,
            "shards": self.shards,
            "files": self.files,
        }
        return group_metadata({MANIFEST_ATTRIBUTE: {**body, "checksum": checksum(canonical_json(body))}})

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Manifest:
        """Read a root zarr.json; ``name`` is what errors call the file.

        Raises:
            UserError: not a store, another format version, truncated or changed.
        """
        try:
            attributes = json.loads(content)["attributes"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{name} is damaged: it is not the JSON of a Zarr group. Restore it from a copy, or harvest again."
            ) from None
        body = attributes.get(MANIFEST_ATTRIBUTE) if isinstance(attributes, dict) else None
        if not isinstance(body, dict):
            raise UserError(f"{name} belongs to a Zarr group that is not an activation store: it has no manifest.")
        version = body.get("format_version")
        if type(version) is int and version != FORMAT_VERSION:
            raise UserError(
                f"{name} is of format version {version}; this program reads version {FORMAT_VERSION}. "
                "Use the release that wrote it, or harvest again."
            )
        claimed = body.pop("checksum", None)
        try:
            found = checksum(canonical_json(body))
        except (ValueError, RecursionError):  # what Python reads, though JSON cannot say it
            found = None
        if found is None or claimed != found:
            raise UserError(f"{name} is damaged: the manifest does not match its own checksum. Restore it from a copy.")
        try:
            return cls._of_body(body)
        except UserError as problem:
            raise UserError(f"{name} is damaged, as its manifest cannot be right: {problem}") from None

    @classmethod
    def _of_body(cls, body: dict[str, Any]) -> Manifest:
        """Trusts nothing: a checksum is no proof that whoever wrote it knew the format. Raises UserError."""
        identity = {"format_version", "compression", "hooks", "geometry", "plan", "provenance"}
        object_(body, "it", identity | {"fingerprint", "rows", "complete", "shards", "files"})
        plan = object_(body["plan"], "plan", {"rows", "documents", "documents_checksum", "excluded", "batches"})
        geometry = object_(body["geometry"], "geometry", {"rows_per_chunk", "rows_per_shard"})
        if not isinstance(body["complete"], bool):
            raise refusal("complete", body["complete"], "true or false")
        manifest = cls(
            hooks=tuple(_hook(hook, f"hooks[{i}]") for i, hook in enumerate(list_(body["hooks"], "hooks"))),
            geometry=Geometry(**{part: whole(n, f"geometry.{part}") for part, n in geometry.items()}),
            rows_planned=whole(plan["rows"], "plan.rows"),
            documents=whole(plan["documents"], "plan.documents"),
            documents_checksum=checksums([plan["documents_checksum"]], "plan.documents_checksum")[0],
            excluded={
                reason: whole(count, f"plan.excluded.{reason}", least=0)
                for reason, count in object_(plan["excluded"], "plan.excluded").items()
            },
            batches=object_(plan["batches"], "plan.batches"),
            provenance=object_(body["provenance"], "provenance"),
            compression=body["compression"],
            rows=whole(body["rows"], "rows", least=0),
            complete=body["complete"],
            shards={
                path: checksums(list_(values, f"shards.{path}"), f"shards.{path}")
                for path, values in object_(body["shards"], "shards").items()
            },
            files=object_(body["files"], "files"),
        )
        manifest._refuse_contradictions()
        if type(body["format_version"]) is not int or body["fingerprint"] != manifest.fingerprint:
            raise UserError("its fingerprint is that of another store.")
        return manifest

    def _refuse_contradictions(self) -> None:
        """Raises UserError where two parts of a manifest do not fit together."""
        names = [hook.name for hook in self.hooks]
        if not names or len({*names}) != len(names):
            raise UserError(f"its hooks are {names}, where each should have a name of its own.")
        if not isinstance(self.compression, str) or self.compression not in COMPRESSIONS:
            raise refusal("compression", self.compression, " or ".join(COMPRESSIONS))
        largest = max(self.rows_planned, self.geometry.rows_per_shard) * max(a.row_bytes for a in self.arrays)
        if largest > LARGEST:
            raise UserError(f"an array of {largest:,} bytes is larger than any disk.")
        whole_shards = self.rows % self.geometry.rows_per_shard == 0
        if self.rows > self.rows_planned or not (whole_shards or self.rows == self.rows_planned):
            raise UserError(
                f"rows is {self.rows}, which is not a number of whole shards of {self.geometry.rows_per_shard} rows "
                f"up to the {self.rows_planned} planned."
            )
        if self.complete and self.rows != self.rows_planned:
            raise UserError(f"it is complete with {self.rows} of {self.rows_planned} rows.")
        if self.shards.keys() != {array.path for array in self.arrays}:
            raise UserError(
                f"shards is about {', '.join(map(repr, sorted(self.shards))) or 'nothing'}, not about the arrays."
            )
        for path, sums in self.shards.items():
            if len(sums) != self.committed_shards:
                raise UserError(
                    f"shards.{path} has {len(sums)} checksums, and {self.rows} rows are {self.committed_shards} shards."
                )
        checksums(list(self.files.values()), "a value of files")
        needed, possible = self._keys_written_once()
        if not needed <= self.files.keys() <= possible:
            odd = min((needed - self.files.keys()) or (self.files.keys() - possible))
            raise UserError(f"files {'lacks' if odd in needed else 'has'} {odd!r}.")

    def _keys_written_once(self) -> tuple[set[str], set[str]]:
        """The keys that `files` must have, and those it may have: ids that are all empty have no chunk."""
        arrays = {f"{DOCUMENT_TABLE}/{name}": 1 for name in DOCUMENT_COLUMNS}
        groups = [DOCUMENT_TABLE]
        for hook in self.hooks if self.complete else ():
            groups.append(f"{STATISTICS}/{hook.name}")
            arrays |= {f"{STATISTICS}/{hook.name}/{name}": STATISTICS_AXES.get(name, 0) for name in STATISTICS_ARRAYS}
        possible = {f"{path}/{METADATA_FILE}" for path in [*groups, *arrays]}
        possible |= {whole_array_key(path, n_axes) for path, n_axes in arrays.items()}
        return possible - {whole_array_key(f"{DOCUMENT_TABLE}/ids", 1)}, possible

    def fixed_files(self) -> dict[str, bytes]:
        """Metadata that follows from the manifest alone, besides the document table: {key: content}."""
        groups = [ACTIVATIONS, NORMS, *([STATISTICS] if self.complete else [])]
        return {f"{group}/{METADATA_FILE}": group_metadata() for group in groups} | self.array_metadata(self.rows)

    def array_metadata(self, rows: int) -> dict[str, bytes]:
        """The zarr.json of every array with a row axis when the store has ``rows`` rows: {key: content}."""
        return {array.metadata_key: array.metadata(rows, self.geometry, self.compression) for array in self.arrays}


def _hook(value: Any, path: str) -> HookSpec:
    hook = object_(value, path, {"name", "shape", "dtype"})
    shape = tuple(whole(n, f"{path}.shape") for n in list_(hook["shape"], f"{path}.shape"))
    return HookSpec(text(hook["name"], f"{path}.name"), shape, text(hook["dtype"], f"{path}.dtype"))


def foreign_names(names: set[str]) -> set[str]:
    """Of what lies in a place that has no manifest: what no store has put there, so that none may be made there.

    A store begins with its document table and metadata, and has a manifest only then; its writer's files tell that
    what was left by a kill in between is ours.
    """
    of_writer = {OWNER_FILE, STAGING_FOLDER}
    begun = {ACTIVATIONS, NORMS, TOKEN_IDS, POSITIONS, DOCUMENTS, DOCUMENT_TABLE} if names & of_writer else set()
    return names - of_writer - begun


def arrays_of(hooks: Sequence[HookSpec]) -> tuple[ArraySpec, ...]:
    return (*(hook.array for hook in hooks), *(hook.norms for hook in hooks), *ROW_ARRAYS)


def differences(
    here: Mapping[str, Any], asked: Mapping[str, Any], where: tuple[str, str] = ("there", "now")
) -> list[str]:
    """Where two identities differ, as "path is value there and value now", in the order of the first."""
    flat_here, flat_asked = dict(_leaves(here)), dict(_leaves(asked))
    return [
        f"{path} is {_shown(flat_here, path)} {where[0]} and {_shown(flat_asked, path)} {where[1]}"
        for path in dict.fromkeys([*flat_here, *flat_asked])
        if flat_here.get(path, _ABSENT) != flat_asked.get(path, _ABSENT)
    ]


_ABSENT = object()


def _shown(leaves: Mapping[str, Any], path: str) -> str:
    return json.dumps(leaves[path]) if path in leaves else "absent"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif path == "hooks":
        # Hooks are told apart by name, so that one hook more is not shown as every later hook having changed.
        for hook in value:
            yield f"hook {hook['name']}", f"{hook['dtype']} {hook['shape']}"
        yield "order of hooks", [hook["name"] for hook in value]
    else:
        yield path, value


# --- JSON and checksums -----------------------------------------------------------------------------------------------


def checksum(content: bytes | bytearray | memoryview | np.ndarray) -> str:
    """xxh3 with 64 bits, in hex: finds accidents at memory speed; it is no defence against intent."""
    return xxhash.xxh3_64_hexdigest(content)


def render_json(value: Any) -> bytes:
    """JSON as it is written to disk: a line for each key, for people, and one way only, so that bytes can be compared.

    What is not an object stands on one line: the standard library indents long lists a hundred times more slowly.
    """
    return _rendered(value, "").encode() + b"\n"


def _rendered(value: Any, margin: str) -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = margin + "  "
    lines = (f"{inner}{json.dumps(key, ensure_ascii=False)}: {_rendered(item, inner)}" for key, item in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + margin + "}"


def canonical_json(value: Any) -> bytes:
    """JSON as it is hashed: no spaces, keys sorted."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def as_json(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``value`` as it will read after a round trip through JSON (tuples become lists)."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{name} cannot be written as JSON: {problem}") from problem
