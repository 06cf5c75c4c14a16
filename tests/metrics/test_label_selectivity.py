"""Selectivity for labels, by hand, and what permuted labels score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.metrics.label_selectivity import label_selectivity, selective_counts

# rows: three of label "a", two of "b", one of "c"
LABELS = np.array(["a", "b", "a", "c", "b", "a"])
ACTIVE = [
    [1, 0, 1, 0, 0, 1],  # with a alone
    [1, 1, 1, 0, 1, 1],  # with a and b
    [1, 0, 0, 0, 1, 0],  # a third of a, half of b
    [0, 0, 0, 0, 0, 0],
]


def codes(active_SB: list[list[int]] | np.ndarray) -> Codes:
    """Values of either sign: what counts is that they are not 0."""
    signs = torch.tensor([1.0, -1.0]).repeat(len(active_SB))[: len(active_SB)]
    return Codes.from_dense(torch.tensor(active_SB, dtype=torch.float32).T * signs)


def test_both_scores_are_those_worked_out_by_hand():
    found = label_selectivity(codes(ACTIVE), LABELS)
    assert found.labels.tolist() == ["a", "b", "c"]
    expected = [
        [1 - 0, 0 - 3 / 4, 0 - 3 / 5],
        [1 - 2 / 3, 1 - 3 / 4, 0 - 1],
        [1 / 3 - 1 / 3, 1 / 2 - 1 / 4, 0 - 2 / 5],
        [0, 0, 0],
    ]
    np.testing.assert_allclose(found.average, expected, atol=1e-12)
    np.testing.assert_allclose(
        found.maximum, [[1, -1, -1], [0, 0, -1], [1 / 3 - 1 / 2, 1 / 2 - 1 / 3, -1 / 2], [0, 0, 0]], atol=1e-12
    )
    assert [found.count_above(t) for t in (0.5, 0.3, 0.2, -0.1)] == [1, 2, 3, 4]
    assert [found.count_above(t, "maximum") for t in (0.5, 0.15)] == [1, 2]
    np.testing.assert_allclose(found.best(), [1, 1 / 4, 0])
    np.testing.assert_allclose(found.best("maximum"), [1, 1 / 6, 0])


@pytest.mark.parametrize("seed", range(5))
def test_what_follows_the_labels_is_far_above_permuted_ones(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=800)
    active = rng.random((40, 800)) < 0.1
    active[:4] |= (labels == np.arange(4)[:, None]) & (rng.random((4, 800)) < 0.7)
    counts = selective_counts(codes(active), labels, seed=seed)
    assert set(counts) == {0.5, 0.2}
    assert counts[0.5].value == counts[0.2].value == 4
    assert counts[0.5].floor == counts[0.2].floor == 0 and counts[0.5].draws == 3
    # with five rows of a label nearly any latent is selective for one of a hundred labels
    rare = np.arange(800) // 8
    assert selective_counts(codes(active), rare, seed=seed)[0.2].floor > 30


def test_the_null_is_the_same_for_the_same_seed():
    active = np.random.default_rng(0).random((30, 60)) < 0.3
    labels = np.arange(60) % 6
    assert selective_counts(codes(active), labels, seed=1) == selective_counts(codes(active), labels, seed=1)
    floors = {selective_counts(codes(active), labels, (0.2,), seed=seed, draws=1)[0.2].floor for seed in range(5)}
    assert len(floors) > 1


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [(np.zeros(5), "codes of 6 rows and labels of shape"), (np.zeros(6), "All 6 rows have the same label")],
)
def test_labels_that_say_nothing_are_refused(labels, sentence):
    with pytest.raises(UserError, match=sentence):
        label_selectivity(codes(ACTIVE), labels)
