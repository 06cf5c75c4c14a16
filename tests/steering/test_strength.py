"""Strengths hit their KL, and one that cannot is said, in words, not left out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dictlearn.steering.directions import random_directions
from dictlearn.steering.edit import next_token_log_probs
from dictlearn.steering.strength import DOUBLINGS, match_kl, mean_length, search

TARGETS = [0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5]


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.0.mlp.hook_post"])
def test_every_target_is_hit_with_both_signs(model, prompts, hook):
    width = model.run_with_cache(prompts.tokens)[1][hook].shape[2]
    (way,) = random_directions(1, width, hook, seed=3)
    found = match_kl(model, prompts, way, TARGETS)
    assert [each.target for each in found] == 2 * TARGETS
    assert [each.alpha > 0 for each in found] == [True] * 7 + [False] * 7
    base = next_token_log_probs(model, prompts)
    for each in found:
        steered = next_token_log_probs(model, prompts, way, each.alpha)
        kl = torch.nn.functional.kl_div(steered, base, reduction="none", log_target=True).sum(dim=1).mean()
        assert each.hit and abs(float(kl) - each.target) <= 0.011 * each.target, each
        assert each.kl == pytest.approx(float(kl), rel=1e-3)


def along(kl):
    """The search over a made-up KL, and how often it asked."""
    asked = []

    def kl_at(alphas):
        asked.append(list(alphas))
        return [kl(alpha) for alpha in alphas]

    return kl_at, asked


def test_a_parabola_gives_its_root_and_signs_are_searched_for_together():
    kl_at, asked = along(lambda alpha: alpha**2 if alpha > 0 else 4 * alpha**2)
    plus, minus = search(kl_at, 0.01, [0.25], tolerance=1e-4)
    assert plus.alpha == pytest.approx(0.5, rel=1e-3) and minus.alpha == pytest.approx(-0.25, rel=1e-3)
    assert plus.hit and minus.hit and plus.said == minus.said == ""
    assert asked[0] == [-0.01, 0.01] and asked[1] == [-0.02, 0.02]


def test_a_kl_that_levels_off_below_the_target_is_said():
    found, reached = search(along(lambda alpha: 0.3 * math.tanh(abs(alpha)))[0], 1.0, [0.5, 0.1], signs=[-1])
    assert not found.hit and found.kl == pytest.approx(0.3) and found.alpha < 0
    assert found.said.startswith(
        "A KL of 0.5 is not reached: of the strengths tried, to -1.311e+05, the nearest is 0.3"
    )
    assert reached.hit and reached.said == ""


def test_a_kl_that_jumps_past_the_target_is_said():
    (found,) = search(along(lambda alpha: 1.0 * (alpha > 3))[0], 1.0, [0.5], signs=[1])
    assert not found.hit and found.said.startswith("A KL of 0.5 is passed at a jump")


def test_a_kl_that_falls_on_the_way_is_said():
    """Up to 0.2 at 2, down to 0.05 at 4, and up again."""
    heights = [(0.0, 0.0), (2.0, 0.2), (4.0, 0.05), (16.0, 1.0)]

    def kl(alpha):
        for (left, low), (right, high) in pairwise(heights):
            if left <= alpha <= right:
                return low + (high - low) * (alpha - left) / (right - left)
        return 1.0

    (below, above) = search(along(kl)[0], 1.0, [0.1, 0.5], signs=[1])
    assert below.hit and below.alpha == pytest.approx(1.0) and below.said == ""
    assert above.hit and above.said == (
        f"The KL falls in places as the strength grows; {above.alpha:.4g} is the first that doubling came upon."
    )


def test_an_edit_without_effect_is_said_and_ends():
    kl_at, asked = along(lambda alpha: 0.0)
    (found,) = search(kl_at, 1.0, [0.1], signs=[1])
    assert found.said == "What is added here does not reach the next token: its KL stays 0." and not found.hit
    assert len(asked) == DOUBLINGS + 1


def test_a_strength_that_overflows_ends_the_search():
    kl_at, asked = along(lambda alpha: 0.01 * alpha if alpha < 8 else float("nan"))
    (found,) = search(kl_at, 1.0, [0.1], signs=[1])
    assert not found.hit and found.kl == pytest.approx(0.04) and len(asked) == 4


def test_the_length_that_strengths_compare_with_leaves_bos_and_padding_out(model, prompts):
    hook = "blocks.1.hook_resid_post"
    rows = model.run_with_cache(prompts.tokens)[1][hook]
    lengths = [rows[b, 1 : prompts.lengths[b]].norm(dim=1) for b in range(3)]
    assert mean_length(model, prompts, hook) == pytest.approx(float(torch.cat(lengths).mean()), rel=1e-5)
