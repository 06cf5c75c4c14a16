"""Splicing replaces what it says, where it says, and leaves the model as it was. On a real Bridge over a tiny model."""

from __future__ import annotations

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import CrossLayerConfig, TopKConfig
from dictlearn.dictionaries.cross_layer import CrossLayer
from dictlearn.dictionaries.topk import TopK
from dictlearn.metrics.downstream import measure_downstream, measure_each_downstream
from dictlearn.metrics.splicing import activations_at, splice

RESID, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tiny_llama, tiny_gpt2):
    from activation_store.harvest.language_model import load_language_model, resolve_model

    return load_language_model(resolve_model(str(tiny_llama if request.param == "llama" else tiny_gpt2)))


@pytest.fixture
def tokens():
    return torch.randint(1, 60, (2, 10), generator=torch.Generator().manual_seed(0))


def random_topk(d_in, d_out=None, **provenance):
    dictionary = TopK(TopKConfig(d_sae=40, k=4), d_in, d_out)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    dictionary.provenance = provenance
    return dictionary.requires_grad_(False)


def cached(model, tokens, *hooks):
    _, cache = model.run_with_cache(tokens)
    return [cache[hook] for hook in hooks]


def test_the_identity_leaves_every_logit_as_it_was(model, tokens):
    clean = model(tokens)
    for hook in (RESID, MLP_OUT, "blocks.0.hook_attn_out"):
        with splice(model, {hook: lambda rows: rows}):
            assert torch.equal(model(tokens), clean)


def test_an_autoencoder_replaces_the_last_residual_and_only_that(model, tokens):
    last = "blocks.2.hook_resid_post"
    dictionary = random_topk(24)
    (before,) = cached(model, tokens, last)
    with splice(model, {last: dictionary}):
        logits = model(tokens)
    with splice(model, {last: lambda rows: dictionary(before.flatten(0, 1))}):
        assert torch.equal(model(tokens), logits)
    assert not torch.allclose(logits, model(tokens))


def test_a_transcoder_reads_its_own_input_hook(model, tokens):
    transcoder = random_topk(24, 24, hook_in=MLP_IN, hook_out=MLP_OUT)
    mlp_in, mlp_out = cached(model, tokens, MLP_IN, MLP_OUT)
    expected = transcoder(mlp_in.flatten(0, 1)).view_as(mlp_out)
    seen = {}

    def remember(activation, hook):
        seen["out"] = activation

    with splice(model, {MLP_OUT: transcoder}):
        model.run_with_hooks(tokens, fwd_hooks=[(MLP_OUT, remember)])
    torch.testing.assert_close(seen["out"], expected)


def test_what_another_dictionary_replaces_is_read_as_replaced_in_whatever_order_they_are_named(model, tokens):
    """Two in a row, of which the second reads the hook that the first replaces."""
    first, last = "blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out"
    second = random_topk(24, 24, hook_in=first, hook_out=last)
    both = {first: lambda rows: 2 * rows + 1, last: second}
    (replaced,) = [2 * activation + 1 for activation in cached(model, tokens, first)]
    fixed = second(replaced.flatten(0, 1))
    with splice(model, {first: both[first], last: lambda rows: fixed}):
        expected = model(tokens)
    for order in (both, dict(reversed(both.items()))):
        with splice(model, order):
            assert torch.equal(model(tokens), expected)


def test_what_needs_a_later_activation_is_refused(model, tokens):
    dictionary = random_topk(24, hook_in=RESID, hook_out=RESID)
    with (
        pytest.raises(UserError, match=f"'{MLP_OUT}' is computed from '{RESID}', which the model has only later"),
        splice(model, {MLP_OUT: dictionary}),
    ):
        model(tokens)


def test_skip_first_leaves_the_first_position_alone(model, tokens):
    mlp_out = cached(model, tokens, MLP_OUT)[0]
    seen = {}

    def remember(activation, hook):
        seen["out"] = activation.clone()

    with splice(model, {MLP_OUT: torch.zeros_like}, skip_first=True):
        model.run_with_hooks(tokens, fwd_hooks=[(MLP_OUT, remember)])
    assert torch.equal(seen["out"][:, 0], mlp_out[:, 0])
    assert not seen["out"][:, 1:].any()


def test_the_model_is_restored_bit_for_bit_also_after_an_exception(model, tokens):
    """A peer's evaluation left its transcoder installed for good."""
    clean = model(tokens)
    with splice(model, {RESID: random_topk(24)}):
        assert not torch.equal(model(tokens), clean)
    assert torch.equal(model(tokens), clean)
    with pytest.raises(RuntimeError, match="inside"), splice(model, {RESID: random_topk(24)}):
        raise RuntimeError("inside")
    assert torch.equal(model(tokens), clean)


def test_hooks_that_cannot_be_edited_are_refused_before_anything_runs(model):
    with (
        pytest.raises(UserError, match="no hook 'blocks.9.hook_mlp_out'"),
        splice(model, {"blocks.9.hook_mlp_out": len}),
    ):
        pass
    with pytest.raises(UserError, match="misses the skip connection"), splice(model, {"blocks.1.hook_resid_mid": len}):
        pass


def test_heads_are_one_vector_to_a_dictionary(model, tokens):
    z = cached(model, tokens, "blocks.1.attn.hook_z")[0]
    assert z.ndim == 4
    with splice(model, {"blocks.1.attn.hook_z": lambda rows: rows}):
        assert torch.equal(model(tokens), model(tokens))
    shapes = []

    def see(rows):
        shapes.append(rows.shape)
        return rows

    with splice(model, {"blocks.1.attn.hook_z": see}):
        model(tokens)
    assert shapes == [(20, z.shape[2] * z.shape[3])]


def test_mean_ablation_leaves_bos_alone_and_puts_the_mean_everywhere_else(model, tokens):
    dictionary = random_topk(24, hook_in=RESID, hook_out=RESID)
    mean = torch.arange(24.0)
    real = torch.ones_like(tokens, dtype=torch.bool)
    got = measure_downstream(model, dictionary, RESID, mean, [(tokens, real)], skip_first=True)

    def by_hand(activation, hook):
        changed = activation.clone()
        changed[:, 1:] = mean
        return changed

    logits = model.run_with_hooks(tokens, fwd_hooks=[(RESID, by_hand)])
    logp = logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None])
    assert got.ce_mean_ablated == pytest.approx(-float(logp.mean()), rel=1e-6)


def test_downstream_loss_by_hand(model, tokens):
    """Cross-entropies and KL recomputed from logits; a perfect splice recovers all of the loss, zero ablation none."""
    dictionary = random_topk(24, hook_in=RESID, hook_out=RESID)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 7:] = False
    mean = torch.zeros(24)
    got = measure_downstream(model, dictionary, RESID, mean, [(tokens, real)], skip_first=False)
    assert got.tokens == 9 + 6

    def cross_entropy(logits):
        keep = real[:, 1:]
        logp = logits[:, :-1][keep].double().log_softmax(-1)
        return logp, float(-logp.gather(1, tokens[:, 1:][keep][:, None]).mean())

    clean, ce_clean = cross_entropy(model(tokens))
    assert got.ce_clean == pytest.approx(ce_clean, rel=1e-9)
    with splice(model, {RESID: dictionary}):
        spliced, ce_spliced = cross_entropy(model(tokens))
    assert got.ce_spliced == pytest.approx(ce_spliced, rel=1e-9)
    assert got.kl_spliced == pytest.approx(float((clean.exp() * (clean - spliced)).sum(1).mean()), rel=1e-9)
    assert got.ce_zero_ablated == pytest.approx(got.ce_mean_ablated)  # the mean given is zero
    assert got.loss_recovered == pytest.approx((got.ce_zero_ablated - ce_spliced) / (got.ce_zero_ablated - ce_clean))


LAYERS = range(2)
MLP_INS, MLP_OUTS = (tuple(f"blocks.{layer}.{name}" for layer in LAYERS) for name in ("mlp.hook_in", "hook_mlp_out"))


def random_cross_layer():
    dictionary = CrossLayer(CrossLayerConfig(d_sae=40, k=4), [24, 24], [24, 24])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    dictionary.provenance = {"hook_in": list(MLP_INS), "hook_out": list(MLP_OUTS)}
    return dictionary.fold().requires_grad_(False)


def test_a_cross_layer_transcoder_replaces_all_its_layers_by_what_they_read_in_the_changed_model(model, tokens):
    dictionary = random_cross_layer()
    seen = {}

    def remember(name):
        return lambda activation, hook: seen.__setitem__(name, activation)

    with splice(model, {MLP_OUTS: dictionary}):
        model.run_with_hooks(tokens, fwd_hooks=[(hook, remember(hook)) for hook in (*MLP_INS, *MLP_OUTS)])
    expected = dictionary(torch.cat([seen[hook].flatten(0, 1) for hook in MLP_INS], dim=1))
    for hook, part in zip(MLP_OUTS, expected.split(dictionary.output_parts, dim=1), strict=True):
        torch.testing.assert_close(seen[hook].flatten(0, 1), part)
    clean_in = cached(model, tokens, MLP_INS[1])[0]
    assert not torch.allclose(seen[MLP_INS[1]], clean_in)  # the second layer read what the first had changed


def test_downstream_loss_of_a_cross_layer_transcoder_is_of_all_layers_at_once(model, tokens):
    dictionary, real = random_cross_layer(), torch.ones_like(tokens, dtype=torch.bool)
    mean = torch.randn(48, generator=torch.Generator().manual_seed(2))
    got = measure_downstream(model, dictionary, MLP_OUTS, mean, [(tokens, real)], skip_first=False)

    def cross_entropy(logits):
        return -float(logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None]).mean())

    for name, replacement in (
        ("spliced", {MLP_OUTS: dictionary}),
        ("zero_ablated", dict.fromkeys(MLP_OUTS, torch.zeros_like)),
        ("mean_ablated", {h: lambda x, m=m: m.expand_as(x) for h, m in zip(MLP_OUTS, mean.split(24), strict=True)}),
    ):
        with splice(model, replacement, skip_first=False):
            assert getattr(got, f"ce_{name}") == pytest.approx(cross_entropy(model(tokens)), rel=1e-6), name


def test_several_hooks_whose_outputs_need_later_inputs_are_replaced_one_at_a_time(model, tokens):
    crosscoder = random_topk([24, 24])
    crosscoder.provenance = {"hook_in": list(MLP_OUTS), "hook_out": list(MLP_OUTS)}
    with pytest.raises(UserError, match="needs activations that the model computes after"):
        splice(model, {MLP_OUTS: crosscoder}).__enter__()

    real = torch.ones_like(tokens, dtype=torch.bool)
    means = dict.fromkeys(MLP_OUTS, torch.zeros(24))
    models = dict.fromkeys(MLP_OUTS, model)
    got = measure_each_downstream(models, crosscoder, MLP_OUTS, means, [(tokens, real)], skip_first=True)
    clean = activations_at(model, tokens, MLP_OUTS)
    rebuilt = crosscoder(torch.cat([part.flatten(0, 1) for part in clean], dim=1)).split(24, dim=1)
    for hook, part in zip(MLP_OUTS, rebuilt, strict=True):
        with splice(model, {hook: lambda rows, part=part: part}, skip_first=True):
            logits = model(tokens)
        expected = -float(logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None]).mean())
        assert got[hook].ce_spliced == pytest.approx(expected, rel=1e-6)


def test_a_crosscoder_of_two_models_reads_both_and_replaces_each_in_its_own(tiny_llama, tiny_gpt2, tokens):
    from activation_store.harvest.language_model import load_language_model, resolve_model

    base, other = (load_language_model(resolve_model(str(path))) for path in (tiny_llama, tiny_gpt2))
    crosscoder = random_topk([24, 24])
    models = {RESID: base, f"other:{RESID}": other}
    real = torch.ones_like(tokens, dtype=torch.bool)
    means = dict.fromkeys(models, torch.zeros(24))
    got = measure_each_downstream(models, crosscoder, list(models), means, [(tokens, real)], skip_first=False)
    both = [activations_at(model, tokens, [RESID])[0].flatten(0, 1) for model in (base, other)]
    rebuilt = crosscoder(torch.cat(both, dim=1)).split(24, dim=1)
    for (hook, model), part in zip(models.items(), rebuilt, strict=True):
        with splice(model, {RESID: lambda rows, part=part: part}, skip_first=False):
            logits = model(tokens)
        expected = -float(logits[:, :-1].double().log_softmax(-1).gather(2, tokens[:, 1:, None]).mean())
        assert got[hook].ce_spliced == pytest.approx(expected, rel=1e-6)
