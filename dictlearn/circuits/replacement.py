"""The local replacement model: a frozen model whose MLPs are written as transcoder features plus what those miss.

    MLP output = sum of active features' decoder rows + decoder bias + error          (with a transcoder)
                 + what its linear path makes of the MLP's input                      (with a skip transcoder)
    MLP output = error                                                                (without one)

Nothing is lost, so the replacement computes what the model computed; and since everything else is frozen, it is linear
in the features, the errors and the embeddings. Positions a transcoder never saw (BOS) are dropped: they have no
features and no error node, and what their MLPs wrote is one residue.

Axes: P positions, K slots for active features, D residual width, I transcoder input width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.circuits.frozen import FrozenModel, FrozenNorm
from dictlearn.circuits.hooks import layer_of

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary


@dataclass(frozen=True)
class ReplacedMLP:
    """One layer's MLP on one prompt. Without a transcoder K is 0 and the error is the whole output.

    Attributes:
        indices_PK, values_PK: active features; value 0 marks an empty slot.
        reads_PKD: encoder rows of those features.
        b_enc_PK: their encoder biases.
        writes_PKD: value times decoder row.
        b_dec_D: the transcoder's output bias (zero without one).
        W_skip_ID: the transcoder's linear path from its input to its output, None for all but skip transcoders.
        error_PD: MLP output minus reconstruction.
        norm: the frozen norm in front, as the transcoder reads it.
    """

    indices_PK: Tensor
    values_PK: Tensor
    reads_PKD: Tensor
    b_enc_PK: Tensor
    writes_PKD: Tensor
    b_dec_D: Tensor
    W_skip_ID: Tensor | None
    error_PD: Tensor
    norm: FrozenNorm


@dataclass(frozen=True)
class Response:
    """What the replacement computes.

    Attributes:
        preactivations_LPK: per layer (P, K), of the features that were active in the model's run.
        logits_V: next-token logits after the last position.
    """

    preactivations_LPK: list[Tensor]
    logits_V: Tensor


@dataclass(frozen=True)
class LocalReplacement:
    """A frozen model with its MLPs replaced.

    Attributes:
        dropped_P: mask of the positions without nodes for MLPs.
    """

    frozen: FrozenModel
    mlps: list[ReplacedMLP]
    dropped_P: Tensor

    def pull_skip(self, layer: int, directions_GPD: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Directions behind an MLP, carried back through the linear path of a skip transcoder; None without one.

        Args:
            directions_GPD: at the positions 0, 1, ...

        Returns:
            ``(directions in front of the MLP's norm (G, P, D), what the norm's bias adds (G,), what its rounding)``.
        """
        mlp, n = self.mlps[layer], directions_GPD.shape[1]
        if mlp.W_skip_ID is None:
            return None
        read_GPD = (directions_GPD @ mlp.W_skip_ID.T).masked_fill(self.dropped_P[:n, None], 0)
        bias_G = read_GPD.sum(dim=1) @ mlp.norm.bias_D
        rounding_G = torch.einsum("gpd,pd->g", read_GPD, mlp.norm.rounding_PD[:n])
        return mlp.norm.pull(read_GPD), bias_G, rounding_G

    def push_skip(self, layer: int, stream_NPD: Tensor) -> Tensor | None:
        """(N, P, D) what a linear path makes of vectors that the layer's MLP reads; None without a skip transcoder."""
        mlp = self.mlps[layer]
        if mlp.W_skip_ID is None:
            return None
        written_NPD = mlp.norm.push(stream_NPD) @ mlp.W_skip_ID
        return written_NPD.masked_fill(self.dropped_P[: stream_NPD.shape[1], None], 0)

    def respond(
        self,
        values_LPK: list[Tensor] | None = None,
        error_LPD: list[Tensor] | None = None,
        embedding_PD: Tensor | None = None,
        position_embedding_PD: Tensor | None = None,
    ) -> Response:
        """Run the replacement forwards, with any of its inputs exchanged for others.

        Features keep the values they are given: a changed input shows in the pre-activations of later features, but
        they are not encoded again. So a change at one node shows its direct effects, which is what edges are.
        """
        frozen = self.frozen
        values_LPK = values_LPK or [mlp.values_PK for mlp in self.mlps]
        error_LPD = error_LPD or [mlp.error_PD for mlp in self.mlps]
        stream_PD = frozen.embedding_PD if embedding_PD is None else embedding_PD
        if frozen.position_embedding_PD is not None:
            added = frozen.position_embedding_PD if position_embedding_PD is None else position_embedding_PD
            stream_PD = stream_PD + added
        kept_P1 = (~self.dropped_P)[:, None]
        preactivations = []
        for layer, mlp in enumerate(self.mlps):
            before_PD = stream_PD
            first, attention = frozen.first_norms[layer], frozen.attentions[layer]
            read_PD = first.push(stream_PD) + first.bias_D + first.rounding_PD
            bias_PHE = attention.pattern_HTS.sum(dim=-1).T[..., None] * attention.b_V_HE
            stream_PD = stream_PD + attention.push(read_PD[None])[0]
            stream_PD = stream_PD + torch.einsum("phe,hed->pd", bias_PHE, attention.W_O_HED)
            stream_PD = stream_PD + attention.b_O_D + attention.rounding_PD
            read_PD = (
                mlp.norm.push(before_PD if frozen.parallel else stream_PD) + mlp.norm.bias_D + mlp.norm.rounding_PD
            )
            preactivations.append(torch.einsum("pd,pkd->pk", read_PD, mlp.reads_PKD) + mlp.b_enc_PK)
            scaled_PK = torch.where(mlp.values_PK == 0, 0, values_LPK[layer] / mlp.values_PK)
            written_PD = torch.einsum("pk,pkd->pd", scaled_PK, mlp.writes_PKD) + mlp.b_dec_D + error_LPD[layer]
            if mlp.W_skip_ID is not None:
                written_PD = written_PD + read_PD @ mlp.W_skip_ID
            stream_PD = stream_PD + torch.where(kept_P1, written_PD, frozen.mlp_out_LPD[layer])
        last = frozen.final_norm.push(stream_PD) + frozen.final_norm.bias_D + frozen.final_norm.rounding_PD
        return Response(preactivations, last[-1] @ frozen.W_U_DV + frozen.b_U_V)


@torch.no_grad()
def replace_mlps(
    frozen: FrozenModel,
    activations: Mapping[str, Tensor],
    transcoders: Mapping[int, Dictionary],
    dropped_positions: tuple[int, ...] = (),
) -> LocalReplacement:
    """Encode the prompt with every transcoder.

    Args:
        frozen: the frozen model.
        activations: the hooks' values, as `freeze` returns them.
        transcoders: layer -> dictionary; `provenance["hook_in"]` and `["hook_out"]` when present must be of that layer.
        dropped_positions: positions without features and errors.

    Raises:
        UserError: a layer the model does not have, wrong widths, or a dictionary whose activations are not its
            pre-activations (a transcoder needs a linear encoder to be traced through).
    """
    dropped_P = torch.zeros(frozen.positions, dtype=torch.bool)
    dropped_P[list(dropped_positions)] = True
    for layer in transcoders:
        if not 0 <= layer < frozen.layers:
            raise UserError(f"There is no layer {layer}: the model's layers are 0 to {frozen.layers - 1}.")
    mlps = [
        _replaced(frozen, activations, layer, transcoders[layer], dropped_P)
        if layer in transcoders
        else _unreplaced(frozen, layer)
        for layer in range(frozen.layers)
    ]
    return LocalReplacement(frozen, mlps, dropped_P)


def _unreplaced(frozen: FrozenModel, layer: int) -> ReplacedMLP:
    output_PD = frozen.mlp_out_LPD[layer]
    positions, width = output_PD.shape
    none_PK, none_PKD = output_PD.new_zeros(positions, 0), output_PD.new_zeros(positions, 0, width)
    return ReplacedMLP(
        indices_PK=none_PK.long(),
        values_PK=none_PK,
        reads_PKD=none_PKD,
        b_enc_PK=none_PK,
        writes_PKD=none_PKD,
        b_dec_D=output_PD.new_zeros(width),
        W_skip_ID=None,
        error_PD=output_PD,
        norm=frozen.second_norms[layer],
    )


def _replaced(
    frozen: FrozenModel, activations: Mapping[str, Tensor], layer: int, transcoder: Dictionary, dropped_P: Tensor
) -> ReplacedMLP:
    output_PD = frozen.mlp_out_LPD[layer]
    hook_in = transcoder.provenance.get("hook_in", f"blocks.{layer}.mlp.hook_in")
    hook_out = transcoder.provenance.get("hook_out", f"blocks.{layer}.hook_mlp_out")
    if layer_of(hook_in, hook_out) != layer:
        raise UserError(f"A transcoder from {hook_in} to {hook_out} was given for layer {layer}; give it for its own.")
    input_PI = activations[hook_in]
    if transcoder.d_in != input_PI.shape[1] or transcoder.d_out != output_PD.shape[1]:
        raise UserError(
            f"The transcoder of layer {layer} goes from {transcoder.d_in} to {transcoder.d_out} numbers per position, "
            f"but this model's MLP from {input_PI.shape[1]} to {output_PD.shape[1]}; use one trained on this model."
        )
    norm = frozen.second_norms[layer]
    if hook_in.endswith("hook_normalized"):
        norm = norm.without_gain(input_PI, activations[f"blocks.{layer}.ln2.hook_in"])

    if transcoder.input_scaling.row_wise:
        raise UserError(
            f"The transcoder of layer {layer} divides each input by a scale of its own (scaling "
            f"{transcoder.config.scaling}), so its activations are not linear in the input and cannot be traced; train "
            "one with scaling mean_square, whiten or none."
        )
    found = [getattr(transcoder, name, None) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    weights = [weight.detach().to("cpu", output_PD.dtype) for weight in found if isinstance(weight, Tensor)]
    if len(weights) < 4:
        raise UserError(
            f"The dictionary of layer {layer} ({type(transcoder).__name__}) has no linear encoder and decoder, so no "
            "circuit can be traced through it; use a TopK transcoder."
        )
    W_enc, b_enc, W_dec, b_dec = weights
    own = next(transcoder.parameters())
    codes = transcoder.encode(input_PI.to(own)).to("cpu", output_PD.dtype)
    chosen_PK = codes.values.detach().masked_fill(dropped_P[:, None], 0)
    # The values are computed here, in the type of the tracing; encode has only chosen which features are active.
    reads_PKI, b_enc_PK = W_enc[codes.indices], b_enc[codes.indices]
    linear_PK = torch.einsum("pi,pki->pk", input_PI, reads_PKI) + b_enc_PK
    active_PK = chosen_PK != 0
    off = (linear_PK - chosen_PK)[active_PK].abs().max() if active_PK.any() else torch.tensor(0.0)
    if not off <= 1e-3 * chosen_PK.abs().max().clamp_min(1e-12):
        raise UserError(
            f"The activations of the transcoder of layer {layer} are not W_enc x + b_enc (off by {float(off):.1e}), so "
            "its features' inputs cannot be traced; use a saved TopK transcoder."
        )
    values_PK = torch.where(active_PK, linear_PK, 0)
    writes_PKD = values_PK[..., None] * W_dec[codes.indices]
    rebuilt_PD = writes_PKD.sum(dim=1) + b_dec
    W_skip_ID = getattr(transcoder, "W_skip", None)
    if isinstance(W_skip_ID, Tensor):
        W_skip_ID = W_skip_ID.detach().to("cpu", output_PD.dtype)
        rebuilt_PD = rebuilt_PD + input_PI @ W_skip_ID
    return ReplacedMLP(
        indices_PK=codes.indices,
        values_PK=values_PK,
        reads_PKD=reads_PKI,
        b_enc_PK=b_enc_PK,
        writes_PKD=writes_PKD,
        b_dec_D=b_dec,
        W_skip_ID=W_skip_ID,
        error_PD=output_PD - rebuilt_PD,
        norm=norm,
    )
