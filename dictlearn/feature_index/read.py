"""An index opened for reading: the table of all latents, and everything that is shown of one.

A page is data: `feature_page` returns a `FeaturePage` of plain Python values, which the app draws and the command line
prints as JSON. Everything on it is exact, computed from all activations of the latent: nothing was sampled when the
index was made. All text on it is safe to show as text, and must not be shown as markup (see token_text.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.errors import UserError
from dictlearn.feature_index.spec import (
    BY_PATH,
    QUANTILE_LEVELS,
    VALUES_PER_FILE,
    IndexManifest,
    chunk_key,
    chunk_keys,
)
from dictlearn.feature_index.strips import AFTER, BEFORE, Band, StripCutter, TokenStrip, bands
from dictlearn.feature_index.table import FeatureTable
from dictlearn.feature_index.token_text import shown

LINEAR_BINS = 40

__all__ = [
    "Band",
    "CoActive",
    "FeatureIndex",
    "FeaturePage",
    "FeatureTable",
    "Histogram",
    "Neighbour",
    "Neuron",
    "TokenFired",
    "TokenLogit",
    "TokenStrip",
    "WritesTo",
    "feature_page",
    "open_index",
]


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` activations lie in ``edges[i]`` to ``edges[i + 1]``; the last bin includes its upper edge."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TokenLogit:
    """By how much one unit of activation raises a token's logit (see ``FeaturePage.logits_are``)."""

    token: str
    token_id: int
    logit: float


@dataclass(frozen=True)
class TokenFired:
    """A token that the latent fires on.

    Attributes:
        count: rows with this token in which the latent fired.
        share_of_mass: the part of the latent's summed |activation| that lies on this token.
        share_of_token: the part of this token's rows in which the latent fired.
        mean: mean activation where it fired on this token.
    """

    token: str
    token_id: int
    count: int
    share_of_mass: float
    share_of_token: float
    mean: float


@dataclass(frozen=True)
class Neighbour:
    """A latent with a similar decoder row."""

    latent: int
    cosine: float
    density: float
    top_token: str


@dataclass(frozen=True)
class CoActive:
    """A latent that fires in the same rows.

    Attributes:
        count: rows in which both fired.
        jaccard: that, divided by the rows in which either fired.
        pmi: log2 of how many times more often they fire together than if they were independent.
        share: the part of this page's latent's activations in which the other fired too.
    """

    latent: int
    count: int
    jaccard: float
    pmi: float
    share: float
    density: float
    top_token: str


@dataclass(frozen=True)
class WritesTo:
    """One of several hooks that a latent is decoded into.

    Attributes:
        norm: length of its decoder row there, in units of the hook's spread (the root of its variance per coordinate).
        share: that, divided by the sum over all hooks; 0 for a latent that writes nowhere.
    """

    hook: str
    norm: float
    share: float


@dataclass(frozen=True)
class Neuron:
    """A neuron in a latent's decoder row, of a dictionary that rebuilds neurons.

    Attributes:
        weight: signed, of the row at unit length; its square is the neuron's share.
    """

    neuron: int
    weight: float


@dataclass(frozen=True)
class FeaturePage:
    """Everything shown of one latent. Numbers that do not exist (of a latent that never fired) are None.

    Attributes:
        density: share of all rows in which it fired; ``density_train`` and ``density_held_out`` of those of one split.
        mean: of the non-zero activations. ``quantiles``: of the non-zero activations, by level.
        histogram: of all activations, in equal steps. ``log_histogram``: in steps of sqrt(2), the same for all latents.
        bands: examples: the top, then (signed codes only) the bottom, then equal shares from strong to weak.
        fires_on: the tokens that carry most of its activation.
        top_logits, bottom_logits: empty where ``logits_are`` says why there are none.
        provenance: what the index was made from (`spec.MadeFrom`): run, store, model, hooks, fingerprints.
        writes_to: the hooks it is decoded into, where there are several.
        neurons: those of largest weight in its decoder row, where it is neurons that are rebuilt.
    """

    latent: int
    d_sae: int
    count: int
    rows: int
    density: float
    density_train: float | None
    density_held_out: float | None
    maximum: float | None
    minimum: float | None
    mean: float | None
    quantiles: dict[str, float]
    histogram: Histogram
    log_histogram: Histogram
    bands: tuple[Band, ...]
    fires_on: tuple[TokenFired, ...]
    top_logits: tuple[TokenLogit, ...]
    bottom_logits: tuple[TokenLogit, ...]
    logits_are: str
    neighbours: tuple[Neighbour, ...]
    coactive: tuple[CoActive, ...]
    provenance: dict[str, Any]
    writes_to: tuple[WritesTo, ...] = ()
    neurons: tuple[Neuron, ...] = ()

    @property
    def run(self) -> str:
        """Name of the run whose dictionary this is a latent of."""
        return self.provenance["run"]

    @property
    def store(self) -> str:
        """Name of the store it was encoded from."""
        return self.provenance["store"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


# --- the index --------------------------------------------------------------------------------------------------------


def open_index(path: str | Path) -> FeatureIndex:
    """Open a feature index.

    Raises:
        UserError: there is none, it is of another format version, or a file is missing or has the wrong size.
    """
    index = Path(path)
    manifest = IndexManifest.read(index)
    manifest.check_files(index)
    return FeatureIndex(index, manifest)


class FeatureIndex:
    """See `open_index`. Arrays are memory-mapped; any number of threads may read.

    Attributes:
        path: the folder.
        manifest: sizes, provenance, edges of the histograms, what the logits are.
    """

    def __init__(self, path: Path, manifest: IndexManifest):
        self.path = path
        self.manifest = manifest
        self._files: dict[str, np.ndarray] = {}
        self._texts: dict[int, str] = {}

    def __repr__(self) -> str:
        made = self.manifest.made_from
        return f"<FeatureIndex {self.path}: {self.d_sae:,} latents of {made.run}, {self.rows:,} rows of {made.store}>"

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".zarr")

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.manifest.sizes.S

    @property
    def rows(self) -> int:
        """Rows of the store that were encoded."""
        return self.manifest.sizes.R

    @property
    def provenance(self) -> dict[str, Any]:
        """What the index was made from: run, store, model, hooks, fingerprints."""
        return dataclasses.asdict(self.manifest.made_from)

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """The hooks that latents are decoded into."""
        hooks = self.manifest.made_from.hook_out
        return (hooks,) if isinstance(hooks, str) else tuple(hooks)

    def decoder_shares(self) -> np.ndarray:
        """(d_sae, hooks) share of each hook in the sum of a latent's decoder norms; no columns where there is one."""
        norms = self.array("decoder/norms")
        return norms / np.maximum(norms.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)

    def verify(self) -> None:
        """Compare every file with its checksum. Raises UserError naming the first that does not match."""
        self.manifest.verify(self.path)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def array(self, path: str) -> np.ndarray:
        """A whole array of `spec.ARRAYS`. Mapped, unless it lies in several files (then a copy)."""
        if path not in self._files:
            spec = BY_PATH[path]
            shape = self.manifest.sizes.shape(spec)
            parts = [self._file(key, spec.carrier) for key in chunk_keys(spec, shape)]
            whole = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, spec.carrier)])
            self._files[path] = whole[: int(np.prod(shape))].reshape(shape)
        return self._files[path]

    def read(self, path: str, start: int, stop: int) -> np.ndarray:
        """Entries start..stop of a one-dimensional array; a copy only where they lie in more than one file."""
        spec = BY_PATH[path]
        parts = []
        for number in range(start // VALUES_PER_FILE, -(-stop // VALUES_PER_FILE)):
            base = number * VALUES_PER_FILE
            content = self._file(chunk_key(spec, number), spec.carrier)
            parts.append(content[max(start - base, 0) : min(stop - base, VALUES_PER_FILE)])
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, spec.carrier)])

    def at(self, path: str, entries: np.ndarray) -> np.ndarray:
        """The given entries (n,) of a one-dimensional array."""
        spec = BY_PATH[path]
        if self.manifest.sizes.shape(spec)[0] <= VALUES_PER_FILE:
            return self._file(chunk_key(spec, 0), spec.carrier)[entries]
        numbers, within = np.divmod(entries, VALUES_PER_FILE)
        out = np.empty(len(entries), dtype=spec.carrier)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            out[here] = self._file(chunk_key(spec, number), spec.carrier)[within[here]]
        return out

    def _file(self, key: str, dtype: np.dtype) -> np.ndarray:
        if key not in self._files:
            try:
                self._files[key] = np.asarray(np.memmap(self.path / key, dtype=dtype, mode="r"))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"The feature index is damaged at {str(self.path / key)!r}: {error}; delete the index and run "
                    "`dictlearn index` again."
                ) from None
        return self._files[key]

    # --- one latent ---------------------------------------------------------------------------------------------------

    def check_latent(self, latent: int) -> int:
        """The number itself. Raises UserError when there is no such latent."""
        if not 0 <= latent < self.d_sae:
            raise UserError(
                f"There is no latent {latent} in the index {self.name!r}: it has {self.d_sae}, "
                f"numbered 0 to {self.d_sae - 1}."
            )
        return latent

    def activations(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n,) in ascending order, and the latent's activations (n,) in them: every one that is not zero."""
        offsets = self.array("activations/offsets")
        start, stop = int(offsets[latent]), int(offsets[latent + 1])
        return self.read("activations/rows", start, stop), self.read("activations/values", start, stop)

    def quantiles(self, latent: int, levels: list[float] | np.ndarray) -> np.ndarray:
        """Exact quantiles of the non-zero activations (inverted CDF: each is an activation that occurred)."""
        values = self.activations(latent)[1]
        if not len(values):
            return np.full(len(levels), np.nan, dtype=np.float32)
        return np.quantile(values, levels, method="inverted_cdf")

    # --- text ---------------------------------------------------------------------------------------------------------

    def token_text(self, token: int) -> str:
        """A token as text that is safe to show; "" for -1 (no token)."""
        if token < 0:
            return ""
        if token not in self._texts:
            self._texts[token] = shown(self.token_bytes(token))
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """The very bytes of a token."""
        ends = self.array("vocabulary/piece_ends")
        start = int(ends[token - 1]) if token else 0
        return self.array("vocabulary/pieces")[start : int(ends[token])].tobytes()

    def document_id(self, document: int) -> str:
        ends = self.array("documents/id_ends")
        start = int(ends[document - 1]) if document else 0
        return self.array("documents/ids")[start : int(ends[document])].tobytes().decode()

    def document_of(self, row: int) -> int:
        """Index of the document that a row belongs to."""
        return int(np.searchsorted(self.array("documents/first_rows"), row, side="right")) - 1

    def is_held_out(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows (n,) are in held-out documents."""
        documents = np.searchsorted(self.array("documents/first_rows"), rows, side="right") - 1
        return self.array("documents/held_out")[documents] == 1

    # --- all latents --------------------------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> FeatureTable:
        count = self.array("latents/count")
        held_out = self.array("latents/held_out_count")
        coactive, together = self.array("coactive/latents")[:, 0], self.array("coactive/counts")[:, 0]
        shares = self.decoder_shares() if len(self.hooks_out) > 1 else np.full((self.d_sae, 1), np.nan)
        hooks = np.array(self.hooks_out if len(self.hooks_out) > 1 else [""], dtype=object)
        with np.errstate(divide="ignore", invalid="ignore"):
            either = count + count[coactive] - together
            return FeatureTable(
                latent=np.arange(self.d_sae),
                count=count,
                density=count / self.rows,
                density_held_out=held_out / np.float64(self.manifest.rows_held_out),
                maximum=self.array("latents/maximum"),
                minimum=self.array("latents/minimum"),
                mean=self.array("latents/total") / count,
                median=self.array("latents/quantiles")[:, QUANTILE_LEVELS.index(0.5)],
                top_token=self._token_column("latents/top_token"),
                top_token_share=self.array("latents/top_token_share"),
                top_logit=self._token_column("logits/top_tokens"),
                top_logit_value=self.array("logits/top_values")[:, 0],
                bottom_logit=self._token_column("logits/bottom_tokens"),
                bottom_logit_value=self.array("logits/bottom_values")[:, 0],
                neighbour=self.array("neighbours/latents")[:, 0],
                neighbour_cosine=self.array("neighbours/cosines")[:, 0],
                coactive=coactive,
                coactive_jaccard=np.where(coactive >= 0, together / either, np.nan),
                writes_to=hooks[shares.argmax(axis=1)],
                writes_to_share=shares.max(axis=1),
            )

    def table(self) -> FeatureTable:
        """One row per latent. Made once, then shared: do not write into its columns."""
        return self._table

    def _token_column(self, path: str) -> np.ndarray:
        tokens = self.array(path)
        column = tokens if tokens.ndim == 1 else tokens[:, 0]
        return np.array([self.token_text(token) for token in column.tolist()], dtype=object)


# --- a page -----------------------------------------------------------------------------------------------------------


def feature_page(
    index: FeatureIndex,
    latent: int,
    *,
    examples: int = 20,
    bins: int = 5,
    examples_per_bin: int = 5,
    before: int = BEFORE,
    after: int = AFTER,
) -> FeaturePage:
    """Everything there is to show of one latent.

    Args:
        examples: strips in the top band (and the bottom one).
        bins: bands of equal numbers of activations, from strong to weak; 0 for none.
        examples_per_bin: strips in each of them, evenly spaced in rank.
        before, after: tokens of a strip around its peak.

    Raises:
        UserError: there is no such latent, or the index is damaged.
    """
    index.check_latent(latent)
    rows, values = index.activations(latent)
    count, held_out = len(rows), int(index.array("latents/held_out_count")[latent])
    rows_held_out = index.manifest.rows_held_out
    rows_train = index.rows - rows_held_out
    cut = StripCutter(index, rows, values, before, after)
    quantiles = dict(
        zip(map("{:g}".format, QUANTILE_LEVELS), index.array("latents/quantiles")[latent].tolist(), strict=True)
    )
    return FeaturePage(
        latent=latent,
        d_sae=index.d_sae,
        count=count,
        rows=index.rows,
        density=count / index.rows,
        density_train=(count - held_out) / rows_train if rows_train else None,
        density_held_out=held_out / rows_held_out if rows_held_out else None,
        maximum=float(index.array("latents/maximum")[latent]) if count else None,
        minimum=float(index.array("latents/minimum")[latent]) if count else None,
        mean=float(index.array("latents/total")[latent]) / count if count else None,
        quantiles=quantiles if count else {},
        histogram=_linear_histogram(values),
        log_histogram=_log_histogram(index, latent),
        bands=bands(cut, values, examples, bins, examples_per_bin),
        fires_on=_fires_on(index, rows, values),
        top_logits=_logits(index, latent, "top"),
        bottom_logits=_logits(index, latent, "bottom"),
        logits_are=index.manifest.logits,
        neighbours=_neighbours(index, latent),
        coactive=_coactive(index, latent),
        provenance=index.provenance,
        writes_to=_writes_to(index, latent),
        neurons=_neurons(index, latent),
    )


def _linear_histogram(values: np.ndarray) -> Histogram:
    if not len(values):
        return Histogram((), ())
    ends = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counts, edges = np.histogram(values, bins=LINEAR_BINS, range=ends)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def _log_histogram(index: FeatureIndex, latent: int) -> Histogram:
    """The stored one, without the empty bins at its ends."""
    counts = index.array("latents/histogram")[latent]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return Histogram((), ())
    first, last = int(filled[0]), int(filled[-1])
    return Histogram(index.manifest.histogram_edges[first : last + 2], tuple(counts[first : last + 1].tolist()))


def _fires_on(index: FeatureIndex, rows: np.ndarray, values: np.ndarray, listed: int = 10) -> tuple[TokenFired, ...]:
    if not len(rows):
        return ()
    tokens, of_token = np.unique(index.at("text/token_ids", rows), return_inverse=True)
    counts = np.bincount(of_token)
    sums = np.bincount(of_token, weights=values)
    mass = np.bincount(of_token, weights=np.abs(values))
    chosen = np.argsort(-mass, kind="stable")[:listed]
    occurrences = index.array("vocabulary/counts")[tokens[chosen]]
    return tuple(
        TokenFired(
            token=index.token_text(int(tokens[i])),
            token_id=int(tokens[i]),
            count=int(counts[i]),
            share_of_mass=float(mass[i] / mass.sum()),
            share_of_token=float(counts[i] / occurs),
            mean=float(sums[i] / counts[i]),
        )
        for i, occurs in zip(chosen.tolist(), occurrences.tolist(), strict=True)
    )


def _logits(index: FeatureIndex, latent: int, end: str) -> tuple[TokenLogit, ...]:
    tokens, values = index.array(f"logits/{end}_tokens")[latent], index.array(f"logits/{end}_values")[latent]
    return tuple(
        TokenLogit(index.token_text(token), token, value)
        for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
        if token >= 0
    )


def _writes_to(index: FeatureIndex, latent: int) -> tuple[WritesTo, ...]:
    hooks = index.hooks_out
    if len(hooks) == 1:
        return ()
    norms, shares = index.array("decoder/norms")[latent], index.decoder_shares()[latent]
    return tuple(
        WritesTo(hook, norm, share) for hook, norm, share in zip(hooks, norms.tolist(), shares.tolist(), strict=True)
    )


def _neurons(index: FeatureIndex, latent: int) -> tuple[Neuron, ...]:
    numbers, weights = index.array("neurons/numbers")[latent], index.array("neurons/weights")[latent]
    return tuple(
        Neuron(number, weight) for number, weight in zip(numbers.tolist(), weights.tolist(), strict=True) if number >= 0
    )


def _neighbours(index: FeatureIndex, latent: int) -> tuple[Neighbour, ...]:
    latents, cosines = index.array("neighbours/latents")[latent], index.array("neighbours/cosines")[latent]
    count, tokens = index.array("latents/count"), index.array("latents/top_token")
    return tuple(
        Neighbour(other, cosine, int(count[other]) / index.rows, index.token_text(int(tokens[other])))
        for other, cosine in zip(latents.tolist(), cosines.tolist(), strict=True)
        if other >= 0
    )


def _coactive(index: FeatureIndex, latent: int) -> tuple[CoActive, ...]:
    latents, counts = index.array("coactive/latents")[latent], index.array("coactive/counts")[latent]
    count, tokens = index.array("latents/count"), index.array("latents/top_token")
    own = int(count[latent])
    found = []
    for other, together in zip(latents.tolist(), counts.tolist(), strict=True):
        if other < 0:
            continue
        its = int(count[other])
        found.append(
            CoActive(
                latent=other,
                count=together,
                jaccard=together / (own + its - together),
                pmi=float(np.log2(together) + np.log2(index.rows) - np.log2(own) - np.log2(its)),
                share=together / own,
                density=its / index.rows,
                top_token=index.token_text(int(tokens[other])),
            )
        )
    return tuple(found)
