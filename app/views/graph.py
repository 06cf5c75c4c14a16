"""An attribution graph as data, drawn by assets/graph.js."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dictlearn.circuits.graph import AttributionGraph, Node
from dictlearn_app import links
from dictlearn_app.graph_shares import edge_shares
from dictlearn_app.token_text import visible
from dictlearn_app.views.component import mount
from dictlearn_app.views.numbers import percent


@dataclass(frozen=True)
class LayerIndex:
    """The feature index of one layer's transcoder: its name, and what each latent fires on most."""

    name: str
    fires_on: Mapping[int, str]


def graph_payload(
    graph: AttributionGraph, link: links.CircuitLink, indexes: Mapping[int, LayerIndex]
) -> dict[str, Any]:
    """The kept nodes and their edges; features of a layer that has an index lead to their pages."""
    kept = graph.kept
    number = {node.id: i for i, node in enumerate(kept)}
    layers = [node.layer for node in graph.nodes if node.layer is not None]
    return {
        "name": link.graph,
        "tokens": [visible(token) for token in graph.tokens],
        "n_layers": int(graph.model.get("layers") or max(layers, default=-1) + 1),
        "nodes": [node_payload(graph, node, link, indexes) for node in kept],
        "edges": {
            "source": [number[edge.source] for edge in graph.edges],
            "target": [number[edge.target] for edge in graph.edges],
            "weight": [edge.weight for edge in graph.edges],
            "share": edge_shares(graph),
        },
        "pinned": link.node,
        "unpin": links.address(links.CircuitLink(graph=link.graph)),
    }


def node_payload(
    graph: AttributionGraph, node: Node, link: links.CircuitLink, indexes: Mapping[int, LayerIndex]
) -> dict[str, Any]:
    index = indexes.get(node.layer) if node.layer is not None else None
    fires_on = index.fires_on.get(node.latent, "") if index and node.latent is not None else ""
    title, label = names(node, fires_on)
    page = links.FeatureLink(index=index.name, latent=node.latent) if index and node.latent is not None else None
    at = f"position {node.position}, {visible(graph.tokens[node.position])!r}"
    layer = f"layer {node.layer}, " if node.layer is not None else ""
    return {
        "id": node.id,
        "kind": node.kind,
        "layer": node.layer,
        "position": node.position,
        "value": node.value,
        "influence": node.influence,
        "title": title,
        "label": label,
        "about": f"fires on {fires_on!r}" if fires_on else "",
        "where": layer + at,
        "short": (f"L{node.layer} " if node.layer is not None else "") + f"@{node.position}",
        "numbers": [] if node.probability is None else [["probability", node.probability]],
        "share": "" if node.probability is None else percent(node.probability),
        "residue": [[name, value] for name, value in node.residue.items()],
        "heads": [
            [f"{term.layer}.{term.head} from {visible(graph.tokens[term.source_position])!r}", term.contribution]
            for term in node.heads
        ],
        "direct": [[name, value] for name, value in node.direct.items()],
        "here": links.address(links.CircuitLink(graph=link.graph, node=node.id)),
        "page": links.address(page) if page else None,
    }


def names(node: Node, fires_on: str) -> tuple[str, str]:
    """A node's title, and its shorter label."""
    token = visible(node.token or "")
    match node.kind:
        case "feature":
            return f"latent {node.latent}", f"{node.latent} {fires_on}".rstrip()
        case "error":
            return "MLP output without a feature", "MLP error"
        case "token":
            return f"token {token!r}", token
        case "position":
            return f"position {node.position}", f"position {node.position}"
        case _:
            return f"logit of {token!r}", token


def draw_graph(payload: dict[str, Any], key: str) -> None:
    mount("graph", payload, key)
