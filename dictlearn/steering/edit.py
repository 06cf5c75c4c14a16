"""Add a direction at every position of a hook for as long as a block runs, and read what the next token would be.

    with steer(model, direction, 4.0):
        logits = model(tokens)

What is added goes to the activation as it is, never to a dictionary's reconstruction of it: nothing else changes.

Axes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.hook_names import check_editable
from dictlearn.steering.directions import Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ROWS_AT_ONCE = 32
"""Rows of a batch whose logits are in memory at a time: 130 MB at 20 positions and 50,000 tokens."""


@dataclass(frozen=True)
class Padded:
    """Token ids (B, T), padded on the right, where nothing before can see it; and the real length of each row (B,)."""

    tokens: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def repeat(self, times: int) -> Padded:
        """All rows, and all of them again, ``times`` in all."""
        return Padded(self.tokens.repeat(times, 1), self.lengths.repeat(times))


def padded(rows: Sequence[Sequence[int]]) -> Padded:
    """Rows of token ids, BOS included, of any lengths above 0."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    return Padded(tokens, lengths)


@contextmanager
def steer(model: TransformerBridge, direction: Direction, alpha: float | Tensor) -> Iterator[TransformerBridge]:
    """Add ``alpha`` times the unit direction at every position of its hook, the first included.

    Args:
        alpha: in the units of the activation; one number, or one for each row of the batch (B,).

    Raises:
        UserError: a hook that the model does not have or that cannot be edited, or one of another width.
    """
    check_editable(direction.hook)
    if direction.hook not in model.hook_dict:
        raise UserError(
            f"The model has no hook {direction.hook!r}; name one of its hooks, such as blocks.0.hook_mlp_out."
        )

    def add(activation: Tensor, hook: Any) -> Tensor:
        shape = activation.shape[2:]  # heads, when there are any, are one vector
        if shape.numel() != len(direction.unit):
            raise UserError(
                f"{direction.name} has {len(direction.unit)} values, an activation at {direction.hook} has "
                f"{shape.numel()}; choose the hook it is of."
            )
        alpha_B = torch.as_tensor(alpha, dtype=torch.float32).reshape(-1)
        added = alpha_B[:, None] * direction.unit
        return activation + added.reshape(len(alpha_B), 1, *shape).to(activation)

    with model.hooks(fwd_hooks=[(direction.hook, add)]):
        yield model


@torch.no_grad()
def next_token_log_probs(
    model: TransformerBridge, prompts: Padded, direction: Direction | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """(B, V) float64 natural log-probabilities of the token after each prompt's last, steered or as it is.

    Args:
        alpha: one strength, or one for each prompt (B,).
    """
    alpha_B = torch.as_tensor(alpha, dtype=torch.float32).expand(len(prompts))
    found = []
    for first in range(0, len(prompts), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        last = prompts.lengths[rows] - 1
        with nullcontext() if direction is None else steer(model, direction, alpha_B[rows]):
            logits = model(prompts.tokens[rows].to(device_of(model)))
        found.append(logits[torch.arange(len(last)), last].double().log_softmax(dim=-1).cpu())
    return torch.cat(found)


def device_of(model: TransformerBridge) -> torch.device:
    return next(model.parameters()).device
