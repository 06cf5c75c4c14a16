"""What each attention head adds to the residual stream, and what the model loses without it.

`head_outputs` gives the features for head_identification.py. `head_effects` is the truth they are judged by, measured
by intervening on the model, one head at a time, and never by looking at codes:

- ablation: at every position the head's z is replaced by its mean over the real positions of all prompts, both classes;
- patching: at every position it is replaced by what it is in the negative of the pair.

Either is read on positives as the loss of the answer's logit above the mean logit, as a share of what separates the
positives from the negatives. Log-probabilities would saturate in a model that is sure of itself. The two disagree on
heads that do the same in both classes (a head that always looks at the previous token): ablation counts them, patching
does not.

Legend: N pairs, T tokens, H heads of all layers (layer-major), E head width, D residual width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from activation_store.progress import NoProgress, Progress

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from dictlearn.circuits.tasks import TokenPairs

KNOWN_FROM = 0.05
"""A head counts as known when its effect is at least this share, of either sign. Fixed before looking at any
ranking."""

PROMPTS_PER_BATCH = 64


def z_hooks(model: TransformerBridge) -> list[str]:
    return [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]


def output_matrices(model: TransformerBridge) -> Tensor:
    """(L, H, E, D): each head's own part of the output projection; heads that share keys and values have one each."""
    return torch.stack([block.attn.W_O.detach().float() for block in model.blocks])


def heads_per_layer(model: TransformerBridge) -> int:
    return int(model.cfg.n_heads)


@torch.no_grad()
def head_outputs(model: TransformerBridge, tokens_NT: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """(N, H, D) float32: what each head writes to the residual stream, averaged over a prompt's real positions.

    The output projection's bias belongs to no head and is left out. Averaging and projecting are linear, so z is
    averaged first.
    """
    W_O_LHED = output_matrices(model)
    parts = []
    for batch in _batches(len(tokens_NT)):
        z_by_layer = _read_z(model, torch.from_numpy(tokens_NT[batch]))
        real_NT = _real_positions(lengths_N[batch], tokens_NT.shape[1])
        z_LNHE = torch.stack([_mean_over(z_NTHE, real_NT) for z_NTHE in z_by_layer])
        parts.append(torch.einsum("lnhe,lhed->nlhd", z_LNHE, W_O_LHED).flatten(1, 2))
    return torch.cat(parts).numpy()


@dataclass(frozen=True)
class HeadEffects:
    """Effects as shares of `gap`, the answer's logit (above the mean logit) in positives minus that in negatives.

    Attributes:
        ablation_H, patching_H: what is lost; negative for heads that work against the answer.
        gap: in logits; close to 0, or negative, in a model that does not do the task.
        accuracy: share of positives whose answer is the most likely token.
        negative_accuracy: the same token, in negatives.
    """

    ablation_H: np.ndarray
    patching_H: np.ndarray
    gap: float
    accuracy: float
    negative_accuracy: float


@torch.no_grad()
def head_effects(model: TransformerBridge, pairs: TokenPairs, progress: Progress | None = None) -> HeadEffects:
    """Run the positives once for each head and way of intervening: 2 H + 5 forward passes over all prompts."""
    layers, heads = model.cfg.n_layers, heads_per_layer(model)
    mean_LHE = _mean_z(model, pairs)
    names = z_hooks(model)
    clean_N, right_N = _answers(model, pairs, pairs.positive_NT)
    other_N, right_in_negatives_N = _answers(model, pairs, pairs.negative_NT)
    ablated_LHN = torch.empty(layers, heads, len(pairs))
    patched_LHN = torch.empty(layers, heads, len(pairs))
    with (progress or NoProgress()).task("Ablating and patching heads", total=layers * heads, unit="heads") as task:
        for batch in _batches(len(pairs)):
            negative_z = _read_z(model, torch.from_numpy(pairs.negative_NT[batch]))
            share = len(pairs.answers_N[batch]) / len(pairs)
            for layer in range(layers):
                for head in range(heads):
                    for results, value in (
                        (ablated_LHN, mean_LHE[layer, head]),
                        (patched_LHN, negative_z[layer][:, :, head]),
                    ):
                        with model.hooks(fwd_hooks=[(names[layer], _replace_head(head, value))]):
                            results[layer, head, batch], _ = _answers(model, pairs, pairs.positive_NT, batch)
                    task.advance(share)
    gap = float((clean_N - other_N).mean())
    lost = [((clean_N - results).mean(dim=-1) / gap).flatten().numpy() for results in (ablated_LHN, patched_LHN)]
    return HeadEffects(lost[0], lost[1], gap, float(right_N.float().mean()), float(right_in_negatives_N.float().mean()))


def known_heads(effects_H: np.ndarray) -> np.ndarray:
    """Which heads matter."""
    return np.abs(effects_H) >= KNOWN_FROM


def _replace_head(head: int, value: Tensor) -> Callable:
    """A hook function that puts ``value`` (broadcast over prompts and positions) in place of one head's z."""

    def hook_function(z_NTHE: Tensor, hook: object) -> Tensor:
        replaced = z_NTHE.clone()
        replaced[:, :, head] = value
        return replaced

    return hook_function


def _answers(
    model: TransformerBridge, pairs: TokenPairs, tokens_NT: np.ndarray, batch: slice | None = None
) -> tuple[Tensor, Tensor]:
    """(N,) the answer's logit above the mean logit at the last real position, and whether it is the largest."""
    logits, right = [], []
    for part in [batch] if batch else _batches(len(pairs)):
        logits_NTV = model(torch.from_numpy(tokens_NT[part]), return_type="logits", use_cache=False)
        n = torch.arange(len(logits_NTV))
        last_NV = logits_NTV[n, torch.from_numpy(pairs.lengths_N[part]) - 1].float()
        answers_N = torch.from_numpy(pairs.answers_N[part])
        logits.append(last_NV[n, answers_N] - last_NV.mean(dim=-1))
        right.append(last_NV.argmax(dim=-1) == answers_N)
    return torch.cat(logits), torch.cat(right)


def _mean_z(model: TransformerBridge, pairs: TokenPairs) -> Tensor:
    """(L, H, E): mean over the real positions of all prompts, positives and negatives."""
    total: Tensor | float = 0.0
    for tokens_NT in (pairs.positive_NT, pairs.negative_NT):
        for batch in _batches(len(pairs)):
            real_NT = _real_positions(pairs.lengths_N[batch], tokens_NT.shape[1])
            z_by_layer = _read_z(model, torch.from_numpy(tokens_NT[batch]))
            total = total + torch.stack([z_NTHE[real_NT].double().sum(dim=0) for z_NTHE in z_by_layer])
    assert isinstance(total, Tensor)
    return (total / (2 * int(pairs.lengths_N.sum()))).float()


def _read_z(model: TransformerBridge, tokens_NT: Tensor) -> list[Tensor]:
    """(N, T, H, E) for each layer."""
    seen: dict[str, Tensor] = {}

    def remember(z_NTHE: Tensor, hook: object, name: str) -> None:
        seen[name] = z_NTHE.detach().clone()

    hooks = [(name, lambda z, hook, name=name: remember(z, hook, name)) for name in z_hooks(model)]
    with model.hooks(fwd_hooks=hooks):
        model(tokens_NT, return_type=None, use_cache=False)
    return [seen[name] for name in z_hooks(model)]


def _real_positions(lengths_N: np.ndarray, tokens: int) -> Tensor:
    return torch.from_numpy(np.arange(tokens) < lengths_N[:, None])


def _mean_over(z_NTHE: Tensor, real_NT: Tensor) -> Tensor:
    """(N, H, E): the mean of z over each prompt's real positions."""
    weights_NT = real_NT / real_NT.sum(dim=1, keepdim=True)
    return torch.einsum("nthe,nt->nhe", z_NTHE.float(), weights_NT)


def _batches(count: int) -> Iterator[slice]:
    for start in range(0, count, PROMPTS_PER_BATCH):
        yield slice(start, min(start + PROMPTS_PER_BATCH, count))
