"""Which nodes of an attribution graph matter: influence, pruning, and two scores.

The definitions are circuit-tracer's, so that the numbers can be compared: every target's incoming edges are taken by
magnitude and normalised to 1, and the probabilities of the logit nodes flow backwards along them. A node's influence is
the sum over all paths. Influence says what is connected strongly, not what would happen if a node were removed.

The adjacency has a row per target and a column per source; a feature is both. Rows exist for the logits and for those
features whose inputs were traced.

Axes: G targets, N sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Adjacency:
    """Edges with what is needed to walk them.

    Attributes:
        rows_GN: direct effect of source n on target g.
        column_of_target_G: the column in which target g is a source; -1 for logits.
        weights_G: probability of a logit, renormalised over the logit nodes; 0 for features.
    """

    rows_GN: np.ndarray
    column_of_target_G: np.ndarray
    weights_G: np.ndarray

    @cached_property
    def normalised_GN(self) -> np.ndarray:
        """Magnitudes whose rows sum to 1."""
        return normalised(self.rows_GN)

    @cached_property
    def influence_N(self) -> np.ndarray:
        """Influence of every source on the logits, over paths of any length."""
        is_feature_G = self.column_of_target_G >= 0
        total_N = np.zeros(self.rows_GN.shape[1])
        arriving_G = self.weights_G
        while arriving_G.any():  # a feature reads earlier layers only: as many rounds as layers, and one more
            reached_N = arriving_G @ self.normalised_GN
            total_N += reached_N
            arriving_G = np.where(is_feature_G, reached_N[self.column_of_target_G], 0)
        return total_N

    @property
    def worth_G(self) -> np.ndarray:
        """A target's own influence, or a logit's weight: how much explaining it is worth."""
        return np.where(self.column_of_target_G >= 0, self.influence_N[self.column_of_target_G], 0) + self.weights_G


@dataclass(frozen=True)
class Scores:
    """How much of the influence the features carry, in [0, 1].

    Attributes:
        replacement: influence that starts at embeddings, as a share of what starts at embeddings or errors.
        completeness: share of nodes' inputs that are not errors, weighted by influence. Nodes without traced inputs
            count as complete when they are embeddings or errors (circuit-tracer's definition) and as wholly unexplained
            when they are features that were left untraced.
        error_influence, input_influence: the two parts of the replacement score.
    """

    replacement: float
    completeness: float
    error_influence: float
    input_influence: float


@dataclass(frozen=True)
class Pruning:
    """What is kept.

    Attributes:
        sources_N: mask of sources.
        targets_G: mask of targets.
        edges_GN: mask of edges, only between kept nodes.
    """

    sources_N: np.ndarray
    targets_G: np.ndarray
    edges_GN: np.ndarray


def normalised(rows_GN: np.ndarray) -> np.ndarray:
    """(G, N) magnitudes whose rows sum to 1 (a row without any edge stays 0)."""
    magnitudes_GN = np.abs(rows_GN)
    return magnitudes_GN / np.maximum(magnitudes_GN.sum(axis=1, keepdims=True), 1e-30)


def measure(adjacency: Adjacency, features: int, errors: slice, inputs: slice) -> Scores:
    """The scores of a whole, unpruned graph, whose columns are features, errors, inputs."""
    influence_N = adjacency.influence_N
    from_inputs, from_errors = float(influence_N[inputs].sum()), float(influence_N[errors].sum())
    traced = adjacency.column_of_target_G[adjacency.column_of_target_G >= 0]
    untraced = influence_N[:features].sum() - influence_N[traced].sum()
    unexplained = float((adjacency.worth_G * adjacency.normalised_GN[:, errors].sum(axis=1)).sum() + untraced)
    total = float(influence_N.sum() + adjacency.weights_G.sum())
    return Scores(
        replacement=from_inputs / max(from_inputs + from_errors, 1e-30),
        completeness=1 - unexplained / max(total, 1e-30),
        error_influence=from_errors,
        input_influence=from_inputs,
    )


def prune(adjacency: Adjacency, inputs: slice, node_threshold: float, edge_threshold: float) -> Pruning:
    """Keep the nodes that cover ``node_threshold`` of the influence, the edges that cover ``edge_threshold``.

    Embeddings and logits always stay. Then nodes that lead nowhere are dropped, and features that nothing leads to,
    until there are none. A feature whose inputs were not traced may stay without any.
    """
    targets_of = adjacency.column_of_target_G
    influence_N = adjacency.influence_N
    sources_N = influence_N >= _covering(influence_N, node_threshold)
    sources_N &= influence_N > 0
    sources_N[inputs] = True
    targets_G = np.where(targets_of >= 0, sources_N[targets_of], True)

    between_GN = targets_G[:, None] & sources_N[None, :]
    small = Adjacency(
        adjacency.rows_GN[targets_G][:, sources_N],
        np.where(targets_of >= 0, np.cumsum(sources_N)[targets_of] - 1, -1)[targets_G],
        adjacency.weights_G[targets_G],
    )
    edge_worth = small.normalised_GN * small.worth_G[:, None]
    edges_GN = np.zeros_like(between_GN)
    edges_GN[between_GN] = ((edge_worth >= _covering(edge_worth, edge_threshold)) & (edge_worth > 0)).ravel()

    always_N = np.zeros(len(sources_N), dtype=bool)
    always_N[inputs] = True
    while True:
        reaches_N = edges_GN.any(axis=0) | always_N
        reached_G = edges_GN.any(axis=1) | (targets_of < 0)
        keep_N = sources_N & reaches_N
        keep_N[targets_of[(targets_of >= 0) & ~reached_G]] = False
        if (keep_N == sources_N).all():
            return Pruning(sources_N, targets_G, edges_GN)
        sources_N = keep_N
        targets_G = np.where(targets_of >= 0, sources_N[targets_of], True)
        edges_GN &= targets_G[:, None] & sources_N[None, :]


def _covering(scores: np.ndarray, share: float) -> float:
    """The largest value such that the scores at or above it make up ``share`` of the sum."""
    ordered = np.sort(scores, axis=None)[::-1]
    reached = np.cumsum(ordered)
    if not len(ordered) or reached[-1] <= 0:
        return 0.0
    return float(ordered[min(np.searchsorted(reached, share * reached[-1]), len(ordered) - 1)])
