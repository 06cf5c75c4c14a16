"""A text's score is its largest cosine; S_CD and AUROC compare the two kinds of text, and know when they cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from activation_store.errors import UserError
from dictlearn.steering.detection import concept_scores, detect, text_activations
from dictlearn.steering.directions import direction, random_directions


def test_a_text_scores_its_largest_cosine_with_each_direction():
    texts = [torch.tensor([[2.0, 0.0], [0.0, -3.0]]), torch.tensor([[-1.0, -1.0], [0.0, 0.0]])]
    ways = [direction(torch.tensor(vector), "h", "v") for vector in ([1.0, 0.0], [0.0, 1.0])]
    np.testing.assert_allclose(concept_scores(texts, ways), [[1.0, 0.0], [0.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(concept_scores([texts[1][:1]], ways), [[-(0.5**0.5)] * 2], atol=1e-7)


def test_the_ratio_and_the_auroc_by_hand():
    found = detect(np.array([0.8, 0.4]), np.array([0.1, 0.2, 0.6]))
    assert found.s_cd == pytest.approx(math.log(0.6 / 0.3))
    assert found.auroc == pytest.approx(5 / 6)  # of six pairs one, 0.4 and 0.6, is the wrong way round


@pytest.mark.parametrize(("activating", "neutral"), [([0.5], [-0.1]), ([-0.1], [0.5]), ([0.5], [0.0])])
def test_a_mean_that_has_no_logarithm_gives_none_and_an_auroc(activating, neutral):
    found = detect(np.array(activating), np.array(neutral))
    assert found.s_cd is None and found.auroc == float(activating > neutral)


def test_texts_of_one_kind_alone_are_refused():
    with pytest.raises(UserError, match="give some of each"):
        detect(np.array([0.5]), np.array([]))


def test_random_directions_detect_nothing_on_average():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(6, 20, generator=generator) for _ in range(40)]
    scores = concept_scores(texts, random_directions(50, 20, "h", seed=0))
    aurocs = [detect(of_one[:20], of_one[20:]).auroc for of_one in scores.T]
    assert abs(np.mean(aurocs) - 0.5) < 0.06 and np.std(aurocs) > 0.03


def test_activations_of_a_text_leave_out_bos_and_padding(model):
    hook, texts = "blocks.1.attn.hook_z", [[0, 5, 9, 2], [0, 7]]
    found = text_activations(model, hook, texts, skip_first=True)
    assert [rows.shape for rows in found] == [(3, 24), (1, 24)]
    alone = model.run_with_cache(torch.tensor([texts[1]]))[1][hook]
    torch.testing.assert_close(found[1], alone[0, 1:].flatten(1), atol=1e-5, rtol=1e-4)
    assert len(text_activations(model, hook, texts, skip_first=False)[1]) == 2
    with pytest.raises(UserError, match="Text 2 of 2 has no tokens"):
        text_activations(model, hook, [[0, 5], [0]], skip_first=True)
