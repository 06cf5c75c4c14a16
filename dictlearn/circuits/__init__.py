"""Circuits: which transcoder features, heads and tokens made a prediction.

    from dictlearn.circuits import attribute, summary, read, write
    graph = attribute(model, {0: transcoder, 2: other}, token_ids)
    write(graph, "workspace/graphs/mine.json")

`frozen` holds a model still on one prompt, `replacement` writes its MLPs as features and errors, `tracing` computes the
edges, `heads` what heads carry, `influence` what matters, `graph` is the result as data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.circuits.attribution import attribute
    from dictlearn.circuits.graph import AttributionGraph, read, write
    from dictlearn.circuits.graph_summary import Summary, summary

__all__ = ["AttributionGraph", "Summary", "attribute", "read", "summary", "write"]

_HOMES = {
    "attribute": "dictlearn.circuits.attribution",
    "AttributionGraph": "dictlearn.circuits.graph",
    "read": "dictlearn.circuits.graph",
    "write": "dictlearn.circuits.graph",
    "Summary": "dictlearn.circuits.graph_summary",
    "summary": "dictlearn.circuits.graph_summary",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a graph is read without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dictlearn.circuits' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
