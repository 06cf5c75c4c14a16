"""What components are given: plain JSON, complete, with text as it is."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from dictlearn.circuits.graph import AttributionGraph, read
from dictlearn_app import links
from dictlearn_app.graph_shares import edge_shares
from dictlearn_app.run_history import read_run
from dictlearn_app.token_text import visible
from dictlearn_app.views import numbers
from dictlearn_app.views.curves import curves_payload
from dictlearn_app.views.graph import LayerIndex, graph_payload
from dictlearn_app.views.sheet import parts
from tests.app.tiny_workspace import HOSTILE


@pytest.fixture(scope="module")
def graph(tiny: Path) -> AttributionGraph:
    return read(tiny / "graphs" / "import-sys.json")


def test_numbers_are_written_as_their_examples_say() -> None:
    assert doctest.testmod(numbers).failed == 0


def test_backticks_make_code_and_a_lone_one_stays_text() -> None:
    assert parts("run `dictlearn index` now") == [{"text": "run "}, {"code": "dictlearn index"}, {"text": " now"}]
    assert parts("a ` b") == [{"text": "a ` b"}]
    assert parts("") == []


def test_invisible_characters_are_written_out_and_the_rest_is_kept() -> None:
    assert visible("a\tb\n\x00\u202e<b>") == "a⇥b↵\\u{0000}\\u{202E}<b>"
    assert visible("näïve ✓ 漢字") == "näïve ✓ 漢字"


def test_every_run_has_its_line_in_the_panels_of_its_metrics(tiny: Path) -> None:
    runs = [read_run(tiny / "runs" / name) for name in ("sae", "training")]
    payload = curves_payload(runs, "step")
    titles = [panel["title"] for panel in payload["panels"]]
    assert titles[:3] == ["loss", "FVU", "L0"] and "rows" not in titles and "wall seconds" not in titles
    loss = payload["panels"][0]
    assert [series["run"] for series in loss["series"]] == [0, 1]
    assert loss["series"][1]["x"][-1] == 170
    assert [run["live"] for run in payload["runs"]] == [False, True]


def test_a_graph_payload_has_the_kept_nodes_and_all_edges(graph: AttributionGraph) -> None:
    payload = graph_payload(graph, links.CircuitLink(graph="g"), {})
    assert [node["id"] for node in payload["nodes"]] == [node.id for node in graph.kept]
    ids = [node["id"] for node in payload["nodes"]]
    edges = payload["edges"]
    assert [(ids[s], ids[t]) for s, t in zip(edges["source"], edges["target"], strict=True)] == [
        (edge.source, edge.target) for edge in graph.edges
    ]
    assert payload["tokens"][7] == HOSTILE[0]
    json.dumps(payload, allow_nan=False)


def test_features_lead_to_their_page_where_their_layer_has_an_index(graph: AttributionGraph) -> None:
    index = LayerIndex("transcoder-2", {latent: f"token {latent}" for latent in range(128)})
    payload = graph_payload(graph, links.CircuitLink(graph="g"), {2: index})
    features = [node for node in payload["nodes"] if node["kind"] == "feature"]
    latents = [node.latent for node in graph.kept if node.kind == "feature"]
    assert [node["page"] for node in features] == [f"feature?index=transcoder-2&latent={latent}" for latent in latents]
    assert all(node["page"] is None for node in payload["nodes"] if node["kind"] != "feature")


def test_the_shares_of_a_nodes_inputs_and_its_residue_are_one(graph: AttributionGraph) -> None:
    shares = edge_shares(graph)
    target = graph.logits[0]
    into = [share for share, edge in zip(shares, graph.edges, strict=True) if edge.target == target.id]
    weights = sum(abs(edge.weight) for edge in graph.into(target.id))
    left = sum(map(abs, target.residue.values()))
    assert sum(into) == pytest.approx(weights / (weights + left))
