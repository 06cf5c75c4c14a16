"""What a page shows is what the store holds: strips stay in their document, and peaks are where the value is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from activation_store.errors import UserError
from dictlearn.feature_index.read import FeaturePage, feature_page
from dictlearn.feature_index.strips import StripCutter

from .conftest import CONTEXT, Made, make_index


def pages(made: Made, **options) -> list[FeaturePage]:
    return [feature_page(made.index, latent, **options) for latent in range(made.index.d_sae)]


def strips_of(page: FeaturePage):
    return [strip for band in page.bands for strip in band.strips]


@pytest.mark.parametrize("window", [(24, 10), (3, 2), (0, 0), (500, 500)])
def test_strips_show_the_text_of_one_document_and_all_its_activations(made: Made, window: tuple[int, int]) -> None:
    before, after = window
    store, documents = made.store, made.store.document_table
    shown = 0
    for page in pages(made, before=before, after=after):
        for strip in strips_of(page):
            shown += 1
            start, stop = strip.row - strip.peak, strip.row - strip.peak + len(strip.tokens)
            of = store.documents(start, stop)
            assert len(set(of.tolist())) == 1
            document = documents[int(of[0])]
            assert strip.document == document.id and strip.split == document.split
            end = document.first_row + document.rows
            assert start == max(document.first_row, strip.row - before)
            assert stop == min(end, strip.row + after + 1)
            assert strip.begins_document == (start == document.first_row)
            assert strip.ends_document == (stop == end)
            assert strip.token_ids == tuple(store.token_ids(start, stop).tolist())
            assert strip.tokens == tuple(map(made.index.token_text, strip.token_ids))
            np.testing.assert_array_equal(np.float32(strip.activations), made.dense[start:stop, page.latent])
            assert strip.activations[strip.peak] == strip.value == made.dense[strip.row, page.latent] != 0
    assert shown > 100


def test_the_model_saw_what_is_marked_as_seen(made: Made) -> None:
    """Positions in the window count from 1 to CONTEXT - 1, and rows of a window follow each other."""
    across = 0
    for page in pages(made):
        for strip in strips_of(page):
            start = strip.row - strip.peak
            position = int(made.store.positions(strip.row, strip.row + 1)[0])
            assert strip.seen_from == max(0, strip.peak - (position - 1))
            assert 0 <= strip.seen_from <= strip.peak
            assert strip.peak - strip.seen_from < CONTEXT
            across += strip.seen_from > 0
            assert start >= 0
    assert across > 10


def test_the_top_band_holds_the_largest_that_do_not_repeat_each_other(made: Made) -> None:
    for page in pages(made, examples=6):
        if page.count == 0:
            assert page.bands == () and page.maximum is None and page.quantiles == {}
            continue
        top = page.bands[0]
        values = made.dense[:, page.latent]
        assert top.kind == "top" and top.count == page.count and top.high == values.max() == page.maximum
        assert top.strips[0].value == values.max()
        assert [strip.value for strip in top.strips] == sorted((strip.value for strip in top.strips), reverse=True)
        # A row stronger than the last one shown is shown itself, or stands in a strip, or has the text of one.
        covered = {row for s in top.strips for row in range(s.row - s.peak, s.row - s.peak + len(s.tokens))}
        stronger = np.flatnonzero(values > top.strips[-1].value)
        assert len(set(stronger.tolist()) - covered) <= top.same_text


def test_bands_are_equal_shares_of_the_activations_from_strong_to_weak(made: Made) -> None:
    for page in pages(made, bins=4, examples_per_bin=3):
        bands = [band for band in page.bands if band.kind == "quantile"]
        assert sum(band.count for band in bands) == page.count
        values = np.sort(made.dense[:, page.latent][made.dense[:, page.latent] != 0])
        stop = len(values)
        for band in bands:
            start = stop - band.count
            assert band.low == values[start] and band.high == values[stop - 1]
            assert abs(band.count - page.count / len(bands)) <= 1
            assert 1 <= len(band.strips) <= 3
            assert all(band.low <= strip.value <= band.high for strip in band.strips)
            stop = start
    assert not [band for band in feature_page(made.index, 3, bins=0).bands if band.kind == "quantile"]


def test_negative_activations_are_shown(made_signed: Made) -> None:
    both = 0
    for page in pages(made_signed):
        values = made_signed.dense[:, page.latent]
        kinds = [band.kind for band in page.bands]
        assert ("top" in kinds) == (values > 0).any() and ("bottom" in kinds) == (values < 0).any()
        if "bottom" in kinds:
            bottom = page.bands[kinds.index("bottom")]
            assert bottom.strips[0].value == values.min() == bottom.low == page.minimum
            assert page.histogram.edges[0] == values.min()
        assert sum(page.histogram.counts) == sum(page.log_histogram.counts) == page.count == (values != 0).sum()
        both += {"top", "bottom"} <= set(kinds)
    assert both >= 3


def test_the_same_text_is_shown_once_and_counted(tmp_path) -> None:
    """Ten documents, six of which are the same."""
    random = np.random.default_rng(3)
    same, others = random.integers(1, 40, 20), random.integers(1, 40, (4, 20))
    token_ids = np.concatenate([same, others[0], same, same, others[1], same, others[2], same, others[3], same])
    made = make_index(tmp_path, [20] * 10, token_ids=token_ids)
    found = 0
    for page in pages(made, examples=8, before=30, after=30):
        for band in page.bands:
            texts = [(strip.token_ids, strip.peak) for strip in band.strips]
            assert len(set(texts)) == len(texts)
            assert sum(strip.copies for strip in band.strips) == band.same_text
            for strip in band.strips:
                assert strip.copies <= (5 if strip.token_ids == tuple(same.tolist()) else 0)
            rows = [(strip.row - strip.peak, strip.row) for strip in band.strips]
            assert len({start for start, _ in rows}) == len(
                rows
            )  # whole documents: a second peak is in the first strip
            found += band.same_text
    assert found > 20


def test_text_that_differs_only_far_from_the_peak_is_the_same_text(made: Made) -> None:
    index = made.index
    rows = np.array([30, 120, 160, 240])  # each in the midst of a document
    cut = StripCutter(index, rows, np.ones(len(rows), dtype=np.float32), before=24, after=10)
    tokens = index.read("text/token_ids", 0, index.rows).copy()
    index._files["text/token_ids/c.0"], kept = tokens, index._files["text/token_ids/c.0"]
    try:
        tokens[120 - 8 : 120 + 5] = tokens[240 - 8 : 240 + 5]
        strips, same_text, _ = cut.choose(np.arange(len(rows)), len(rows))
        assert same_text == 1
        assert [(strip.row, strip.copies) for strip in strips] == [(30, 0), (120, 1), (160, 0)]
        tokens[120 + 4] += 1
        assert cut.choose(np.arange(len(rows)), len(rows))[1] == 0
    finally:
        index._files["text/token_ids/c.0"] = kept


def test_numbers_of_the_header(made: Made) -> None:
    held_out = made.index.is_held_out(np.arange(made.store.rows))
    for page in pages(made):
        fired = made.dense[:, page.latent] != 0
        assert page.count == fired.sum() and page.rows == len(fired) and page.density == fired.mean()
        assert page.density_held_out == pytest.approx(fired[held_out].mean())
        assert page.density_train == pytest.approx(fired[~held_out].mean())
        values = made.dense[fired, page.latent]
        if page.count:
            assert page.quantiles["0.5"] == np.quantile(values, 0.5, method="inverted_cdf")
            assert page.mean == pytest.approx(values.astype(np.float64).mean())
            assert page.histogram.edges[0] == 0 and page.histogram.edges[-1] == pytest.approx(values.max())
        assert (page.run, page.store) == ("run", "store")


def test_the_tokens_that_a_latent_fires_on(made: Made) -> None:
    tokens = made.store.token_ids(0, made.store.rows)
    for page in pages(made):
        values = made.dense[:, page.latent]
        for fired in page.fires_on:
            on = (tokens == fired.token_id) & (values != 0)
            assert fired.count == on.sum()
            assert fired.share_of_token == pytest.approx(on.sum() / (tokens == fired.token_id).sum())
            assert fired.share_of_mass == pytest.approx(np.abs(values[on]).sum() / np.abs(values).sum(), rel=1e-5)
            assert fired.mean == pytest.approx(values[on].mean(), rel=1e-5)
        masses = [fired.share_of_mass for fired in page.fires_on]
        assert masses == sorted(masses, reverse=True)
        if page.count:
            assert page.fires_on[0].token == made.index.table().top_token[page.latent]


def test_latents_that_fire_together(made: Made) -> None:
    fired = made.dense != 0
    for page in pages(made):
        for other in page.coactive:
            both = (fired[:, page.latent] & fired[:, other.latent]).sum()
            either = (fired[:, page.latent] | fired[:, other.latent]).sum()
            assert other.count == both and other.jaccard == both / either
            assert other.share == both / page.count
            expected = fired[:, page.latent].mean() * fired[:, other.latent].mean()
            assert other.pmi == pytest.approx(np.log2(both / len(fired) / expected))
            assert other.density == fired[:, other.latent].mean()


def test_a_page_is_json(made: Made, made_signed: Made) -> None:
    for source in (made, made_signed):
        for page in pages(source):
            again = json.loads(json.dumps(page.as_dict(), allow_nan=False))
            assert again["latent"] == page.latent and len(again["bands"]) == len(page.bands)


@pytest.mark.parametrize("latent", [-1, 24, 10**9])
def test_a_latent_that_does_not_exist_is_refused(made: Made, latent: int) -> None:
    with pytest.raises(UserError, match=f"There is no latent {latent} in the index 'run': it has 24, numbered 0 to 23"):
        feature_page(made.index, latent)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_sorted_with_what_does_not_exist_last(made: Made) -> None:
    table = made.index.table()
    for descending in (True, False):
        by_maximum = table.sorted_by("maximum", descending)
        assert np.isnan(by_maximum.maximum[-1]) and by_maximum.latent[-1] == 0
        steps = np.diff(by_maximum.maximum[:-1])
        assert ((steps <= 0) if descending else (steps >= 0)).all()
    tokens = table.sorted_by("top_token", descending=False).top_token.tolist()
    assert tokens == sorted(tokens)
    assert len(table.columns()) > 10 and all(len(column) == 24 for column in table.columns().values())


def test_the_table_is_filtered(made: Made) -> None:
    table = made.index.table()
    assert table.where(fired=False).latent.tolist() == [0]
    assert len(table.where(fired=True)) == 23
    dense = table.where(at_least={"density": 0.1}, at_most={"maximum": 9.0})
    expected = (table.density >= 0.1) & (table.maximum <= 9)
    np.testing.assert_array_equal(dense.latent, np.flatnonzero(expected))
    token = str(table.top_token[5])
    assert 5 in table.where(text=token.upper()).latent
    assert 17 in table.where(text="17").latent
    assert len(table.where(text="no token has this text")) == 0
    assert made.index.table() is table and len(table) == 24


def test_a_column_that_does_not_exist_is_refused(made: Made) -> None:
    with pytest.raises(UserError, match="no column 'colour'; it has latent, count"):
        made.index.table().sorted_by("colour")
