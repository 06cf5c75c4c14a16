"""Logits are what a dense computation gives, and what the model itself does with a vector in its stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dictlearn
from activation_store.harvest.language_model import load_language_model, load_tokenizer, resolve_model
from dictlearn import reports
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.decoder import (
    Unembedding,
    load_unembedding,
    logit_effects,
    neighbours,
    top_neurons,
    why_no_logits,
    writes_to_stream,
)
from dictlearn.feature_index.index import open_index
from dictlearn.feature_index.read import feature_page
from dictlearn.feature_index.spec import LISTED
from dictlearn.token_text import known_tokens
from dictlearn.workspace import Workspace

from .conftest import make_model, make_run, make_store


def ignore(n: int) -> None:
    pass


@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize(("latents", "tokens"), [(70, 300), (3, 4)])
def test_logits_equal_the_dense_computation(centres: bool, latents: int, tokens: int, monkeypatch) -> None:
    from dictlearn.feature_index import decoder

    monkeypatch.setattr(decoder, "BLOCK_VALUES", 4000)
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(latents, 16, generator=generator) + 0.5
    gain, W_U = torch.rand(16, generator=generator) + 0.5, torch.randn(16, tokens, generator=generator) + 0.3
    token_ids = np.arange(tokens) * 2  # every other number is unknown to the tokenizer
    found = logit_effects(W_dec, Unembedding(gain, centres, W_U, token_ids), ignore)
    written = W_dec.double() - (W_dec.double().mean(dim=1, keepdim=True) if centres else 0)
    effects = (written * gain.double()) @ W_U.double()
    effects = (effects - effects.mean(dim=1, keepdim=True)).numpy()
    listed = min(LISTED, tokens)
    for sign, which, values in ((1, found[0], found[1]), (-1, found[2], found[3])):
        expected = sign * np.sort(sign * effects, axis=1)[:, ::-1][:, :listed]
        np.testing.assert_allclose(values[:, :listed], expected, atol=1e-5)
        picked = np.take_along_axis(effects, which[:, :listed] // 2, axis=1)
        np.testing.assert_allclose(picked, expected, atol=1e-5)
        assert (which[:, listed:] == -1).all() and np.isnan(values[:, listed:]).all()


def test_neighbours_of_few_latents_and_of_rows_of_zeros() -> None:
    latents, cosines = neighbours(torch.tensor([[1.0, 0], [0, 0], [-2, 0]]), ignore)
    assert latents[0].tolist() == [1, 2, *[-1] * 8] and cosines[0, :2].tolist() == [0, -1]
    assert np.isnan(cosines[:, 2:]).all()


@pytest.mark.parametrize(
    ("hook", "writes"),
    [
        ("blocks.3.hook_resid_post", True),
        ("blocks.0.hook_resid_mid", True),
        ("blocks.11.hook_mlp_out", True),
        ("blocks.1.attn.hook_out", True),
        ("hook_embed", True),
        ("blocks.1.mlp.hook_in", False),
        ("blocks.1.mlp.hook_post", False),
        ("blocks.1.attn.hook_z", False),
        ("blocks.1.ln2.hook_out", False),
        ("ln_final.hook_out", False),
    ],
)
def test_which_hooks_write_to_the_residual_stream(hook: str, writes: bool) -> None:
    assert writes_to_stream(hook) == writes


def save_real_model(folder: Path, layout: str) -> Path:
    """A random model whose gains are far from 1."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    make_model(folder)
    (folder / "model.safetensors").unlink()
    if layout == "gpt2":
        config = transformers.GPT2Config(vocab_size=260, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=0)
        config.n_inner = 12
        cls = transformers.GPT2LMHeadModel
    else:
        widths = dict(vocab_size=260, hidden_size=12, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
        config, cls = transformers.LlamaConfig(**widths, bos_token_id=0), transformers.LlamaForCausalLM
    torch.manual_seed(3)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_logits_are_what_the_model_does_with_the_denominator_held_still(layout: str, tmp_path) -> None:
    spec = resolve_model(str(save_real_model(tmp_path / layout, layout)))
    end = load_unembedding(spec, known_tokens(load_tokenizer(spec), spec.vocab_size))
    assert end.token_ids_V.tolist() == list(range(257)) and end.centres == (layout == "gpt2")
    model = load_language_model(spec)
    stream, written = torch.randn(12), torch.randn(12)

    def numerator(x: torch.Tensor) -> torch.Tensor:
        """The logits without the final norm's denominator, by the model's own modules."""
        centred = x - x.mean() if end.centres else x
        scale = (centred.square().mean() + model.cfg.eps).sqrt()
        bias = model.ln_final.bias if end.centres else 0
        return (model.ln_final(x[None])[0] - bias) * scale @ model.W_U

    expected = (numerator(stream + written) - numerator(stream))[:257]
    expected = expected - expected.mean()
    tokens, values, _, _ = logit_effects(written[None], end, ignore)
    np.testing.assert_allclose(values[0], expected.topk(LISTED).values, rtol=1e-3, atol=1e-4)
    assert tokens[0].tolist() == expected.topk(LISTED).indices.tolist()


def test_an_index_with_logits_shows_them(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    model = save_real_model(workspace.root / "model", "gpt2")
    store = make_store(workspace, "store", [60], model=model)
    make_run(workspace, "run", store)
    index = open_index(run_index(IndexConfig("run"), workspace))
    page = feature_page(index, 5)
    assert len(page.top_logits) == len(page.bottom_logits) == LISTED
    assert page.top_logits[0].logit > 0 > page.bottom_logits[0].logit
    assert page.top_logits[0].token == index.table().top_logit[5]
    assert "LayerNorm's centring and gain" in page.logits_are and index.manifest.has_logits


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_latents_of_an_mlp_are_shown_by_their_neurons_and_reach_the_logits_through_its_weights(
    layout: str, tmp_path, capsys
) -> None:
    workspace = Workspace(tmp_path)
    folder = save_real_model(workspace.root / "model", layout)
    make_run(workspace, "run", make_store(workspace, "store", [60], hook="blocks.1.mlp.hook_post", model=folder))
    index = open_index(run_index(IndexConfig("run"), workspace))
    page = feature_page(index, 5)
    W_dec = dictlearn.load(workspace.run("run").folder).W_dec
    unit = (W_dec / W_dec.norm(dim=1, keepdim=True))[5]
    order = unit.abs().argsort(descending=True)[:LISTED].tolist()
    assert [one.neuron for one in page.neurons] == order
    np.testing.assert_allclose([one.weight for one in page.neurons], unit[order], rtol=1e-5)
    reports.feature(page)
    assert f"neurons: {order[0]} {unit[order[0]]:+.2f}, {order[1]} " in capsys.readouterr().out

    spec = resolve_model(str(folder))
    model, added = load_language_model(spec), []
    for strength in (0, 1):  # what a unit of the latent adds to the stream, by the model itself
        hooks = [
            ("blocks.1.mlp.hook_post", lambda x, hook, strength=strength: x + strength * W_dec[5]),
            ("blocks.1.hook_mlp_out", lambda x, hook: added.append(x[0, 0].detach())),
        ]
        model.run_with_hooks(torch.tensor([[0, 5]]), fwd_hooks=hooks)
    end = load_unembedding(spec, known_tokens(load_tokenizer(spec), spec.vocab_size))
    tokens, values, _, _ = logit_effects((added[1] - added[0])[None], end, ignore)
    np.testing.assert_allclose([one.logit for one in page.top_logits], values[0], rtol=1e-3, atol=1e-4)
    assert [one.token_id for one in page.top_logits][:3] == tokens[0, :3].tolist()
    assert "decoder row, the MLP's output weights, " in page.logits_are and index.manifest.has_logits


def test_a_weight_of_zero_is_no_neuron() -> None:
    numbers, weights = top_neurons(torch.tensor([[0.0, -4, 0, 3], [0, 0, 0, 0]]))
    assert numbers.tolist() == [[1, 3, *[-1] * 8], [-1] * 10]
    np.testing.assert_allclose(weights[0, :2], [-0.8, 0.6])
    assert np.isnan(weights[0, 2:]).all() and np.isnan(weights[1]).all()


def test_neurons_behind_which_a_norm_stands_have_no_logits() -> None:
    assert why_no_logits(("blocks.1.mlp.hook_post",), (), "llama") is None
    assert why_no_logits(("blocks.1.mlp.hook_post",), (), "gemma2") == "gemma2 has a norm behind its MLPs"
    several = ("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")
    assert why_no_logits(several, (), "llama") == f"{several[0]} does not write into the residual stream"


def test_a_dictionary_that_does_not_write_to_the_stream_has_no_logits(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [60], hook="blocks.1.mlp.hook_in"))
    page = feature_page(open_index(run_index(IndexConfig("run"), workspace)), 5)
    assert page.top_logits == () and "blocks.1.mlp.hook_in does not write into the residual stream" in page.logits_are
