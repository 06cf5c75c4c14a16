"""The latents of two runs matched by their decoders: how many, beside chance, and which of them a page lists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from activation_store.errors import UserError
from dictlearn.comparison.activations import SharedRows, shared_rows
from dictlearn.comparison.decoders import Agreement, share
from dictlearn.feature_index.index import FeatureIndex
from dictlearn_app.feature_list import pager
from dictlearn_app.views.numbers import percent

LEAST = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Cosines that the table counts from."""

BINS = 40
PAGE_SIZE = 25

SHOWN = {
    "": "partners, nearest first",
    "far": "partners, farthest first",
    "a": "latents of A with the least like them in B",
    "b": "latents of B with the least like them in A",
}
"""What the list can hold, as the address says it and as the page does."""


@dataclass(frozen=True)
class Sides:
    """The feature indexes of two runs; None where a run has none that fits its dictionary."""

    a: FeatureIndex | None
    b: FeatureIndex | None


@dataclass(frozen=True)
class Listed:
    """One page of pairs.

    Attributes:
        pairs: (latent of A, latent of B); -1 where a latent has nothing near it.
        cosines: of each pair.
        shared: the rows in which both fire; empty where that is not known.
        found: pairs in all; first: number, from 1, of the first on this page.
        page: from 1; pager: what each link to another page says, and the page it opens.
    """

    pairs: list[tuple[int, int]]
    cosines: list[float]
    shared: list[SharedRows]
    found: int
    first: int
    page: int
    pager: list[tuple[str, int]]


def listed(found: Agreement, sides: Sides, show: str, page: int) -> tuple[Listed, str]:
    """The page of pairs that an address asks for, and why it lacks what fires together, "" where it does not."""
    pairs, cosines = every_pair(found, sides, show)
    pages = max(1, -(-len(pairs) // PAGE_SIZE))
    page = max(1, min(page, pages))
    here = slice((page - 1) * PAGE_SIZE, page * PAGE_SIZE)
    some = [(int(one), int(other)) for one, other in pairs[here]]
    shared, lacking = list[SharedRows](), ""
    if sides.a is not None and sides.b is not None:
        try:
            shared = shared_rows(sides.a, sides.b, some)
        except UserError as error:
            lacking = str(error)
    made = Listed(some, cosines[here].tolist(), shared, len(pairs), here.start + 1, page, pager(page, pages))
    return made, lacking


def every_pair(found: Agreement, sides: Sides, show: str) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a list, (P, 2), in its order, and their cosines (P,)."""
    if show in ("a", "b"):
        matches, index = (found.a_in_b, sides.a) if show == "a" else (found.b_in_a, sides.b)
        own = np.flatnonzero((matches.latents >= 0) & fired(index, len(matches.latents)))
        own = own[np.argsort(matches.cosines[own], kind="stable")]
        pairs = np.stack([own, matches.latents[own]], axis=1)
        return (pairs if show == "a" else pairs[:, ::-1]), matches.cosines[own]
    pairs = found.partners()
    pairs = pairs[::-1] if show == "far" else pairs
    return pairs, found.a_in_b.cosines[pairs[:, 0]]


def fired(index: FeatureIndex | None, latents: int) -> np.ndarray:
    """Which latents fired at all: the directions of the others were never used. All, where that is not known."""
    return np.ones(latents, bool) if index is None else np.asarray(index.array("latents/count") > 0)


def chance_table(found: Agreement) -> list[list[str]]:
    """A line for each of `LEAST`: partners, then the share of either's latents beside what chance would find."""
    lines = [
        [
            f"{least:g}",
            f"{len(found.partners(least)):,}",
            percent(found.a_in_b.share(least)),
            percent(share(found.gaussian_a, least)),
            percent(found.b_in_a.share(least)),
            percent(share(found.gaussian_b, least)),
        ]
        for least in LEAST
    ]
    partners = found.a_in_b.cosines[found.partners()[:, 0]]
    means = (partners, found.a_in_b.cosines, found.gaussian_a, found.b_in_a.cosines, found.gaussian_b)
    return [*lines, ["mean cosine", *(f"{one.mean():.3f}" if len(one) else "–" for one in means)]]


def histogram_of(found: Agreement) -> tuple[list[float], list[int], dict[str, list[int]]]:
    """Edges and counts of A's cosines, and what as many rows would count by chance, by name."""
    cosines = found.a_in_b.cosines
    lowest = min(0.0, *(float(one.min()) for one in (cosines, found.gaussian_a, found.random_a)))
    edges = np.linspace(lowest, 1, BINS + 1)

    def counts(values: np.ndarray) -> list[int]:
        histogram = np.histogram(values.clip(lowest, 1), edges)[0]
        return [round(one) for one in (histogram * (len(cosines) / len(values))).tolist()]

    beside = {"Gaussian of B's mean and covariance": found.gaussian_a, "random directions": found.random_a}
    return edges.tolist(), counts(cosines), {name: counts(values) for name, values in beside.items()}
