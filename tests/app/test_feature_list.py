"""The table of features as the address asks for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.feature_index.selectivity import recognisable
from dictlearn_app import links
from dictlearn_app.feature_list import (
    MOST_DENSITY,
    PAGE_SIZE,
    feature_list,
    first_latent,
    log_part,
    pager,
    strongest_examples,
)


@pytest.fixture(scope="module")
def index(tiny: Path) -> FeatureIndex:
    return open_index(tiny / "indexes" / "sae.zarr")


def test_pages_together_hold_every_latent_once_in_order(index: FeatureIndex) -> None:
    pages = [feature_list(index.table(), links.FeaturesLink(page=page, sort="density"), {}) for page in (1, 2, 3)]
    assert [len(page.table) for page in pages] == [PAGE_SIZE, PAGE_SIZE, 256 - 2 * PAGE_SIZE]
    latents = np.concatenate([page.table.latent for page in pages])
    densities = np.concatenate([page.table.density for page in pages])
    assert sorted(latents.tolist()) == list(range(256))
    assert (np.diff(densities) <= 0).all()


def test_ascending_turns_the_order(index: FeatureIndex) -> None:
    there = feature_list(index.table(), links.FeaturesLink(sort="latent", ascending=1), {})
    assert there.table.latent[:3].tolist() == [0, 1, 2]
    assert not there.descending


def test_bounds_search_and_notes_keep_what_fits(index: FeatureIndex) -> None:
    table = index.table()
    dense = feature_list(table, links.FeaturesLink(least=0.04, most=0.05), {})
    assert 0 < dense.found < 256
    assert ((dense.table.density >= 0.04) & (dense.table.density <= 0.05)).all()
    noted = feature_list(table, links.FeaturesLink(search="MY NOTE"), {17: "this is my note"})
    assert noted.table.latent.tolist() == [17]
    assert feature_list(table, links.FeaturesLink(search="17"), {}).table.latent.tolist() == [17]


@pytest.mark.parametrize(
    "link",
    [links.FeaturesLink(page=99), links.FeaturesLink(page=-1), links.FeaturesLink(sort="nonsense", show="nonsense")],
)
def test_what_cannot_be_asked_becomes_the_nearest(index: FeatureIndex, link: links.FeaturesLink) -> None:
    there = feature_list(index.table(), link, {})
    assert 1 <= there.page <= there.pages and len(there.table) and there.sort == "maximum"


def test_nothing_found_is_an_empty_page(index: FeatureIndex) -> None:
    there = feature_list(index.table(), links.FeaturesLink(search="no such token anywhere"), {})
    assert (there.found, len(there.table), there.pages) == (0, 0, 1)


def test_examples_show_each_latents_largest_activation(index: FeatureIndex) -> None:
    there = feature_list(index.table(), links.FeaturesLink(), {})
    examples = strongest_examples(index, there.table)
    assert [example.activations[example.peak] for example in examples] == pytest.approx(there.table.maximum.tolist())


def test_bars_of_densities_are_logarithmic() -> None:
    whole = np.array([0.0, 0.0001, 0.01, 1.0])
    bars = log_part(whole, whole)
    assert bars[0] == 0 and bars[-1] == 1
    assert bars[3] - bars[2] == pytest.approx(bars[2] - bars[1])


def test_the_pager_leads_to_the_ends_and_the_neighbours() -> None:
    assert [number for _, number in pager(10, 50)] == [1, 7, 8, 9, 10, 11, 12, 13, 50]
    assert pager(1, 1) == []


def test_recognisable_latents_come_best_first_and_can_be_sorted(index: FeatureIndex) -> None:
    patterns = {found.latent: found for found in recognisable(index, limit=200, most_density=0.2)}
    assert len(patterns) > 3
    best = feature_list(index.table(), links.FeaturesLink(show="recognisable"), {}, patterns)
    assert best.table.latent.tolist() == list(patterns)[:PAGE_SIZE]
    by_density = feature_list(index.table(), links.FeaturesLink(show="recognisable", sort="density"), {}, patterns)
    assert set(by_density.table.latent.tolist()) == set(patterns)
    assert (np.diff(by_density.table.density) <= 0).all()


def test_a_page_opens_with_a_latent_that_is_not_dense(index: FeatureIndex) -> None:
    table = index.table()
    latent = first_latent(table)
    assert table.density[latent] <= MOST_DENSITY
    assert table.maximum[latent] == table.maximum[table.density <= MOST_DENSITY].max()
