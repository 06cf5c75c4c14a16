"""Attribution graphs in the JSON that circuit-tracer's viewer and Neuronpedia read.

An object of ``metadata, qParams, nodes, links``. What that form cannot say is left out: pruned nodes, residues, heads.
Its one embedding node per position is our token and positional embedding together. Its id of an error,
``0_LAYER_POSITION``, is also the id of feature LAYER of layer 0 at that position; where both are in a graph, the error
gets an id of ours, and readers tell the two apart by ``feature_type``. Its ``influence`` is not ours but the share of
all influence that a node and everything above it hold: the viewer hides nodes beyond a threshold on it.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from activation_store.disk import replace_text
from dictlearn.circuits.graph import AttributionGraph, Node


def export(graph: AttributionGraph, path: str | Path, slug: str | None = None) -> Path:
    """Write ``graph`` for circuit-tracer's viewer; ``slug`` names it there (the file's name when not given)."""
    path = Path(path)
    replace_text(path, json.dumps(as_circuit_tracer(graph, slug or path.stem), ensure_ascii=False, allow_nan=False))
    return path


def as_circuit_tracer(graph: AttributionGraph, slug: str) -> dict[str, Any]:
    """The graph as the viewer's JSON object."""
    feature_ids = {_own_id(graph, node) for node in graph.kept if node.kind == "feature"}
    ids = {node.id: _own_id(graph, node) for node in graph.kept}
    for node in graph.kept:
        if node.kind == "error" and ids[node.id] in feature_ids:
            ids[node.id] = f"error_{node.layer}_{node.position}"
    covered = _covered(graph)
    nodes: dict[str, dict[str, Any]] = {}
    for node in graph.kept:
        described = _node(graph, node, ids[node.id], covered.get(node.id))
        known = nodes.setdefault(ids[node.id], described)
        if known is not described:  # a positional embedding beside its token's
            known["influence"] = min(known["influence"], described["influence"])
    weights: dict[tuple[str, str], float] = {}
    for edge in graph.edges:
        ends = ids[edge.source], ids[edge.target]
        weights[ends] = weights.get(ends, 0.0) + edge.weight
    settings = graph.settings
    # Python's hash() of a string differs from process to process; a scan has to name the same thing everywhere.
    scan = hashlib.sha256(json.dumps([graph.model, graph.transcoders], sort_keys=True).encode()).hexdigest()[:16]
    metadata = {
        "slug": slug,
        "scan": f"dictlearn-{scan}",
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "transcoder_list": [str(record.get("run", f"layer {record['layer']}")) for record in graph.transcoders],
        "node_threshold": settings["node_threshold"],
        "schema_version": 1,
        "info": {"generator": {"name": "dictlearn"}},
        "generation_settings": {
            "max_n_logits": settings["max_logits"],
            "desired_logit_prob": settings["logit_probability"],
            "max_feature_nodes": settings["max_features"],
        },
        "pruning_settings": {
            "node_threshold": settings["node_threshold"],
            "edge_threshold": settings["edge_threshold"],
        },
    }
    return {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": [
            {"source": source, "target": target, "weight": weight} for (source, target), weight in weights.items()
        ],
    }


def _own_id(graph: AttributionGraph, node: Node) -> str:
    """The id circuit-tracer gives this node."""
    match node.kind:
        case "feature":
            return f"{node.layer}_{node.latent}_{node.position}"
        case "error":
            return f"0_{node.layer}_{node.position}"
        case "logit":
            return f"{graph.model['layers'] + 1}_{node.token_id}_{node.position}"
        case _:
            return f"E_{graph.token_ids[node.position]}_{node.position}"


def _covered(graph: AttributionGraph) -> dict[str, float]:
    """By id: the influence of a node and of all that have more, as a share of everybody's. Logits have none."""
    sources = sorted((node for node in graph.nodes if node.kind != "logit"), key=lambda node: -node.influence)
    total = sum(node.influence for node in sources)
    so_far = accumulate(node.influence for node in sources)
    return {node.id: min(sum_here / total, 1.0) for node, sum_here in zip(sources, so_far, strict=True)}


def _node(graph: AttributionGraph, node: Node, identity: str, covered: float | None) -> dict[str, Any]:
    token = graph.tokens[node.position]
    feature: int | None
    match node.kind:
        case "feature":
            assert node.layer is not None and node.latent is not None
            layer, feature, kind, words = str(node.layer), _pair(node.layer, node.latent), "cross layer transcoder", ""
        case "error":
            layer, feature, kind, words = str(node.layer), -1, "mlp reconstruction error", f'Err: mlp "{token}"'
        case "logit":
            layer, feature, kind = str(graph.model["layers"] + 1), node.token_id, "logit"
            words = f'Output "{node.token}" (p={node.probability:.3f})'
        case _:
            layer, feature, kind, words = "E", graph.token_ids[node.position], "embedding", f'Emb: "{token}"'
    group = identity if node.kind == "error" else identity.rpartition("_")[0]
    return {
        "node_id": identity,
        "feature": feature,
        "layer": layer,
        "ctx_idx": node.position,
        "feature_type": kind,
        "jsNodeId": f"{group}-{node.position}" if layer == "E" else f"{group}-0",
        "clerp": words,
        "influence": covered,
        "activation": node.value if node.kind == "feature" else None,
        "token_prob": node.probability or 0.0,
        "is_target_logit": node.kind == "logit" and node.id == graph.logits[0].id,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _pair(layer: int, latent: int) -> int:
    """Cantor's pairing: how the viewer numbers features over all layers."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent
