"""What is in a feature index: the names, the shapes and the manifest. No other file spells them.

An index is a Zarr v3 group that any Zarr reader opens; the manifest is the attribute "dictlearn_feature_index" of the
root. All arrays are uncompressed, so that a latent's activations are one byte range of one or two files.

Every non-zero activation is kept, feature-major (compressed sparse rows whose "rows" are latents): the activations of
latent s are the entries ``offsets[s]`` to ``offsets[s + 1]`` of ``rows`` and ``values``, in ascending order of row.
The text and the vocabulary are copied from the store and the model (8 bytes for each row, next to some 250 for its
activations), so that a page needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.errors import UserError
from activation_store.spec import (
    METADATA_FILE,
    STORED_TYPES,
    array_metadata,
    canonical_json,
    checksum,
    group_metadata,
    render_json,
)

FORMAT_VERSION = 1
MANIFEST_ATTRIBUTE = "dictlearn_feature_index"

LISTED = 10
"""Entries of every list kept per latent: logits at either end, decoder neighbours, co-active latents."""

QUANTILE_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Of the non-zero activations of a latent. Any other level is computed from all of them when asked for."""

HISTOGRAM_BINS = 40
"""Logarithmic bins, each sqrt(2) wide, so that 40 reach from the largest magnitude down to a millionth of it. Smaller
magnitudes fall into one further bin around zero."""

VALUES_PER_FILE = 1 << 20
"""Entries of a long array in one file: 4 MiB."""


# --- the arrays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexArray:
    """One array: where it is, its axes (keys of `Sizes`), its type on disk, what it holds."""

    path: str
    axes: str
    dtype: str
    meaning: str

    @property
    def carrier(self) -> np.dtype:
        return STORED_TYPES[self.dtype].carrier


ARRAYS = (
    IndexArray("activations/offsets", "F", "int64", "where each latent's activations begin; the last is their number"),
    IndexArray("activations/rows", "N", "int32", "row of the store of each activation, ascending within a latent"),
    IndexArray("activations/values", "N", "float32", "the activation; never 0, negative for signed codes"),
    IndexArray("latents/count", "S", "int64", "rows in which the latent fired"),
    IndexArray("latents/held_out_count", "S", "int64", "those of them in held-out documents"),
    IndexArray("latents/maximum", "S", "float32", "largest activation; NaN for a latent that never fired"),
    IndexArray("latents/minimum", "S", "float32", "smallest non-zero activation; NaN for a latent that never fired"),
    IndexArray("latents/total", "S", "float64", "sum of all activations"),
    IndexArray("latents/peak_row", "S", "int64", "row of the (first) activation of largest magnitude; -1 if none"),
    IndexArray("latents/quantiles", "SQ", "float32", "activations at QUANTILE_LEVELS (inverted CDF); NaN if none"),
    IndexArray("latents/histogram", "SH", "int64", "activations between consecutive histogram_edges of the manifest"),
    IndexArray("latents/top_token", "S", "int32", "token with the largest sum of |activation|; -1 if none"),
    IndexArray("latents/top_token_share", "S", "float32", "its share of the sum of |activation|; NaN if none"),
    IndexArray("neighbours/latents", "ST", "int32", "latents with the most similar decoder rows; -1 for no more"),
    IndexArray("neighbours/cosines", "ST", "float32", "the cosine of the two"),
    IndexArray(
        "decoder/norms", "SM", "float32", "length of its decoder row in each rebuilt hook, in units of its spread"
    ),
    IndexArray("neurons/numbers", "SW", "int32", "neurons of largest weight in its decoder row; -1 for no more"),
    IndexArray("neurons/weights", "SW", "float32", "the weights, of the row at unit length"),
    IndexArray("coactive/latents", "ST", "int32", "latents with the largest Jaccard index of rows; -1 for no more"),
    IndexArray("coactive/counts", "ST", "int64", "rows in which both fired"),
    IndexArray("logits/top_tokens", "ST", "int32", "tokens whose logit it raises most; -1 where there are no logits"),
    IndexArray("logits/top_values", "ST", "float32", "by how much, per unit of activation (see decoder.py)"),
    IndexArray("logits/bottom_tokens", "ST", "int32", "tokens whose logit it lowers most"),
    IndexArray("logits/bottom_values", "ST", "float32", "by how much"),
    IndexArray("text/token_ids", "R", "int32", "the token of each row"),
    IndexArray("text/positions", "R", "int32", "its place in the window that the language model saw"),
    IndexArray("documents/ids", "I", "uint8", "the documents' ids as one run of UTF-8"),
    IndexArray("documents/id_ends", "D", "int64", "where each id ends"),
    IndexArray("documents/first_rows", "D", "int64", "first row of each document"),
    IndexArray("documents/rows", "D", "int64", "its number of rows"),
    IndexArray("documents/held_out", "D", "uint8", "1 for held-out documents, 0 for those trained on"),
    IndexArray("vocabulary/pieces", "P", "uint8", "the bytes of all tokens, one after the other"),
    IndexArray("vocabulary/piece_ends", "V", "int64", "where each token's bytes end"),
    IndexArray("vocabulary/counts", "V", "int64", "rows that hold each token"),
)
BY_PATH = {array.path: array for array in ARRAYS}
GROUPS = tuple(dict.fromkeys(array.path.split("/")[0] for array in ARRAYS))


@dataclass(frozen=True)
class Sizes:
    """The length of each axis.

    Attributes:
        S: latents; F one more. N: activations. R: rows. D: documents. I: bytes of their ids. V: tokens of the
            vocabulary. P: bytes of their pieces. H: histogram bins. M: rebuilt hooks, where there are several, else 0.
            W: listed neurons, where it is neurons that are rebuilt, else 0. Q: quantile levels. T: entries of a list.
    """

    S: int
    N: int
    R: int
    D: int
    I: int  # noqa: E741
    V: int
    P: int
    H: int
    M: int = 0
    W: int = 0
    Q: int = len(QUANTILE_LEVELS)
    T: int = LISTED

    @property
    def F(self) -> int:
        return self.S + 1

    def shape(self, array: IndexArray) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in array.axes)


def metadata(array: IndexArray, shape: tuple[int, ...]) -> bytes:
    """The array's zarr.json. One-dimensional arrays are cut into files of `VALUES_PER_FILE`, others lie in one."""
    codec: dict[str, Any] = {"name": "bytes"}
    if array.carrier.itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    record = array_metadata(shape, chunk_shape(shape), array.dtype, [codec])
    record["attributes"] = {"meaning": array.meaning}
    return render_json(record)


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:
        return (max(1, min(shape[0], VALUES_PER_FILE)),)
    return tuple(max(1, n) for n in shape)


def chunk_keys(array: IndexArray, shape: tuple[int, ...]) -> list[str]:
    """The files of the array's values, in order. An array of no values has none."""
    if not prod(shape):
        return []
    files = -(-shape[0] // chunk_shape(shape)[0])
    return [chunk_key(array, number) for number in range(files)]


def chunk_key(array: IndexArray, number: int) -> str:
    """File ``number`` of an array, counted along its first axis."""
    return f"{array.path}/c.{number}" + ".0" * (len(array.axes) - 1)


def chunk_bytes(array: IndexArray, shape: tuple[int, ...]) -> int:
    """Size of each file of the array; the last one is padded with zeros, as Zarr wants it."""
    return prod(chunk_shape(shape)) * array.carrier.itemsize


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeFrom:
    """What an index was made from. Two indexes with the same record hold the same bytes (on one machine).

    A hook is a name, several hooks are a list of them. The model is that of the store, not of those aligned with it.
    """

    run: str
    kind: str
    dictionary_fingerprint: str
    d_in: int
    d_out: int
    d_sae: int
    hook_in: str | list[str]
    hook_out: str | list[str]
    model: str
    model_fingerprint: str
    store: str
    store_fingerprint: str
    rows: int
    logits: bool
    coactive: bool
    aligned_stores: list[str] = field(default_factory=list)
    aligned_fingerprints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class IndexManifest:
    """Attributes:
    made_from: the identity.
    sizes: lengths of the axes.
    rows_held_out: rows in held-out documents, of ``sizes.R``.
    histogram_edges: H + 1 ascending edges shared by all latents.
    logits: what the logits are, in words, or why there are none.
    has_logits: whether there are any.
    files: key -> xxh3 checksum of every file of values.
    """

    made_from: MadeFrom
    sizes: Sizes
    rows_held_out: int
    histogram_edges: tuple[float, ...]
    logits: str
    has_logits: bool
    files: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The root zarr.json."""
        body = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "quantile_levels": list(QUANTILE_LEVELS),
        }
        body = json.loads(json.dumps(body))
        return group_metadata({MANIFEST_ATTRIBUTE: {**body, "checksum": checksum(canonical_json(body))}})

    @classmethod
    def read(cls, index: Path) -> IndexManifest:
        """The manifest of the index in the folder ``index``.

        Raises:
            UserError: nothing there, something else, another format version, or damaged.
        """
        path = index / METADATA_FILE
        try:
            attributes = json.loads(path.read_bytes())["attributes"]
        except FileNotFoundError:
            what = "it has no zarr.json" if index.is_dir() else "there is no such folder"
            raise UserError(f"{str(index)!r} is no feature index: {what}; make one with `dictlearn index`.") from None
        except NotADirectoryError:
            raise UserError(f"{str(index)!r} is a file, not the folder of a feature index.") from None
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError):
            raise _damaged(path, "it is not the JSON of a Zarr group") from None
        body = attributes.get(MANIFEST_ATTRIBUTE) if isinstance(attributes, Mapping) else None
        if not isinstance(body, dict):
            raise UserError(f"{str(index)!r} is a Zarr group but no feature index; make one with `dictlearn index`.")
        version = body.get("format_version")
        if version != FORMAT_VERSION and isinstance(version, int):
            raise UserError(
                f"The feature index {str(index)!r} is of format version {version}; this dictlearn reads version "
                f"{FORMAT_VERSION}. Delete it and run `dictlearn index` again, or use the release that wrote it."
            )
        claimed = body.pop("checksum", None)
        if claimed != checksum(canonical_json(body)):
            raise _damaged(path, "the manifest does not match its own checksum")
        return cls(
            made_from=MadeFrom(**body["made_from"]),
            sizes=Sizes(**body["sizes"]),
            rows_held_out=body["rows_held_out"],
            histogram_edges=tuple(body["histogram_edges"]),
            logits=body["logits"],
            has_logits=body["has_logits"],
            files=body["files"],
        )

    def check_files(self, index: Path) -> None:
        """Look whether every file of values is there in full size (not at its contents).

        Raises:
            UserError: naming the first that is not.
        """
        for array in ARRAYS:
            shape = self.sizes.shape(array)
            expected = chunk_bytes(array, shape)
            for key in chunk_keys(array, shape):
                try:
                    found = (index / key).stat().st_size
                except OSError:
                    raise _damaged(index / key, "it is missing") from None
                if found != expected:
                    raise _damaged(index / key, f"it has {found:,} bytes instead of {expected:,}")

    def verify(self, index: Path) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            UserError: naming the first file that does not match.
        """
        self.check_files(index)
        for key, expected in self.files.items():
            if checksum((index / key).read_bytes()) != expected:
                raise _damaged(index / key, "its contents do not match the checksum in the manifest")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"The feature index is damaged at {str(path)!r}: {reason}; delete the index and run `dictlearn index` again."
    )
