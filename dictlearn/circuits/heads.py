"""Which heads: what each attention head carries to a target, and what part of an edge goes through which head.

Edges run through heads without showing them. Two decompositions bring them back, both exact:

- `heads_of_targets`: a target's value is what its own position holds directly (embedding, MLP outputs, biases) plus
  what every head brings there from every source position.
- `heads_of_edges`: an edge is its direct part plus, for every head, the part whose last head that is: the head that
  writes at the target's position, whatever the path took before. What it writes may reach the target through the linear
  paths of skip transcoders there.

Axes: G targets, N sources, P positions, S source positions, D residual width, L layers, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dictlearn.circuits.frozen import FrozenAttention
from dictlearn.circuits.replacement import LocalReplacement
from dictlearn.circuits.tracing import ATTENTION_BIASES, ROUNDING, Sources, Targets

SOURCES_PER_BATCH = 128


@dataclass(frozen=True)
class HeadTerms:
    """What stands at the targets' own positions and what heads bring; the two add up to the targets' values.

    Attributes:
        heads_GLHS: contribution of (layer, head, source position).
        direct: the rest by name, (G,) each.
    """

    heads_GLHS: Tensor
    direct: dict[str, Tensor]


@torch.no_grad()
def heads_of_targets(replacement: LocalReplacement, targets: Targets) -> HeadTerms:
    """Split each target's value into heads and what is at its position anyway."""
    frozen, g_GD, p_G = replacement.frozen, targets.directions_GD, targets.positions_G
    heads_GLHS = g_GD.new_zeros(len(targets), frozen.layers, frozen.heads, frozen.positions)
    direct = dict(targets.residue)

    def add(name: str, term_G: Tensor) -> None:
        direct[name] = direct[name] + term_G if name in direct else term_G

    for layer in range(targets.attentions):
        attention = frozen.attentions[layer]
        heads_GLHS[:, layer] = attention.by_head(g_GD, p_G)
        add(ATTENTION_BIASES, g_GD @ attention.b_O_D)
        add(ROUNDING, (g_GD * attention.rounding_PD[p_G]).sum(dim=-1))
    for layer in range(targets.mlps):
        add(f"MLP {layer} at the same position", (g_GD * frozen.mlp_out_LPD[layer, p_G]).sum(dim=-1))
    add("token embedding", (g_GD * frozen.embedding_PD[p_G]).sum(dim=-1))
    if frozen.position_embedding_PD is not None:
        add("positional embedding", (g_GD * frozen.position_embedding_PD[p_G]).sum(dim=-1))
    return HeadTerms(heads_GLHS, direct)


@torch.no_grad()
def head_shares(replacement: LocalReplacement, targets: Targets) -> np.ndarray:
    """(G, L, H) magnitude of each head's whole contribution, as a share of all heads' and direct contributions'.

    Biases and rounding are left out of the sum, as they are when edges are normalised.
    """
    frozen = replacement.frozen
    shares = np.zeros((len(targets), frozen.layers, frozen.heads))
    for batch in torch.arange(len(targets)).split(512):
        terms = heads_of_targets(replacement, targets[batch])
        heads_GLH = terms.heads_GLHS.sum(dim=-1).abs()
        others_G = sum(
            term_G.abs() for name, term_G in terms.direct.items() if "embedding" in name or name.startswith("MLP ")
        )
        total_G = heads_GLH.sum(dim=(1, 2)) + others_G
        shares[batch.numpy()] = (heads_GLH / total_G.clamp_min(1e-30)[:, None, None]).numpy()
    return shares


@dataclass(frozen=True)
class EdgeHeads:
    """Axis M: edges. ``direct_M`` plus the sum of ``heads_MLH`` is the edges' weight."""

    direct_M: np.ndarray
    heads_MLH: np.ndarray


@torch.no_grad()
def heads_of_edges(
    replacement: LocalReplacement, sources: Sources, targets: list[Targets], edges: list[tuple[np.ndarray, np.ndarray]]
) -> list[EdgeHeads]:
    """Split edges by their last head.

    Sources are carried forwards through the frozen model, a batch at a time, and read off at each target's position
    behind each head.

    Args:
        targets: groups of targets.
        edges: for each group, (M,) source columns and (M,) numbers of targets within the group.

    Returns:
        One result per group, in the order of its edges.
    """
    frozen = replacement.frozen
    results = [
        EdgeHeads(np.zeros(len(columns)), np.zeros((len(columns), frozen.layers, frozen.heads))) for columns, _ in edges
    ]
    behind = [_directions_at_target(replacement, group) for group in targets]
    wanted = np.unique(np.concatenate([columns for columns, _ in edges])) if edges else np.zeros(0, dtype=int)
    for start in range(0, len(wanted), SOURCES_PER_BATCH):
        batch = wanted[start : start + SOURCES_PER_BATCH]
        vectors_ND, layers_N, positions_N = _vectors(replacement, sources, batch)
        # For each group: which of its edges start in this batch, and from which of the batch's sources.
        mine = []
        for columns, _ in edges:
            place = np.searchsorted(batch, columns).clip(max=len(batch) - 1)
            mine.append((np.flatnonzero(batch[place] == columns), place))
        for group, (which_M, place) in enumerate(mine):
            _add_direct(
                results[group],
                targets[group],
                behind[group],
                edges[group][1],
                which_M,
                place,
                vectors_ND,
                layers_N,
                positions_N,
            )
        stream_NPD = vectors_ND.new_zeros(len(batch), frozen.positions, vectors_ND.shape[1])
        for layer in range(frozen.layers):
            arriving = torch.from_numpy(np.flatnonzero(layers_N == layer - 1))
            stream_NPD[arriving, torch.from_numpy(positions_N)[arriving]] += vectors_ND[arriving]
            attention = frozen.attentions[layer]
            read_NPD = frozen.first_norms[layer].push(stream_NPD)
            values_NSHE = torch.einsum("nsd,hde->nshe", read_NPD, attention.W_V_HDE)
            for group, (which_M, place) in enumerate(mine):
                if layer < targets[group].attentions and len(which_M):
                    numbers_M = edges[group][1][which_M]
                    directions_GD = behind[group].attentions_GLD[:, layer]
                    effects_MH = _at_targets(
                        values_NSHE, attention, directions_GD, targets[group].positions_G, numbers_M, place[which_M]
                    )
                    results[group].heads_MLH[which_M, layer] = effects_MH.numpy()
            mixed_NTHE = torch.einsum("hts,nshe->nthe", attention.pattern_HTS, values_NSHE)
            written_NPD = torch.einsum("nthe,hed->ntd", mixed_NTHE, attention.W_O_HED)
            skipped_NPD = replacement.push_skip(layer, stream_NPD if frozen.parallel else stream_NPD + written_NPD)
            stream_NPD += written_NPD if skipped_NPD is None else written_NPD + skipped_NPD
    return results


@dataclass(frozen=True)
class _AtTarget:
    """A target's direction at its own position, as what is written there earlier meets it.

    Only the linear paths of skip transcoders change it on the way.

    Attributes:
        attentions_GLD: for what each layer's heads write.
        layers_GLD: (G, 1 + L, D) for what the embedding writes, and then each layer's MLP.
    """

    attentions_GLD: Tensor
    layers_GLD: Tensor


def _directions_at_target(replacement: LocalReplacement, targets: Targets) -> _AtTarget:
    frozen, g_GD = replacement.frozen, targets.directions_GD
    here_G = torch.arange(len(targets)), targets.positions_G
    attentions, layers = [], [g_GD]
    for layer in reversed(range(frozen.layers)):
        through_GD = torch.zeros_like(g_GD)
        if layer < targets.mlps and replacement.mlps[layer].W_skip_ID is not None:
            g_GPD = g_GD.new_zeros(len(targets), frozen.positions, g_GD.shape[1])
            g_GPD[here_G] = g_GD
            pulled = replacement.pull_skip(layer, g_GPD)
            assert pulled is not None
            through_GD = pulled[0][here_G]
        attentions.append(g_GD if frozen.parallel else g_GD + through_GD)
        g_GD = g_GD + through_GD
        layers.append(g_GD)
    return _AtTarget(torch.stack(attentions[::-1], dim=1), torch.stack(layers[::-1], dim=1))


def _vectors(
    replacement: LocalReplacement, sources: Sources, columns: np.ndarray
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """What sources write: (N, D) vectors, and the layer (-1: embeddings) and position they write at."""
    frozen = replacement.frozen
    vectors, layers, positions = [], [], []
    for column in columns.tolist():
        if column < sources.features:
            layer, position = int(sources.feature_layer[column]), int(sources.feature_position[column])
            vector = replacement.mlps[layer].writes_PKD[position, int(sources.feature_slot[column])]
        elif column < sources.errors.stop:
            number = column - sources.errors.start
            layer, position = int(sources.error_layer[number]), int(sources.error_position[number])
            vector = replacement.mlps[layer].error_PD[position]
        else:
            layer, number = -1, column - sources.inputs.start
            position = number % sources.tokens
            table = frozen.table("token" if number < sources.tokens else "position")
            vector = table[position]
        vectors.append(vector)
        layers.append(layer)
        positions.append(position)
    return torch.stack(vectors), np.array(layers), np.array(positions)


def _add_direct(
    result: EdgeHeads,
    targets: Targets,
    behind: _AtTarget,
    numbers_of_edges: np.ndarray,
    which_M: np.ndarray,
    place: np.ndarray,
    vectors_ND: Tensor,
    layers_N: np.ndarray,
    positions_N: np.ndarray,
) -> None:
    """The part of an edge that meets no head: source and target at one position, the source's layer in front."""
    from_M, to_M = place[which_M], numbers_of_edges[which_M]
    meets = (positions_N[from_M] == targets.positions_G.numpy()[to_M]) & (layers_N[from_M] < targets.mlps)
    which_M, from_M, to_M = which_M[meets], from_M[meets], to_M[meets]
    directions_MD = behind.layers_GLD[torch.from_numpy(to_M), torch.from_numpy(layers_N[from_M] + 1)]
    result.direct_M[which_M] = (vectors_ND[from_M] * directions_MD).sum(dim=-1).numpy()


def _at_targets(
    values_NSHE: Tensor,
    attention: FrozenAttention,
    directions_GD: Tensor,
    positions_G: Tensor,
    numbers_M: np.ndarray,
    from_M: np.ndarray,
) -> Tensor:
    """(M, H): what each head writes of a source's values, read at the target's position in these directions."""
    effects_MH = values_NSHE.new_zeros(len(numbers_M), values_NSHE.shape[2])
    positions_M = positions_G.numpy()[numbers_M]
    for position in np.unique(positions_M):
        here = np.flatnonzero(positions_M == position)
        n = int(position) + 1
        mixed_NHE = torch.einsum("hs,nshe->nhe", attention.pattern_HTS[:, position, :n], values_NSHE[:, :n])
        asked_MHE = torch.einsum("md,hed->mhe", directions_GD[numbers_M[here]], attention.W_O_HED)
        effects_MH[here] = (mixed_NHE[from_M[here]] * asked_MHE).sum(dim=-1)
    return effects_MH
