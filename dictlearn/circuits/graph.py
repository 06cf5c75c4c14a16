"""An attribution graph as data, and its file. No torch: the app and the terminal read graphs without a model.

The file is one JSON object, ``{"format", "version", ...}``, with the fields of `AttributionGraph` by name. Nodes are
objects; edges are columns (``source``, ``target``: ids by number in the list of nodes). Pruned nodes stay in the file,
marked ``"kept": false``; a pruned edge is part of its target's residue.

Every explained node's value is the sum of its edges and its residue; `gaps` says by how much it is not, and reading
refuses a file in which that is more than rounding.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from activation_store.disk import replace_text
from activation_store.errors import UserError

FORMAT = "dictlearn-attribution-graph"
VERSION = 1
KINDS = ("feature", "error", "token", "position", "logit")
PRUNED = "left out by pruning"
OTHER_HEADS = "other heads"
TOLERANCE = 1e-3
"""Of the sum of magnitudes. float32 sums agree to about 1e-6; an edited file does not."""


@dataclass(frozen=True)
class HeadTerm:
    """What one head brings to a node from one source position."""

    layer: int
    head: int
    source_position: int
    contribution: float


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: ``feature/LAYER/POSITION/LATENT``, ``error/LAYER/POSITION``, ``token/POSITION``, ``position/POSITION`` or
            ``logit/TOKEN_ID``.
        kind: one of `KINDS`. An error is one MLP's output at one position that no feature accounts for: the whole
            output where the layer has no transcoder.
        layer: of features and errors.
        position: in the prompt; for a logit, the last one.
        latent: of features.
        token_id: of token and logit nodes.
        value: a feature's activation; a logit minus the mean logit; the length of an error's or embedding's vector.
        influence: share of the logits' probability that reaches the node along normalised edges.
        kept: whether it survived pruning.
        explained: whether its inputs were traced: true for logits, and for the features that mattered most.
        probability: of logit nodes, the model's next-token probability.
        residue: explained kept nodes: what its edges leave over, by name.
        heads: explained kept nodes: the largest head terms.
        direct: explained kept nodes: everything else that, with `heads`, adds up to the value.
    """

    id: str
    kind: str
    position: int
    value: float
    influence: float
    kept: bool
    explained: bool = False
    layer: int | None = None
    latent: int | None = None
    token_id: int | None = None
    token: str | None = None
    probability: float | None = None
    residue: dict[str, float] = field(default_factory=dict)
    heads: tuple[HeadTerm, ...] = ()
    direct: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EdgeHead:
    """The part of an edge whose last head is this one."""

    layer: int
    head: int
    weight: float


@dataclass(frozen=True)
class Edge:
    """A direct linear effect: what the source, at its value in the model's run, adds to the target's value.

    Attributes:
        source, target: ids.
        weight: signed, in the target's units.
        direct: the part that goes through no head.
        heads: the heads that carry most of it; what they and `direct` leave over goes through other heads.
    """

    source: str
    target: str
    weight: float
    direct: float = 0.0
    heads: tuple[EdgeHead, ...] = ()


@dataclass(frozen=True)
class HeadInfluence:
    """How much of the explained nodes' inputs one head brings, weighted by the nodes' influence; in [0, 1]."""

    layer: int
    head: int
    influence: float


@dataclass(frozen=True)
class GraphScores:
    """The scores of one whole graph; see `dictlearn.circuits.influence.Scores`."""

    replacement: float
    completeness: float
    error_influence: float
    input_influence: float


@dataclass(frozen=True)
class AttributionGraph:
    """Which features, heads and tokens made one next-token prediction.

    Attributes:
        prompt: the text, when there was one.
        tokens, token_ids: the prompt's tokens, BOS included.
        model: name, fingerprint, layers, heads, vocabulary size.
        transcoders: per replaced layer: layer, run, dictionary_fingerprint, hook_in, hook_out, kind, d_sae, store.
        settings: what `attribute` was asked for.
        nodes: features, errors, embeddings, then logits by falling probability; pruned ones too.
        edges: between kept nodes.
        heads: every head, by falling influence.
        scores: of the graph before pruning.
        nulls: the same scores for dictionaries that know nothing, by name.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    model: dict[str, Any]
    transcoders: tuple[dict[str, Any], ...]
    settings: dict[str, Any]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    heads: tuple[HeadInfluence, ...]
    scores: GraphScores
    nulls: dict[str, GraphScores]

    @property
    def logits(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.kind == "logit")

    @property
    def kept(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.kept)

    def node(self, identity: str) -> Node:
        """Raises KeyError."""
        return self._by_id[identity]

    def into(self, identity: str) -> tuple[Edge, ...]:
        """The edges into a node, largest magnitude first."""
        return tuple(self._edges_by_end.get(("target", identity), ()))

    def out_of(self, identity: str) -> tuple[Edge, ...]:
        """The edges out of a node, largest magnitude first."""
        return tuple(self._edges_by_end.get(("source", identity), ()))

    def gaps(self) -> dict[str, float]:
        """Per explained kept node: how far edges plus residue are from its value, relative to the value."""
        return {identity: gap / max(abs(value), 1e-30) for identity, gap, value, _ in self.sums()}

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _edges_by_end(self) -> dict[tuple[str, str], list[Edge]]:
        ends: dict[tuple[str, str], list[Edge]] = {}
        for edge in sorted(self.edges, key=lambda edge: -abs(edge.weight)):
            ends.setdefault(("source", edge.source), []).append(edge)
            ends.setdefault(("target", edge.target), []).append(edge)
        return ends

    def sums(self) -> list[tuple[str, float, float, float]]:
        """(id, |value - terms|, value, sum of the terms' magnitudes) of every explained kept node."""
        terms = {node.id: list(node.residue.values()) for node in self.nodes if node.explained and node.kept}
        for edge in self.edges:
            terms[edge.target].append(edge.weight)
        by_id = self._by_id
        return [
            (identity, abs(by_id[identity].value - math.fsum(parts)), by_id[identity].value, sum(map(abs, parts)))
            for identity, parts in terms.items()
        ]


def write(graph: AttributionGraph, path: str | Path) -> Path:
    """Write as JSON; a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number = {node.id: i for i, node in enumerate(graph.nodes)}
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    data |= {f.name: getattr(graph, f.name) for f in dataclasses.fields(graph) if f.name not in ("nodes", "edges")}
    data["heads"] = [dataclasses.astuple(head) for head in graph.heads]
    data["scores"] = dataclasses.asdict(graph.scores)
    data["nulls"] = {name: dataclasses.asdict(scores) for name, scores in graph.nulls.items()}
    data["nodes"] = [_node_to_json(node) for node in graph.nodes]
    data["edges"] = {
        "source": [number[edge.source] for edge in graph.edges],
        "target": [number[edge.target] for edge in graph.edges],
        "weight": [edge.weight for edge in graph.edges],
        "direct": [edge.direct for edge in graph.edges],
        "heads": [[dataclasses.astuple(head) for head in edge.heads] for edge in graph.edges],
    }
    replace_text(path, json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read(path: str | Path) -> AttributionGraph:
    """Read and check a graph.

    Raises:
        UserError: no such file, not a graph of ours, another version, or damaged: not JSON, fields missing, edges to
            nodes that are not there, sums that do not hold.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no graph at {str(path)!r}; make one with `dictlearn circuit`.") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is not an attribution graph of dictlearn; make one with `dictlearn circuit`.")
    if data.get("version") != VERSION:
        raise UserError(
            f"{str(path)!r} has graph version {data.get('version')}; this dictlearn reads version {VERSION}. "
            "Use the dictlearn that wrote it, or make the graph again."
        )
    try:
        graph = _from_json(data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    for identity, gap, _, magnitudes in graph.sums():
        if not gap <= TOLERANCE * max(magnitudes, 1e-6):
            raise _damaged(path, f"the inputs of {identity} do not add up to its value")
    return graph


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"The graph {str(path)!r} is damaged ({reason}); make it again with `dictlearn circuit`.")


def _node_to_json(node: Node) -> dict[str, Any]:
    """Fields at their defaults are left out: most nodes are pruned features with a handful of numbers."""
    data = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.name != "heads"}
    data = {name: value for name, value in data.items() if value is not None and value is not False and value != {}}
    data["kept"] = node.kept
    if node.heads:
        data["heads"] = [dataclasses.astuple(term) for term in node.heads]
    return data


def _from_json(data: dict[str, Any]) -> AttributionGraph:
    nodes = []
    for fields in data["nodes"]:
        fields = dict(fields)
        fields["heads"] = tuple(HeadTerm(*term) for term in fields.get("heads", ()))
        node = Node(**fields)
        if node.kind not in KINDS or not 0 <= node.position < len(data["tokens"]):
            raise ValueError(f"node {node.id!r} is of no known kind or outside the prompt")
        if not (math.isfinite(node.value) and math.isfinite(node.influence)):
            raise ValueError(f"node {node.id!r} has a number that is not finite")
        nodes.append(node)
    if len({node.id for node in nodes}) != len(nodes):
        raise ValueError("two nodes have one id")
    columns = data["edges"]
    edges = []
    for source, target, weight, direct, heads in zip(
        *(columns[name] for name in ("source", "target", "weight", "direct", "heads")), strict=True
    ):
        if min(source, target) < 0 or not nodes[source].kept or not (nodes[target].kept and nodes[target].explained):
            raise ValueError("an edge joins nodes that are not in the graph")
        parts = tuple(EdgeHead(*part) for part in heads)
        edges.append(Edge(nodes[source].id, nodes[target].id, float(weight), float(direct), parts))
    return AttributionGraph(
        prompt=str(data["prompt"]),
        tokens=tuple(map(str, data["tokens"])),
        token_ids=tuple(map(int, data["token_ids"])),
        model=dict(data["model"]),
        transcoders=tuple(map(dict, data["transcoders"])),
        settings=dict(data["settings"]),
        nodes=tuple(nodes),
        edges=tuple(edges),
        heads=tuple(HeadInfluence(*head) for head in data["heads"]),
        scores=GraphScores(**data["scores"]),
        nulls={str(name): GraphScores(**scores) for name, scores in data["nulls"].items()},
    )
