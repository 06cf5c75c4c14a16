"""`attribute`: from a language model, its transcoders and a prompt to an attribution graph.

Freeze the model on the prompt, write its MLPs as features and errors, trace the likely next tokens back, then the
features behind them from the last layer to the first, measure, prune, and put names to everything.

Axes: G targets, N sources, M edges, L layers, H heads, S source positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from dictlearn.circuits import influence
from dictlearn.circuits.frozen import FrozenModel, freeze
from dictlearn.circuits.graph import (
    OTHER_HEADS,
    PRUNED,
    AttributionGraph,
    Edge,
    EdgeHead,
    GraphScores,
    HeadInfluence,
    HeadTerm,
    Node,
)
from dictlearn.circuits.heads import head_shares, heads_of_edges, heads_of_targets
from dictlearn.circuits.nulls import NULLS
from dictlearn.circuits.replacement import LocalReplacement, replace_mlps
from dictlearn.circuits.tracing import Sources, Targets, feature_targets, logit_targets, sources_of, trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from dictlearn.dictionaries.base import Dictionary

HEAD_TERMS_PER_NODE = 12
HEADS_PER_EDGE = 3
HEAD_SHARE_SHOWN = 0.05
"""Of the magnitudes that make up an edge; smaller ones count as other heads."""


@dataclass(frozen=True)
class Traced:
    """The whole graph of one prompt, unpruned: every source, the targets whose inputs were traced, and the adjacency.

    Attributes:
        groups: targets: the logits, then features by layer from the last to the first.
        columns_G: the source that each target is, -1 for logits; groups one after the other.
        residue: by name, (G,) each.
        logit_ids, probabilities: the logit targets' tokens and their probabilities in the model's run.
    """

    replacement: LocalReplacement
    sources: Sources
    groups: list[Targets]
    adjacency: influence.Adjacency
    residue: dict[str, np.ndarray]
    logit_ids: Tensor
    probabilities: Tensor

    @property
    def columns_G(self) -> np.ndarray:
        return self.adjacency.column_of_target_G

    def scores(self) -> GraphScores:
        sources = self.sources
        return GraphScores(
            **asdict(influence.measure(self.adjacency, sources.features, sources.errors, sources.inputs))
        )


@torch.no_grad()
def attribute(
    model: TransformerBridge,
    transcoders: Mapping[int, Dictionary],
    prompt_ids: Sequence[int],
    *,
    prompt: str = "",
    text_of: Callable[[int], str] = str,
    model_record: Mapping[str, Any] | None = None,
    max_logits: int = 10,
    logit_probability: float = 0.95,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_features: int = 2048,
    dropped_positions: tuple[int, ...] | None = None,
    nulls: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> AttributionGraph:
    """Which transcoder features, heads and tokens made the prediction after ``prompt_ids``.

    Args:
        model: a TransformerBridge without weight processing.
        transcoders: layer -> dictionary that takes the MLP's input and gives its output. MLPs of other layers are
            error nodes.
        prompt_ids: token ids, BOS included.
        prompt: the text, kept in the graph.
        text_of: a token id as text.
        model_record: name and fingerprint, kept in the graph.
        max_logits, logit_probability: explain the most likely tokens until their probabilities sum to
            ``logit_probability``, at most ``max_logits`` of them.
        node_threshold, edge_threshold: share of influence that kept nodes and edges cover.
        max_features: trace the inputs of at most this many features, the most influential first. Scores depend on it,
            so compare graphs made with the same. On one core and 4 layers of 256, 64 tokens with 32 features each take
            2 s for 2048 features and 5 s for all 8192 (three times that with nulls); 128 tokens, three times as long.
        dropped_positions: positions whose MLPs get no nodes. None means the first when a transcoder's provenance says
            that BOS was left out of its training.
        nulls: measure the scores of untrained and of permuted transcoders too (about three times the time).
        seed: of those.
        dtype: what to compute in; the model's type when not given.
        progress: told of the layers traced.

    Raises:
        UserError: an empty prompt, a model that cannot be traced, transcoders that do not fit it.
    """
    if len(prompt_ids) == 0:
        raise UserError("There is nothing to trace: the prompt is empty.")
    if dropped_positions is None:
        left_out = any(transcoder.provenance.get("bos_left_out", False) for transcoder in transcoders.values())
        dropped_positions = (0,) if left_out else ()
    progress = progress or NoProgress()
    frozen, activations = freeze(model, list(prompt_ids), dtype)
    limits = max_logits, logit_probability, max_features
    asked_nulls = NULLS if nulls and transcoders else {}
    null_scores: dict[str, GraphScores] = {}
    sweeps = (len(asked_nulls) + 1) * (frozen.layers + 1)
    with progress.task("Tracing the prompt", total=sweeps, unit="layers") as task:
        # Nulls first, so that no two adjacencies are in memory at once.
        for name, null in asked_nulls.items():
            ignorant = {layer: null(transcoder, seed, layer) for layer, transcoder in transcoders.items()}
            replacement = replace_mlps(frozen, activations, ignorant, dropped_positions)
            null_scores[name] = trace_graph(replacement, *limits, task.advance).scores()
        replacement = replace_mlps(frozen, activations, transcoders, dropped_positions)
        traced = trace_graph(replacement, *limits, task.advance)
    pruning = influence.prune(traced.adjacency, traced.sources.inputs, node_threshold, edge_threshold)
    settings = dict(
        max_logits=max_logits,
        logit_probability=logit_probability,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        max_features=max_features,
        dropped_positions=list(dropped_positions),
        seed=seed,
        dtype=str(frozen.logits_V.dtype).removeprefix("torch."),
    )
    record = {"name": model.cfg.model_name, "fingerprint": None, **(model_record or {})}
    record |= {"layers": frozen.layers, "heads": frozen.heads, "d_vocab": len(frozen.logits_V)}
    return AttributionGraph(
        prompt=prompt,
        tokens=tuple(text_of(int(token)) for token in prompt_ids),
        token_ids=tuple(map(int, prompt_ids)),
        model=record,
        transcoders=tuple(_record(layer, transcoders[layer]) for layer in sorted(transcoders)),
        settings=settings,
        nodes=_nodes(traced, pruning, text_of),
        edges=_edges(traced, pruning),
        heads=_head_influences(traced),
        scores=traced.scores(),
        nulls=null_scores,
    )


def trace_graph(
    replacement: LocalReplacement,
    max_logits: int,
    logit_probability: float,
    max_features: int,
    advance: Callable[[], None] = lambda: None,
) -> Traced:
    """Trace the logits, then layer by layer from the last to the first the features that reach them most.

    A feature reads earlier layers only. So when a layer's turn comes, its features' influence is final, and choosing
    the most influential is exact. A layer may use its even share of the features that are still allowed.
    """
    sources = sources_of(replacement)
    logit_ids, probabilities = choose_logits(replacement.frozen, max_logits, logit_probability)
    groups = [logit_targets(replacement, logit_ids)]
    traces = [trace(replacement, sources, groups[0])]
    columns = [np.full(len(logit_ids), -1)]
    weights = (probabilities / probabilities.sum()).numpy()
    advance()

    reached_N = weights @ influence.normalised(traces[0].rows_GN)
    remaining = max_features
    for layer in reversed(range(replacement.frozen.layers)):
        layer_columns = np.arange(len(sources))[sources.features_of_layer(layer)]
        order = np.argsort(-reached_N[layer_columns], kind="stable")[: remaining // (layer + 1)]
        chosen = np.sort(layer_columns[order[reached_N[layer_columns[order]] > 0]])
        if len(chosen):
            targets = feature_targets(replacement, sources, layer, chosen)
            groups.append(targets)
            traces.append(trace(replacement, sources, targets))
            columns.append(chosen)
            reached_N = reached_N + reached_N[chosen] @ influence.normalised(traces[-1].rows_GN)
            remaining -= len(chosen)
        advance()
    all_columns = np.concatenate(columns)
    all_weights = np.zeros(len(all_columns), dtype=weights.dtype)
    all_weights[: len(weights)] = weights
    residue = {}
    for name in dict.fromkeys(name for part in traces for name in part.residue):
        parts = [part.residue.get(name, np.zeros(len(part.rows_GN))) for part in traces]
        residue[name] = np.concatenate(parts)
    rows_GN = np.concatenate([part.rows_GN for part in traces])
    adjacency = influence.Adjacency(rows_GN, all_columns, all_weights)
    return Traced(replacement, sources, groups, adjacency, residue, logit_ids, probabilities)


def choose_logits(frozen: FrozenModel, max_logits: int, logit_probability: float) -> tuple[Tensor, Tensor]:
    """The most likely next tokens and their probabilities."""
    probabilities, token_ids = frozen.logits_V.softmax(dim=0).sort(descending=True)
    needed = int((probabilities.cumsum(dim=0) < logit_probability).sum()) + 1
    count = max(1, min(needed, max_logits, len(token_ids)))
    return token_ids[:count], probabilities[:count]


def _nodes(traced: Traced, pruning: influence.Pruning, text_of: Callable[[int], str]) -> tuple[Node, ...]:
    sources, frozen, mlps = traced.sources, traced.replacement.frozen, traced.replacement.mlps
    influence_N = traced.adjacency.influence_N
    explained = _explained_fields(traced, pruning)
    plain = _number(traced.adjacency.rows_GN.dtype)
    target_of = {column: target for target, column in enumerate(traced.columns_G.tolist()) if column >= 0}
    nodes = []
    for column, identity in enumerate(source_ids(sources)):
        kind, *where = identity.split("/")
        fields: dict[str, Any] = dict(
            id=identity, kind=kind, influence=plain(influence_N[column]), kept=bool(pruning.sources_N[column])
        )
        if kind == "feature":
            layer, position, latent = map(int, where)
            fields |= dict(layer=layer, position=position, latent=latent, value=plain(sources.feature_value[column]))
            fields["explained"] = column in target_of
            fields |= explained.get(target_of.get(column, -1), {}) if column in target_of else {}
        elif kind == "error":
            layer, position = map(int, where)
            fields |= dict(layer=layer, position=position, value=plain(float(mlps[layer].error_PD[position].norm())))
        else:
            position = int(where[0])
            fields |= dict(position=position, value=plain(float(frozen.table(kind)[position].norm())))
            if kind == "token":
                token = int(frozen.token_ids[position])
                fields |= dict(token_id=token, token=text_of(token))
        nodes.append(Node(**fields))
    for number, (token, probability) in enumerate(
        zip(traced.logit_ids.tolist(), traced.probabilities.tolist(), strict=True)
    ):
        nodes.append(
            Node(
                id=f"logit/{token}",
                kind="logit",
                position=frozen.positions - 1,
                value=plain(float(traced.groups[0].values_G[number])),
                influence=plain(traced.adjacency.weights_G[number]),
                kept=True,
                explained=True,
                token_id=token,
                token=text_of(token),
                probability=plain(probability),
                **explained[number],
            )
        )
    return tuple(nodes)


def source_ids(sources: Sources) -> list[str]:
    """The id of every column."""
    ids = [
        f"feature/{layer}/{position}/{latent}"
        for layer, position, latent in zip(
            sources.feature_layer, sources.feature_position, sources.feature_latent, strict=True
        )
    ]
    ids += [f"error/{layer}/{p}" for layer, p in zip(sources.error_layer, sources.error_position, strict=True)]
    ids += [f"token/{position}" for position in range(sources.tokens)]
    return ids + [f"position/{position}" for position in range(sources.position_embeddings)]


def _explained_fields(traced: Traced, pruning: influence.Pruning) -> dict[int, dict[str, Any]]:
    """Residue, head terms and direct terms of every kept target, by its number."""
    rows_GN = traced.adjacency.rows_GN
    plain = _number(rows_GN.dtype)
    result: dict[int, dict[str, Any]] = {}
    first = 0
    for targets in traced.groups:
        mine = np.flatnonzero(pruning.targets_G[first : first + len(targets)])
        terms = heads_of_targets(traced.replacement, targets[torch.from_numpy(mine)])
        _, layers, heads, positions = terms.heads_GLHS.shape
        flat = terms.heads_GLHS.flatten(1)
        largest = flat.abs().topk(min(HEAD_TERMS_PER_NODE, flat.shape[1]), dim=1).indices
        for row, local in enumerate(mine.tolist()):
            number = first + local
            left_out = rows_GN[number][~pruning.edges_GN[number]]
            residue = {name: plain(term_G[number]) for name, term_G in traced.residue.items() if term_G[number] != 0}
            residue[PRUNED] = plain(left_out.sum(dtype=np.float64))
            places = [int(place) for place in largest[row] if flat[row, place] != 0]
            shown = []
            for place in places:
                layer, head, source = (int(i) for i in np.unravel_index(place, (layers, heads, positions)))
                shown.append(HeadTerm(layer, head, source, plain(float(flat[row, place]))))
            rest = flat[row].double().clone()
            rest[places] = 0
            direct = {name: plain(float(term_G[row])) for name, term_G in terms.direct.items() if term_G[row] != 0}
            direct[OTHER_HEADS] = plain(float(rest.sum()))
            result[number] = dict(residue=residue, heads=tuple(shown), direct=direct)
        first += len(targets)
    return result


def _edges(traced: Traced, pruning: influence.Pruning) -> tuple[Edge, ...]:
    frozen = traced.replacement.frozen
    plain = _number(traced.adjacency.rows_GN.dtype)
    source_names = source_ids(traced.sources)
    target_names = [
        source_names[column] if column >= 0 else f"logit/{int(traced.logit_ids[number])}"
        for number, column in enumerate(traced.columns_G.tolist())
    ]
    per_group, first = [], 0
    for targets in traced.groups:
        numbers_M, columns_M = np.nonzero(pruning.edges_GN[first : first + len(targets)])
        per_group.append((first, numbers_M, columns_M))
        first += len(targets)
    parts = heads_of_edges(
        traced.replacement, traced.sources, traced.groups, [(columns, numbers) for _, numbers, columns in per_group]
    )
    edges, heads = [], frozen.heads
    for (first, numbers_M, columns_M), part in zip(per_group, parts, strict=True):
        weights_M = traced.adjacency.rows_GN[first + numbers_M, columns_M]
        flat_MX = part.heads_MLH.reshape(len(numbers_M), frozen.layers * heads)
        largest = np.argsort(-np.abs(flat_MX), axis=1)[:, :HEADS_PER_EDGE]
        amounts = np.take_along_axis(flat_MX, largest, axis=1)
        shown = np.abs(amounts) > HEAD_SHARE_SHOWN * (np.abs(flat_MX).sum(axis=1) + np.abs(part.direct_M))[:, None]
        for m, (number, column) in enumerate(zip((first + numbers_M).tolist(), columns_M.tolist(), strict=True)):
            carriers = tuple(
                EdgeHead(int(place) // heads, int(place) % heads, plain(amount))
                for place, amount in zip(largest[m][shown[m]], amounts[m][shown[m]], strict=True)
            )
            ends = source_names[column], target_names[number]
            edges.append(Edge(*ends, plain(weights_M[m]), direct=plain(part.direct_M[m]), heads=carriers))
    return tuple(edges)


def _head_influences(traced: Traced) -> tuple[HeadInfluence, ...]:
    worth_G = traced.adjacency.worth_G
    shares_GLH = np.concatenate([head_shares(traced.replacement, targets) for targets in traced.groups])
    influence_LH = np.tensordot(worth_G, shares_GLH, axes=1) / worth_G.sum()
    order = np.argsort(-influence_LH, axis=None, kind="stable")
    return tuple(
        HeadInfluence(int(layer), int(head), float(influence_LH[layer, head]))
        for layer, head in zip(*np.unravel_index(order, influence_LH.shape), strict=True)
    )


def _number(dtype: np.dtype) -> Callable[[Any], float]:
    """To a Python number without the digits that the type does not have: a file a third the size."""
    return float if dtype == np.float64 else lambda value: float(f"{value:.9g}")


def _record(layer: int, transcoder: Dictionary) -> dict[str, Any]:
    provenance = transcoder.provenance
    record = {"layer": layer, "kind": type(transcoder).__name__, "d_sae": transcoder.d_sae}
    for name in ("run", "dictionary_fingerprint", "hook_in", "hook_out", "store"):
        if name in provenance:
            record[name] = provenance[name]
    return record
