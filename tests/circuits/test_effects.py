"""Edges mean what they say: change a node, and every target moves by the edge.

First in the local replacement model, for every node of every kind; then in the model itself, run through
TransformerBridge with its patterns and denominators held by hooks. And the sites at which a transcoder may read and
write are ones where an edit does what autograd says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from activation_store.errors import UserError
from dictlearn.circuits.attribution import Traced, trace_graph
from dictlearn.circuits.hooks import layer_of
from dictlearn.circuits.replacement import Response, replace_mlps

from .conftest import PROMPT, make_transcoder


def whole_graph(case) -> Traced:
    return trace_graph(case.replace(), max_logits=10, logit_probability=0.95, max_features=10_000)


def read_targets(traced: Traced, response: Response) -> np.ndarray:
    """(G,) the targets' values in a response, in the order of the adjacency's rows."""
    sources = traced.sources
    result = []
    for number, column in enumerate(traced.columns_G):
        if column < 0:
            result.append(response.logits_V[traced.logit_ids[number]] - response.logits_V.mean())
        else:
            where = sources.feature_position[column], sources.feature_slot[column]
            result.append(response.preactivations_LPK[sources.feature_layer[column]][where])
    return torch.stack(result).numpy()


def changed(traced: Traced, column: int, factor: float) -> Response:
    """The replacement with one source multiplied by ``factor``."""
    sources, replacement = traced.sources, traced.replacement
    values = [mlp.values_PK.clone() for mlp in replacement.mlps]
    errors = [mlp.error_PD.clone() for mlp in replacement.mlps]
    embedding = replacement.frozen.embedding_PD.clone()
    positions = replacement.frozen.position_embedding_PD
    positions = None if positions is None else positions.clone()
    if column < sources.features:
        where = sources.feature_position[column], sources.feature_slot[column]
        values[sources.feature_layer[column]][where] *= factor
    elif column < sources.errors.stop:
        number = column - sources.errors.start
        errors[sources.error_layer[number]][sources.error_position[number]] *= factor
    else:
        number = column - sources.inputs.start
        table = embedding if number < sources.tokens else positions
        table[number % sources.tokens] *= factor
    return replacement.respond(values, errors, embedding, positions)


def test_the_replacement_reproduces_the_model(case) -> None:
    replacement = case.replace()
    response = replacement.respond()
    torch.testing.assert_close(response.logits_V, replacement.frozen.logits_V, rtol=1e-10, atol=1e-12)
    for ours, mlp in zip(response.preactivations_LPK, replacement.mlps, strict=True):
        active = mlp.values_PK != 0
        torch.testing.assert_close(ours[active], mlp.values_PK[active], rtol=1e-10, atol=1e-12)


def test_doubling_any_node_changes_every_target_by_its_edge(case) -> None:
    traced = whole_graph(case)
    before = read_targets(traced, traced.replacement.respond())
    for column in range(len(traced.sources)):
        moved = read_targets(traced, changed(traced, column, 2.0)) - before
        np.testing.assert_allclose(moved, traced.adjacency.rows_GN[:, column], rtol=1e-8, atol=1e-12)


def test_removing_any_node_changes_every_target_by_minus_its_edge(case) -> None:
    traced = whole_graph(case)
    before = read_targets(traced, traced.replacement.respond())
    for column in range(0, len(traced.sources), 3):
        moved = read_targets(traced, changed(traced, column, 0.0)) - before
        np.testing.assert_allclose(moved, -traced.adjacency.rows_GN[:, column], rtol=1e-8, atol=1e-12)


def test_a_swapped_edge_would_be_noticed(case) -> None:
    traced = whole_graph(case)
    before = read_targets(traced, traced.replacement.respond())
    moved = read_targets(traced, changed(traced, 0, 2.0)) - before
    assert not np.allclose(moved, traced.adjacency.rows_GN[:, 1], rtol=1e-3)


def test_edges_are_the_gradient_of_the_replacement(case) -> None:
    """Autograd through the forward pass, against the backward sweep's linear algebra."""
    traced = whole_graph(case)
    replacement, sources = traced.replacement, traced.sources
    values = [mlp.values_PK.clone().requires_grad_() for mlp in replacement.mlps]
    embedding = replacement.frozen.embedding_PD.clone().requires_grad_()
    response = replacement.respond(values, embedding_PD=embedding)
    for number, column in enumerate(traced.columns_G):
        if column < 0:
            target = response.logits_V[traced.logit_ids[number]] - response.logits_V.mean()
        else:
            where = sources.feature_position[column], sources.feature_slot[column]
            target = response.preactivations_LPK[sources.feature_layer[column]][where]
        grads = torch.autograd.grad(target, [*values, embedding], retain_graph=True, allow_unused=True)
        from_tokens = (grads[-1] * embedding).sum(dim=1).detach()
        first = sources.inputs.start
        np.testing.assert_allclose(
            traced.adjacency.rows_GN[number, first : first + sources.tokens], from_tokens, rtol=1e-8, atol=1e-12
        )
        for layer, (grad, value) in enumerate(zip(grads, values, strict=False)):
            mine = sources.features_of_layer(layer)
            if grad is None:
                assert (traced.adjacency.rows_GN[number, mine] == 0).all()
                continue
            effects = (grad * value).detach()[sources.feature_position[mine], sources.feature_slot[mine]]
            np.testing.assert_allclose(traced.adjacency.rows_GN[number, mine], effects, rtol=1e-8, atol=1e-12)


# --- in the model itself ----------------------------------------------------------------------------------------------


def held(case, edits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the Bridge with patterns, denominators and MLP outputs at their values in the plain run, plus ``edits``."""
    tokens = torch.tensor([PROMPT])
    _, plain = case.model.run_with_cache(tokens)
    hold = [name for name in plain if name.endswith(("hook_pattern", "hook_scale", "hook_mlp_out"))]
    hooks = [(name, lambda value, hook, name=name: plain[name] + edits.get(name, 0)) for name in hold]
    hooks += [
        (name, lambda value, hook, name=name: value + edits[name])
        for name in edits
        if not name.endswith("hook_mlp_out")
    ]
    seen = {}
    reads = [f"blocks.{layer}.mlp.hook_in" for layer in case.transcoders]
    hooks += [(name, lambda value, hook, name=name: seen.update({name: value.detach()[0]})) for name in reads]
    with torch.no_grad(), case.model.hooks(fwd_hooks=hooks):
        logits = case.model(tokens)[0, -1]
    return seen | {"logits": logits - logits.mean()}


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
def test_adding_a_node_to_the_held_model_moves_it_by_the_edges(case) -> None:
    """One feature, error, token and position of each layer and a few positions, added a second time in the Bridge."""
    traced = whole_graph(case)
    sources, replacement = traced.sources, traced.replacement
    before = held(case, {})
    rng = np.random.default_rng(0)
    picks = [rng.choice(np.arange(len(sources))[sources.features_of_layer(layer)], 3) for layer in (0, 2)]
    picks += [rng.choice(np.arange(sources.errors.start, sources.errors.stop), 4)]
    picks += [rng.choice(np.arange(sources.inputs.start, sources.inputs.stop), 4)]
    for column in np.concatenate(picks):
        edit = torch.zeros(1, len(PROMPT), replacement.frozen.embedding_PD.shape[1], dtype=torch.float64)
        if column < sources.features:
            layer, position = sources.feature_layer[column], sources.feature_position[column]
            site = f"blocks.{layer}.hook_mlp_out"
            edit[0, position] = replacement.mlps[layer].writes_PKD[position, sources.feature_slot[column]]
        elif column < sources.errors.stop:
            number = column - sources.errors.start
            layer, position = sources.error_layer[number], sources.error_position[number]
            site = f"blocks.{layer}.hook_mlp_out"
            edit[0, position] = replacement.mlps[layer].error_PD[position]
        else:
            number = column - sources.inputs.start
            position = number % sources.tokens
            site = "hook_embed" if number < sources.tokens else "hook_pos_embed"
            frozen = replacement.frozen
            table = frozen.embedding_PD if number < sources.tokens else frozen.position_embedding_PD
            edit[0, position] = table[position]
        after = held(case, {site: edit})
        for number, target in enumerate(traced.columns_G):
            if target < 0:
                moved = (after["logits"] - before["logits"])[traced.logit_ids[number]]
            else:
                layer, position = sources.feature_layer[target], sources.feature_position[target]
                name = f"blocks.{layer}.mlp.hook_in"
                read = case.transcoders[layer].W_enc[sources.feature_latent[target]]
                moved = (after[name] - before[name])[position] @ read
            # 1e-6: Llama's norms round to float32, and edited ones are computed in float64 instead.
            assert float(moved) == pytest.approx(traced.adjacency.rows_GN[number, column], rel=1e-6, abs=1e-7)


WRITE_SITES = ["blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out", "hook_embed"]


@pytest.mark.parametrize("site", WRITE_SITES)
def test_at_every_site_we_accept_an_edit_does_what_autograd_says(case, site) -> None:
    """In the unheld model: finite difference of the intervention against the gradient at the site."""
    tokens, token = torch.tensor([PROMPT]), 7
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(1, len(PROMPT), 24, generator=generator, dtype=torch.float64)
    leaf = {}

    def add_leaf(value, hook):
        leaf["edit"] = torch.zeros_like(value, requires_grad=True)
        return value + leaf["edit"]

    with case.model.hooks(fwd_hooks=[(site, add_leaf)]):
        case.model(tokens)[0, -1, token].backward()
    slope = float((leaf["edit"].grad * direction).sum())
    # A step wide enough that Llama's norms, which round to float32, do not show.
    step, ends = 1e-2, []
    with torch.no_grad():
        for side in (-2, -1, 1, 2):
            with case.model.hooks(fwd_hooks=[(site, lambda value, hook, side=side: value + side * step * direction)]):
                ends.append(float(case.model(tokens)[0, -1, token]))
    difference = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step)
    assert abs(slope) > 1e-3
    assert difference == pytest.approx(slope, rel=1e-3)


def test_an_edit_at_resid_mid_misses_the_skip_connection(case) -> None:
    """Why no node is written there, and no transcoder that claims to read or write there is accepted."""
    if case.layout == "gpt_neox":
        pytest.skip("attention and MLP are parallel: there is no resid_mid")
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = case.model(tokens)
        with case.model.hooks(fwd_hooks=[("blocks.2.hook_resid_mid", lambda value, hook: 2 * value)]):
            doubled = case.model(tokens)
    assert float((plain - doubled).abs().max()) < 0.2  # a norm undoes doubling; the skip connection would not
    for hooks in (("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "hook_resid_mid")):
        with pytest.raises(UserError, match="does not stand for one MLP"):
            layer_of(*(f"blocks.2.{hook}" for hook in hooks))


def test_a_dictionary_of_several_hooks_is_not_taken_for_a_transcoder_of_one_mlp() -> None:
    both = [f"blocks.{layer}.mlp.hook_in" for layer in (0, 1)]
    with pytest.raises(UserError, match="'clt' is of several hooks, and a graph takes one transcoder for each layer"):
        layer_of(both, [hook.replace("mlp.hook_in", "hook_mlp_out") for hook in both], "clt")


def test_a_transcoder_may_read_in_front_of_the_norms_gain(case) -> None:
    transcoders = {2: make_transcoder(2, seed=5, hook_in="ln2.hook_normalized")}
    frozen, activations = case.freeze()
    traced = trace_graph(replace_mlps(frozen, activations, transcoders, (0,)), 10, 0.95, 1000)
    assert len(traced.groups) == 2
    total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
    values = torch.cat([targets.values_G for targets in traced.groups]).numpy()
    np.testing.assert_allclose(total, values, rtol=1e-9)
    before = read_targets(traced, traced.replacement.respond())
    np.testing.assert_allclose(before, values, rtol=1e-9)
    for column in range(0, len(traced.sources), 5):
        moved = read_targets(traced, changed(traced, column, 2.0)) - before
        np.testing.assert_allclose(moved, traced.adjacency.rows_GN[:, column], rtol=1e-8, atol=1e-12)
