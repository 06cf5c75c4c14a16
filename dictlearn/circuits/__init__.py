"""Circuits: which transcoder features, heads and tokens made a prediction.

    from dictlearn.circuits import attribute, summary, read, write
    graph = attribute(model, {0: transcoder, 2: other}, token_ids)
    write(graph, "workspace/graphs/mine.json")

`frozen` holds a model still on one prompt, `replacement` writes its MLPs as features and errors, `tracing` computes the
edges, `heads` what heads carry, `influence` what matters, `graph` is the result as data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activation_store.on_first_use import on_first_use

if TYPE_CHECKING:
    from dictlearn.circuits.attribution import attribute
    from dictlearn.circuits.graph import AttributionGraph, read, write
    from dictlearn.circuits.graph_summary import Summary, summary

__all__ = ["AttributionGraph", "Summary", "attribute", "read", "summary", "write"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "attribution": "attribute",
        "graph": "AttributionGraph read write",
        "graph_summary": "Summary summary",
    },
)
