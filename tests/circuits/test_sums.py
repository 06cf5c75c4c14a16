"""What is attributed adds up: edges plus residue are the pre-activation or the logit, to 1e-9 in float64.

No term is computed from the others, so a mistake in any of them shows here. Not checked here: whether the terms mean
what they say (test_effects.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dictlearn.circuits.attribution import Traced, trace_graph
from dictlearn.circuits.heads import heads_of_edges, heads_of_targets
from dictlearn.circuits.tracing import (
    ATTENTION_BIASES,
    DECODER_BIASES,
    DROPPED,
    ENCODER_BIAS,
    NORM_BIASES,
    ROUNDING,
    UNEMBEDDING_BIAS,
)

EXACT = 1e-9


def whole_graph(case, dropped: tuple[int, ...] = (0,)) -> Traced:
    return trace_graph(case.replace(dropped), max_logits=10, logit_probability=0.95, max_features=10_000)


def values(traced: Traced) -> np.ndarray:
    return torch.cat([targets.values_G for targets in traced.groups]).numpy()


@pytest.mark.parametrize("dropped", [(), (0,), (0, 3)])
def test_edges_and_residue_are_the_value(case, dropped) -> None:
    traced = whole_graph(case, dropped)
    total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
    assert len(total) > 30
    np.testing.assert_allclose(total, values(traced), rtol=EXACT, atol=0)


def test_the_values_are_the_models_own(case) -> None:
    """Features: what the transcoder computes from the model's activation. Logits: the model's, minus their mean."""
    traced = whole_graph(case)
    logits, cache = case.model.run_with_cache(torch.tensor([[1, 5, 7, 2, 9, 7, 11]]))
    last = logits[0, -1].detach()
    np.testing.assert_allclose(traced.groups[0].values_G, (last - last.mean())[traced.logit_ids], rtol=EXACT)
    sources = traced.sources
    for layer, transcoder in case.transcoders.items():
        dense = transcoder.encode(cache[f"blocks.{layer}.mlp.hook_in"][0]).dense()
        mine = sources.features_of_layer(layer)
        assert mine.stop - mine.start == int((dense[1:] > 0).sum())
        expected = dense[sources.feature_position[mine], sources.feature_latent[mine]]
        np.testing.assert_allclose(sources.feature_value[mine], expected, rtol=EXACT)


def test_every_named_residue_is_there_and_counts(case) -> None:
    traced = whole_graph(case)
    expected = {ENCODER_BIAS, ATTENTION_BIASES, DECODER_BIASES, DROPPED, ROUNDING, UNEMBEDDING_BIAS, NORM_BIASES}
    assert set(traced.residue) == expected
    silent = {name for name, term in traced.residue.items() if np.abs(term).max() < 1e-3}
    by_design = {ROUNDING} | ({NORM_BIASES} if case.layout == "llama" else set())
    # No layout here has a bias on its unembedding; test_an_unembedding_bias_is_a_residue gives it one.
    assert silent == by_design | {UNEMBEDDING_BIAS}


def test_rounding_is_no_place_to_hide_a_mistake(case) -> None:
    """It is the model's output minus ours, at norms and attention: float32's precision in Llama's norms."""
    traced = whole_graph(case)
    share = np.abs(traced.residue[ROUNDING]) / np.abs(traced.adjacency.rows_GN).sum(axis=1)
    assert share.max() < (1e-6 if case.layout == "llama" else 1e-13)


def test_an_unembedding_bias_is_a_residue(case) -> None:
    bias = case.model.unembed.original_component.bias
    if bias is None:
        pytest.skip("this layout's unembedding takes no bias")
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.add_(torch.randn(len(bias), generator=torch.Generator().manual_seed(0), dtype=bias.dtype))
        traced = whole_graph(case)
        total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
        np.testing.assert_allclose(total, values(traced), rtol=EXACT)
        assert np.abs(traced.residue[UNEMBEDDING_BIAS]).max() > 0.1
    finally:
        with torch.no_grad():
            bias.copy_(before)


def test_a_corrupted_edge_breaks_the_sum(case) -> None:
    traced = whole_graph(case)
    rows = traced.adjacency.rows_GN.copy()
    target, source = np.unravel_index(np.abs(rows).argmax(), rows.shape)
    rows[target, source] *= 1 + 1e-6
    total = rows.sum(axis=1) + sum(traced.residue.values())
    wrong = ~np.isclose(total, values(traced), rtol=EXACT, atol=0)
    assert wrong.tolist() == [number == target for number in range(len(rows))]


@pytest.mark.parametrize("term", ["b_O_D", "b_V_HE", "bias_D", "b_dec_D", "b_enc_PK"])
def test_a_forgotten_bias_breaks_the_sum(case, term) -> None:
    """Zero one bias where the residue reads it: the sums must notice, so none is computed from the rest."""
    replacement = case.replace()
    parts = [*replacement.frozen.attentions, *replacement.frozen.first_norms, *replacement.mlps]
    biases = [getattr(part, term) for part in parts if hasattr(part, term)]
    if not any(bias.abs().max() > 0 for bias in biases if bias.numel()):
        pytest.skip("this layout has no such bias")
    for bias in biases:
        bias.zero_()
    traced = trace_graph(replacement, 10, 0.95, 10_000)
    total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
    assert np.abs(total - values(traced)).max() > 1e-3


def test_heads_and_what_is_at_the_position_are_the_value(case) -> None:
    traced = whole_graph(case)
    for targets in traced.groups:
        terms = heads_of_targets(traced.replacement, targets)
        total = terms.heads_GLHS.sum(dim=(1, 2, 3)) + sum(terms.direct.values())
        torch.testing.assert_close(total, targets.values_G, rtol=EXACT, atol=0)


def test_an_edge_is_its_direct_part_and_its_heads(case) -> None:
    traced = whole_graph(case)
    edges, first = [], 0
    rows_per_group = []
    for targets in traced.groups:
        rows = traced.adjacency.rows_GN[first : first + len(targets)]
        numbers, columns = np.nonzero(rows)
        edges.append((columns, numbers))
        rows_per_group.append(rows[numbers, columns])
        first += len(targets)
    parts = heads_of_edges(traced.replacement, traced.sources, traced.groups, edges)
    assert any(len(weights) for weights in rows_per_group)
    for targets, part, weights in zip(traced.groups, parts, rows_per_group, strict=True):
        np.testing.assert_allclose(part.direct_M + part.heads_MLH.sum(axis=(1, 2)), weights, rtol=1e-7, atol=1e-13)
        assert (part.heads_MLH != 0).any() == (targets.attentions > 0)


def test_the_sums_hold_when_few_features_are_traced(case) -> None:
    traced = trace_graph(case.replace(), 3, 0.95, max_features=9)
    assert (traced.columns_G >= 0).sum() == 9
    total = traced.adjacency.rows_GN.sum(axis=1) + sum(traced.residue.values())
    np.testing.assert_allclose(total, values(traced), rtol=EXACT)
