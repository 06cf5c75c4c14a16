"""Which latents of an index the address asks for: filtered, sorted, and cut into pages, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dictlearn.feature_index.index import FeatureIndex
from dictlearn.feature_index.selectivity import Selective
from dictlearn.feature_index.strips import StripCutter, TokenStrip
from dictlearn.feature_index.table import FeatureTable
from dictlearn_app import links

PAGE_SIZE = 100
DEFAULT_SORT = "maximum"
BEFORE, AFTER = 14, 6
"""Tokens of an example: what a table has room for."""

SHOWN: dict[str, bool | None] = {"that fired": True, "recognisable": True, "all": None, "that never fired": False}
"""The choices of the page -> what `FeatureTable.where` is asked; the first is the default."""

RECOGNISABLE = "recognisable"
"""The choice that keeps what one token explains, best first: `dictlearn.feature_index.selectivity`."""

MOST_ACTIVATIONS = 40_000_000
"""In an index of more, finding the recognisable latents takes longer than a page may: it is not offered."""

MOST_DENSITY = 0.05
"""A latent that fires more often is not what a page opens with: the largest activations tend to be dense ones'."""

COLUMNS: tuple[tuple[str | None, str, str, str], ...] = (
    ("latent", "latent", "", ""),
    ("top_token", "fires on", "", "the token that carries most of its summed activation"),
    (None, "strongest example", "wide", ""),
    ("density", "density", "right", "share of rows in which it fires"),
    ("maximum", "max", "right", "largest activation"),
    ("median", "median", "right", "of its non-zero activations"),
    ("writes_to_share", "writes to", "", "the hook that gets most of its decoder row; sorts by how much of it"),
    ("top_logit_value", "raises", "", "the token whose logit it raises most; sorts by how much"),
    ("bottom_logit_value", "lowers", "", "the token whose logit it lowers most; sorts by how much"),
    ("neighbour_cosine", "nearest", "right", "the latent with the nearest decoder row, and the cosine"),
    (
        "coactive_jaccard",
        "fires with",
        "right",
        "the latent that most nearly fires in the same rows, and the Jaccard index",
    ),
    (None, "note", "", ""),
)
"""Column of the table to sort by (None: cannot), heading, alignment, explanation."""

OF_SEVERAL_HOOKS = "writes_to_share"
"""The column that only a dictionary of several rebuilt hooks has."""


def columns_of(table: FeatureTable) -> list[tuple[str | None, str, str, str]]:
    """The columns that the latents of this index have."""
    several = bool(len(table)) and table.writes_to[0] != ""
    return [column for column in COLUMNS if several or column[0] != OF_SEVERAL_HOOKS]


@dataclass(frozen=True)
class FeatureList:
    """One page of a table of latents.

    Attributes:
        index: its name.
        table: the latents on this page.
        density_bar, maximum_bar: how long their bars are, 0 to 1, on one scale for the whole index.
        found, of: latents that fit, and all.
        first: number, from 1, of the first on this page.
        page, pages: from 1.
        pager: what each link to another page says, and the page it opens.
        sort, descending: the order, as the address asked or by default; "" for that of ``patterns``.
        patterns: latent -> the token that explains it, where the address asks for recognisable latents.
    """

    index: str
    table: FeatureTable
    density_bar: np.ndarray
    maximum_bar: np.ndarray
    found: int
    of: int
    first: int
    page: int
    pages: int
    pager: list[tuple[str, int]]
    sort: str
    descending: bool
    patterns: Mapping[int, Selective]


def feature_list(
    table: FeatureTable,
    link: links.FeaturesLink,
    notes: Mapping[int, str],
    patterns: Mapping[int, Selective] | None = None,
) -> FeatureList:
    """The page of latents that a link asks for; what it asks beyond the ends is the nearest there is."""
    fits = filtered(table, link, notes)
    sortable = {name for name, *_ in columns_of(table) if name}
    sort = link.sort if link.sort in sortable else DEFAULT_SORT
    descending = not link.ascending
    if patterns is not None:
        fits = fits.take(np.isin(fits.latent, list(patterns)))
        sort = link.sort if link.sort in sortable else ""
    ordered = fits.sorted_by(sort, descending) if sort else in_order(fits, patterns or {})
    pages = max(1, -(-len(ordered) // PAGE_SIZE))
    page = max(1, min(link.page, pages))
    first = (page - 1) * PAGE_SIZE
    here = ordered.take(np.arange(first, min(first + PAGE_SIZE, len(ordered))))
    return FeatureList(
        index=link.index,
        table=here,
        density_bar=log_part(here.density, table.density),
        maximum_bar=part(here.maximum, table.maximum),
        found=len(ordered),
        of=len(table),
        first=first + 1,
        page=page,
        pages=pages,
        pager=pager(page, pages),
        sort=sort,
        descending=descending,
        patterns=patterns or {},
    )


def in_order(table: FeatureTable, patterns: Mapping[int, Selective]) -> FeatureTable:
    """The latents in the order in which ``patterns`` names them."""
    place = {latent: i for i, latent in enumerate(patterns)}
    return table.take(np.argsort([place[latent] for latent in table.latent.tolist()], kind="stable"))


def strongest_examples(index: FeatureIndex, table: FeatureTable) -> list[TokenStrip | None]:
    """The text around the activation of largest magnitude of each latent in the table; None where it never fired.

    About 0.2 ms each: reading and cutting one page of 100 costs less than drawing it.
    """
    peaks = index.array("latents/peak_row")
    found: list[TokenStrip | None] = []
    for latent in table.latent.tolist():
        rows, values = index.activations(latent)
        entry = int(np.searchsorted(rows, peaks[latent])) if len(rows) else -1
        found.append(StripCutter(index, rows, values, BEFORE, AFTER).strip(entry, copies=0) if entry >= 0 else None)
    return found


def filtered(table: FeatureTable, link: links.FeaturesLink, notes: Mapping[int, str]) -> FeatureTable:
    """By the words (in tokens or in a note), by whether it fired, by density."""
    fits = table.where(
        fired=SHOWN.get(link.show, True) if link.show else True,
        at_least={"density": link.least} if link.least > 0 else None,
        at_most={"density": link.most} if link.most < 1 else None,
    )
    if not link.search:
        return fits
    wanted = link.search.casefold()
    noted = [latent for latent, note in notes.items() if wanted in note.casefold()]
    keep = np.isin(fits.latent, noted) | np.isin(fits.latent, fits.where(text=link.search).latent)
    return fits.take(keep)


def log_part(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Where each value lies between the smallest and largest of ``whole``, on a logarithmic scale; 0 for zeros."""
    positive = whole[whole > 0]
    if not len(positive):
        return np.zeros(len(values))
    low, high = np.log(positive.min()) - 0.1, np.log(positive.max())
    with np.errstate(divide="ignore"):
        return np.clip((np.log(values) - low) / (high - low), 0, 1)


def part(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Each value as a share of the largest of ``whole``; 0 for NaN."""
    most = np.nanmax(whole, initial=0)
    return np.nan_to_num(np.clip(values / most, 0, 1)) if most > 0 else np.zeros(len(values))


def pager(page: int, pages: int) -> list[tuple[str, int]]:
    """Links to the first, the near and the last pages. Empty for a single page."""
    if pages == 1:
        return []
    near = sorted({1, *range(max(1, page - 3), min(pages, page + 3) + 1), pages})
    return [(str(number), number) for number in near]


def first_latent(table: FeatureTable) -> int:
    """What a page shows when no latent is asked for: the one that fires strongest, of those that are not dense."""
    sparse = table.where(fired=True, at_most={"density": MOST_DENSITY})
    return int((sparse if len(sparse) else table).sorted_by(DEFAULT_SORT).latent[0])
