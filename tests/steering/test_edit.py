"""What is added is strength times the unit direction, at every position of the hook, to the activation as it is."""

from __future__ import annotations

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.steering.directions import direction, random_directions
from dictlearn.steering.edit import next_token_log_probs, padded, steer

from .conftest import PROMPTS

RESID = "blocks.1.hook_resid_post"


def seen_at(model, tokens, hook):
    _, cache = model.run_with_cache(tokens)
    return cache[hook]


@pytest.mark.parametrize("hook", [RESID, "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"])
def test_the_activation_is_moved_by_the_strength_at_every_position(model, hook):
    tokens = torch.tensor([[0, 5, 9, 2], [0, 7, 7, 1]])
    clean = seen_at(model, tokens, hook)
    (way,) = random_directions(1, clean.shape[2:].numel(), hook, seed=0)
    with steer(model, way, torch.tensor([3.0, -0.5])):
        moved = seen_at(model, tokens, hook)
    expected = torch.tensor([3.0, -0.5])[:, None, None] * way.unit
    torch.testing.assert_close((moved - clean).flatten(2), expected.expand(2, 4, -1), atol=1e-5, rtol=1e-4)
    assert torch.equal(seen_at(model, tokens, hook), clean)


def test_what_is_added_to_mlp_neurons_is_what_their_output_weights_make_of_it(model):
    tokens = torch.tensor([[0, 5, 9, 2]])
    d_mlp = seen_at(model, tokens, "blocks.1.mlp.hook_post").shape[2]
    (neurons,) = random_directions(1, d_mlp, "blocks.1.mlp.hook_post", seed=1)
    clean = seen_at(model, tokens, "blocks.1.hook_mlp_out")
    with steer(model, neurons, 2.0):
        steered = model(tokens)
        written = seen_at(model, tokens, "blocks.1.hook_mlp_out") - clean
    assert torch.allclose(written, written[:, :1].expand_as(written), atol=1e-5)  # the same at every position
    with steer(model, direction(written[0, 0], "blocks.1.hook_mlp_out", "written"), float(written[0, 0].norm())):
        torch.testing.assert_close(model(tokens), steered, atol=1e-4, rtol=1e-4)


def test_prompts_of_other_lengths_in_the_batch_change_nothing(model, prompts):
    (way,) = random_directions(1, 24, RESID, seed=2)
    alphas = torch.tensor([1.0, 2.0, 3.0])
    together = next_token_log_probs(model, prompts, way, alphas)
    for row, (prompt, alpha) in enumerate(zip(PROMPTS, alphas, strict=True)):
        with steer(model, way, float(alpha)):
            alone = model(torch.tensor([prompt]))[0, -1].double().log_softmax(dim=-1)
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
    base = next_token_log_probs(model, prompts)
    assert torch.equal(next_token_log_probs(model, prompts, way, 0.0), base)
    torch.testing.assert_close(base.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_more_rows_than_fit_at_once_keep_their_order(model, prompts, monkeypatch):
    (way,) = random_directions(1, 24, RESID, seed=2)
    alphas = torch.arange(6.0)
    whole = next_token_log_probs(model, prompts.repeat(2), way, alphas)
    monkeypatch.setattr("dictlearn.steering.edit.ROWS_AT_ONCE", 4)
    torch.testing.assert_close(next_token_log_probs(model, prompts.repeat(2), way, alphas), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("hook", "width", "sentence"),
    [
        ("blocks.1.hook_resid_mid", 24, "misses the skip connection"),
        ("blocks.9.hook_mlp_out", 24, "has no hook 'blocks.9.hook_mlp_out'"),
        (RESID, 23, "random 0 has 23 values, an activation at blocks.1.hook_resid_post has 24"),
    ],
)
def test_what_cannot_be_added_is_refused(model, hook, width, sentence):
    (way,) = random_directions(1, width, hook, seed=0)
    with pytest.raises(UserError, match=sentence), steer(model, way, 1.0):
        model(torch.tensor([[0, 1]]))


def test_padding_is_on_the_right():
    rows = padded([[1, 2, 3], [4]])
    assert rows.tokens.tolist() == [[1, 2, 3], [4, 0, 0]] and rows.lengths.tolist() == [3, 1]
    assert rows.repeat(2).tokens.tolist() == [[1, 2, 3], [4, 0, 0], [1, 2, 3], [4, 0, 0]]
