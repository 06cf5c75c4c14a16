"""Influence, pruning and scores, on graphs small enough to do by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dictlearn.circuits.influence import Adjacency, measure, prune

# Sources: features 0 (early), 1 (late), 2 (leads nowhere); an error 3; a token 4.
FEATURES, ERRORS, INPUTS = 3, slice(3, 4), slice(4, 5)


def by_hand() -> Adjacency:
    rows = np.array(
        [
            [0.0, 3.0, 0.0, -1.0, 0.0],  # the only logit: three quarters from feature 1, a quarter from the error
            [2.0, 0.0, 0.0, 0.0, -2.0],  # feature 1: half feature 0, half the token
            [0.0, 0.0, 0.0, 1.0, 4.0],  # feature 0: a fifth the error
            [0.0, 0.0, 0.0, 0.0, 7.0],  # feature 2, which nothing reads
        ]
    )
    return Adjacency(rows, np.array([-1, 1, 0, 2]), np.array([1.0, 0, 0, 0]))


def test_influence_by_hand() -> None:
    expected = [0.75 * 0.5, 0.75, 0.0, 0.25 + 0.375 * 0.2, 0.375 + 0.375 * 0.8]
    np.testing.assert_allclose(by_hand().influence_N, expected)


def test_influence_is_the_sum_over_all_paths() -> None:
    """w ((I - N)^-1 - I), on a random graph in which nodes read earlier nodes; all of it reaches the leaves."""
    rng = np.random.default_rng(0)
    features, leaves, logits = 12, 5, 3
    rows = np.zeros((features + logits, features + leaves))
    for feature in range(features):
        rows[feature, :feature] = rng.normal(size=feature)
        rows[feature, features:] = rng.normal(size=leaves)
    rows[features:] = rng.normal(size=(logits, features + leaves))
    weights = np.r_[np.zeros(features), 0.6, 0.3, 0.1]
    adjacency = Adjacency(rows, np.r_[np.arange(features), [-1] * logits], weights)

    square = np.zeros((features + leaves + logits,) * 2)
    square[:features, : features + leaves] = adjacency.normalised_GN[:features]
    square[features + leaves :, : features + leaves] = adjacency.normalised_GN[features:]
    w = np.r_[np.zeros(features + leaves), 0.6, 0.3, 0.1]
    closed = w @ (np.linalg.inv(np.eye(len(square)) - square) - np.eye(len(square)))
    np.testing.assert_allclose(adjacency.influence_N, closed[: features + leaves], rtol=1e-12)
    assert adjacency.influence_N[features:].sum() == pytest.approx(1)


def test_scores_by_hand() -> None:
    scores = measure(by_hand(), FEATURES, ERRORS, INPUTS)
    assert scores.input_influence == pytest.approx(0.675)
    assert scores.error_influence == pytest.approx(0.325)
    assert scores.replacement == pytest.approx(0.675)
    # Worth of: logit 1, feature 1 0.75, feature 0 0.375, feature 2 0, error 0.325, token 0.675.
    assert scores.completeness == pytest.approx(1 - (1 * 0.25 + 0.375 * 0.2) / (1 + 0.75 + 0.375 + 0.325 + 0.675))


def test_untraced_features_count_as_unexplained() -> None:
    whole, part = by_hand(), by_hand()
    part = Adjacency(part.rows_GN[:2], part.column_of_target_G[:2], part.weights_G[:2])
    scores = measure(part, FEATURES, ERRORS, INPUTS)
    assert scores.completeness < measure(whole, FEATURES, ERRORS, INPUTS).completeness
    influence = part.influence_N
    unexplained = 0.25 + influence[0]
    assert scores.completeness == pytest.approx(1 - unexplained / (1 + influence.sum()))


def test_pruning_keeps_what_covers_the_threshold_and_drops_what_dangles() -> None:
    everything = prune(by_hand(), INPUTS, 1.0, 1.0)
    assert everything.sources_N.tolist() == [True, True, False, True, True]
    assert everything.targets_G.tolist() == [True, True, True, False]
    assert everything.edges_GN.sum() == 6  # all but the one into the feature that nothing reads

    # Influences 0.75, 0.675, 0.375, 0.325: the first two cover 0.67 of the sum, the first three 0.85.
    some = prune(by_hand(), INPUTS, 0.8, 1.0)
    assert some.sources_N.tolist() == [True, True, False, False, True]
    one = prune(by_hand(), INPUTS, 0.6, 1.0)
    assert one.sources_N.tolist() == [False, True, False, False, True]
    assert one.edges_GN.sum() == 2


def test_a_feature_that_loses_its_edges_goes_and_so_does_what_only_fed_it() -> None:
    # Feature 0 feeds feature 1 alone, and feature 1's edge into the logit is tiny.
    rows = np.array([[0.0, 0.01, 0, 0, 5.0], [1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    adjacency = Adjacency(rows, np.array([-1, 1, 0]), np.array([1.0, 0, 0]))
    pruning = prune(adjacency, INPUTS, 1.0, 0.9)
    assert pruning.sources_N.tolist() == [False, False, False, False, True]
    assert pruning.targets_G.tolist() == [True, False, False]
    assert pruning.edges_GN.tolist() == [[False] * 4 + [True], [False] * 5, [False] * 5]


def test_tokens_stay_even_without_influence() -> None:
    rows = np.array([[1.0, 0, 0, 0, 0]])
    adjacency = Adjacency(rows, np.array([-1]), np.array([1.0]))
    assert prune(adjacency, INPUTS, 0.8, 0.98).sources_N.tolist() == [True, False, False, False, True]
