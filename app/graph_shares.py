"""How much of a node's inputs each edge is: what edges are filtered by and drawn with."""

from __future__ import annotations

from collections import defaultdict

from dictlearn.circuits.graph import AttributionGraph


def edge_shares(graph: AttributionGraph) -> list[float]:
    """|weight| of each edge as a share of the magnitudes of all inputs and residues of its target."""
    total: dict[str, float] = defaultdict(float)
    for node in graph.nodes:
        total[node.id] = sum(abs(value) for value in node.residue.values())
    for edge in graph.edges:
        total[edge.target] += abs(edge.weight)
    return [abs(edge.weight) / total[edge.target] if total[edge.target] else 0.0 for edge in graph.edges]
