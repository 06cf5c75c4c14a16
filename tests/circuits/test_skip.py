"""Circuits through skip transcoders: the linear path is one more way for every edge, and all sums stay exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dictlearn.circuits import attribute
from dictlearn.circuits.attribution import trace_graph
from dictlearn.circuits.nulls import untrained
from dictlearn.circuits.replacement import replace_mlps
from dictlearn.dictionaries.configs import SkipConfig
from dictlearn.dictionaries.skip import Skip

from . import test_effects, test_sums
from .conftest import LATENTS, PROMPT, WIDTH, Case, make_transcoder


def make(layer: int, scaled: bool = False) -> Skip:
    """The random transcoder of the other tests, with a random linear path."""
    plain = make_transcoder(layer, seed=1)
    skip = Skip(SkipConfig(d_sae=LATENTS, k=5, scaling="mean_square" if scaled else "none"), WIDTH, WIDTH).double()
    generator = torch.Generator().manual_seed(layer)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(skip, name).copy_(getattr(plain, name))
        skip.W_skip.copy_(0.2 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        if scaled:
            skip.input_scaling.scale.fill_(1.5)
            skip.target_scaling.scale.fill_(0.7)
    skip.provenance = plain.provenance
    return skip.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def skips(case: Case) -> Case:
    """Skip transcoders for layers 0 and 2, layer 1's MLP without one."""
    return dataclasses.replace(case, transcoders={layer: make(layer) for layer in (0, 2)})


@pytest.mark.parametrize(
    "promise",
    [
        test_sums.test_the_values_are_the_models_own,
        test_sums.test_rounding_is_no_place_to_hide_a_mistake,
        test_sums.test_a_corrupted_edge_breaks_the_sum,
        test_sums.test_heads_and_what_is_at_the_position_are_the_value,
        test_sums.test_an_edge_is_its_direct_part_and_its_heads,
        test_sums.test_the_sums_hold_when_few_features_are_traced,
        test_effects.test_the_replacement_reproduces_the_model,
        test_effects.test_doubling_any_node_changes_every_target_by_its_edge,
        test_effects.test_edges_are_the_gradient_of_the_replacement,
    ],
    ids=lambda promise: promise.__name__.removeprefix("test_"),
)
def test_what_holds_for_plain_transcoders_holds(skips: Case, promise) -> None:
    promise(skips)


@pytest.mark.parametrize("dropped", [(), (0,), (0, 3)])
def test_edges_and_residue_are_the_value(skips: Case, dropped: tuple[int, ...]) -> None:
    test_sums.test_edges_and_residue_are_the_value(skips, dropped)


def test_a_forgotten_linear_path_breaks_the_sums(skips: Case) -> None:
    replacement = skips.replace()
    mlps = [dataclasses.replace(mlp, W_skip_ID=None) for mlp in replacement.mlps]
    traced = trace_graph(dataclasses.replace(replacement, mlps=mlps), 10, 0.95, 10_000)
    total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
    assert np.abs(total - test_sums.values(traced)).max() > 1e-3


def test_the_linear_path_moves_edges(skips: Case, case: Case) -> None:
    """Through layer 2's path features of layer 0 reach the logits in another way than without it."""
    with_path, without = (test_sums.whole_graph(each) for each in (skips, case))
    of_layer_0 = with_path.sources.features_of_layer(0)
    assert with_path.sources.features == without.sources.features and of_layer_0.stop > 0
    rows = [traced.adjacency.rows_GN[0, of_layer_0] for traced in (with_path, without)]
    assert np.abs(rows[0] - rows[1]).max() > 0.01 * np.abs(rows[1]).max()


def test_the_error_is_what_the_saved_dictionary_misses(skips: Case) -> None:
    transcoders = {layer: make(layer, scaled=True) for layer in (0, 2)}
    frozen, activations = skips.freeze()
    replaced = replace_mlps(frozen, activations, {layer: made.fold() for layer, made in transcoders.items()}, ())
    for layer, made in transcoders.items():
        missed = frozen.mlp_out_LPD[layer] - made(activations[f"blocks.{layer}.mlp.hook_in"])
        torch.testing.assert_close(replaced.mlps[layer].error_PD, missed, rtol=1e-9, atol=1e-9)


def test_a_graph_with_its_nulls_adds_up(skips: Case) -> None:
    graph = attribute(skips.model, {layer: made.fold() for layer, made in skips.transcoders.items()}, PROMPT)
    assert max(graph.gaps().values()) < 1e-7 and graph.nulls
    turned = untrained(skips.transcoders[0], seed=0, layer=0)
    assert not torch.allclose(turned.W_skip, skips.transcoders[0].W_skip)
    torch.testing.assert_close(turned.W_skip.norm(dim=1), skips.transcoders[0].W_skip.norm(dim=1))
