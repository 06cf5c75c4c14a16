"""Circuits through transcoders whose number of active features is not bounded: saved ones are traced as TopK's are."""

from __future__ import annotations

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.circuits import attribute
from dictlearn.circuits.replacement import replace_mlps
from dictlearn.dictionaries import config_class, dictionary_class
from dictlearn.dictionaries.base import Dictionary

from .conftest import LATENTS, PROMPT, WIDTH, Case

KINDS = ["relu", "jumprelu", "gated"]


def make(kind: str, layer: int) -> Dictionary:
    """A random transcoder with a scaling, and with everything its kind adds away from where it begins."""
    generator = torch.Generator().manual_seed(layer)
    transcoder = dictionary_class(kind)(config_class(kind)(d_sae=LATENTS), WIDTH, WIDTH).double()
    with torch.no_grad():
        for name, weight in transcoder.named_parameters():
            scale = {"W_enc": 0.3, "W_dec": 0.2}.get(name, 0.1)
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        transcoder.input_scaling.scale.fill_(1.5)
        transcoder.target_scaling.scale.fill_(0.7)
    transcoder.provenance = {"hook_in": f"blocks.{layer}.mlp.hook_in", "hook_out": f"blocks.{layer}.hook_mlp_out"}
    return transcoder.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_and_the_error_of_a_replaced_mlp_are_the_dictionary_s(case: Case, kind: str) -> None:
    transcoders = {layer: make(kind, layer) for layer in (0, 2)}
    frozen, activations = case.freeze()
    replaced = replace_mlps(frozen, activations, {layer: t.fold() for layer, t in transcoders.items()}, ())
    for layer, transcoder in transcoders.items():
        mlp, rows = replaced.mlps[layer], activations[f"blocks.{layer}.mlp.hook_in"]
        expected = transcoder.encode(rows).dense() * transcoder.target_scaling.unit()
        values = torch.zeros_like(expected).scatter_add(1, mlp.indices_PK, mlp.values_PK)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
        assert len(set((values != 0).sum(dim=1).tolist())) > 1
        torch.testing.assert_close(mlp.error_PD, frozen.mlp_out_LPD[layer] - transcoder(rows), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_dictionary_is_traced_and_one_in_training_is_refused(case: Case, kind: str) -> None:
    transcoders = {layer: make(kind, layer) for layer in (0, 2)}
    graph = attribute(case.model, {layer: t.fold() for layer, t in transcoders.items()}, PROMPT)
    assert any(node.kind == "feature" and node.influence > 0 for node in graph.nodes)
    with pytest.raises(UserError, match="are not W_enc x"):
        attribute(case.model, transcoders, PROMPT)
