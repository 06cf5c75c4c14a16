"""The estimators: scikit-learn's own checks, planted features and parents, and the way to a dictionary."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from activation_store.errors import UserError
from dictlearn.dictionaries.files import load, save
from dictlearn.factorisation import HierarchicalSemiNMF, SemiNMF
from dictlearn.metrics.recovery import match_directions, matched_cosine

FEW = {"iterations": 60, "patience": 20, "random_state": 0}
FEWER = FEW | {"iterations": 5, "sweeps": 50}


@parametrize_with_checks(
    [
        SemiNMF(2, winners=1.0, **FEWER),
        SemiNMF(2, winners=0.5, features="non_negative", **FEWER),
        HierarchicalSemiNMF((3, 2), winners=1.0, steps=3, **FEWER),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def planted(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """300 rows of 6 features, each of 4 of 60 neurons of its own."""
    rng = np.random.default_rng(seed)
    features = np.zeros((6, 60))
    places = rng.permutation(60)[:24].reshape(6, 4)
    np.put_along_axis(features, places, rng.normal(size=(6, 4)) + np.sign(rng.normal(size=(6, 4))), axis=1)
    return (rng.random((300, 6)) < 0.4) * rng.exponential(size=(300, 6)) @ features, features


@pytest.mark.parametrize("start", ["random", "kmeans", "svd"])
def test_every_start_finds_planted_features(start):
    scores = []
    for seed in range(5):
        X, features = planted(seed)
        model = SemiNMF(6, winners=4 / 60, start=start, iterations=400, patience=50, random_state=seed).fit(X)
        scores.append(matched_cosine(model.components_, features, draws=0).value)
        assert model.errors_.min() < 0.2 and model.n_iter_ == len(model.errors_)
        assert (np.count_nonzero(model.components_, axis=1) == 4).all()
    assert np.mean(scores) >= 0.85


def test_codes_are_exact_and_agree_and_rows_come_back():
    X, _ = planted(0)
    model = SemiNMF(6, winners=0.2, sweeps=5000, tolerance=1e-12, **FEW)
    codes = model.fit_transform(X)
    np.testing.assert_array_equal(codes, model.transform(X))
    expected = np.stack([nnls(model.components_.T, row)[0] for row in X])
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-8)
    left_over = np.linalg.norm(X - model.inverse_transform(codes))
    assert model.reconstruction_err_ == pytest.approx(left_over)
    assert left_over**2 <= model.errors_.min() * np.square(X).sum() * (1 + 1e-6)
    assert list(model.get_feature_names_out()) == [f"seminmf{i}" for i in range(6)]


def test_the_same_random_state_gives_the_same_and_another_something_else():
    X, _ = planted(0)
    model = SemiNMF(6, **FEW)
    first, again = model.fit(X).components_, clone(model).fit(X).components_
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, clone(model).set_params(random_state=1).fit(X).components_)


def test_it_may_begin_with_codes_that_are_given():
    X, _ = planted(0)
    codes = np.random.default_rng(1).random((300, 6))
    model = SemiNMF(6, winners=1.0, **FEW).fit(X, codes=codes)
    np.testing.assert_array_equal(model.components_, SemiNMF(6, winners=1.0, **FEW).fit(X, codes=codes).components_)
    assert not np.array_equal(model.components_, SemiNMF(6, winners=1.0, **FEW).fit(X).components_)


def test_a_fitted_estimator_becomes_a_dictionary_that_is_saved_and_loaded(tmp_path):
    X, _ = planted(0)
    X = X.astype(np.float32)
    model = SemiNMF(6, winners=0.1, start="kmeans", **FEW).fit(X)
    made = model.dictionary({"hook_in": "a", "hook_out": "a"})
    assert made.kind == "snmf" and made.provenance["hook_in"] == "a"
    assert made.provenance["factorised"] == {"start": "kmeans", "iterations": model.n_iter_}
    loaded = load(save(made, tmp_path / "made"))
    rows = torch.from_numpy(X)
    np.testing.assert_allclose(loaded.encode(rows).dense().numpy(), model.transform(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loaded(rows).numpy(), model.inverse_transform(model.transform(X)), rtol=1e-4, atol=1e-4)


# --- levels -----------------------------------------------------------------------------------------------------------


def family(seed: int, parents: int = 3, children: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Children with four neurons of their parent's and three of their own: ``(rows, features, parent of each)``."""
    rng = np.random.default_rng(seed)
    of_child = np.repeat(np.arange(parents), children)
    places = rng.permutation(80)
    shared = places[: 4 * parents].reshape(parents, 4)
    own = places[4 * parents : 4 * parents + 3 * len(of_child)].reshape(-1, 3)
    features = np.zeros((len(of_child), 80))
    signs = np.sign(rng.normal(size=80))
    for child, parent in enumerate(of_child):
        features[child, shared[parent]] = signs[shared[parent]]
        features[child, own[child]] = signs[own[child]]
    codes = (rng.random((500, len(features))) < 0.25) * rng.exponential(size=(500, len(features)))
    return codes @ features, features, of_child


def hierarchy(seed: int, steps: int) -> tuple[HierarchicalSemiNMF, np.ndarray, np.ndarray]:
    X, features, of_child = family(seed)
    model = HierarchicalSemiNMF(
        (9, 3), winners=(7 / 80, 13 / 80), start="kmeans", steps=steps, iterations=300, patience=50, random_state=seed
    )
    return model.fit(X), features, of_child


def test_codes_are_of_the_features_that_adam_left():
    X, _, _ = family(0)
    model = HierarchicalSemiNMF((9,), winners=0.2, steps=50, iterations=50, random_state=0).fit(X)
    codes = model.transform(X)
    np.testing.assert_array_equal(model.inverse_transform(codes), codes @ model.components_)
    left_over = X - codes @ model.components_
    assert (left_over @ model.components_.T).max() < 1e-2 * np.abs(X @ model.components_.T).max(), "solved for these"


@pytest.mark.parametrize("steps", [0, 100])
def test_parents_are_the_union_of_their_planted_children(steps):
    """Of the children that were found: the first level does not always find all."""
    together, of_neurons = [], []
    seeds = range(3 if steps else 5)
    for seed in seeds:
        model, features, of_child = hierarchy(seed, steps)
        found = match_directions(model.levels_[0], features)
        assert (model.coefficients_[0] >= 0).all() and model.parents_[0].shape == (9, 3)
        assert model.parents_[0].any(axis=1).all()
        chosen = np.where(found.cosines > 0.9, model.coefficients_[0].argmax(axis=1)[found.latents], -1)
        for first, second in itertools.combinations(np.flatnonzero(chosen >= 0), 2):
            together.append((chosen[first] == chosen[second]) == (of_child[first] == of_child[second]))
        for child in np.flatnonzero(chosen >= 0):
            of_neurons.append((model.levels_[1][chosen[child]] != 0)[features[child] != 0].mean())
        if steps:
            assert model.error_ < model.error_of_levels_
    assert len(of_neurons) >= 7 * len(seeds) and np.mean(together) >= 0.9 and np.mean(of_neurons) >= 0.9


def test_adam_brings_back_no_neuron():
    before, after = hierarchy(0, 0)[0].levels_[1], hierarchy(0, 50)[0].levels_[1]
    assert ((after != 0) <= (before != 0)).all() and not np.allclose(before, after)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1)


def test_a_level_becomes_a_dictionary():
    model = hierarchy(0, 20)[0]
    made = model.dictionary(1)
    np.testing.assert_allclose(made.W_dec.numpy(), model.levels_[1], atol=1e-6)
    with pytest.raises(UserError, match="There is no level 2: there are 2"):
        model.dictionary(2)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"winners": 0.0}, "winners is 0.0"),
        ({"winners": 1.5}, "winners is 1.5"),
        ({"start": "nowhere"}, "start is 'nowhere'; choose one of random, kmeans, svd"),
        ({"features": "positive"}, "features is 'positive'"),
        ({"n_components": 0}, "d_sae is 0"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        SemiNMF(**{"n_components": 6} | options).fit(planted(0)[0])


def test_impossible_rows_and_codes_are_refused_in_a_sentence():
    X, _ = planted(0)
    with pytest.raises(ValueError, match=r"5 sample\(s\) .* minimum of 6 is required"):
        SemiNMF(6).fit(X[:5])
    with pytest.raises(ValueError, match="Negative values in data passed to SemiNMF, whose features"):
        SemiNMF(6, features="non_negative").fit(X)
    with pytest.raises(ValueError, match="contains NaN"):
        SemiNMF(6).fit(np.where(X > 0, np.nan, X))
    with pytest.raises(UserError, match="the least of these is -1"):
        SemiNMF(6).fit(X, codes=-np.ones((300, 6)))
    with pytest.raises(UserError, match=r"have the shape \(300, 5\)"):
        SemiNMF(6).fit(X, codes=np.ones((300, 5)))
    with pytest.raises(UserError, match="Codes are never negative"):
        SemiNMF(6, **FEW).fit(X).inverse_transform(-np.ones((2, 6)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ranks": (4, 4)}, "ranks are 4, 4; each must be smaller"),
        ({"ranks": ()}, "ranks are none"),
        ({"ranks": (4, 2), "winners": (0.1, 0.2, 0.3)}, "winners has 3 shares for 2 ranks"),
        ({"ranks": (4, 2), "threshold": 0.0}, "threshold is 0.0"),
        ({"ranks": (4, 2), "steps": -1}, "steps is -1"),
    ],
)
def test_impossible_levels_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        HierarchicalSemiNMF(**options).fit(planted(0)[0])
