"""Matching the decoders of two dictionaries: planted matches are found, and what chance scores is told from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from dictlearn.comparison import decoders
from dictlearn.comparison.decoders import agreement, decoder_rows, directions, match
from dictlearn.dictionaries.configs import ICFLConfig, KSparseConfig, TopKConfig
from dictlearn.dictionaries.files import load, save
from dictlearn.dictionaries.icfl import ICFL
from dictlearn.dictionaries.k_sparse import KSparse
from dictlearn.dictionaries.topk import TopK

ROOT = Path(__file__).resolve().parents[2]


def rows(seed: int, S: int, O: int) -> np.ndarray:  # noqa: E741
    return np.random.default_rng(seed).normal(size=(S, O)).astype(np.float32)


# --- matches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_permuted_and_rescaled_decoder_is_matched_row_by_row(seed: int) -> None:
    a = rows(seed, 80, 24)
    order = np.random.default_rng(seed + 100).permutation(80)
    scales = np.random.default_rng(seed + 200).uniform(0.1, 9, size=(80, 1)).astype(np.float32)
    found = agreement(a, (a * scales)[order])
    assert sorted(map(tuple, found.partners().tolist())) == sorted(
        (int(latent), place) for place, latent in enumerate(order)
    )
    np.testing.assert_allclose(found.a_in_b.cosines, 1, atol=1e-5)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_matches_are_those_of_the_whole_matrix_of_cosines(S: int, T: int, seed: int, block: int) -> None:
    a, b = directions(rows(seed, S, 6)), directions(rows(seed + 1000, T, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "BLOCK_VALUES", block)
        a_in_b, b_in_a = match(a, b)
    cosines = a.astype(np.float64) @ b.T.astype(np.float64)
    np.testing.assert_allclose(a_in_b.cosines, cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(b_in_a.cosines, cosines.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(cosines[np.arange(S), a_in_b.latents], cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(cosines[b_in_a.latents, np.arange(T)], cosines.max(axis=0), atol=1e-6)


def test_no_latent_has_two_partners_and_the_nearest_come_first() -> None:
    common = rows(0, 30, 16)
    a = np.concatenate([common, common[:10] + 0.2 * rows(1, 10, 16), rows(2, 20, 16)])
    found = agreement(a, common + 0.1 * rows(3, 30, 16))
    pairs = found.partners()
    assert len(set(pairs[:, 0].tolist())) == len(set(pairs[:, 1].tolist())) == len(pairs) <= 30
    assert (np.diff(found.a_in_b.cosines[pairs[:, 0]]) <= 0).all()
    near = found.partners(least=0.995)
    assert 0 < len(near) < len(pairs) and near.tolist() == pairs[: len(near)].tolist()


def test_an_opposite_direction_is_no_match() -> None:
    a = rows(0, 1, 8)
    assert agreement(a, -a).a_in_b.cosines[0] == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_where_codes_have_signs_an_opposite_direction_is_the_same_latent(seed: int) -> None:
    a = rows(seed, 60, 16)
    signs = np.random.default_rng(seed).choice([-1, 1], size=(60, 1)).astype(np.float32)
    found = agreement(a, signs * a, signed=False)
    np.testing.assert_allclose(found.a_in_b.cosines, 1, atol=1e-5)
    assert len(found.partners(0.99)) == 60 > len(agreement(a, signs * a).partners(0.99))
    assert found.random_a.min() >= 0 and found.random_a.mean() > agreement(a, a).random_a.mean()


def test_a_latent_that_writes_nothing_matches_nothing() -> None:
    a, b = rows(0, 12, 8), rows(1, 10, 8)
    a[3] = b[7] = 0
    found = agreement(a, b)
    assert found.a_in_b.latents[3] == found.b_in_a.latents[7] == -1
    assert found.a_in_b.cosines[3] == found.b_in_a.cosines[7] == 0
    assert 3 not in found.partners()[:, 0] and 7 not in found.partners()[:, 1]


# --- chance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_decoders_with_nothing_in_common_score_what_chance_does(seed: int) -> None:
    found = agreement(rows(seed, 400, 32), rows(seed + 50, 300, 32))
    for own, gaussian, even in (
        (found.a_in_b, found.gaussian_a, found.random_a),
        (found.b_in_a, found.gaussian_b, found.random_b),
    ):
        assert own.cosines.mean() == pytest.approx(gaussian.mean(), abs=0.02)
        assert own.cosines.mean() == pytest.approx(even.mean(), abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_a_space_in_common_is_no_feature_in_common(seed: int) -> None:
    """Both write into the same 4 of 32 directions: the sphere says that they agree, the Gaussian that they do not."""
    space = rows(seed, 4, 32)
    a, b = rows(seed + 1, 300, 4) @ space, rows(seed + 2, 300, 4) @ space
    found = agreement(a, b)
    assert found.a_in_b.cosines.mean() == pytest.approx(found.gaussian_a.mean(), abs=0.02)
    assert found.a_in_b.cosines.mean() > found.random_a.mean() + 0.3


@pytest.mark.parametrize("seed", range(3))
def test_a_direction_that_all_rows_share_is_no_feature_in_common(seed: int) -> None:
    shared = 8 * rows(seed, 1, 32)
    found = agreement(rows(seed + 1, 300, 32) + shared, rows(seed + 2, 300, 32) + shared)
    assert found.a_in_b.cosines.mean() == pytest.approx(found.gaussian_a.mean(), abs=0.02)
    assert found.a_in_b.cosines.mean() > found.random_a.mean() + 0.3


def test_planted_features_stand_out_from_both_kinds_of_chance() -> None:
    common = rows(0, 100, 32)
    a = np.concatenate([common + 0.2 * rows(1, 100, 32), rows(2, 100, 32)])
    b = np.concatenate([common + 0.2 * rows(3, 100, 32), rows(4, 100, 32)])
    found = agreement(a, b)
    assert found.a_in_b.share(0.85) == pytest.approx(0.5, abs=0.02)
    assert max(found.gaussian_a.max(), found.random_a.max()) < 0.85


def test_chance_is_the_same_at_every_call_and_another_with_another_seed() -> None:
    a, b = rows(0, 50, 16), rows(1, 40, 16)
    once, again, other = agreement(a, b), agreement(a, b), agreement(a, b, seed=1)
    np.testing.assert_array_equal(once.gaussian_a, again.gaussian_a)
    np.testing.assert_array_equal(once.random_b, again.random_b)
    assert (once.random_a != other.random_a).any()


def test_chance_is_drawn_for_some_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "DRAWN", 20)
    found = agreement(rows(0, 50, 16), rows(1, 10, 16))
    assert (len(found.gaussian_a), len(found.random_b)) == (20, 10)
    assert len(found.a_in_b.cosines) == 50


def test_fewer_rows_than_coordinates_have_a_gaussian_too() -> None:
    found = agreement(rows(0, 3, 40), rows(1, 2, 40))
    assert np.isfinite(found.gaussian_a).all() and np.isfinite(found.gaussian_b).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_has_no_cosine_is_refused() -> None:
    with pytest.raises(UserError, match="rows of 8 and of 9 coordinates have no cosine"):
        agreement(rows(0, 4, 8), rows(1, 4, 9))
    with pytest.raises(UserError, match="not finite have no direction"):
        agreement(np.full((2, 4), np.nan), rows(1, 4, 4))
    with pytest.raises(UserError, match="without rows cannot be matched"):
        agreement(np.zeros((0, 4)), rows(1, 4, 4))


# --- saved dictionaries -----------------------------------------------------------------------------------------------


def saved(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    dictionary = {
        "topk": lambda: TopK(TopKConfig(d_sae=12, k=3), 6),
        "ksparse": lambda: KSparse(KSparseConfig(d_sae=12, k=3), 6),
        "icfl": lambda: ICFL(ICFLConfig(d_sae=12, rounds=2, width=2), 6),
    }[kind]()
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return save(dictionary, folder / kind)


@pytest.mark.parametrize("kind", ["topk", "ksparse", "icfl"])
def test_the_decoder_is_read_as_the_dictionary_has_it(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind)
    read = decoder_rows(folder)
    assert read.dtype == np.float32 and read.shape == (12, 6) and read.any()
    np.testing.assert_array_equal(read, load(folder).W_dec.detach().numpy())


def test_a_decoder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no dictionary in"):
        decoder_rows(tmp_path)
    folder = saved(tmp_path, "topk")
    (folder / "dictionary.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is damaged"):
        decoder_rows(folder)
    (folder / "dictionary.safetensors").unlink()
    with pytest.raises(UserError, match="is damaged"):
        decoder_rows(folder)


def test_a_decoder_is_read_and_matched_without_torch(tmp_path: Path) -> None:
    folder = saved(tmp_path, "topk")
    code = (
        "import sys\nfrom dictlearn.comparison.decoders import agreement, decoder_rows\n"
        f"rows = decoder_rows({str(folder)!r})\nprint(len(agreement(rows, rows).partners()), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["12", "False"], ran.stderr
