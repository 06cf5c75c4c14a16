"""An index opened for reading: its arrays, the activations of a latent, text, and the table of all latents."""

from __future__ import annotations

import dataclasses
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
from dictlearn.feature_index.table import FeatureTable
from dictlearn.token_text import shown


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
