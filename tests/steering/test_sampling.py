"""Continuations are decided by the seed, drawn from the tokens asked for, and judged by the unsteered model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dictlearn.steering.directions import random_directions
from dictlearn.steering.edit import padded
from dictlearn.steering.sampling import Sampling, continuations, draw, fluency

from .conftest import PROMPTS

FREE = Sampling(samples=3, tokens=5, top_k=0, top_p=1.0, seed=4)


def test_the_seed_decides_and_a_strength_of_zero_changes_nothing(model, prompts):
    (way,) = random_directions(1, 24, "blocks.1.hook_resid_post", seed=0)
    plain = continuations(model, prompts, FREE)
    assert plain.shape == (3, 3, 5)
    assert torch.equal(continuations(model, prompts, FREE), plain)
    assert torch.equal(continuations(model, prompts, FREE, way, 0.0), plain)
    assert not torch.equal(continuations(model, prompts, replace(FREE, seed=5)), plain)
    assert not torch.equal(continuations(model, prompts, FREE, way, 50.0), plain)
    assert not torch.equal(plain[0], plain[1])


def test_the_likeliest_token_is_what_a_loop_by_hand_writes_steered_at_every_position(model, prompts):
    (way,) = random_directions(1, 24, "blocks.1.hook_mlp_out", seed=0)
    greedy = replace(FREE, samples=1, top_k=1)
    written = continuations(model, prompts, greedy, way, 6.0)
    for b, prompt in enumerate(PROMPTS):
        row = list(prompt)
        for _ in range(5):
            logits = model.run_with_hooks(
                torch.tensor([row]), fwd_hooks=[(way.hook, lambda activation, hook: activation + 6.0 * way.unit)]
            )
            row.append(int(logits[0, -1].argmax()))
        assert written[0, b].tolist() == row[len(prompt) :]


def test_fluency_is_the_mean_log_probability_of_the_new_tokens_without_steering(model, prompts):
    written = continuations(model, prompts, FREE)
    found = fluency(model, prompts, written)
    row = torch.tensor([[*PROMPTS[1], *written[2, 1].tolist()]])
    log_probs = model(row)[0].double().log_softmax(dim=-1)
    by_hand = [float(log_probs[place - 1, row[0, place]]) for place in range(3, 8)]
    assert float(found[2, 1]) == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def drawn(share: float, **changes) -> int:
    """What is drawn of probabilities 0.1, 0.5, 0.2 and 0.2 at a place in [0, 1)."""
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.2]]).log()
    return int(draw(logits, replace(FREE, **changes), torch.tensor([share])))


def test_draws_follow_the_probabilities_from_the_likeliest_down():
    assert [drawn(share) for share in (0.0, 0.49, 0.51, 0.69, 0.71, 0.89, 0.91, 0.999)] == [1, 1, 2, 2, 3, 3, 0, 0]


def test_only_the_likeliest_are_drawn_where_that_is_asked():
    assert {drawn(share / 100, top_k=2) for share in range(100)} == {1, 2}
    assert {drawn(share / 100, top_p=0.3) for share in range(100)} == {1}
    assert {drawn(share / 100, top_p=0.6) for share in range(100)} == {1, 2}
    halves = torch.zeros(1, 2)  # the first reaches 0.5 by itself
    assert int(draw(halves, replace(FREE, top_p=0.5), torch.tensor([0.99]))) == 0
    # of two, 0.5 and 0.2 are 5/7 and 2/7
    assert drawn(0.71, top_k=2) == 1 and drawn(0.72, top_k=2) == 2


def test_a_low_temperature_draws_the_likeliest_and_a_high_one_all():
    assert {drawn(share / 100, temperature=0.05) for share in range(100)} == {1}
    counts = [sum(drawn(share / 100, temperature=100.0) == token for share in range(100)) for token in range(4)]
    assert min(counts) >= 24


def test_many_samples_have_the_model_s_probabilities(model):
    prompt = padded([[0, 5, 9]])
    found = continuations(model, prompt, replace(FREE, samples=400, tokens=1)).flatten()
    expected = model(prompt.tokens)[0, -1].softmax(dim=-1)
    share = torch.bincount(found, minlength=len(expected)) / 400
    assert (share - expected).abs().max() < 5 * (0.25 / 400) ** 0.5
