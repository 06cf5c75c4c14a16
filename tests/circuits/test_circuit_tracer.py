"""The export has what circuit-tracer's viewer and Neuronpedia require, and no two nodes with one id."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dictlearn.circuits import attribute
from dictlearn.circuits.circuit_tracer import as_circuit_tracer, export
from dictlearn.circuits.graph import AttributionGraph

from .conftest import PROMPT

ROOT = Path(__file__).resolve().parents[2]
# What Neuronpedia's graph-schema.json (draft-07, read at commit b8efe843) requires.
METADATA = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
NODE = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "jsNodeId": str,
    "clerp": str,
}
LINK = {"source": str, "target": str, "weight": float}
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


@pytest.fixture(scope="module")
def graph(case) -> AttributionGraph:
    words = [f"w{i}" for i in range(31)]
    return attribute(case.model, case.transcoders, PROMPT, text_of=words.__getitem__, nulls=False)


def has(entry: dict, fields: dict) -> bool:
    return all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def test_the_required_fields_are_there(graph, tmp_path) -> None:
    data = json.loads(export(graph, tmp_path / "mine.json").read_text())
    assert has(data["metadata"], METADATA) and data["metadata"]["slug"] == "mine"
    assert data["qParams"]["pinnedIds"] == []
    assert all(has(node, NODE) for node in data["nodes"])
    assert {node["feature_type"] for node in data["nodes"]} == TYPES
    assert all(has(link, LINK) for link in data["links"])


def test_links_join_nodes_and_keep_their_sums(graph) -> None:
    data = as_circuit_tracer(graph, "slug")
    ids = Counter(node["node_id"] for node in data["nodes"])
    assert max(ids.values()) == 1
    assert {link[end] for link in data["links"] for end in ("source", "target")} <= ids.keys()
    best = f"{graph.model['layers'] + 1}_{graph.logits[0].token_id}_{len(PROMPT) - 1}"
    total = sum(link["weight"] for link in data["links"] if link["target"] == best)
    assert total == pytest.approx(sum(edge.weight for edge in graph.into(graph.logits[0].id)))
    embeddings = [node for node in data["nodes"] if node["feature_type"] == "embedding"]
    assert len(embeddings) == len(PROMPT)  # a token's and its position's are one node there


def test_the_viewers_threshold_keeps_what_the_graph_kept(graph) -> None:
    """Its influence is cumulative: features and errors at or below the node threshold are those pruning began from."""
    data = as_circuit_tracer(graph, "slug")
    free = [
        node for node in data["nodes"] if node["feature_type"] in ("cross layer transcoder", "mlp reconstruction error")
    ]
    ordered = sorted(free, key=lambda node: node["influence"])
    assert all(0 < node["influence"] <= 1 for node in free)
    assert ordered[-2]["influence"] <= graph.settings["node_threshold"] + 1e-9


def test_an_error_that_shares_its_id_with_a_feature_gets_another(graph) -> None:
    """The error of (layer 1, position p) and feature 1 of layer 0 at position p are both 0_1_p over there."""
    error = next(node for node in graph.kept if node.kind == "error" and node.layer == 1)
    feature = next(node for node in graph.kept if node.kind == "feature" and node.layer == 0)
    twin = dataclasses.replace(feature, position=error.position, latent=1, id=f"feature/0/{error.position}/1")
    clashing = dataclasses.replace(graph, nodes=(*graph.nodes, twin))
    data = as_circuit_tracer(clashing, "slug")
    by_id = {node["node_id"]: node for node in data["nodes"]}
    assert len(by_id) == len(data["nodes"])
    assert by_id[f"0_1_{error.position}"]["feature_type"] == "cross layer transcoder"
    assert by_id[f"error_1_{error.position}"]["feature_type"] == "mlp reconstruction error"
    plain = {node["node_id"]: node for node in as_circuit_tracer(graph, "slug")["nodes"]}
    assert plain[f"0_1_{error.position}"]["feature_type"] == "mlp reconstruction error"


def test_the_scan_is_the_same_in_every_process(graph, tmp_path) -> None:
    from dictlearn.circuits import write

    path = write(graph, tmp_path / "graph.json")
    code = (
        "from dictlearn.circuits.circuit_tracer import as_circuit_tracer\n"
        "from dictlearn.circuits import read\n"
        f"print(as_circuit_tracer(read({str(path)!r}), 's')['metadata']['scan'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == as_circuit_tracer(graph, "s")["metadata"]["scan"], done.stderr
