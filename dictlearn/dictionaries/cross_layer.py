"""Cross-layer transcoder: latents that read one layer's MLP input and write to that layer's MLP output and all later.

Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models" (Transformer Circuits Thread),
section "Cross-layer transcoders"; here with the k largest pre-activations of each layer in the place of their JumpReLU
and its penalty, as in `dictlearn.dictionaries.topk`:

    codes_l = ReLU(TopK(W_enc_l u_l + b_enc_l))        output_j = sum over l <= j of codes_l W_dec_lj + b_dec_j

u_l is the scaled input of layer l. Every layer has the same number of latents, latent s is of layer s // (S / L), and
W_enc has a row of one layer's width for each. The decoders of target j are one matrix, `decoders[j]`, with a row for
each latent of layers 0 to j: nothing is stored or computed of what cannot be.

A latent's rows of all decoders together have unit norm in scaled units. Training begins with a transcoder of each layer
by itself: a latent's row for its own layer lies along an example's target, those for later layers are 0.

Axes: B rows, L layers, D input width of one layer, S latents, K active per row, A dead latents of the first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Width
from dictlearn.dictionaries.configs import CrossLayerConfig
from dictlearn.dictionaries.dead_latents import Dead, DeadLatents
from dictlearn.dictionaries.scaling import LEAST, ControlStatistics, MeanSquareByPart, scalings, spread
from dictlearn.dictionaries.start import towards, unit_directions
from dictlearn.ops import TopKCodes


class CrossLayer(Dictionary):
    kind = "clt"
    Config = CrossLayerConfig
    config: CrossLayerConfig
    causal = True
    spread_of_parts: Tensor
    """(L,) the root of each output's variance per coordinate, for `dictlearn.dictionaries.parts`."""

    def __init__(self, config: CrossLayerConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.layers = len(self.input_parts)
        self.dead_latents = DeadLatents(groups=self.layers)
        self.latents_of_layer = self.d_sae // self.layers
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.input_parts[0]))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.decoders = nn.ParameterList(
            torch.zeros((layer + 1) * self.latents_of_layer, width) for layer, width in enumerate(self.output_parts)
        )
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.input_scaling, self.target_scaling = scalings(config.scaling, self.input_parts, self.output_parts)
        self.register_buffer("spread_of_parts", torch.ones(len(self.output_parts)))

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """(S, O): each latent's rows of all decoders side by side, with zeros for the layers before its own."""
        return torch.cat([F.pad(decoder, (0, 0, 0, self.d_sae - len(decoder))) for decoder in self.decoders], dim=1)

    def layer_of(self, latents: Tensor) -> Tensor:
        """The layer that each latent reads, counted from the first of the dictionary's."""
        return latents // self.latents_of_layer

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, L D) to codes, in k slots for each layer."""
        codes = self._select(self.input_scaling(x))
        return Codes(codes.indices, codes.values, self.d_sae)

    def decode(self, codes: Codes) -> Tensor:
        parts = [self._decode(codes.values, codes.indices, target) for target in range(self.layers)]
        return self.target_scaling.undo(torch.cat(parts, dim=1) + self.b_dec)

    def rebuild_part(self, parts: Sequence[Tensor], part: int) -> Tensor:
        """(B, width) raw output of one layer from the raw inputs, (B, D) each, of the layers up to it."""
        known = torch.cat(list(parts), dim=1)
        x_BD = self.input_scaling(F.pad(known, (0, self.d_in - known.shape[1])))
        codes = self._select(x_BD, layers=part + 1)
        output_B = self._decode(codes.values, codes.indices, part) + self.b_dec.split(self.output_parts)[part]
        before = sum(self.output_parts[:part])
        output_BO = F.pad(output_B, (before, self.d_out - before - output_B.shape[1]))
        return self.target_scaling.undo(output_BO).split(self.output_parts, dim=1)[part]

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        if target is None:
            raise ValueError("A cross-layer transcoder has a target: give the outputs of all layers side by side.")
        x_BD, target_BO = self.input_scaling(x), self.target_scaling(target)
        revives = self.config.auxk_weight > 0
        dead = self.dead_latents.of(self.rows_since_fired, self.config.dead_after_rows) if revives else None
        values_BK, indices_BK, dead_pre_BA = self._select(x_BD, dead)
        rebuilt, revived = [], []
        if dead is not None and dead_pre_BA is not None:
            dead_BA = self._keep_dead(dead.only(dead_pre_BA), dead)
        for layer, decoder in enumerate(self.decoders):
            # slots come layer by layer, so that those that write here are the first
            slots = slice(0, indices_BK.shape[1] // self.layers * (layer + 1))
            if dead is None:
                rebuilt.append(ops.decode(values_BK[:, slots], indices_BK[:, slots], decoder))
                continue
            first = sum(dead.lengths[: layer + 1])
            output, of_dead = ops.decode_also(
                values_BK[:, slots], indices_BK[:, slots], decoder, dead_BA[:, :first], dead.latents[:first]
            )
            rebuilt.append(output)
            revived.append(of_dead)
        output_BO = torch.cat(rebuilt, dim=1) + self.b_dec
        error_BO = target_BO - output_BO
        mse = error_BO.square().mean()
        total, terms = mse, {"mse": mse.detach()}
        if dead is not None:
            residual_BO = error_BO.detach() - torch.cat(revived, dim=1)
            auxk = dead.term(residual_BO.square().mean() / ops.mean_over_rows(mse.detach()).clamp_min(LEAST))
            terms["auxk"] = auxk.detach()
            total = total + self.config.auxk_weight * auxk
        codes = Codes(indices_BK, values_BK.detach(), self.d_sae)
        return Loss(total, terms, codes, self.target_scaling.undo(output_BO.detach(), x))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """A transcoder of each layer by itself: rows along examples, its encoder scaled to fit the first rows best."""
        if target is None:
            raise ValueError("A cross-layer transcoder begins with a target.")
        self.input_scaling.fit(x, control)
        self.target_scaling.fit(target, control)
        self.spread_of_parts.copy_(torch.stack([spread(part) for part in target.split(self.output_parts, dim=1)]))
        x_BD, target_BO = self.input_scaling(x), self.target_scaling(target)
        self.b_dec.copy_(target_BO.mean(dim=0))
        for layer, (of_input, of_target, bias) in enumerate(
            zip(
                x_BD.split(self.input_parts, dim=1),
                target_BO.split(self.output_parts, dim=1),
                self.b_dec.split(self.output_parts),
                strict=True,
            )
        ):
            rows = slice(layer * self.latents_of_layer, (layer + 1) * self.latents_of_layer)
            examples_S = torch.randint(len(x), (self.latents_of_layer,), generator=generator)
            read_SD = towards(of_input, examples_S, unit_directions(len(examples_S), of_input.shape[1], generator))
            written_SO = towards(of_target, examples_S, unit_directions(len(examples_S), of_target.shape[1], generator))
            self.W_enc[rows], self.decoders[layer][rows] = read_SD, written_SO
            self.b_enc[rows] = -read_SD @ of_input.mean(dim=0)
            codes = ops.encode_topk(of_input, self.W_enc[rows], self.b_enc[rows], self.config.k)
            output = ops.decode(codes.values, codes.indices, written_SO)
            fit = (output * (of_target - bias)).sum() / output.square().sum().clamp_min(LEAST)
            if fit > 0:
                self.W_enc[rows] *= fit
                self.b_enc[rows] *= fit

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Decoder rows, each of all layers together, lose the component of their gradient along themselves."""
        pairs = [(decoder, decoder.grad) for decoder in self.decoders if decoder.grad is not None]
        along_S = self._total([torch.linalg.vecdot(grad, decoder) for decoder, grad in pairs])
        for decoder, grad in pairs:
            grad.addcmul_(decoder, along_S[: len(decoder), None], value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        norm_S = self._total([decoder.square().sum(dim=1) for decoder in self.decoders]).sqrt().clamp_min(LEAST)
        for decoder in self.decoders:
            decoder.div_(norm_S[: len(decoder), None])

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations, folded in float64; a latent's decoder rows are then raw directions."""
        folded = self.copy().double()
        read, written = folded.input_scaling, folded.target_scaling
        if isinstance(read, MeanSquareByPart) and isinstance(written, MeanSquareByPart):
            for rows, scale in zip(
                folded.W_enc.split(self.latents_of_layer), read.scale.split(self.input_parts), strict=True
            ):
                rows.div_(scale)
            for decoder, scale in zip(folded.decoders, written.scale.split(self.output_parts), strict=True):
                decoder.mul_(scale)
            folded.b_dec.mul_(written.scale)
        folded.drop_scaling()
        return folded.to(self.W_enc.dtype)

    def _select(self, x_BD: Tensor, dead: Dead | None = None, layers: int | None = None) -> TopKCodes:
        """The k largest of each of the first layers, layer by layer, and the dead latents' pre-activations besides."""
        layers = self.layers if layers is None else layers
        found = []
        for layer, (part, rows_SD, bias_S) in enumerate(
            zip(
                x_BD.split(self.input_parts, dim=1)[:layers],
                self.W_enc.split(self.latents_of_layer)[:layers],
                self.b_enc.split(self.latents_of_layer)[:layers],
                strict=True,
            )
        ):
            first = layer * self.latents_of_layer
            also = None if dead is None else dead.latents.split(dead.lengths)[layer] - first
            values, indices, pre = ops.encode_topk(part, rows_SD, bias_S, self.config.k, None, also)
            found.append(TopKCodes(values, indices + first, pre))
        return TopKCodes(
            torch.cat([codes.values for codes in found], dim=1),
            torch.cat([codes.indices for codes in found], dim=1),
            None if dead is None else torch.cat([codes.also for codes in found if codes.also is not None], dim=1),
        )

    def _keep_dead(self, dead_pre_BA: Tensor, dead: Dead) -> Tensor:
        """(B, A) of each layer's dead latents those that AuxK takes."""
        most = self.config.k_aux or max(1, self.input_parts[0] // 2)
        return torch.cat([ops.keep_topk(pre, most) for pre in dead_pre_BA.split(dead.lengths, dim=1)], dim=1)

    def _decode(self, values_BK: Tensor, indices_BK: Tensor, target: int) -> Tensor:
        """(B, width) what codes in any order of slots write at a target layer, scaled, without bias."""
        decoder = self.decoders[target]
        writes_BK = indices_BK < len(decoder)
        return ops.decode(values_BK * writes_BK, indices_BK * writes_BK, decoder)

    def _total(self, of_rows: Sequence[Tensor]) -> Tensor:
        """(S,) the sum over decoders of a number for each of their rows."""
        total_S = self.b_enc.new_zeros(self.d_sae)
        for one in of_rows:
            total_S[: len(one)] += one
        return total_S
