"""An index holds exactly what a brute-force encoding of the store gives, however it was cut to fit in memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dictlearn.dictionaries.files import load
from dictlearn.feature_index import encode, read, spec, transpose
from dictlearn.feature_index import index as index_module
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.feature_index.spec import ARRAYS, QUANTILE_LEVELS

from .conftest import Made, encode_all, make_index, make_run, make_store


def assert_holds(made: Made) -> None:
    """Everything that is known of activations, against the dense ones."""
    index, dense, store = made.index, made.dense, made.store
    rows, d_sae = dense.shape
    tokens = store.token_ids(0, rows)
    held_out = np.zeros(rows, dtype=bool)
    for start, stop in store.split_rows("held-out"):
        held_out[start:stop] = True
    edges = np.array(index.manifest.histogram_edges)
    fired = dense != 0
    together = fired.T.astype(np.int64) @ fired.astype(np.int64)
    table = index.table()
    for latent in range(d_sae):
        expected_rows = np.flatnonzero(dense[:, latent])
        expected = dense[expected_rows, latent]
        found_rows, found = index.activations(latent)
        np.testing.assert_array_equal(found_rows, expected_rows)
        np.testing.assert_array_equal(found, expected)
        assert table.count[latent] == len(expected)
        assert table.density[latent] == len(expected) / rows
        assert index.array("latents/held_out_count")[latent] == held_out[expected_rows].sum()
        np.testing.assert_array_equal(
            index.array("latents/histogram")[latent], np.histogram(expected.astype(np.float64), edges)[0]
        )
        assert index.array("latents/histogram")[latent].sum() == len(expected)
        if not len(expected):
            assert np.isnan(table.maximum[latent]) and table.top_token[latent] == ""
            assert index.array("latents/peak_row")[latent] == -1
            continue
        assert table.maximum[latent] == expected.max() and table.minimum[latent] == expected.min()
        np.testing.assert_allclose(table.mean[latent], expected.astype(np.float64).mean(), rtol=1e-12)
        assert index.array("latents/peak_row")[latent] == expected_rows[np.abs(expected).argmax()]
        quantiles = np.quantile(expected, QUANTILE_LEVELS, method="inverted_cdf")
        np.testing.assert_array_equal(index.array("latents/quantiles")[latent], quantiles)
        np.testing.assert_array_equal(index.quantiles(latent, QUANTILE_LEVELS), quantiles)
        mass = np.bincount(tokens[expected_rows], weights=np.abs(expected))
        assert index.array("latents/top_token")[latent] == mass.argmax()
        np.testing.assert_allclose(table.top_token_share[latent], mass.max() / mass.sum(), rtol=1e-6)
        assert_coactive(index, latent, together)


def assert_coactive(index: FeatureIndex, latent: int, together: np.ndarray) -> None:
    counts = together.diagonal()
    both = together[latent].copy()
    both[latent] = 0
    jaccard = both / np.maximum(counts[latent] + counts - both, 1)
    latents, found = index.array("coactive/latents")[latent], index.array("coactive/counts")[latent]
    listed = latents >= 0
    assert listed.sum() == min(spec.LISTED, (both > 0).sum())
    np.testing.assert_array_equal(found[listed], both[latents[listed]])
    np.testing.assert_array_equal(jaccard[latents[listed]], np.sort(jaccard)[::-1][: listed.sum()])
    np.testing.assert_array_equal(found[~listed], 0)


def test_every_activation_is_kept_and_every_statistic_is_exact(made: Made) -> None:
    assert_holds(made)
    assert made.index.array("activations/offsets")[-1] == (made.dense != 0).sum()
    made.index.verify()


def test_negative_activations_are_kept(made_signed: Made) -> None:
    assert_holds(made_signed)
    assert (made_signed.dense < 0).any()
    assert made_signed.index.manifest.histogram_edges[0] < 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.integers(0, 90), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 0),
    kind=st.sampled_from(["topk", "icfl", "gated"]),
    d_sae=st.integers(2, 40),
    batch=st.integers(16, 64),
    slots=st.integers(50, 1000),
    held=st.integers(1, 7),
    per_file=st.sampled_from([7, 64, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_it_does_not_matter_how_the_work_is_cut(
    tmp_path_factory, monkeypatch, documents, kind, d_sae, batch, slots, held, per_file, seed
) -> None:
    """Sizes of batches, parts, ranges of latents and files are drawn; a range always fits its largest latent."""
    megabyte = 128 * 2**20
    with monkeypatch.context() as patch:
        patch.setattr(encode, "batch_rows", lambda d_sae: batch)
        patch.setattr(encode, "BYTES_PER_SLOT", megabyte // 2 // slots)
        patch.setattr(transpose, "BYTES_PER_ACTIVATION", megabyte // 2 // (sum(documents) + 1))
        patch.setattr(transpose, "PAIR_VALUES", 13 * held)
        patch.setattr(spec, "VALUES_PER_FILE", per_file)
        patch.setattr(index_module, "VALUES_PER_FILE", per_file)
        made = make_index(
            tmp_path_factory.mktemp("cut"), documents, kind=kind, d_sae=d_sae, k=min(4, d_sae // 2 * 2), seed=seed
        )
        assert_holds(made)
        made.index.verify()


def test_memory_decides_how_the_work_is_cut_but_not_what_comes_out(tmp_path, monkeypatch) -> None:
    from activation_store.testing import assert_same_files
    from dictlearn.workspace import Workspace

    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [150, 250, 100]))
    monkeypatch.setattr(encode, "batch_rows", lambda d_sae: 32)
    monkeypatch.setattr(encode, "BYTES_PER_SLOT", 2**17)
    monkeypatch.setattr(transpose, "BYTES_PER_ACTIVATION", 2**17)
    small = run_index(IndexConfig("run", name="small", logits=False, memory_mb=150), workspace)
    large = run_index(IndexConfig("run", name="large", logits=False, memory_mb=1000), workspace)
    assert_same_files(small, large)


def test_another_store_than_the_one_trained_on_and_its_first_rows(tmp_path) -> None:
    from dictlearn.workspace import Workspace

    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [80]))
    other = make_store(workspace, "other", [50, 0, 40, 60], seed=9)
    path = run_index(IndexConfig("run", store="other", name="first", rows=70, logits=False), workspace)
    index = open_index(path)
    dense = encode_all(workspace, "run", other)[:70]
    rows = np.concatenate([index.activations(latent)[0] for latent in range(index.d_sae)])
    assert len(rows) == (dense != 0).sum() and rows.max() < 70
    assert index.rows == 70 and index.array("documents/rows").tolist() == [50, 0, 20]
    assert index.manifest.rows_held_out == 20
    assert index.provenance["store"] == "other" and index.provenance["run"] == "run"


def test_neighbours_are_the_nearest_decoder_rows(made: Made) -> None:
    W_dec = load(made.workspace.run("run").dictionary).W_dec.double()
    cosines = torch.nn.functional.normalize(W_dec, dim=1)
    cosines = (cosines @ cosines.T).fill_diagonal_(-2).numpy()
    latents, found = made.index.array("neighbours/latents"), made.index.array("neighbours/cosines")
    for latent in range(made.index.d_sae):
        np.testing.assert_allclose(found[latent], np.sort(cosines[latent])[::-1][: spec.LISTED], atol=1e-6)
        np.testing.assert_allclose(cosines[latent, latents[latent]], found[latent], atol=1e-6)


def test_without_coactive_and_logits_there_are_none(tmp_path) -> None:
    from dictlearn.workspace import Workspace

    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [80]))
    index = open_index(run_index(IndexConfig("run", logits=False, coactive=False), workspace))
    page = read.feature_page(index, 3)
    assert page.coactive == () and page.top_logits == () and "--no-logits" in page.logits_are
    assert (index.table().coactive == -1).all() and np.isnan(index.table().coactive_jaccard).all()


def test_any_zarr_reader_opens_it(made: Made) -> None:
    group = zarr.open_group(made.index.path, mode="r")
    for array in ARRAYS:
        found = group[array.path]
        np.testing.assert_array_equal(found[...], made.index.array(array.path))
        assert found.attrs["meaning"] == array.meaning
    assert set(group.group_keys()) == set(spec.GROUPS)


def test_text_is_copied_whole(made: Made) -> None:
    index, store = made.index, made.store
    np.testing.assert_array_equal(index.array("text/token_ids"), store.token_ids(0, store.rows))
    np.testing.assert_array_equal(index.array("text/positions"), store.positions(0, store.rows))
    for number, document in enumerate(store.document_table):
        assert index.document_id(number) == document.id
    np.testing.assert_array_equal(
        index.array("vocabulary/counts"), np.bincount(store.token_ids(0, store.rows), minlength=260)
    )
    held_out = index.is_held_out(np.arange(store.rows))
    expected = np.zeros(store.rows, dtype=bool)
    for start, stop in store.split_rows("held-out"):
        expected[start:stop] = True
    np.testing.assert_array_equal(held_out, expected)


@given(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.25, 0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=30))
def test_values_on_an_edge_are_counted_where_numpy_counts_them(values: list[float]) -> None:
    edges = np.array([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])
    in_order = np.sort(np.array(values, dtype=np.float32))
    np.testing.assert_array_equal(transpose.in_bins(in_order, edges), np.histogram(in_order, edges)[0])


def test_ranges_cover_the_latents_and_fit() -> None:
    counts = np.array([5, 0, 9, 1, 1, 1, 10, 0, 3])
    memory = 2 * 10 * transpose.BYTES_PER_ACTIVATION
    ranges = transpose.plan_ranges(counts, memory, coactive=False)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(counts)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert max(counts[start:stop].sum() for start, stop in ranges) <= 10
    most_latents = transpose.plan_ranges(counts, 2 * 4 * len(counts) * 2 * 100, coactive=True)
    assert max(stop - start for start, stop in most_latents) <= 200


def test_a_latent_too_dense_for_the_memory_is_refused_with_the_memory_it_needs() -> None:
    from activation_store.errors import UserError

    with pytest.raises(UserError, match="Latent 1 fires in 10,000,000 rows.*--memory-mb (\\d+)") as refusal:
        transpose.plan_ranges(np.array([3, 10_000_000]), 128 * 2**20, coactive=True)
    needed = int(str(refusal.value).split("--memory-mb ")[1].split(",")[0])
    transpose.plan_ranges(np.array([3, 10_000_000]), needed * 2**20, coactive=True)
