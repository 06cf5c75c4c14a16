"""What a person wants to know of an attribution graph first: a few short tables. No torch, and no drawing."""

from __future__ import annotations

from dataclasses import dataclass

from dictlearn.circuits.graph import AttributionGraph, GraphScores, HeadTerm, Node


@dataclass(frozen=True)
class NodeRow:
    """One node behind the prediction.

    Attributes:
        where: such as ``MLP 2, feature 1031`` or ``token``.
        position, token: where in the prompt it stands.
        value: a feature's activation; the length of an error or embedding.
        influence: on all logit nodes, over paths of any length, in [0, 1].
        direct_effect: its edge into the likeliest token's logit; 0 when there is none or it was pruned.
    """

    id: str
    where: str
    position: int
    token: str
    value: float
    influence: float
    direct_effect: float


@dataclass(frozen=True)
class HeadRow:
    """One attention head.

    Attributes:
        influence: share of the explained nodes' inputs it brings, weighted by their influence, in [0, 1].
        largest: of its contributions to kept nodes that the graph lists, the one that matters most: its share of the
            node's inputs, times the node's influence. None when the graph lists none.
        to: that node's id.
    """

    layer: int
    head: int
    influence: float
    largest: HeadTerm | None
    to: str | None


@dataclass(frozen=True)
class Prediction:
    """A likely next token; ``logit`` is above the mean logit."""

    token: str
    token_id: int
    probability: float
    logit: float


@dataclass(frozen=True)
class Summary:
    """The features, tokens, errors and heads behind a prediction, by falling influence.

    Attributes:
        residue: what the edges into the likeliest token's logit leave over, by name.
        edges_into_prediction: what those edges add up to; with the residue, the logit.
        gap: the largest gap between a kept node's value and its terms, relative to the value.
    """

    prompt: str
    predictions: tuple[Prediction, ...]
    features: tuple[NodeRow, ...]
    tokens: tuple[NodeRow, ...]
    errors: tuple[NodeRow, ...]
    heads: tuple[HeadRow, ...]
    residue: dict[str, float]
    edges_into_prediction: float
    scores: GraphScores
    nulls: dict[str, GraphScores]
    nodes: int
    nodes_kept: int
    edges_kept: int
    gap: float


def summary(graph: AttributionGraph, rows: int = 10) -> Summary:
    """The first ``rows`` of each kind; features and errors among the kept nodes."""
    best = graph.logits[0]
    into_best = {edge.source: edge.weight for edge in graph.into(best.id)}

    def top(*kinds: str) -> tuple[NodeRow, ...]:
        nodes = [node for node in graph.kept if node.kind in kinds]
        nodes.sort(key=lambda node: -node.influence)
        return tuple(
            NodeRow(
                id=node.id,
                where=label(node),
                position=node.position,
                token=graph.tokens[node.position],
                value=node.value,
                influence=node.influence,
                direct_effect=into_best.get(node.id, 0.0),
            )
            for node in nodes[:rows]
        )

    terms: dict[tuple[int, int], tuple[float, HeadTerm, str]] = {}
    for node in graph.kept:
        inputs = sum(abs(term.contribution) for term in node.heads) + sum(map(abs, node.direct.values()))
        for term in node.heads:
            matters = node.influence * abs(term.contribution) / max(inputs, 1e-30)
            if matters > terms.get((term.layer, term.head), (0.0,))[0]:
                terms[term.layer, term.head] = matters, term, node.id
    heads = []
    for head in graph.heads[:rows]:
        _, largest, to = terms.get((head.layer, head.head), (0.0, None, None))
        heads.append(HeadRow(head.layer, head.head, head.influence, largest, to))
    return Summary(
        prompt=graph.prompt,
        predictions=tuple(
            Prediction(node.token or "", node.token_id or 0, node.probability or 0.0, node.value)
            for node in graph.logits
        ),
        features=top("feature"),
        tokens=top("token", "position"),
        errors=top("error"),
        heads=tuple(heads),
        residue=dict(best.residue),
        edges_into_prediction=sum(into_best.values()),
        scores=graph.scores,
        nulls=graph.nulls,
        nodes=len(graph.nodes),
        nodes_kept=len(graph.kept),
        edges_kept=len(graph.edges),
        gap=max(graph.gaps().values(), default=0.0),
    )


def label(node: Node) -> str:
    """A node in words."""
    match node.kind:
        case "feature":
            return f"MLP {node.layer}, feature {node.latent}"
        case "error":
            return f"MLP {node.layer}, error"
        case "token":
            return "token embedding"
        case "position":
            return "positional embedding"
        case _:
            return f"logit of {node.token!r}"
