"""Which next tokens steering makes likelier, and which less likely.

Axes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenChange:
    """One next token before and after, means over prompts of its probability and of its natural log-probability."""

    token_id: int
    token: str
    probability_before: float
    probability_after: float
    log_probability_before: float
    log_probability_after: float


@dataclass(frozen=True)
class TokenChanges:
    """The tokens that were asked about, and those whose probability rose and fell most, most first."""

    watched: list[TokenChange]
    raised: list[TokenChange]
    lowered: list[TokenChange]


def token_changes(
    base_BV: Tensor, steered_BV: Tensor, text_of: Callable[[int], str], watched: Sequence[int] = (), listed: int = 5
) -> TokenChanges:
    """What became of the next token's log-probabilities (B, V).

    Args:
        text_of: token id -> its text.
        watched: ids of tokens to tell about in any case.
        listed: how many that rose, and how many that fell, to list at most.
    """
    means = [log_probs.mean(dim=0) for log_probs in (base_BV, steered_BV)]
    shares = [log_probs.exp().mean(dim=0) for log_probs in (base_BV, steered_BV)]
    moved = shares[1] - shares[0]
    listed = min(listed, len(moved))

    def change(token_id: int) -> TokenChange:
        numbers = [float(each[token_id]) for each in (*shares, *means)]
        return TokenChange(token_id, text_of(token_id), *numbers)

    def changes(found: Tensor) -> list[TokenChange]:
        return [change(token_id) for token_id in found.tolist()]

    raised, lowered = (moved.topk(listed, largest=largest).indices for largest in (True, False))
    return TokenChanges(
        [change(token_id) for token_id in watched],
        changes(raised[moved[raised] > 0]),
        changes(lowered[moved[lowered] < 0]),
    )
