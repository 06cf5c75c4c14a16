"""Direct linear effects: what every source of a local replacement model brings to a target, and what the biases bring.

A target is a direction read somewhere: a feature's encoder row behind its MLP's norm, or a logit's unembedding column
behind the last one. `trace` carries that direction backwards through the frozen model, layer by layer: at each MLP it
is read off against every active feature and error, and goes on through the linear path if a skip transcoder has one; at
each attention layer it also goes to the positions the heads look at. Many targets go together, so a layer costs a few
matrix products per batch and no autograd.

The contributions and the residue add up to the target's value. No residue is the difference of the others: each is a
bias, a dropped output or a rounding error, carried along the same directions.

Axes: G targets, N sources, P positions, D residual width, K feature slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dictlearn.circuits.replacement import LocalReplacement

TARGETS_PER_BATCH = 128
"""128 targets x 64 positions x 256 numbers in float32 is 8 MB: a batch stays near the processor."""

ENCODER_BIAS = "encoder bias"
UNEMBEDDING_BIAS = "unembedding bias"
NORM_BIASES = "norm biases"
ATTENTION_BIASES = "attention biases"
DECODER_BIASES = "decoder biases"
DROPPED = "dropped positions"
ROUNDING = "rounding in the model"


@dataclass(frozen=True)
class Sources:
    """The columns of the adjacency: features, then errors, then token embeddings, then positional embeddings.

    Attributes:
        feature_layer, feature_position, feature_slot, feature_latent: (F,) sorted by layer, position, slot.
        feature_value: (F,) activations.
        error_layer, error_position: (E,) sorted by layer, position.
        tokens: P.
        position_embeddings: P with learned positions, else 0.
    """

    feature_layer: np.ndarray
    feature_position: np.ndarray
    feature_slot: np.ndarray
    feature_latent: np.ndarray
    feature_value: np.ndarray
    error_layer: np.ndarray
    error_position: np.ndarray
    tokens: int
    position_embeddings: int

    @property
    def features(self) -> int:
        return len(self.feature_layer)

    @property
    def errors(self) -> slice:
        return slice(self.features, self.features + len(self.error_layer))

    @property
    def inputs(self) -> slice:
        """Token and positional embeddings."""
        return slice(self.errors.stop, self.errors.stop + self.tokens + self.position_embeddings)

    def __len__(self) -> int:
        return self.inputs.stop

    def features_of_layer(self, layer: int) -> slice:
        return slice(*np.searchsorted(self.feature_layer, [layer, layer + 1]))


@dataclass(frozen=True)
class Targets:
    """Directions to explain, which lie in front of the same layers.

    Attributes:
        values_G: the quantities to attribute: pre-activations or demeaned logits.
        directions_GD: the direction in the residual stream, each at one position.
        positions_G: that position.
        attentions, mlps: how many layers' attention and MLPs lie in front.
        residue: what has been met already on the way to the residual stream, by name, (G,) each.
    """

    values_G: Tensor
    directions_GD: Tensor
    positions_G: Tensor
    attentions: int
    mlps: int
    residue: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.values_G)

    def __getitem__(self, chosen: Tensor) -> Targets:
        residue = {name: term_G[chosen] for name, term_G in self.residue.items()}
        return Targets(
            self.values_G[chosen],
            self.directions_GD[chosen],
            self.positions_G[chosen],
            self.attentions,
            self.mlps,
            residue,
        )


@dataclass(frozen=True)
class Trace:
    """Rows of the adjacency.

    Attributes:
        rows_GN: (G, N) direct effect of each source.
        residue: the rest by name, (G,) each.
    """

    rows_GN: np.ndarray
    residue: dict[str, np.ndarray]


def sources_of(replacement: LocalReplacement) -> Sources:
    """Every active feature, every error and every embedding of a replacement."""
    layers, positions, slots, latents, values = [], [], [], [], []
    for layer, mlp in enumerate(replacement.mlps):
        position_F, slot_F = np.nonzero(mlp.values_PK.numpy())
        layers.append(np.full(len(position_F), layer))
        positions.append(position_F)
        slots.append(slot_F)
        latents.append(mlp.indices_PK.numpy()[position_F, slot_F])
        values.append(mlp.values_PK.numpy()[position_F, slot_F])
    kept_positions = np.flatnonzero(~replacement.dropped_P.numpy())
    frozen = replacement.frozen
    return Sources(
        feature_layer=np.concatenate(layers),
        feature_position=np.concatenate(positions),
        feature_slot=np.concatenate(slots),
        feature_latent=np.concatenate(latents),
        feature_value=np.concatenate(values),
        error_layer=np.repeat(np.arange(frozen.layers), len(kept_positions)),
        error_position=np.tile(kept_positions, frozen.layers),
        tokens=frozen.positions,
        position_embeddings=0 if frozen.position_embedding_PD is None else frozen.positions,
    )


def feature_targets(replacement: LocalReplacement, sources: Sources, layer: int, features_G: np.ndarray) -> Targets:
    """Features of one layer, given as columns of the sources."""
    frozen, mlp = replacement.frozen, replacement.mlps[layer]
    positions_G = torch.from_numpy(sources.feature_position[features_G])
    slots_G = torch.from_numpy(sources.feature_slot[features_G])
    reads_GD = mlp.reads_PKD[positions_G, slots_G]
    residue = {
        ENCODER_BIAS: mlp.b_enc_PK[positions_G, slots_G],
        NORM_BIASES: reads_GD @ mlp.norm.bias_D,
        ROUNDING: (reads_GD * mlp.norm.rounding_PD[positions_G]).sum(dim=-1),
    }
    return Targets(
        values_G=mlp.values_PK[positions_G, slots_G],
        directions_GD=mlp.norm.pull_at(reads_GD, positions_G),
        positions_G=positions_G,
        attentions=layer if frozen.parallel else layer + 1,
        mlps=layer,
        residue=residue,
    )


def logit_targets(replacement: LocalReplacement, token_ids_G: Tensor) -> Targets:
    """Next-token logits after the last position, minus the mean over the vocabulary."""
    frozen, norm = replacement.frozen, replacement.frozen.final_norm
    reads_GD = (frozen.W_U_DV[:, token_ids_G] - frozen.W_U_DV.mean(dim=1, keepdim=True)).T
    positions_G = torch.full_like(token_ids_G, frozen.positions - 1)
    residue = {
        UNEMBEDDING_BIAS: frozen.b_U_V[token_ids_G] - frozen.b_U_V.mean(),
        NORM_BIASES: reads_GD @ norm.bias_D,
        ROUNDING: reads_GD @ norm.rounding_PD[-1],
    }
    return Targets(
        values_G=frozen.logits_V[token_ids_G] - frozen.logits_V.mean(),
        directions_GD=norm.pull_at(reads_GD, positions_G),
        positions_G=positions_G,
        attentions=frozen.layers,
        mlps=frozen.layers,
        residue=residue,
    )


@torch.no_grad()
def trace(replacement: LocalReplacement, sources: Sources, targets: Targets) -> Trace:
    """The direct effect of every source on every target, and the residue: rows and residue add up to the values."""
    rows_GN = np.zeros((len(targets), len(sources)), dtype=targets.directions_GD.numpy().dtype)
    residue: dict[str, np.ndarray] = {}
    # Nothing reads later positions: sorted by position, a batch carries no more of them than it needs.
    for batch in torch.argsort(targets.positions_G, stable=True).split(TARGETS_PER_BATCH):
        chosen = targets[batch]
        sweep = _Sweep(replacement, sources, chosen, rows_GN, batch.numpy())
        for layer in reversed(range(targets.attentions)):
            through_skip = sweep.read_mlp(layer) if layer < targets.mlps else None
            if through_skip is not None and not replacement.frozen.parallel:
                sweep.g_GPD = sweep.g_GPD + through_skip
            sweep.pass_attention(layer)
            if through_skip is not None and replacement.frozen.parallel:
                sweep.g_GPD = sweep.g_GPD + through_skip
        sweep.read_embeddings()
        for name, term_G in sweep.residue.items():
            residue.setdefault(name, np.zeros(len(targets), dtype=rows_GN.dtype))[batch.numpy()] = term_G.numpy()
    return Trace(rows_GN, residue)


class _Sweep:
    """One batch of targets on its way back from where it reads to the embeddings. Writes into rows of the adjacency."""

    def __init__(
        self,
        replacement: LocalReplacement,
        sources: Sources,
        targets: Targets,
        rows_GN: np.ndarray,
        row_numbers_G: np.ndarray,
    ) -> None:
        self.replacement, self.sources, self.rows_GN, self.row_numbers_G = replacement, sources, rows_GN, row_numbers_G
        self.n = int(targets.positions_G.max()) + 1
        width = targets.directions_GD.shape[1]
        self.g_GPD = targets.directions_GD.new_zeros(len(targets), self.n, width)
        self.g_GPD[torch.arange(len(targets)), targets.positions_G] = targets.directions_GD
        self.residue = {name: term_G.clone() for name, term_G in targets.residue.items()}

    def read_mlp(self, layer: int) -> Tensor | None:
        """Returns the directions (G, P, D) in front of the MLP to which a skip transcoder's linear path leads."""
        mlp, n = self.replacement.mlps[layer], self.n
        dropped_P = self.replacement.dropped_P[:n]
        if mlp.values_PK.shape[1]:
            effects_PGK = self.g_GPD.transpose(0, 1) @ mlp.writes_PKD[:n].transpose(1, 2)
            position_F, slot_F = mlp.values_PK[:n].nonzero(as_tuple=True)
            columns = self.sources.features_of_layer(layer)
            self._write(columns.start, effects_PGK.permute(1, 0, 2)[:, position_F, slot_F])
        errors_GP = torch.einsum("gpd,pd->gp", self.g_GPD, mlp.error_PD[:n])[:, ~dropped_P]
        per_layer = len(self.sources.error_layer) // len(self.replacement.mlps)
        self._write(self.sources.errors.start + layer * per_layer, errors_GP)
        self._leave(DECODER_BIASES, self.g_GPD[:, ~dropped_P].sum(dim=1) @ mlp.b_dec_D)
        outputs_PD = self.replacement.frozen.mlp_out_LPD[layer, :n][dropped_P]
        self._leave(DROPPED, torch.einsum("gpd,pd->g", self.g_GPD[:, dropped_P], outputs_PD))
        pulled = self.replacement.pull_skip(layer, self.g_GPD)
        if pulled is None:
            return None
        directions_GPD, bias_G, rounding_G = pulled
        self._leave(NORM_BIASES, bias_G)
        self._leave(ROUNDING, rounding_G)
        return directions_GPD

    def pass_attention(self, layer: int) -> None:
        attention, norm = self.replacement.frozen.attentions[layer], self.replacement.frozen.first_norms[layer]
        self._leave(ATTENTION_BIASES, self.g_GPD.sum(dim=1) @ attention.b_O_D)
        self._leave(ROUNDING, torch.einsum("gpd,pd->g", self.g_GPD, attention.rounding_PD[: self.n]))
        behind_norm_GPD, value_bias_G = attention.pull(self.g_GPD)
        self._leave(ATTENTION_BIASES, value_bias_G)
        self._leave(NORM_BIASES, behind_norm_GPD.sum(dim=1) @ norm.bias_D)
        self._leave(ROUNDING, torch.einsum("gpd,pd->g", behind_norm_GPD, norm.rounding_PD[: self.n]))
        self.g_GPD = self.g_GPD + norm.pull(behind_norm_GPD)

    def read_embeddings(self) -> None:
        frozen, start = self.replacement.frozen, self.sources.inputs.start
        self._write(start, torch.einsum("gpd,pd->gp", self.g_GPD, frozen.embedding_PD[: self.n]))
        if frozen.position_embedding_PD is not None:
            effects_GP = torch.einsum("gpd,pd->gp", self.g_GPD, frozen.position_embedding_PD[: self.n])
            self._write(start + self.sources.tokens, effects_GP)

    def _write(self, first_column: int, effects: Tensor) -> None:
        self.rows_GN[self.row_numbers_G, first_column : first_column + effects.shape[1]] = effects.numpy()

    def _leave(self, name: str, term_G: Tensor) -> None:
        self.residue[name] = self.residue[name] + term_G if name in self.residue else term_G
