"""The graph that `attribute` returns, and its file: it still adds up after pruning, and damage is found."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.circuits import attribute, read, summary, write
from dictlearn.circuits.graph import OTHER_HEADS, PRUNED, AttributionGraph

from .conftest import PROMPT, make_transcoder


def graph_of(case, **asked) -> AttributionGraph:
    words = [f"w{i}" for i in range(31)]
    return attribute(
        case.model, case.transcoders, PROMPT, prompt="w5 w7", text_of=words.__getitem__, dropped_positions=(0,), **asked
    )


@pytest.fixture(scope="module")
def graph(case) -> AttributionGraph:
    return graph_of(case)


def test_edges_and_residue_are_the_value_after_pruning(graph) -> None:
    gaps = graph.gaps()
    assert len(gaps) >= len(graph.logits) + 2
    assert max(gaps.values()) < 1e-9
    assert any(not node.kept for node in graph.nodes)
    assert any(node.residue.get(PRUNED) for node in graph.kept)


def test_heads_and_direct_terms_are_the_value_too(graph) -> None:
    for node in graph.kept:
        if node.explained:
            terms = [term.contribution for term in node.heads] + list(node.direct.values())
            assert math.fsum(terms) == pytest.approx(node.value, rel=1e-9)
            assert OTHER_HEADS in node.direct


def test_every_node_of_the_prompt_is_there(graph, case) -> None:
    kinds = [node.kind for node in graph.nodes]
    assert kinds.count("token") == len(PROMPT)
    assert kinds.count("position") == (len(PROMPT) if case.layout == "gpt2" else 0)
    assert kinds.count("error") == 3 * (len(PROMPT) - 1)  # the first position is dropped
    assert {node.layer for node in graph.nodes if node.kind == "feature"} == {0, 2}
    assert 1 < kinds.count("logit") <= 10
    assert all(node.kept for node in graph.nodes if node.kind in ("token", "position", "logit"))
    assert graph.tokens == tuple(f"w{i}" for i in PROMPT)
    probabilities = [node.probability for node in graph.logits]
    assert probabilities == sorted(probabilities, reverse=True)


def test_the_file_gives_back_the_graph(graph, tmp_path) -> None:
    path = write(graph, tmp_path / "new" / "graph.json")
    assert read(path) == graph
    assert [file.name for file in path.parent.iterdir()] == ["graph.json"]
    data = json.loads(path.read_text())
    assert data["version"] == 1
    assert any(node["kept"] is False for node in data["nodes"])


def test_a_graph_of_odd_tokens_survives_its_file(graph, tmp_path) -> None:
    tokens = ("<script>alert(1)</script>", "**b**", "\x00", "\u2028", '"', "�", "日本")
    odd = dataclasses.replace(graph, tokens=tokens, prompt="\n\t" + tokens[0])
    assert read(write(odd, tmp_path / "odd.json")) == odd


def test_a_corrupted_edge_is_found_when_the_file_is_read(graph, tmp_path) -> None:
    path = write(graph, tmp_path / "graph.json")
    data = json.loads(path.read_text())
    largest = max(range(len(data["edges"]["weight"])), key=lambda i: abs(data["edges"]["weight"][i]))
    data["edges"]["weight"][largest] *= 1.1
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="damaged .the inputs of .* do not add up to its value"):
        read(path)
    worst = max(dataclasses.replace(graph, edges=graph.edges[1:]).gaps().values())
    assert worst > 1e-6


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "", "is damaged"),
        (lambda text: "[1, 2]", "is not an attribution graph"),
        (lambda text: text.replace("dictlearn-attribution-graph", "other"), "is not an attribution graph"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "has graph version 99"),
        (lambda text: text.replace('"nodes"', '"knots"'), "is damaged"),
        (lambda text: text.replace('"kind": "logit"', '"kind": "logic"', 1), "is damaged"),
        (lambda text: text.replace('"source": [', '"source": [99999, ', 1), "is damaged"),
        (lambda text: text.replace('"influence": ', '"influence": NaN, "ignored": ', 1), "is damaged"),
        (lambda text: text.replace('"heads": [', '"heads": [[1], ', 1), "is damaged"),
    ],
)
def test_a_damaged_file_is_one_sentence(graph, tmp_path, damage, words) -> None:
    path = write(graph, tmp_path / "graph.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=words) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_file_is_one_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="There is no graph at .*dictlearn circuit"):
        read(tmp_path / "none.json")
    with pytest.raises(UserError, match="is damaged"):
        read(tmp_path)


def test_nulls_stand_beside_the_scores(graph) -> None:
    assert set(graph.nulls) == {"untrained transcoders", "permuted decoder rows"}
    for scores in (graph.scores, *graph.nulls.values()):
        assert 0 < scores.replacement < 1 and 0 < scores.completeness < 1
    assert len({scores.replacement for scores in (graph.scores, *graph.nulls.values())}) == 3


def test_the_same_seed_makes_the_same_graph(case, graph) -> None:
    assert graph_of(case) == graph
    assert graph_of(case, seed=1).nulls != graph.nulls


def test_without_nulls_and_transcoders_mlps_are_errors(case) -> None:
    graph = attribute(case.model, {}, PROMPT)
    assert graph.nulls == {}
    assert {node.kind for node in graph.nodes} <= {"error", "token", "position", "logit"}
    assert max(graph.gaps().values()) < 1e-9
    assert graph.scores.replacement < 1


def test_a_perfect_transcoder_scores_one(case) -> None:
    """Where every MLP's output is its transcoder's, no influence comes from errors."""
    transcoders = {layer: make_transcoder(layer, seed=2) for layer in range(3)}

    def hooks():
        seen = {}
        for layer, transcoder in transcoders.items():
            name = f"blocks.{layer}"

            def keep(value, hook, layer=layer):
                seen[layer] = value

            def put(value, hook, layer=layer, transcoder=transcoder):
                return transcoder(seen[layer][0])[None]

            yield f"{name}.mlp.hook_in", keep
            yield f"{name}.hook_mlp_out", put

    with case.model.hooks(fwd_hooks=list(hooks())), torch.no_grad():
        graph = attribute(case.model, transcoders, PROMPT, nulls=False)
    assert graph.scores.replacement == pytest.approx(1, abs=1e-9)
    assert graph.scores.completeness == pytest.approx(1, abs=1e-9)
    assert max(graph.gaps().values()) < 1e-9


def test_few_features_traced_still_add_up(case) -> None:
    graph = graph_of(case, max_features=6, nulls=False)
    explained = [node for node in graph.nodes if node.kind == "feature" and node.explained]
    assert len(explained) == 6
    assert max(graph.gaps().values()) < 1e-9
    whole = graph_of(case, nulls=False)
    assert graph.scores.completeness < whole.scores.completeness


def test_the_most_influential_features_are_the_ones_traced(case) -> None:
    graph = graph_of(case, max_features=6, nulls=False)
    last = [node for node in graph.nodes if node.kind == "feature" and node.layer == 2]
    traced = {node.id for node in last if node.explained}
    strongest = sorted(last, key=lambda node: -node.influence)[: len(traced)]
    assert {node.id for node in strongest} == traced


def test_bos_is_dropped_when_the_transcoders_never_saw_it(case) -> None:
    transcoders = {0: make_transcoder(0, seed=1)}
    transcoders[0].provenance["bos_left_out"] = True
    graph = attribute(case.model, transcoders, PROMPT, nulls=False)
    assert graph.settings["dropped_positions"] == [0]
    assert not [node for node in graph.nodes if node.kind in ("feature", "error") and node.position == 0]


def test_the_summary_says_what_the_graph_says(graph) -> None:
    found = summary(graph, rows=3)
    assert len(found.features) <= 3 and len(found.tokens) == 3 and len(found.heads) == 3
    assert [row.influence for row in found.features] == sorted((r.influence for r in found.features), reverse=True)
    total = found.edges_into_prediction + sum(found.residue.values())
    assert total == pytest.approx(found.predictions[0].logit, rel=1e-9)
    assert found.predictions[0].probability == graph.logits[0].probability
    assert all(0 <= head.influence <= 1 for head in found.heads)
    assert sum(head.influence for head in graph.heads) < 1
    assert any(row.direct_effect for row in found.features + found.tokens)


# --- what cannot be traced --------------------------------------------------------------------------------------------


def refused(case, transcoders, prompt=PROMPT) -> str:
    with pytest.raises(UserError) as refusal:
        attribute(case.model, transcoders, prompt)
    return str(refusal.value)


def test_an_empty_prompt_is_refused(case) -> None:
    assert "the prompt is empty" in refused(case, {}, [])


def test_an_autoencoder_is_refused(case) -> None:
    sae = make_transcoder(0, seed=1)
    sae.provenance["hook_in"] = sae.provenance["hook_out"]
    assert "is an autoencoder of blocks.0.hook_mlp_out, not a transcoder" in refused(case, {0: sae})


def test_a_transcoder_of_another_layer_is_refused(case) -> None:
    assert "was given for layer 1" in refused(case, {1: make_transcoder(0, seed=1)})
    assert "There is no layer 7" in refused(case, {7: make_transcoder(0, seed=1)})


def test_a_transcoder_of_another_width_is_refused(case) -> None:
    wide = make_transcoder(0, seed=1)
    wide.d_in = 99
    assert "goes from 99 to 24 numbers" in refused(case, {0: wide})


def test_a_dictionary_whose_codes_are_not_its_preactivations_is_refused(case) -> None:
    scaled = make_transcoder(0, seed=1, scaling="mean_square")
    scaled.input_scaling.scale.fill_(2)
    assert "are not W_enc x + b_enc" in refused(case, {0: scaled})


@pytest.mark.parametrize("scaling", ["per_token", "layer_norm"])
def test_a_dictionary_that_scales_each_row_is_refused(case, scaling) -> None:
    row_wise = make_transcoder(0, seed=1, scaling=scaling)
    assert f"divides each input by a scale of its own (scaling {scaling})" in refused(case, {0: row_wise.fold()})


def test_a_model_built_otherwise_is_refused(case) -> None:
    """Here: a model whose residual stream is multiplied by something between two layers."""
    with (
        case.model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: 1.1 * value)]),
        pytest.raises(UserError, match="is not computed the way GPT-2"),
    ):
        attribute(case.model, {}, PROMPT)
