"""Everything that is shown of one latent.

A page is data: `feature_page` returns a `FeaturePage` of plain Python values, which the app draws and the command line
prints as JSON. Everything on it is exact, computed from all activations of the latent: nothing was sampled when the
index was made. All text on it is safe to show as text, and must not be shown as markup (see token_text.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from dictlearn.feature_index.index import FeatureIndex
from dictlearn.feature_index.spec import QUANTILE_LEVELS
from dictlearn.feature_index.strips import AFTER, BEFORE, Band, StripCutter, bands

LINEAR_BINS = 40


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
