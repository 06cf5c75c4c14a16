"""What the decoder alone says of each latent: the latents that write alike, and the tokens whose logits it moves.

Logits. Row s of the decoder is what one unit of latent s adds to the residual stream. On its way to the logits that
meets everything in between: later layers, the final norm, the unembedding. Kept here is the *direct effect*, with the
later layers left out and the norm's denominator, which depends on the whole stream, taken as 1:

    effect[s, v] = sum_o (W_dec[s, o] - mean of the row, for LayerNorm) gain[o] W_U[o, v],  minus its mean over v

A constant added to all logits changes no probability, hence the mean over the vocabulary is taken out. Divide by the
length scale of the residual stream in front of the final norm to get logits; the order of tokens is right as it stands.

Neurons. What a dictionary of ``mlp.hook_post`` rebuilds is a number for each neuron of an MLP, and a latent's row says
which neurons it is. They reach the stream through the MLP's output weights: row s of W_dec W_out then stands for the
row above, in models that add an MLP's output to the stream as it is.

Several hooks. What a latent writes to several places of one model reaches the end together: rows for what is added to
the stream (the outputs of attention and MLP) are summed. The stream itself, further up, is all that was added before,
so where it is rebuilt the last such row counts, and of the others those for what is added after it. Models that were
harvested into aligned stores have an end each, so that there is no one effect on logits.

Neighbours of several hooks are compared by their whole rows, each hook in units of its own spread, or else the hook
with the largest activations would decide.

Axes: S latents, O output width (of all hooks), M rebuilt hooks, V vocabulary, T listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.dictionaries.parts import norms_of_parts
from dictlearn.feature_index.spec import LISTED

if TYPE_CHECKING:
    from activation_store.harvest.language_model import ModelSpec
    from dictlearn.dictionaries.base import Dictionary

BLOCK_VALUES = 1 << 22
"""Products in memory at a time: 16 MiB in float32."""

PLACES_IN_BLOCK = (
    (True, re.compile(r"hook_resid_pre|hook_in")),
    (False, re.compile(r"hook_attn_out|attn\.hook_out")),
    (True, re.compile(r"hook_resid_mid")),
    (False, re.compile(r"hook_mlp_out|mlp\.hook_out")),
    (True, re.compile(r"hook_resid_post|hook_out")),
)
"""The hooks of a block that write to the residual stream, in order; and whether each is the stream itself, or what is
added to it."""

OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
NEURONS = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")
NORM_BEHIND_MLP = ("gemma2", "gemma3_text", "olmo2")
"""Layouts with a norm between an MLP and the stream: what a neuron adds depends on all the others."""
EMBEDDING = re.compile(r"hook_embed|hook_pos_embed|embed\.hook_out|pos_embed\.hook_out")


def evened(W_dec_SO: Tensor, dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """Decoder rows with each of several hooks in units of its spread, and their lengths in each hook.

    Returns:
        (S, O), and (S, M): the rows as they are and M = 0 where there is one hook.
    """
    parts = dictionary.output_parts
    if len(parts) == 1:
        return W_dec_SO, W_dec_SO.new_empty(len(W_dec_SO), 0)
    spread_M = getattr(dictionary, "spread_of_parts", torch.ones(len(parts))).cpu()
    W_even_SO = W_dec_SO / spread_M.repeat_interleave(torch.tensor(parts))
    return W_even_SO, norms_of_parts(W_even_SO, parts)


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


def top_neurons(W_dec_SO: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The neurons of largest weight in each row over neurons: ``(numbers (S, T) int32, weights (S, T) float32)``.

    Weights are those of the row at unit length, so that a square is a share; -1 and NaN where no other is above 0.
    """
    S, neurons = W_dec_SO.shape
    numbers, weights = np.full((S, LISTED), -1, np.int32), np.full((S, LISTED), np.nan, np.float32)
    unit_SO = F.normalize(W_dec_SO.float(), dim=1)
    found = unit_SO.abs().topk(min(LISTED, neurons), dim=1).indices
    listed = unit_SO.gather(1, found).numpy()
    numbers[:, : listed.shape[1]] = np.where(listed != 0, found.numpy(), -1)
    weights[:, : listed.shape[1]] = np.where(listed != 0, listed, np.nan)
    return numbers, weights


@dataclass(frozen=True)
class Unembedding:
    """The end of a language model.

    Attributes:
        gain_O: the final norm's gain; ones where there is no norm.
        centres: whether that norm subtracts the mean over O (LayerNorm does, RMSNorm does not).
        W_U_OV: the unembedding, of the tokens in ``token_ids_V``.
        token_ids_V: the tokens that the tokenizer knows, ascending.
        W_out_NO: what each neuron of one layer adds to the stream; None where no layer was named.
    """

    gain_O: Tensor
    centres: bool
    W_U_OV: Tensor
    token_ids_V: np.ndarray
    W_out_NO: Tensor | None = None


def load_unembedding(spec: ModelSpec, known_V: np.ndarray, neurons_of: int | None = None) -> Unembedding:
    """Load the language model and keep its end, and the output weights of the MLP of layer ``neurons_of``.

    ``known_V`` (vocabulary,) says which tokens exist.

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
    W_out_NO = None if neurons_of is None else model.W_out[neurons_of].detach().float().cpu()
    return Unembedding(gain_O, centres, W_U_OV[:, torch.from_numpy(token_ids_V)].contiguous(), token_ids_V, W_out_NO)


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


def logits_in_words(hooks_out: Sequence[str], wanted: bool, why_not: str | None, end: Unembedding | None) -> str:
    """What the logits of an index are, or why it has none."""
    if not wanted:
        return "Not computed: the index was made with --no-logits."
    if end is None:
        return f"Not defined: {why_not}."
    norm = "LayerNorm's centring and gain" if end.centres else "the final norm's gain"
    reaching = " + ".join(hooks_out[part] for part in reaching_the_end(hooks_out))
    row = "decoder row" if len(hooks_out) == 1 else f"decoder row at {reaching}"
    row += "" if end.W_out_NO is None else ", the MLP's output weights"
    return (
        f"Direct effect of one unit of activation on the logits: {row}, {norm}, unembedding; later layers left "
        "out, the norm's denominator taken as 1, the mean over the vocabulary subtracted."
    )


def why_no_logits(hooks_out: Sequence[str], aligned_stores: Sequence[str], layout: str) -> str | None:
    """Why no effect on logits is defined in a model of this layout, or None where one is."""
    if aligned_stores:
        return "the dictionary writes to the hooks of several models, and each has logits of its own"
    if neurons_of(hooks_out) is not None:
        return f"{layout} has a norm behind its MLPs" if layout in NORM_BEHIND_MLP else None
    elsewhere = [hook for hook in hooks_out if not writes_to_stream(hook)]
    return f"{elsewhere[0]} does not write into the residual stream" if elsewhere else None


def neurons_of(hooks_out: Sequence[str]) -> int | None:
    """The layer whose MLP's neurons are rebuilt, where that is the one hook; None for all others."""
    found = NEURONS.fullmatch(hooks_out[0]) if len(hooks_out) == 1 else None
    return None if found is None else int(found[1])


def writes_to_stream(hook: str) -> bool:
    """Whether what is written at ``hook`` is added to the residual stream as it is."""
    return _place(hook) is not None


def reaching_the_end(hooks_out: Sequence[str]) -> list[int]:
    """Which of several hooks that write to the stream have rows that the logits see: see the top of this file."""
    places = [place for hook in hooks_out if (place := _place(hook)) is not None]
    last_stream = max((where for where, is_stream in places if is_stream), default=None)
    return [part for part, (where, _) in enumerate(places) if last_stream is None or where >= last_stream]


def _place(hook: str) -> tuple[tuple[int, int], bool] | None:
    """``((block, place in the block), whether the stream itself is there)``; None for what is not of the stream."""
    if EMBEDDING.fullmatch(hook):
        return (-1, 0), False
    if (of_block := OF_BLOCK.fullmatch(hook)) is None:
        return None
    for place, (is_stream, names) in enumerate(PLACES_IN_BLOCK):
        if names.fullmatch(of_block[2]):
            return (int(of_block[1]), place), is_stream
    return None
