"""Continuations of prompts, steered and not, and how likely the unsteered model finds them.

Sample s of prompt b draws the same random numbers whether it is steered or not, so that what differs between the two is
the steering, and a strength of 0 changes nothing.

Fluency is the mean natural log-probability per token of a continuation under the *unsteered* model, in nats. It is no
judge of language: text that repeats itself is likely, and text about another subject than the prompt's is not.

Axes: B prompts, S samples, T positions, N new tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activation_store.seeds import numpy_stream
from dictlearn.steering.directions import Direction
from dictlearn.steering.edit import ROWS_AT_ONCE, Padded, device_of, steer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Sampling:
    """How to draw continuations: of the ``top_k`` likeliest tokens (0: of all), as many as it takes to reach ``top_p``.

    ``temperature`` divides the logits before that. Each of ``samples`` has ``tokens`` tokens; none ends a text.
    """

    samples: int = 1
    tokens: int = 50
    temperature: float = 1.0
    top_k: int = 30
    top_p: float = 0.3
    seed: int = 0


@torch.no_grad()
def continuations(
    model: TransformerBridge,
    prompts: Padded,
    sampling: Sampling,
    direction: Direction | None = None,
    alpha: float = 0.0,
) -> Tensor:
    """(S, B, N) int64 token ids; steered at every position, the prompt's and the new ones', where there is a direction.

    All positions are computed anew for each token.
    """
    S, B, N = sampling.samples, len(prompts), sampling.tokens
    drawn = torch.from_numpy(numpy_stream(sampling.seed, "continuations").random((S, B, N)))
    found = []
    for first in range(0, S * B, ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        lengths = prompts.lengths.repeat(S)[rows]
        tokens = torch.nn.functional.pad(prompts.tokens.repeat(S, 1)[rows], (0, N))
        row = torch.arange(len(tokens))
        with nullcontext() if direction is None else steer(model, direction, alpha):
            for n in range(N):
                logits = model(tokens[:, : int(lengths.max()) + n].to(device_of(model)))
                tokens[row, lengths + n] = draw(
                    logits[row, lengths + n - 1].cpu(), sampling, drawn.flatten(0, 1)[rows, n]
                )
        found.append(torch.stack([tokens[row, lengths + n] for n in range(N)], dim=1))
    return torch.cat(found).unflatten(0, (S, B))


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B,) one token for each row of logits (B, V), by numbers (B,) in [0, 1)."""
    sorted_BV, order_BV = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        sorted_BV, order_BV = sorted_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    probability = sorted_BV.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    probability = probability * (before < sampling.top_p)  # the first that reaches top_p is the last to be kept
    reached = probability.cumsum(dim=-1)
    place = (reached <= uniform[:, None] * reached[:, -1:]).sum(dim=-1)
    return order_BV.gather(1, place[:, None]).squeeze(1)


@torch.no_grad()
def fluency(model: TransformerBridge, prompts: Padded, continued: Tensor) -> Tensor:
    """(S, B) mean natural log-probability per token of continuations (S, B, N) under the model as it is."""
    S, B, N = continued.shape
    found = torch.zeros(S, B, dtype=torch.float64)
    for b in range(B):
        prompt = prompts.tokens[b, : prompts.lengths[b]]
        for first in range(0, S, ROWS_AT_ONCE):
            new = continued[first : first + ROWS_AT_ONCE, b]
            tokens = torch.cat([prompt.expand(len(new), -1), new], dim=1).to(device_of(model))
            log_probs = model(tokens)[:, -N - 1 : -1].double().log_softmax(dim=-1).cpu()
            found[first : first + ROWS_AT_ONCE, b] = log_probs.gather(2, new[:, :, None]).mean(dim=(1, 2))
    return found
