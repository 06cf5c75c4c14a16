"""What components are given: plain JSON, complete, with text as it is."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from dictlearn.circuits.graph import AttributionGraph, read
from dictlearn_app import links
from dictlearn_app.graph_shares import edge_shares
from dictlearn_app.run_history import RunHistory, read_run
from dictlearn_app.token_text import visible
from dictlearn_app.views import numbers
from dictlearn_app.views.curves import FEW, POINTS_IN_ALL, curves_payload, in_order
from dictlearn_app.views.graph import LayerIndex, graph_payload
from dictlearn_app.views.sheet import parts
from tests.app.tiny_workspace import HOSTILE


@pytest.fixture(scope="module")
def graph(tiny: Path) -> AttributionGraph:
    return read(tiny / "graphs" / "import-sys.json")


def test_numbers_are_written_as_their_examples_say() -> None:
    result = doctest.testmod(numbers)
    assert result.attempted and not result.failed


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
    assert [run["state"] for run in payload["runs"]] == ["", "interrupted"]
    assert [run["last"] for run in payload["runs"]] == [None, None]


def logged(name: str, fvu: float, points: int = 5, **more: list[float | None]) -> RunHistory:
    steps = [float(step) for step in range(points)]
    values: list[float | None] = [fvu * 1.0000001 + step for step in steps[::-1]]
    return RunHistory(name, curves={"step": list(steps), "fvu": values, **more}, last={"step": steps[-1], "fvu": fvu})


def test_many_runs_are_ordered_by_how_they_ended() -> None:
    """Colours follow the order, so the numbers of runs in the panels must too."""
    runs = [logged(f"widths-k{k}", fvu) for k, fvu in enumerate((0.3, 0.1, 0.9, 0.5, 0.2, 0.8, 0.7, 0.6, 0.4))]
    payload = curves_payload(in_order(runs), "step")
    assert [run["last"] for run in payload["runs"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [run["short"] for run in payload["runs"]][:3] == ["k1", "k4", "k0"]
    assert payload["ranked_by"] == "FVU"
    assert [series["y"][-1] for series in payload["panels"][0]["series"]] == [run["last"] for run in payload["runs"]]
    few = curves_payload(in_order(runs[:FEW]), "step")
    assert [run["name"] for run in few["runs"]] == [run.name for run in runs[:FEW]] and few["ranked_by"] is None


def test_a_run_without_a_number_yet_is_the_last_of_many() -> None:
    runs = [RunHistory("b", curves={"step": [1.0]}), *(logged(f"a{i}", 1 + i) for i in range(FEW))]
    payload = curves_payload(in_order(runs), "step")
    assert [run["short"] for run in payload["runs"]] == [*(f"a{i}" for i in range(FEW)), "b"]
    assert payload["runs"][-1]["last"] is None


def test_the_points_of_a_panel_are_bounded_however_many_runs_there_are() -> None:
    panel = curves_payload([logged(f"run{i}", 0.1, points=600) for i in range(30)], "step")["panels"][0]
    lengths = [len(series["x"]) for series in panel["series"]]
    assert POINTS_IN_ALL / 2 < sum(lengths) <= POINTS_IN_ALL
    assert {series["x"][-1] for series in panel["series"]} == {599.0}


def test_a_line_without_its_place_is_left_out_and_a_metric_without_a_number_has_no_panel() -> None:
    run = logged("a", 0.1, wall_tokens_per_second=[1.0, None, 3.0, 4.0, 5.0], rows=[4.0, 8.0, None, 16.0, 20.0])
    run.curves["auxk"] = [None] * 5
    panels = {panel["title"]: panel["series"] for panel in curves_payload([run], "rows")["panels"]}
    assert panels.keys() == {"FVU", "tokens per second"}
    assert panels["tokens per second"][0] == {"run": 0, "x": [4.0, 8.0, 16.0, 20.0], "y": [1.0, None, 4.0, 5.0]}


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
