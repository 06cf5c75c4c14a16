"""Head identification: counts against brute force, the SAE against a float64 derivation by hand, and known answers.

Whether the method finds heads of a real model is not tested here; the script prints that beside its nulls.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream
from dictlearn.circuits import head_identification as identification
from dictlearn.circuits import head_outputs
from dictlearn.circuits.head_identification import (
    NO_CODE,
    RELEASED,
    DiscreteSAE,
    DiscreteSAEConfig,
    codes_of,
    edge_scores,
    fit_discrete_sae,
    heads_in_top_edges,
    interval,
    kmeans_codes,
    mean_difference,
    mean_difference_in_spreads,
    node_scores,
    probe_scores,
    roc_auc,
    score_heads,
)
from dictlearn.circuits.tasks import planted_heads

TINY = DiscreteSAEConfig(codes=12, epochs=5, examples=4)


def random_codes(seed: int, pairs: int = 7, heads: int = 5, codes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = numpy_stream(seed, "test codes")
    return tuple(rng.integers(NO_CODE, codes, size=(pairs, heads)) for _ in range(2))


# --- scores from codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalised", [False, True])
def test_node_scores_are_the_codes_of_positives_alone(seed: int, normalised: bool) -> None:
    positive, negative = random_codes(seed)
    expected = []
    for head in range(positive.shape[1]):
        only = [c for c in range(NO_CODE, 4) if c in positive[:, head] and c not in negative[:, head]]
        either = [c for c in range(NO_CODE, 4) if c in positive[:, head] or c in negative[:, head]]
        expected.append(len(only) / (len(either) if normalised else 1))
    assert node_scores(positive, negative, normalised).tolist() == expected
    assert sum(expected) > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("normalised", [False, True])
def test_edge_scores_are_the_pairs_of_codes_of_positives_alone(seed: int, normalised: bool) -> None:
    positive, negative = random_codes(seed)
    heads = positive.shape[1]
    expected = np.zeros((heads, heads))
    for one, other in itertools.permutations(range(heads), 2):
        seen = [{(row[one], row[other]) for row in codes.tolist()} for codes in (positive, negative)]
        expected[one, other] = len(seen[0] - seen[1]) / (len(seen[0] | seen[1]) if normalised else 1)
    assert np.array_equal(edge_scores(positive, negative, normalised), expected)
    assert len(np.unique(expected)) > 2


def test_an_edge_sees_what_neither_of_its_heads_shows() -> None:
    """Both heads have the codes 0 and 1 in both classes; only together do they tell the classes apart."""
    positive, negative = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 0]])
    assert node_scores(positive, negative).tolist() == [0, 0]
    assert edge_scores(positive, negative)[0, 1] == 2


def test_heads_in_top_edges_counts_both_ends() -> None:
    edges = np.zeros((4, 4))
    for (one, other), score in {(0, 1): 9, (0, 2): 8, (1, 3): 7, (2, 3): 6, (0, 3): 5, (1, 2): 4}.items():
        edges[one, other] = edges[other, one] = score
    assert heads_in_top_edges(edges, share=0.5).tolist() == [2, 2, 1, 1]
    assert heads_in_top_edges(edges, share=1 / 6).tolist() == [1, 1, 0, 0]


def test_edges_that_tie_at_the_border_share_it_in_whatever_order_heads_come() -> None:
    edges = np.ones((4, 4)) - np.eye(4)
    assert np.allclose(heads_in_top_edges(edges, share=0.5), 1.5)
    rng = numpy_stream(0, "test ties")
    edges = rng.integers(0, 3, size=(9, 9))
    edges = np.triu(edges, 1) + np.triu(edges, 1).T
    order = rng.permutation(9)
    counted = heads_in_top_edges(edges)
    assert np.allclose(heads_in_top_edges(edges[np.ix_(order, order)]), counted[order])
    assert counted.sum() == pytest.approx(2 * round(0.25 * 36))


# --- the SAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_atoms", [True, False])
def test_the_loss_and_its_gradients_are_those_derived_by_hand_in_float64(unit_atoms: bool) -> None:
    config = replace(TINY, unit_atoms=unit_atoms, l1=0.3)
    sae = DiscreteSAE(6, config, seed=1, scale=0.7)
    x = np.asarray(numpy_stream(0, "test rows").standard_normal((9, 6)), dtype=np.float32)
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.5, 0.5, 6))  # not at its initial zero, which would hide a missing bias
    loss = sae.loss(torch.from_numpy(x))
    loss.backward()

    W_enc, b_enc, W_dec, b = (p.detach().numpy().astype(np.float64) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b))
    scaled = x.astype(np.float64) / 0.7
    pre = (scaled - b) @ W_enc.T + b_enc
    h = np.maximum(pre, 0)
    error = h @ W_dec + b - scaled
    assert loss.item() == pytest.approx((error**2).mean() + 0.3 * h.sum(axis=1).mean(), rel=1e-6)

    d_out = 2 * error / error.size
    d_pre = (d_out @ W_dec.T + 0.3 / len(x)) * (pre > 0)
    expected = {
        "W_enc": d_pre.T @ (scaled - b),
        "b_enc": d_pre.sum(axis=0),
        "W_dec": h.T @ d_out,
        "b": d_out.sum(axis=0) - (d_pre @ W_enc).sum(axis=0),
    }
    assert 0 < (pre > 0).mean() < 1
    for name, gradient in expected.items():
        np.testing.assert_allclose(getattr(sae, name).grad.numpy(), gradient, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("unit_atoms", [True, False])
def test_training_lowers_the_loss_and_keeps_the_norms(unit_atoms: bool) -> None:
    rows = numpy_stream(0, "test rows").standard_normal((40, 8)).astype(np.float32)
    config = DiscreteSAEConfig(codes=16, epochs=100, unit_atoms=unit_atoms)
    drawn, trained = fit_discrete_sae(rows, replace(config, epochs=0), 3), fit_discrete_sae(rows, config, 3)
    with torch.no_grad():
        losses = [sae.loss(torch.from_numpy(rows)).item() for sae in (drawn, trained)]
        assert losses[1] < 0.6 * losses[0]
        assert torch.allclose(trained.W_enc.norm(dim=1), torch.ones(16), atol=1e-6)
        norms = trained.W_dec.norm(dim=1 if unit_atoms else 0)
        assert torch.allclose(norms, torch.ones(len(norms)), atol=1e-6)


@pytest.mark.parametrize("unit_atoms", [True, False])
def test_gradients_lose_the_part_that_would_change_a_norm(unit_atoms: bool) -> None:
    """And training uses what is left: Adam would turn a radial part into steps of full size."""
    config = replace(TINY, unit_atoms=unit_atoms, epochs=1, rescale=False)
    rows = numpy_stream(0, "test rows").standard_normal((9, 6)).astype(np.float32)
    sae = DiscreteSAE(6, config, seed=0)
    sae.loss(torch.from_numpy(rows)).backward()
    sae.keep_gradients_tangent()
    stepped = fit_discrete_sae(rows, config, seed=0)
    for name, dim in (("W_enc", 1), ("W_dec", 1 if unit_atoms else 0)):
        matrix = getattr(sae, name)
        assert matrix.grad.norm() > 1e-4
        assert (matrix.grad * matrix).sum(dim=dim).abs().max() < 1e-7
        first_step = matrix.detach() - config.lr * matrix.grad.sign()  # what Adam's first step is
        expected = torch.nn.functional.normalize(first_step, dim=dim)
        unsure = matrix.grad.abs() < 1e-6  # and is not, where the gradient is not far above Adam's epsilon
        assert unsure.float().mean() < 0.2
        assert torch.allclose(getattr(stepped, name)[~unsure], expected[~unsure], atol=2e-5)


def test_rescaling_makes_the_codes_the_same_whatever_unit_the_model_computes_in() -> None:
    features = planted_heads("shifted", 0, pairs=10, heads=6, known=2, width=16).positive_NHD
    rows = features[:4].reshape(-1, 16)

    def codes(scale: float, config: DiscreteSAEConfig) -> np.ndarray:
        return codes_of(fit_discrete_sae(scale * rows, config, 0), scale * features)

    mended = DiscreteSAEConfig(codes=12, epochs=50)
    assert np.array_equal(codes(1.0, mended), codes(2.0**-6, mended))
    assert not np.array_equal(codes(1.0, RELEASED), codes(2.0**-6, RELEASED))


def test_a_row_without_an_active_latent_has_a_code_of_its_own() -> None:
    def codes(own_no_code: bool) -> list[list[int]]:
        sae = DiscreteSAE(2, DiscreteSAEConfig(codes=2, own_no_code=own_no_code), seed=0)
        with torch.no_grad():
            sae.W_enc.copy_(torch.eye(2))
            sae.b_enc.zero_()
        features = np.array([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, -1.0], [2.0, 3.0]]], dtype=np.float32)
        return codes_of(sae, features).tolist()

    assert codes(own_no_code=True) == [[0, 1], [NO_CODE, 1]]
    assert codes(own_no_code=False) == [[0, 1], [0, 1]]


# --- baselines --------------------------------------------------------------------------------------------------------


def test_kmeans_codes_tell_separate_clusters_apart() -> None:
    centres = np.eye(3) * 10
    features = centres[np.array([[0, 1], [2, 0], [1, 1]])]
    (codes,) = kmeans_codes(centres, 200, 0, features)
    assert len({codes[0, 0], codes[0, 1], codes[1, 0]}) == 3
    assert codes[0, 0] == codes[1, 1]
    assert codes[0, 1] == codes[2, 0] == codes[2, 1]


def test_mean_differences_by_hand() -> None:
    positive = np.array([[[3.0, 4.0], [0.0, 0.0]], [[3.0, 4.0], [2.0, 0.0]]])
    negative = np.array([[[0.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, -1.0]]])
    assert mean_difference(positive, negative).tolist() == [5, 0]
    scaled = mean_difference_in_spreads(10 * positive + [[0.0], [5.0]], 10 * negative)[1]
    assert scaled == pytest.approx(np.sqrt(50) / 10)


def test_the_probe_prefers_the_head_that_tells_the_classes_apart() -> None:
    heads = planted_heads("shifted", 0, pairs=40, heads=4, known=1, width=8)
    scores = probe_scores(heads.positive_NHD, heads.negative_NHD)
    assert scores.argmax() == heads.known_H.argmax()
    assert (scores[~heads.known_H] < np.log(0.5) + 0.1).all()


def test_the_probe_holds_the_two_prompts_of_a_pair_out_together() -> None:
    from sklearn.linear_model import LogisticRegression

    heads = planted_heads("shifted", 1, pairs=10, heads=2, known=1, width=8)
    label = np.array([1] * 10 + [0] * 10)
    pair = np.tile(np.arange(10), 2)
    expected = []
    for head in range(2):
        features = np.concatenate([heads.positive_NHD[:, head], heads.negative_NHD[:, head]]).astype(np.float64)
        likelihood = np.full(20, np.nan)
        for held_out in folds_of_pairs(pair):
            train = ~np.isin(pair, held_out)
            mean, spread = features[train].mean(axis=0), features[train].std(axis=0)
            probe = LogisticRegression(max_iter=1000).fit((features[train] - mean) / spread, label[train])
            probabilities = probe.predict_proba((features[~train] - mean) / spread)
            likelihood[~train] = probabilities[np.arange((~train).sum()), label[~train]]
        expected.append(np.log(likelihood).mean())
    assert probe_scores(heads.positive_NHD, heads.negative_NHD) == pytest.approx(expected)


def folds_of_pairs(pair: np.ndarray) -> list[np.ndarray]:
    """The pairs that each of five folds holds out: all of them once, two at a time."""
    from sklearn.model_selection import GroupKFold

    folds = [np.unique(pair[test]) for _, test in GroupKFold(5).split(pair, groups=pair)]
    assert sorted(np.concatenate(folds).tolist()) == list(range(10))
    return folds


# --- known answers ----------------------------------------------------------------------------------------------------


def test_planted_heads_that_move_are_found_by_their_means() -> None:
    for seed in range(3):
        heads = planted_heads("shifted", seed, pairs=60)
        assert roc_auc(mean_difference(heads.positive_NHD, heads.negative_NHD), heads.known_H) > 0.97


def test_when_the_class_moves_no_mean_codes_find_heads_and_means_do_not() -> None:
    """With a code for every state of every head (12 heads, 8 states), and little noise."""
    by_codes, by_means = [], []
    for seed in range(5):
        heads = planted_heads("equal-means", seed, pairs=60, heads=12, known=4, noise=0.1)
        rows = np.concatenate([heads.positive_NHD, heads.negative_NHD]).reshape(-1, 64)
        codes = kmeans_codes(rows, 12 * 8, seed, heads.positive_NHD, heads.negative_NHD)
        by_codes.append(roc_auc(node_scores(*codes), heads.known_H))
        by_means.append(roc_auc(mean_difference(heads.positive_NHD, heads.negative_NHD), heads.known_H))
    assert min(by_codes) > 0.97
    assert interval(by_means).low < 0.6


def test_shuffled_labels_find_nothing_in_planted_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known head is distributed like any other over both classes together, so the true AUC is a half."""
    monkeypatch.setattr(identification, "probe_scores", lambda positive, negative: np.zeros(positive.shape[1]))  # slow
    found: dict[str, list[float]] = {name: [] for name in (identification.MEANS_SHUFFLED, identification.SHUFFLED)}
    for seed in range(12):
        heads = planted_heads("shifted", seed, pairs=50)
        scores = score_heads(heads.positive_NHD, heads.negative_NHD, replace(TINY, codes=40), seed)
        for name, aucs in found.items():
            aucs.append(roc_auc(scores[name, "nodes"], heads.known_H))
    for name, aucs in found.items():
        estimate = interval(aucs)
        assert estimate.low < 0.5 < estimate.high, name
        assert estimate.half < 0.12, name


def test_every_method_scores_every_head_and_the_seed_decides_all() -> None:
    heads = planted_heads("equal-means", 0, pairs=20, heads=6, known=2, width=16)
    first, again, other = (score_heads(heads.positive_NHD, heads.negative_NHD, TINY, seed) for seed in (0, 0, 1))
    sources = {source for source, _ in first}
    assert sources == {
        "discrete SAE", "SAE as released", "SAE untrained", "k-means codes", "SAE, labels shuffled",
        "released, shuffled",
        "mean difference", "means, shuffled", "means, per spread", "linear probe",
    }  # fmt: skip
    assert all(scores.shape == (6,) and np.isfinite(scores).all() for scores in first.values())
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not np.array_equal(first["discrete SAE", "heads in top edges"], other["discrete SAE", "heads in top edges"])


def test_auc_counts_ties_half() -> None:
    known = np.array([True, True, False, False])
    assert roc_auc(np.array([2.0, 1.0, 1.0, 0.0]), known) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_interval_is_students() -> None:
    estimate = interval([0.6, 0.7, 0.8, 0.9, 1.0])
    assert estimate.mean == pytest.approx(0.8)
    assert estimate.half == pytest.approx(2.776445 * np.sqrt(0.025) / np.sqrt(5), rel=1e-5)
    assert str(estimate) == "0.80 ± 0.20"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((6, 3, 4), (5, 3, 4)), "There are 6 positive and 5 negative examples"),
        (((6, 3, 4), (6, 2, 4)), r"found shapes \(6, 3, 4\) and \(6, 2, 4\)"),
        (((4, 3, 4), (4, 3, 4)), "At least 5 pairs of examples are needed"),
        (((6, 1, 4), (6, 1, 4)), "at least two, not 1"),
    ],
)
def test_features_that_cannot_be_scored_are_refused(shapes: tuple, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        score_heads(np.zeros(shapes[0]), np.zeros(shapes[1]), TINY)


def test_more_training_examples_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="At least 8 pairs of examples are needed"):
        score_heads(np.zeros((7, 3, 4)), np.zeros((7, 3, 4)), replace(TINY, examples=15))


def test_values_that_are_not_finite_are_refused() -> None:
    features = np.zeros((6, 3, 4))
    features[2, 1, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        score_heads(np.zeros((6, 3, 4)), features, TINY)


@pytest.mark.parametrize("known", [[True, True], [False, False]])
def test_an_auc_without_two_kinds_of_heads_is_refused(known: list[bool]) -> None:
    with pytest.raises(UserError, match=f"{sum(known)} of 2 heads"):
        roc_auc(np.array([1.0, 2.0]), np.array(known))


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "circuits" / "identify_heads.py"
    spec = importlib.util.spec_from_file_location("identify_heads", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "identify_heads", module)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_every_method_and_leaves_out_seeds_without_an_answer(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identification, "DiscreteSAEConfig", lambda examples: replace(TINY, examples=examples))

    aucs = []

    def cases() -> Iterator:
        for seed in range(4):
            heads = planted_heads("shifted", seed, pairs=12, heads=6, known=2, width=16)
            if seed:
                aucs.append(roc_auc(mean_difference(heads.positive_NHD, heads.negative_NHD), heads.known_H))
            known = {"planted": heads.known_H & (seed > 0), "other": heads.known_H & False}
            yield script.Case(heads.positive_NHD, heads.negative_NHD, known)

    script.compare(cases, examples=4)
    printed = capsys.readouterr().out
    assert "By planted, all heads matter or none does in seeds [0]" in printed
    assert "By other, all heads matter or none does in seeds [0, 1, 2, 3]" in printed
    assert "known by planted: mean over 3 seeds" in printed and "known by other:" not in printed
    rows = {line.split("│")[0].strip(): line.split("│")[1:] for line in printed.splitlines() if "│" in line}
    assert rows["mean difference"][0].strip() == str(interval(aucs))
    assert {"discrete SAE", "SAE as released", "SAE untrained", "SAE, labels shuffled"} <= set(rows)
    assert {"minus its labels shuffled", "minus SAE untrained", "minus linear probe"} <= set(rows)


def test_a_model_that_does_not_do_the_task_is_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = head_outputs.HeadEffects(np.zeros(4), np.zeros(4), gap=-0.1, accuracy=0.0, negative_accuracy=0.0)
    monkeypatch.setattr(head_outputs, "head_effects", lambda *arguments: nothing)
    with pytest.raises(UserError, match="does not do this task at all"):
        script.measured_truth(None, None)
