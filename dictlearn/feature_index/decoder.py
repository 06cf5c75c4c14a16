"""What the decoder alone says of each latent: the latents that write alike, and the tokens whose logits it moves.

Logits. Row s of the decoder is what one unit of latent s adds to the residual stream. On its way to the logits that
meets everything in between: later layers, the final norm, the unembedding. Kept here is the *direct effect*, with the
later layers left out and the norm's denominator, which depends on the whole stream, taken as 1:

    effect[s, v] = sum_o (W_dec[s, o] - mean of the row, for LayerNorm) gain[o] W_U[o, v],  minus its mean over v

A constant added to all logits changes no probability, hence the mean over the vocabulary is taken out. Divide by the
length scale of the residual stream in front of the final norm to get logits; the order of tokens is right as it stands.

Axes: S latents, O output width, V vocabulary, T listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.feature_index.spec import LISTED

if TYPE_CHECKING:
    from activation_store.harvest.language_model import ModelSpec

BLOCK_VALUES = 1 << 22
"""Products in memory at a time: 16 MiB in float32."""

WRITES_TO_STREAM = re.compile(
    r"(blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out|(attn|mlp)\.hook_out|hook_in|hook_out)"
    r"|hook_embed|hook_pos_embed|embed\.hook_out|pos_embed\.hook_out)"
)


def neighbours(W_dec_SO: Tensor, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """The latents with the most similar decoder rows, most similar first: ``(latents (S, T) int32, cosines (S, T))``.

    A row of zeros has cosine 0 with every other. With fewer than T other latents the rest is -1 and NaN.
    """
    unit_SO = F.normalize(W_dec_SO.float(), dim=1)
    S = len(unit_SO)
    listed = min(LISTED, S - 1)
    latents, cosines = np.full((S, LISTED), -1, np.int32), np.full((S, LISTED), np.nan, np.float32)
    block = max(1, BLOCK_VALUES // S)
    for start in range(0, S, block):
        products_BS = unit_SO[start : start + block] @ unit_SO.T
        own = torch.arange(len(products_BS))
        products_BS[own, start + own] = -torch.inf
        top = products_BS.topk(listed, dim=1)
        stop = start + len(products_BS)
        latents[start:stop, :listed] = top.indices.numpy()
        cosines[start:stop, :listed] = top.values.clamp(-1, 1).numpy()
        advance(len(products_BS))
    return latents, cosines


@dataclass(frozen=True)
class Unembedding:
    """The end of a language model.

    Attributes:
        gain_O: the final norm's gain; ones where there is no norm.
        centres: whether that norm subtracts the mean over O (LayerNorm does, RMSNorm does not).
        W_U_OV: the unembedding, of the tokens in ``token_ids_V``.
        token_ids_V: the tokens that the tokenizer knows, ascending.
    """

    gain_O: Tensor
    centres: bool
    W_U_OV: Tensor
    token_ids_V: np.ndarray


def load_unembedding(spec: ModelSpec, known_V: np.ndarray) -> Unembedding:
    """Load the language model and keep its end. ``known_V`` (vocabulary,) says which tokens exist.

    Raises:
        UserError: the model cannot be loaded.
    """
    from activation_store.harvest.language_model import load_language_model

    model = load_language_model(spec)
    W_U_OV = model.W_U.detach().float().cpu()
    token_ids_V = np.flatnonzero(known_V[: W_U_OV.shape[1]])
    norm = getattr(model, "ln_final", None)
    weight = getattr(norm, "weight", None)
    gain_O = torch.ones(len(W_U_OV)) if weight is None else weight.detach().float().cpu()
    if getattr(norm, "uses_weight_offset", False):
        gain_O = gain_O + 1
    centres = norm is not None and not getattr(norm, "uses_rms_norm", False)
    return Unembedding(gain_O, centres, W_U_OV[:, torch.from_numpy(token_ids_V)].contiguous(), token_ids_V)


def logit_effects(
    W_dec_SO: Tensor, end: Unembedding, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``(top tokens, top values, bottom tokens, bottom values)``, each (S, T), the strongest first; -1 and NaN pad."""
    S, V = len(W_dec_SO), end.W_U_OV.shape[1]
    listed = min(LISTED, V)
    tokens = [np.full((S, LISTED), -1, np.int32) for _ in range(2)]
    values = [np.full((S, LISTED), np.nan, np.float32) for _ in range(2)]
    mean_O = end.W_U_OV.mean(dim=1)
    block = max(1, BLOCK_VALUES // V)
    for start in range(0, S, block):
        written_BO = W_dec_SO[start : start + block].float()
        if end.centres:
            written_BO = written_BO - written_BO.mean(dim=1, keepdim=True)
        scaled_BO = written_BO * end.gain_O
        effects_BV = scaled_BO @ end.W_U_OV - (scaled_BO @ mean_O)[:, None]
        stop = start + len(effects_BV)
        for which, largest in enumerate((True, False)):
            found = effects_BV.topk(listed, dim=1, largest=largest)
            tokens[which][start:stop, :listed] = end.token_ids_V[found.indices.numpy()]
            values[which][start:stop, :listed] = found.values.numpy()
        advance(len(effects_BV))
    return tokens[0], values[0], tokens[1], values[1]


def logits_in_words(hook_out: str, wanted: bool, end: Unembedding | None) -> str:
    """What the logits of an index are, or why it has none."""
    if not wanted:
        return "Not computed: the index was made with --no-logits."
    if end is None:
        return f"Not defined: {hook_out} does not write into the residual stream."
    norm = "LayerNorm's centring and gain" if end.centres else "the final norm's gain"
    return (
        f"Direct effect of one unit of activation on the logits: decoder row, {norm}, unembedding; later layers left "
        "out, the norm's denominator taken as 1, the mean over the vocabulary subtracted."
    )


def writes_to_stream(hook: str) -> bool:
    """Whether what is written at ``hook`` is added to the residual stream as it is."""
    return WRITES_TO_STREAM.fullmatch(hook) is not None
