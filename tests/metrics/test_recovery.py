"""Recovery of planted features: known answers, and what knows nothing scores about its floor, over several seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries.configs import CrosscoderConfig, TopKConfig
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.topk import TopK
from dictlearn.metrics.recovery import (
    absorption,
    alive_share,
    match_directions,
    matched_cosine,
    measure_recovery,
    purity,
)
from dictlearn.synthetic import FeatureTree, SparseFeatures

SPARSE = SparseFeatures(d=16, features=40, mean_l0=3.0)
TREE = FeatureTree()
SEEDS = range(5)
Z = 4.5
"""Deviations of one draw; those of 30 draws are known to an eighth."""


def random_rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# --- directions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("planted", [SPARSE, TREE], ids=["sparse", "tree"])
def test_the_truth_scores_one_in_any_order_and_length_and_among_other_latents(planted, signed):
    truth = planted.directions
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(truth))
        lengths = np.random.default_rng(seed).uniform(0.1, 9, size=(len(truth), 1))
        hidden = np.vstack([random_rows(seed, 30, truth.shape[1]), truth])
        for learned in (truth, truth[order], truth * lengths, hidden):
            score = matched_cosine(learned, truth, signed=signed)
            assert score.value == pytest.approx(1)
            assert score.floor + Z * score.floor_std < 1
        assert match_directions(truth[order], truth, signed=signed).latents.tolist() == np.argsort(order).tolist()


def test_a_latent_that_points_the_other_way_counts_with_absolute_cosines_only():
    truth = np.eye(6)
    learned = truth * [[1], [1], [1], [-1], [-1], [-1]]
    assert matched_cosine(learned, truth, signed=False).value == pytest.approx(1)
    # The three latents that point the other way are given to each other's features: 0, not -1.
    assert matched_cosine(learned, truth).value == pytest.approx(0.5)


def test_true_directions_without_a_latent_count_zero():
    truth = np.eye(8)
    assert matched_cosine(truth[:6], truth).value == pytest.approx(6 / 8)
    assert match_directions(truth[:6], truth).features.tolist() == [0, 1, 2, 3, 4, 5]
    assert matched_cosine(np.zeros((8, 8)), truth).value == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_no_other_matching_has_a_larger_sum(seed, features, latents, signed):
    truth, learned = random_rows(seed, features, 3), random_rows(seed + 1, latents, 3)
    cosines = (truth @ learned.T) / np.linalg.norm(truth, axis=1)[:, None] / np.linalg.norm(learned, axis=1)
    gains = cosines if signed else np.abs(cosines)
    if features > latents:
        gains = gains.T
    best = max(
        sum(gains[i, j] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(gains.shape[1]), gains.shape[0])
    )
    assert matched_cosine(learned, truth, signed=signed, draws=1).value == pytest.approx(best / features)


@pytest.mark.parametrize("signed", [True, False])
def test_random_directions_score_about_their_floor(signed):
    for planted, latents in ((SPARSE, 40), (SPARSE, 100), (TREE, 20), (TREE, 64)):
        for seed in SEEDS:
            learned = random_rows(100 + seed, latents, planted.directions.shape[1])
            scores = [matched_cosine(learned, planted.directions, signed=signed, seed=seed, draws=30)]
            if planted is TREE:
                scores.append(absorption(learned, TREE.directions, TREE.parents, signed=signed, seed=seed, draws=30))
                assert abs(scores[1].floor) < 0.15
            for score in scores:
                assert score.floor_std > 0 and abs(score.value - score.floor) < Z * score.floor_std


def test_a_floor_is_of_its_seed_and_has_the_draws_asked_for():
    learned = random_rows(0, 20, 20)
    first, again = (matched_cosine(learned, TREE.directions, seed=3, draws=4) for _ in range(2))
    assert first == again and first.draws == 4
    other = matched_cosine(learned, TREE.directions, seed=4, draws=4)
    assert other.value == first.value and other.floor != first.floor
    more = matched_cosine(learned, TREE.directions, seed=3, draws=50)
    assert abs(more.floor - first.floor) < Z * more.floor_std / 2
    one, two = (matched_cosine(learned, TREE.directions, seed=3, draws=draws) for draws in (1, 2))
    assert math.isnan(one.floor_std)
    assert two.floor_std == pytest.approx(math.sqrt(2) * abs(one.floor - two.floor))
    assert str(first).startswith(f"{first.value:.3f} (chance {first.floor:.3f} ± ")


# --- absorption -------------------------------------------------------------------------------------------------------


def absorbing(share: float) -> np.ndarray:
    """The truth, but that each child's latent also holds ``share`` of its parent."""
    learned = TREE.directions.copy()
    children = np.flatnonzero(TREE.parents >= 0)
    learned[children] += share * TREE.directions[TREE.parents[children]]
    return learned


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_dictionary_made_to_absorb_shows_it(share):
    expected = share / math.sqrt(1 + share**2)
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(20)
        score = absorption(absorbing(share)[order], TREE.directions, TREE.parents)
        assert score.value == pytest.approx(expected, abs=1e-9)
    cosine = matched_cosine(absorbing(share), TREE.directions).value
    assert cosine == pytest.approx((11 + 9 / math.sqrt(1 + share**2)) / 20)


def test_absorption_of_latents_turned_round_is_the_same_with_absolute_cosines():
    turned = absorbing(0.5) * np.where(np.arange(20) % 2, 1, -1)[:, None]
    expected = absorption(absorbing(0.5), TREE.directions, TREE.parents).value
    assert absorption(turned, TREE.directions, TREE.parents, signed=False).value == pytest.approx(expected)


def test_children_without_a_latent_do_not_count_and_without_any_there_is_no_number():
    assert absorption(absorbing(1.0)[:12], TREE.directions, TREE.parents).value == pytest.approx(math.sqrt(0.5))
    assert math.isnan(absorption(TREE.directions[:11], TREE.directions, TREE.parents).value)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_true_codes_are_pure_in_any_order_and_permuted_rows_are_not():
    for planted in (SPARSE, TREE):
        codes = planted.draw(0, 2000).codes
        shuffled = codes[:, np.random.default_rng(0).permutation(codes.shape[1])]
        score = purity(Codes.from_dense(torch.from_numpy(shuffled)), codes)
        assert score.value == 1
        assert score.floor + Z * score.floor_std < 0.8


def test_purity_by_hand():
    """Latent 0: feature 0 in 3 of its 4 rows. Latent 1: feature 1 in 1 of 2. Latent 2 fires once, latent 3 never."""
    codes = torch.tensor([[1, 0, 0, 0], [2, 0, 0, 0], [-1, 3, 0, 0], [1, 1, 5, 0.0]])
    truth = np.array([[1, 0], [1, 0], [1, 0], [0, 2.0]])
    one = Codes.from_dense(codes)
    assert purity(one, truth, least_rows=2).value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert purity(one, truth, least_rows=1).value == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert math.isnan(purity(one, truth).value)


def test_codes_that_know_nothing_are_as_pure_as_their_floor():
    truth = SPARSE.draw(0, 2000).codes
    for seed in SEEDS:
        blind = Codes.from_dense(torch.from_numpy((random_rows(seed, 2000, 30) > 1.5).astype(np.float32)))
        score = purity(blind, truth, seed=seed, draws=30)
        assert abs(score.value - score.floor) < Z * score.floor_std
        # The most common feature alone makes codes that know nothing this pure.
        assert score.floor > SPARSE.rates[0] - 0.02


def knows_the_truth(planted, latents: int, k: int) -> TopK:
    """A TopK whose first latents are the true directions of orthonormal features and whose others never fire."""
    dictionary = TopK(TopKConfig(d_sae=latents, k=k, scaling="none"), planted.directions.shape[1]).double()
    with torch.no_grad():
        dictionary.W_dec[:20] = dictionary.W_enc[:20] = torch.from_numpy(planted.directions)
        dictionary.b_enc[:20] = -0.01
        dictionary.b_enc[20:] = -1
    return dictionary.requires_grad_(False)


def test_all_four_of_a_dictionary_that_knows_the_tree():
    batch = TREE.draw(0, 3000)
    dictionary = knows_the_truth(TREE, 50, 4)
    found = measure_recovery(
        dictionary, torch.from_numpy(batch.x).double(), batch.codes, TREE.directions, TREE.parents, draws=4
    )
    assert found.matched_cosine.value == pytest.approx(1)
    assert found.absorption is not None and found.absorption.value == pytest.approx(0, abs=1e-9)
    assert found.purity.value == 1
    assert found.alive_share.value == 20 / 50
    assert {score.draws for score in vars(found).values()} == {4}


def test_the_floor_of_the_alive_share_is_of_untrained_dictionaries():
    x = torch.from_numpy(TREE.draw(0, 3000).x)
    for d_out in (None, 5):
        target = None if d_out is None else torch.from_numpy(random_rows(0, 3000, d_out)).float()
        config = TopKConfig(d_sae=60, k=4)
        dead = TopK(config, 20, d_out)
        with torch.no_grad():
            dead.b_enc.fill_(-1)
        score = alive_share(dead, x, target, draws=5)
        assert score.value == 0 and score.floor > 0.5
        for seed in SEEDS:
            untrained = TopK(config, 20, d_out)
            moments = type("Moments", (), {"mean": np.zeros(20), "second_moment": np.eye(20)})()
            untrained.initialise(x, target, torch.Generator().manual_seed(seed), moments)
            own = alive_share(untrained, x, target, seed=seed, draws=5)
            assert abs(own.value - own.floor) <= Z * max(own.floor_std, 1 / 60)


def test_the_floor_of_a_dictionary_of_several_hooks_is_of_ones_of_the_same_hooks():
    x = torch.from_numpy(TREE.draw(0, 500).x)
    score = alive_share(Crosscoder(CrosscoderConfig(d_sae=30), (12, 8)), x, draws=2)
    assert score.value == 0 and score.floor > 0


def test_untrained_dictionaries_differ():
    few = torch.from_numpy(TREE.draw(0, 20).x)
    assert alive_share(TopK(TopKConfig(d_sae=60, k=4), 20), few, draws=5).floor_std > 0


def test_sparse_features_have_no_absorption():
    batch = SPARSE.draw(0, 200)
    dictionary = TopK(TopKConfig(d_sae=30, k=3), 16)
    found = measure_recovery(
        dictionary, torch.from_numpy(batch.x), batch.codes, SPARSE.directions, SPARSE.parents, draws=2
    )
    assert found.absorption is None
    assert found.matched_cosine.value == 0 and math.isnan(found.purity.value) and found.alive_share.value == 0


def test_training_raises_recovery_well_above_chance():
    """A plain TopK on the tree: it finds most features, and absorbs, as published."""
    for seed in range(3):
        tree = FeatureTree(seed=seed)
        dictionary = TopK(TopKConfig(d_sae=20, k=2, dead_after_rows=5000), 20)
        first = torch.from_numpy(tree.draw(0, 2000, "initial").x)
        moments = type("Moments", (), {"mean": np.zeros(20), "second_moment": np.eye(20)})()
        dictionary.initialise(first, None, torch.Generator().manual_seed(seed), moments)
        optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
        for number in range(400):
            loss = dictionary.loss(torch.from_numpy(tree.draw(number, 200).x))
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()
            dictionary.constrain()
            dictionary.observe(loss.codes)
        batch = tree.draw(0, 3000, "evaluate")
        found = measure_recovery(
            dictionary, torch.from_numpy(batch.x), batch.codes, tree.directions, tree.parents, seed=seed, draws=5
        )
        assert found.matched_cosine.value > found.matched_cosine.floor + 5 * found.matched_cosine.floor_std
        assert found.purity.value > found.purity.floor + 5 * found.purity.floor_std


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused():
    truth = TREE.directions
    with pytest.raises(UserError, match="True directions have 20 coordinates and decoder rows 16; compare a"):
        matched_cosine(random_rows(0, 8, 16), truth)
    with pytest.raises(UserError, match="numbers that are not finite cannot be matched; the training diverged"):
        match_directions(np.full((8, 20), np.nan), truth)
    with pytest.raises(UserError, match="among 20 directions and 20 entries of parents 0 have one"):
        absorption(truth, truth, np.full(20, -1))
    with pytest.raises(UserError, match="among 20 directions and 3 entries of parents 3 have one"):
        absorption(truth, truth, np.zeros(3, dtype=np.int64))
    with pytest.raises(UserError, match="codes of 4 rows, true codes of 5; give the same rows"):
        purity(Codes.from_dense(torch.ones(4, 2)), np.ones((5, 2)))
