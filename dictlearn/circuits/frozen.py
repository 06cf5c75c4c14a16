"""A language model on one prompt with everything that is not linear held still.

Attention patterns and the norms' denominators keep the values they had in the model's own run; MLP outputs are given
vectors. What is left between a vector written into the residual stream and whatever reads it later is a linear map,
with biases. This file holds those maps and their transposes. Attention is not explained here: why a head looks where it
looks stays outside.

Whatever the model computed that these maps do not reproduce (a norm that rounds to single precision, say) is kept per
site as `rounding`: the model's output minus ours. `freeze` refuses a model in which that is more than rounding.

Axes: B vectors in a batch, P positions, T destination positions, S source positions, D residual width, H heads, E head
width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_store.errors import UserError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# The norms of Hugging Face's Llama compute in float32 whatever the model's type: a float64 model is off by 1e-7.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class FrozenNorm:
    """LayerNorm or RMSNorm with its denominators fixed: ``centre(x) / scale * gain + bias``.

    Attributes:
        scale_P: the denominators.
        rounding_PD: the model's output minus this formula.
    """

    scale_P: Tensor
    gain_D: Tensor
    bias_D: Tensor
    centred: bool
    rounding_PD: Tensor

    def push(self, x_BPD: Tensor) -> Tensor:
        """The linear part, for vectors in front of the norm."""
        if self.centred:
            x_BPD = x_BPD - x_BPD.mean(dim=-1, keepdim=True)
        return x_BPD / self.scale_P[: x_BPD.shape[-2], None] * self.gain_D

    def pull(self, v_BPD: Tensor) -> Tensor:
        """The transpose of `push`, for directions behind the norm at positions 0, 1, ..."""
        return self._pull(v_BPD, self.scale_P[: v_BPD.shape[-2]])

    def pull_at(self, v_BD: Tensor, positions_B: Tensor) -> Tensor:
        """The transpose of `push`, each direction at a position of its own."""
        return self._pull(v_BD, self.scale_P[positions_B])

    def _pull(self, v: Tensor, scale: Tensor) -> Tensor:
        v = v * self.gain_D / scale[:, None]
        return v - v.mean(dim=-1, keepdim=True) if self.centred else v

    def without_gain(self, normalized_PD: Tensor, input_PD: Tensor) -> FrozenNorm:
        """The same norm read before its gain and bias are applied."""
        gain_D, bias_D = torch.ones_like(self.gain_D), torch.zeros_like(self.bias_D)
        bare = FrozenNorm(self.scale_P, gain_D, bias_D, self.centred, torch.zeros_like(input_PD))
        return replace(bare, rounding_PD=normalized_PD - bare.push(input_PD))


@dataclass(frozen=True)
class FrozenAttention:
    """One attention layer with its pattern fixed; key/value heads are repeated so that every query head has its own.

    Attributes:
        pattern_HTS: rows are destinations.
        values_SHE: the values the model computed, bias included.
        rounding_PD: the model's output minus this formula.
    """

    pattern_HTS: Tensor
    W_V_HDE: Tensor
    b_V_HE: Tensor
    W_O_HED: Tensor
    b_O_D: Tensor
    values_SHE: Tensor
    rounding_PD: Tensor

    def push(self, x_BPD: Tensor) -> Tensor:
        """The linear part, for vectors behind the layer's norm."""
        values_BSHE = torch.einsum("bsd,hde->bshe", x_BPD, self.W_V_HDE)
        mixed_BTHE = torch.einsum("hts,bshe->bthe", self.pattern_HTS, values_BSHE)
        return torch.einsum("bthe,hed->btd", mixed_BTHE, self.W_O_HED)

    def pull(self, g_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `push`, for directions at positions 0, 1, ...; and what the value biases bring.

        Returns:
            (B, S, D) directions behind the norm, and (B,) the value biases' contribution through the pattern.
        """
        batch, n, width = g_BTD.shape
        heads, d_head = self.b_V_HE.shape
        out = self.W_O_HED.reshape(heads * d_head, width)
        asked_BTHE = (g_BTD @ out.T).view(batch, n, heads, d_head)
        # One matrix product per head, with every direction and head coordinate side by side.
        asked_H_T_BE = asked_BTHE.permute(2, 1, 0, 3).reshape(heads, n, batch * d_head)
        asked_H_S_BE = self.pattern_HTS[:, :n, :n].transpose(1, 2) @ asked_H_T_BE
        asked_BSHE = asked_H_S_BE.view(heads, n, batch, d_head).permute(2, 1, 0, 3)
        bias_B = (asked_BSHE.sum(dim=1) * self.b_V_HE).sum(dim=(1, 2))
        into = self.W_V_HDE.permute(0, 2, 1).reshape(heads * d_head, width)
        return asked_BSHE.reshape(batch, n, heads * d_head) @ into, bias_B

    def by_head(self, g_BD: Tensor, positions_B: Tensor) -> Tensor:
        """(B, H, S): what each head brings from each source to a direction just behind this layer at one position."""
        asked_BHE = torch.einsum("bd,hed->bhe", g_BD, self.W_O_HED)
        return self.pattern_HTS[:, positions_B].transpose(0, 1) * torch.einsum(
            "bhe,she->bhs", asked_BHE, self.values_SHE
        )


@dataclass(frozen=True)
class FrozenModel:
    """One prompt's run of a language model, ready to be traced.

    Attributes:
        token_ids: (P,) the prompt.
        embedding_PD: token embeddings.
        position_embedding_PD: learned positional embeddings, or None.
        first_norms, attentions, second_norms: one per layer.
        mlp_out_LPD: what the MLPs wrote.
        parallel: whether an MLP reads the residual stream in front of its layer's attention (GPT-J, GPT-NeoX).
        logits_V: the model's next-token logits after the last position.
    """

    token_ids: Tensor
    embedding_PD: Tensor
    position_embedding_PD: Tensor | None
    first_norms: list[FrozenNorm]
    attentions: list[FrozenAttention]
    second_norms: list[FrozenNorm]
    mlp_out_LPD: Tensor
    parallel: bool
    final_norm: FrozenNorm
    W_U_DV: Tensor
    b_U_V: Tensor
    logits_V: Tensor

    @property
    def layers(self) -> int:
        return len(self.attentions)

    @property
    def positions(self) -> int:
        return len(self.token_ids)

    @property
    def heads(self) -> int:
        return len(self.attentions[0].b_V_HE)

    def table(self, kind: str) -> Tensor:
        """(P, D) embeddings of kind "token" or "position"."""
        if kind == "token":
            return self.embedding_PD
        assert self.position_embedding_PD is not None
        return self.position_embedding_PD


@torch.no_grad()
def freeze(
    model: TransformerBridge, token_ids: list[int], dtype: torch.dtype | None = None
) -> tuple[FrozenModel, dict[str, Tensor]]:
    """Run ``model`` on one prompt and keep what is needed to trace it.

    Args:
        model: a TransformerBridge whose weights were not folded or otherwise processed.
        token_ids: the prompt, BOS included when the model wants one.
        dtype: what to compute in; the model's own type when not given (float32 for half precision).

    Returns:
        The frozen model, and the activations of the hooks a transcoder may read or replace, (P, d) each.

    Raises:
        UserError: when the model is built in a way that these maps do not describe.
    """
    own = model.W_U.dtype
    dtype = dtype or (own if own in (torch.float32, torch.float64) else torch.float32)
    tolerance = ROUNDING.get(own, 5e-2)
    wanted = ["hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_post", "hook_pattern", "hook_attn_out"]
    wanted += ["ln1", "ln2", "ln_final", "mlp.hook_in", "mlp.hook_out", "hook_mlp_out"]
    logits, cache = model.run_with_cache(
        torch.tensor([token_ids], device=model.W_U.device), names_filter=lambda name: any(w in name for w in wanted)
    )
    seen = {name: value[0].detach().to("cpu", dtype) for name, value in cache.items() if value.is_floating_point()}
    blocks = [f"blocks.{layer}" for layer in range(model.cfg.n_layers)]
    needed = [
        f"{block}.{site}"
        for block in blocks
        for site in ("hook_resid_pre", "ln1.hook_out", "attn.hook_pattern", "hook_attn_out", "ln2.hook_out")
    ]
    needed += [f"{block}.hook_mlp_out" for block in blocks] + ["hook_embed", "ln_final.hook_out"]
    missing = [name for name in needed if name not in seen]
    if missing:
        raise UserError(
            f"Circuits cannot be traced in {model.cfg.model_name!r}: it has no {missing[0]!r}; "
            "models built like GPT-2, Llama or GPT-NeoX can be."
        )
    positions = seen.get("hook_pos_embed")
    if positions is not None:
        positions = positions.expand_as(seen["hook_embed"]).contiguous()
    streams = [seen[f"{block}.hook_resid_pre"] for block in blocks] + [seen[f"{blocks[-1]}.hook_resid_post"]]
    parallel = bool(model.cfg.parallel_attn_mlp)

    first_norms, attentions, second_norms = [], [], []
    for layer, block in enumerate(blocks):
        bridge = model.blocks[layer]
        first_norms.append(_norm(bridge.ln1, seen, f"{block}.ln1", streams[layer]))
        attentions.append(_attention(bridge.attn, seen, block, dtype))
        mlp_reads = streams[layer] if parallel else streams[layer] + seen[f"{block}.hook_attn_out"]
        second_norms.append(_norm(bridge.ln2, seen, f"{block}.ln2", mlp_reads))
    frozen = FrozenModel(
        token_ids=torch.tensor(token_ids),
        embedding_PD=seen["hook_embed"],
        position_embedding_PD=positions,
        first_norms=first_norms,
        attentions=attentions,
        second_norms=second_norms,
        mlp_out_LPD=torch.stack([seen[f"{block}.hook_mlp_out"] for block in blocks]),
        parallel=parallel,
        final_norm=_norm(model.ln_final, seen, "ln_final", streams[-1]),
        W_U_DV=model.W_U.detach().to("cpu", dtype),
        b_U_V=model.b_U.detach().to("cpu", dtype),
        logits_V=logits[0, -1].detach().to("cpu", dtype),
    )
    _check(frozen, seen, streams, tolerance, model.cfg.model_name)
    return frozen, seen


def _norm(bridge: Any, seen: dict[str, Tensor], name: str, input_PD: Tensor) -> FrozenNorm:
    scale_P = seen[f"{name}.hook_scale"].squeeze(-1)
    gain_D = bridge.weight.detach().to("cpu", input_PD.dtype)
    if bridge.uses_weight_offset:
        gain_D = gain_D + 1
    bias = None if bridge.uses_rms_norm else getattr(bridge, "bias", None)
    bias_D = torch.zeros_like(gain_D) if bias is None else bias.detach().to("cpu", input_PD.dtype)
    norm = FrozenNorm(scale_P, gain_D, bias_D, not bridge.uses_rms_norm, torch.zeros_like(input_PD))
    return replace(norm, rounding_PD=seen[f"{name}.hook_out"] - (norm.push(input_PD) + bias_D))


def _attention(bridge: Any, seen: dict[str, Tensor], block: str, dtype: torch.dtype) -> FrozenAttention:
    W_O_HED = bridge.W_O.detach().to("cpu", dtype)
    W_V_HDE, b_V = bridge.W_V.detach().to("cpu", dtype), bridge.b_V
    heads, d_head, width = W_O_HED.shape
    shared_by = heads // len(W_V_HDE)
    W_V_HDE = W_V_HDE.repeat_interleave(shared_by, dim=0)
    b_V_HE = torch.zeros(heads, d_head, dtype=dtype)
    if b_V is not None:
        b_V_HE = b_V.detach().to("cpu", dtype).repeat_interleave(shared_by, dim=0)
    b_O_D = torch.zeros(width, dtype=dtype) if bridge.b_O is None else bridge.b_O.detach().to("cpu", dtype)
    pattern_HTS = seen[f"{block}.attn.hook_pattern"]
    values_SHE = torch.einsum("sd,hde->she", seen[f"{block}.ln1.hook_out"], W_V_HDE) + b_V_HE
    mixed_THE = torch.einsum("hts,she->the", pattern_HTS, values_SHE)
    output_TD = torch.einsum("the,hed->td", mixed_THE, W_O_HED) + b_O_D
    rounding_PD = seen[f"{block}.hook_attn_out"] - output_TD
    return FrozenAttention(pattern_HTS, W_V_HDE, b_V_HE, W_O_HED, b_O_D, values_SHE, rounding_PD)


def _check(
    frozen: FrozenModel, seen: dict[str, Tensor], streams: list[Tensor], tolerance: float, model_name: str
) -> None:
    """Every piece of the model's run must be what the maps say, up to the rounding of the model's type."""
    embedded = frozen.embedding_PD
    if frozen.position_embedding_PD is not None:
        embedded = embedded + frozen.position_embedding_PD
    pieces = [("the embedding", embedded, streams[0])]
    for layer in range(frozen.layers):
        block = f"blocks.{layer}"
        added = streams[layer] + seen[f"{block}.hook_attn_out"] + frozen.mlp_out_LPD[layer]
        attention = frozen.attentions[layer]
        pieces += [
            (f"{block}'s residual stream", added, streams[layer + 1]),
            (f"{block}.attn", seen[f"{block}.hook_attn_out"] - attention.rounding_PD, seen[f"{block}.hook_attn_out"]),
        ]
        for name, norm in ((f"{block}.ln1", frozen.first_norms[layer]), (f"{block}.ln2", frozen.second_norms[layer])):
            pieces.append((name, seen[f"{name}.hook_out"] - norm.rounding_PD, seen[f"{name}.hook_out"]))
        if f"{block}.mlp.hook_in" in seen:
            pieces.append((f"{block}.mlp's input", seen[f"{block}.ln2.hook_out"], seen[f"{block}.mlp.hook_in"]))
    final = seen["ln_final.hook_out"]
    pieces.append(("ln_final", final - frozen.final_norm.rounding_PD, final))
    pieces.append(("the unembedding", final[-1] @ frozen.W_U_DV + frozen.b_U_V, frozen.logits_V))
    for name, ours, models in pieces:
        if not (ours - models).abs().max() <= tolerance * models.abs().max():
            raise UserError(
                f"Circuits cannot be traced in {model_name!r}: {name} is not computed the way GPT-2, Llama and "
                f"GPT-NeoX compute it (off by {float((ours - models).abs().max() / models.abs().max()):.1e}); "
                "load the model without weight processing, or choose another."
            )
