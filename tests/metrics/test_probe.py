"""The probe: balanced, split by group, and beside chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.metrics.probe import probe, probe_reconstruction, split_by_group


def balanced(rng: np.random.Generator, rows: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(noise, labels, groups)``: ten groups, each with both labels."""
    return rng.normal(size=(rows, 6)), np.arange(rows) % 2, rng.integers(10, size=rows)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_there_is_read_and_what_is_not_scores_chance(seed):
    noise, labels, groups = balanced(np.random.default_rng(seed))
    found = probe(noise + 8 * labels[:, None], labels, groups, seed=seed)
    assert found.accuracy == 1.0 and found.chance == 0.5
    assert found.training_rows + found.test_rows == 400 and 60 < found.test_rows < 180
    assert abs(probe(noise, labels, groups, seed=seed).accuracy - 0.5) < 0.2


def test_each_label_counts_the_same_however_many_rows_it_has():
    """One coordinate, in which the rare label is on the high side and a quarter of the frequent one too."""
    rows = np.array([[0.0]] * 60 + [[1.0]] * 20 + [[1.0]] * 4)
    labels = np.array([0] * 80 + [1] * 4)
    x, y, groups = np.tile(rows, (2, 1)), np.tile(labels, 2), np.repeat([0, 1], len(rows))
    # plain accuracy would be best (0.95) with "always 0"; weighed alike, 1 is said where x is 1: (0.75 + 1) / 2
    assert probe(x, y, groups, test_share=0.5).accuracy == pytest.approx(0.875)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides(seed):
    groups = np.random.default_rng(seed).integers(12, size=300)
    train, test = split_by_group(groups, 0.25, seed)
    assert (train ^ test).all() and not set(groups[train]) & set(groups[test])
    assert len(set(groups[test])) == 3


@pytest.mark.parametrize("seed", range(5))
def test_a_probe_that_knows_the_group_alone_does_not_seem_to_know_the_label(seed):
    """Groups have labels of their own and stand apart in directions that say nothing of the label."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(24), 20)
    x = 5 * rng.normal(size=(24, 30))[groups] + rng.normal(size=(480, 30))
    by_group = np.mean([probe(x, groups % 2, groups, seed=s).accuracy for s in range(6)])
    leaking = np.mean([probe(x, groups % 2, np.arange(480), seed=s).accuracy for s in range(6)])
    assert leaking > 0.95 and by_group < 0.8


def test_a_reconstruction_is_probed_beside_what_it_was_made_of():
    noise, labels, groups = balanced(np.random.default_rng(0))
    x = torch.from_numpy(noise + 3 * labels[:, None]).float()
    empty = TopK(TopKConfig(d_sae=8, k=2), 6)  # untrained: rebuilds zeros
    of_output, of_x = probe_reconstruction(empty, x, labels, groups)
    assert of_output.accuracy == of_output.chance == 0.5 and of_x.accuracy > 0.95
    assert (of_output.training_rows, of_output.test_rows) == (of_x.training_rows, of_x.test_rows)


@pytest.mark.parametrize(
    ("labels", "groups", "sentence"),
    [
        ([0, 1, 0], [0, 1, 2, 3], "There are 4 rows, 3 labels and 4 groups"),
        ([0, 1, 0, 1], [7, 7, 7, 7], "There are 1 groups"),
        ([0, 0, 0, 0], [0, 1, 2, 3], "All 4 rows have the same label"),
        ([0, 0, 1, 1], [0, 0, 1, 1], "part has the label .: with 2 groups"),
    ],
)
def test_splits_that_cannot_be_are_refused(labels, groups, sentence):
    with pytest.raises(UserError, match=sentence):
        probe(np.zeros((4, 2)), np.array(labels), np.array(groups))
