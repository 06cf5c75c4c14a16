"""Heads' outputs add up to the attention's, and an edit of one head is an edit of what the attention writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from activation_store.seeds import numpy_stream
from dictlearn.circuits.head_outputs import head_effects, head_outputs, known_heads, output_matrices
from dictlearn.circuits.tasks import TokenPairs

LENGTHS = np.array([7, 4, 6])


@pytest.fixture
def pairs() -> TokenPairs:
    """Random tokens; each negative differs from its positive at position 2. Padding is token 0."""
    rng = numpy_stream(0, "test prompts")
    positive = rng.integers(2, 31, size=(3, 7)) * (np.arange(7) < LENGTHS[:, None])
    negative = positive.copy()
    negative[:, 2] = (positive[:, 2] + 5) % 29 + 2
    return TokenPairs(positive, negative, LENGTHS, np.array([3, 8, 30]))


def attention_output(model: Any, layer: int, tokens: np.ndarray) -> torch.Tensor:
    _, cache = model.run_with_cache(torch.from_numpy(tokens), names_filter=f"blocks.{layer}.hook_attn_out")
    return cache[f"blocks.{layer}.hook_attn_out"]


def test_heads_and_the_bias_add_up_to_the_attentions_output(case: Any, pairs: TokenPairs) -> None:
    """In every layout, grouped-query attention among them, averaged over real positions only."""
    model = case.model
    outputs = head_outputs(model, pairs.positive_NT, pairs.lengths_N)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    assert outputs.shape == (3, layers * heads, model.cfg.d_model)
    for layer in range(layers):
        bias = model.blocks[layer].attn.b_O
        added = outputs[:, layer * heads : (layer + 1) * heads].sum(axis=1) + bias.detach().numpy()
        written = attention_output(model, layer, pairs.positive_NT)
        expected = [written[n, :length].mean(dim=0).numpy() for n, length in enumerate(LENGTHS)]
        np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(case: Any, pairs: TokenPairs) -> None:
    alone = head_outputs(case.model, pairs.positive_NT[1:2, :4], LENGTHS[1:2])
    np.testing.assert_allclose(head_outputs(case.model, pairs.positive_NT, LENGTHS)[1:2], alone, rtol=1e-4, atol=1e-6)


def test_effects_are_those_of_the_same_edit_made_after_the_output_projection(case: Any, pairs: TokenPairs) -> None:
    model = case.model
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    W_O = output_matrices(model).double()
    hooks = [f"blocks.{layer}.attn.hook_z" for layer in range(layers)]
    z_positive, z_negative = (
        model.run_with_cache(torch.from_numpy(tokens), names_filter=lambda name: name in hooks)[1]
        for tokens in (pairs.positive_NT, pairs.negative_NT)
    )
    real = torch.from_numpy(np.arange(7) < LENGTHS[:, None])

    @torch.no_grad()
    def answers(tokens: np.ndarray) -> torch.Tensor:
        logits = model(torch.from_numpy(tokens))
        last = logits[torch.arange(3), torch.from_numpy(LENGTHS) - 1]
        return last[torch.arange(3), torch.from_numpy(pairs.answers_N)] - last.mean(dim=-1)

    clean = answers(pairs.positive_NT)
    gap = (clean - answers(pairs.negative_NT)).mean()
    expected = torch.empty(2, layers, heads)
    for layer in range(layers):
        z, other = z_positive[hooks[layer]], z_negative[hooks[layer]]
        mean = torch.cat([z[real], other[real]]).mean(dim=0)
        for head in range(heads):
            for row, value in enumerate((mean[head].expand_as(z[:, :, head]), other[:, :, head])):
                change = (value - z[:, :, head]) @ W_O[layer, head]
                hook = (f"blocks.{layer}.hook_attn_out", lambda written, hook, change=change: written + change)
                with model.hooks(fwd_hooks=[hook]):
                    expected[row, layer, head] = (clean - answers(pairs.positive_NT)).mean() / gap

    effects = head_effects(model, pairs)
    assert effects.gap == pytest.approx(gap.item(), rel=1e-4)
    np.testing.assert_allclose(effects.ablation_H, expected[0].flatten(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(effects.patching_H, expected[1].flatten(), rtol=1e-3, atol=1e-4)
    assert np.abs(effects.ablation_H).max() > 0.01 and np.abs(effects.patching_H).max() > 0.01


def test_heads_that_work_against_the_answer_matter_too() -> None:
    assert known_heads(np.array([0.06, -0.06, 0.04, 0.0])).tolist() == [True, True, False, False]
