"""Activations that SAELens cached (``CacheActivationsRunner``), read with pyarrow alone.

Such a cache is a folder in the layout of Hugging Face ``datasets``: ``dataset_info.json`` with the columns,
``state.json`` with the list of Arrow files. A row of it is one context: the column of a hook holds (context, d) floats,
``token_ids``, which older caches lack, as many integers. The runner's own settings are in
``cache_activations_runner_cfg.json`` where the cache came from the hub, and nowhere otherwise.

A context is packed from several texts, and where they begin is not recorded. So each context is a document of its own,
and the last tenth of them is held out: neighbours may share a text. The runner starts over where its text ends before
its number of tokens is reached, so a context may come twice; it is then in the split of the first. It stores the
activations of the BOS token like any others, and so do we.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from activation_store.errors import UserError
from activation_store.foreign import (
    BLOCK_BYTES,
    HELD_OUT_SHARE,
    Block,
    ForeignRows,
    import_rows,
    stored_dtype,
)
from activation_store.progress import Progress
from activation_store.spec import UNKNOWN, DocumentRows, Geometry, HookSpec

if TYPE_CHECKING:
    import pyarrow

COLUMNS_FILE, PARTS_FILE, RUNNER_FILE = "dataset_info.json", "state.json", "cache_activations_runner_cfg.json"
UNFINISHED = ".tmp_shards"
TOKEN_COLUMN = "token_ids"
END_OF_STREAM = bytes.fromhex("ffffffff00000000")
"""How an Arrow stream ends. A file cut off between two batches reads as a shorter one, so we look for this."""

RUNNER_SETTINGS = ("model_name", "dataset_path", "context_size", "prepend_bos", "seqpos_slice")


def import_saelens_cache(
    folder: str | os.PathLike[str],
    location: str,
    *,
    dtype: str | None = None,
    model: dict | None = None,
    geometry: Geometry | None = None,
    compression: str = "none",
    progress: Progress | None = None,
) -> None:
    """Make a store of a cache, or continue to.

    Args:
        folder: what `CacheActivationsRunner` wrote.
        location: the store to make.
        dtype: on disk; the cache's own when None.
        model: provenance of the language model. None takes the name that the runner recorded, if it did.

    Raises:
        UserError: no such cache, an unfinished or damaged one, a value that is not finite.
    """
    cache = Cache(Path(folder))
    if model is None and "model_name" in cache.settings:
        model = {"name": cache.settings["model_name"], "fingerprint": None}
    import_rows(cache.as_foreign_rows(dtype), location, model, geometry, compression, progress)


@dataclass(frozen=True)
class Column:
    """One hook: (context, d) values of a type in each row of the cache."""

    hook: str
    context: int
    d: int
    dtype: str


class Cache:
    """A folder written by `CacheActivationsRunner`."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}." if not folder.exists() else f"{folder} is not a folder.")
        if (folder / UNFINISHED).exists():
            raise UserError(
                f"{folder} is unfinished: SAELens' runner was interrupted, or is still at work (it left {UNFINISHED}). "
                "It cannot continue one; delete the folder and run it again."
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Of the runner, as far as they are known."""
        if not (self.folder / RUNNER_FILE).exists():
            return {}
        recorded = self._json(RUNNER_FILE)
        return {key: recorded[key] for key in RUNNER_SETTINGS if recorded.get(key) is not None}

    @cached_property
    def columns(self) -> list[Column]:
        """The hooks in it: one, as SAELens writes them today."""
        features = self._json(COLUMNS_FILE).get("features") or {}
        columns = []
        try:
            for name, feature in features.items():
                if feature.get("_type") == "Array2D":
                    context, d = feature["shape"]
                    columns.append(Column(name, int(context), int(d), str(feature["dtype"])))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.folder / COLUMNS_FILE} is damaged: its features are not those of a cache."
            ) from None
        if not columns or len({column.context for column in columns}) > 1 or columns[0].context < 1:
            raise UserError(
                f"{self.folder} is a data set, but not of cached activations: it should have a column of "
                f"(context, d) values named after a hook, and has {', '.join(features) or 'none'}."
            )
        return columns

    @property
    def context(self) -> int:
        """Rows of the store for each row of the cache."""
        return self.columns[0].context

    @cached_property
    def parts(self) -> list[tuple[Path, int]]:
        """The Arrow files in their order, each with its number of contexts.

        Raises:
            UserError: one is missing, truncated, or of other columns.
        """
        state = self._json(PARTS_FILE)
        try:
            files = [self.folder / part["filename"] for part in state["_data_files"]]
        except (KeyError, TypeError):
            raise UserError(f"{self.folder / PARTS_FILE} is damaged: it does not list the data files.") from None
        if len(set(files)) < len(files):
            raise UserError(f"{self.folder / PARTS_FILE} is damaged: it lists a data file twice.")
        return [(file, sum(batch.num_rows for batch in self._batches(file))) for file in files]

    def as_foreign_rows(self, dtype: str | None) -> ForeignRows:
        contexts = sum(n for _, n in self.parts)
        if not contexts:
            raise UserError(f"{self.folder} holds no activations: the runner stopped before its first buffer was full.")
        hooks = tuple(
            HookSpec(c.hook, (c.d,), stored_dtype(c.dtype, dtype, f"{c.hook} in {self.folder}")) for c in self.columns
        )
        return ForeignRows(
            name=self.folder.name,
            hooks=hooks,
            rows=contexts * self.context,
            blocks=self._blocks,
            documents=self._documents,
            batches={"context": self.context},
            origin={
                "format": "SAELens cached activations",
                "folder": self.folder.name,
                "dtype": {column.hook: column.dtype for column in self.columns},
                "runner": self.settings,
            },
        )

    def _documents(self, fingerprint: str) -> list[DocumentRows]:
        """Named after the tokens, so that caches of the same tokens at different hooks can be merged."""
        tokens = fingerprint.partition(":")[2][:8]
        return [
            DocumentRows(f"{tokens}/context {i}", split, i * self.context, self.context)
            for i, split in enumerate(self._splits())
        ]

    def _splits(self) -> list[str]:
        """Of each context: the last tenth of the distinct ones is held out."""
        seen: dict[object, int] = {}
        numbers = [seen.setdefault(tokens, len(seen)) for tokens in self._tokens_of_contexts()]
        first_held_out = len(seen) - len(seen) // HELD_OUT_SHARE
        return ["held-out" if number >= first_held_out else "train" for number in numbers]

    def _tokens_of_contexts(self) -> Iterator[object]:
        """A hash of each context's tokens; its number where tokens are not known."""
        number = 0
        for file, _ in self.parts:
            for batch in self._batches(file):
                known = TOKEN_COLUMN in batch.schema.names
                for tokens in self._token_ids(batch, file).reshape(batch.num_rows, self.context):
                    yield xxhash.xxh3_128_digest(tokens.astype("<i4")) if known else number
                    number += 1

    def _blocks(self, row: int) -> Iterator[Block]:
        wanted, before = row // self.context, 0
        context_bytes = sum(c.context * c.d * np.dtype(c.dtype).itemsize for c in self.columns)
        at_once = max(1, BLOCK_BYTES // context_bytes)
        positions = self._positions
        for file, contexts in self.parts:
            if before + contexts <= wanted:
                before += contexts
                continue
            for batch in self._batches(file):
                for start in range(max(0, wanted - before), batch.num_rows, at_once):
                    part = batch.slice(start, at_once)
                    yield Block(
                        (before + start) * self.context,
                        {c.hook: self._values(part, c.hook, (c.context, c.d), file) for c in self.columns},
                        self._token_ids(part, file),
                        np.tile(positions, part.num_rows),
                    )
                before += batch.num_rows

    @cached_property
    def _positions(self) -> np.ndarray:
        """Of the rows of one context: counted from its first token, unless the runner's settings tell of a slice."""
        whole = np.arange(self.settings.get("context_size", self.context))
        kept = whole[slice(*self.settings.get("seqpos_slice", (None,)))]
        return kept if len(kept) == self.context else np.full(self.context, UNKNOWN)

    def _token_ids(self, batch: pyarrow.RecordBatch, file: Path) -> np.ndarray:
        if TOKEN_COLUMN not in batch.schema.names:
            return np.full(batch.num_rows * self.context, UNKNOWN)
        return self._values(batch, TOKEN_COLUMN, (self.context,), file)

    def _values(self, batch: pyarrow.RecordBatch, column: str, shape: tuple[int, ...], file: Path) -> np.ndarray:
        """A column of lists as (rows of the store, ...), without a copy."""
        import pyarrow
        import pyarrow.compute

        lists = batch.column(column)
        if isinstance(lists, pyarrow.ExtensionArray):  # when `datasets` is loaded, it puts its own type around them
            lists = lists.storage
        for length in shape:
            lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(lists)).to_pylist()
            if lengths != [length]:
                raise UserError(f"{file} is damaged: {column} holds lists of {lengths} values, expected {length}.")
            lists = lists.flatten()
        if lists.null_count:
            raise UserError(f"{file} is damaged: {column} lacks {lists.null_count} values.")
        return lists.to_numpy().reshape(-1, *shape[1:])

    def _batches(self, file: Path) -> Iterator[pyarrow.RecordBatch]:
        """The record batches of an Arrow file, memory-mapped."""
        import pyarrow
        from pyarrow import ipc

        try:
            with pyarrow.memory_map(str(file)) as mapped:
                mapped.seek(max(0, mapped.size() - len(END_OF_STREAM)))
                if mapped.read() != END_OF_STREAM:
                    raise UserError(f"{file} is truncated: its end is missing. Restore it from a copy.")
                mapped.seek(0)
                stream = ipc.open_stream(mapped)
                missing = [column.hook for column in self.columns if column.hook not in stream.schema.names]
                if missing:
                    raise UserError(f"{file} is damaged: it has no column {missing[0]}.")
                for batch in stream:
                    batch.validate(full=True)  # offsets out of bounds would be read as they are
                    yield batch
        except FileNotFoundError:
            raise UserError(f"{file} is missing, though {PARTS_FILE} lists it: the cache is damaged.") from None
        except (pyarrow.ArrowException, OSError, ValueError) as problem:
            raise UserError(f"{file} is damaged; Arrow says: {problem}.") from problem

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no {name}, so it is no data set that SAELens cached. Name the folder that "
                "CacheActivationsRunner wrote (a cache on the hub is Parquet: load it with `datasets` and "
                "save_to_disk first)."
            ) from None
        except (OSError, ValueError) as problem:
            raise UserError(f"{file} cannot be read: {problem}.") from problem
        if not isinstance(content, dict):
            raise UserError(f"{file} is damaged: it should hold a JSON object.")
        return content
