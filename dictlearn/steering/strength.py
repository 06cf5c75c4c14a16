"""How much of a direction: strengths at which the next token's distribution has moved by a given KL.

Two directions are compared fairly where both move the model as much (Shafran, Geiger and Geva 2025, arXiv 2506.10920):
by KL(base || steered) of the next token after a prompt, in nats, the mean over prompts where there are several.

KL is 0 at strength 0 and continuous, but it need not rise with strength, nor without end. So the strength is doubled
until the KL is passed, and the bracket so found is halved until the KL is met. What is found lies in the first bracket
that doubling came upon; where the KL was seen to fall on the way, or was not reached, that is said in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from dictlearn.metrics.splicing import activations_at
from dictlearn.steering.directions import Direction
from dictlearn.steering.edit import Padded, device_of, next_token_log_probs

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOLERANCE = 0.01
"""Of the KL asked for."""
FIRST = 2.0**-7
"""The first strength, as a share of the mean length of the hook's activations."""
DOUBLINGS = 17
"""To 1024 times that length, where what is added is all that is left."""
HALVINGS = 40


@dataclass(frozen=True)
class Strength:
    """How much of a direction moves the next token by a KL.

    Attributes:
        target: KL asked for, in nats.
        alpha: what the unit direction is multiplied by, in the units of the activation; below 0 where it is taken away.
        kl: KL reached with it; where the target was not hit, the nearest that was tried.
        hit: whether that is the target, within the tolerance.
        said: what should be known of it, in a sentence; empty otherwise.
    """

    target: float
    alpha: float
    kl: float
    hit: bool
    said: str = ""


def match_kl(
    model: TransformerBridge,
    prompts: Padded,
    direction: Direction,
    targets: Sequence[float],
    signs: Sequence[int] = (1, -1),
    tolerance: float = TOLERANCE,
) -> list[Strength]:
    """The strength for each target with the first sign, then with the next; all are searched for in the same batches.

    Args:
        targets: KL in nats, above 0.
        signs: 1 to add the direction, -1 to take it away.
        tolerance: share of a target by which its KL may miss it.
    """
    base_BV = next_token_log_probs(model, prompts)

    def kl_at(alphas: Sequence[float]) -> list[float]:
        alpha_of_row = torch.tensor(alphas).repeat_interleave(len(prompts))
        steered = next_token_log_probs(model, prompts.repeat(len(alphas)), direction, alpha_of_row)
        steered_NBV = steered.unflatten(0, (len(alphas), len(prompts)))
        return (base_BV.exp() * (base_BV - steered_NBV)).sum(dim=-1).mean(dim=-1).tolist()

    return search(kl_at, FIRST * mean_length(model, prompts, direction.hook), targets, signs, tolerance)


def search(
    kl_at: Callable[[Sequence[float]], list[float]],
    first: float,
    targets: Sequence[float],
    signs: Sequence[int] = (1, -1),
    tolerance: float = TOLERANCE,
) -> list[Strength]:
    """The same for any function from strengths to their KL, beginning with strengths of size ``first``."""
    searches = [_Search(sign, target, tolerance, first) for sign in signs for target in targets]
    while going := [each for each in searches if not each.done]:
        alphas = sorted({each.next for each in going})
        found = dict(zip(alphas, kl_at(alphas), strict=True))
        for each in going:
            each.learn(found[each.next])
    return [each.result() for each in searches]


def mean_length(model: TransformerBridge, prompts: Padded, hook: str) -> float:
    """Of a hook's activations at all tokens but the prompts' first where there are others: BOS is often far longer."""
    (rows,) = activations_at(model, prompts.tokens.to(device_of(model)), [hook])
    place = torch.arange(prompts.tokens.shape[1])
    real = place < prompts.lengths[:, None]
    if (prompts.lengths > 1).any():
        real &= place > 0
    return float(rows.cpu().flatten(2)[real].double().norm(dim=1).mean()) or 1.0


class _Search:
    """For one target with one sign: what was tried, and what to try next."""

    def __init__(self, sign: int, target: float, tolerance: float, first: float) -> None:
        self._sign, self._target, self._tolerance = sign, target, tolerance
        self._tried = {0.0: 0.0}
        self._below, self._above = 0.0, math.inf
        self._size = first
        self._left = DOUBLINGS

    @property
    def next(self) -> float:
        return self._sign * self._size

    @property
    def done(self) -> bool:
        return self._left < 0 or self._hit(self._nearest())

    def learn(self, kl: float) -> None:
        """The KL at `next`."""
        self._left -= 1
        if not math.isfinite(kl):  # in float16 strengths overflow
            self._left = -1
            return
        self._tried[self._size] = kl
        if kl < self._target:
            self._below = self._size
        else:
            if math.isinf(self._above):
                self._left = HALVINGS
            self._above = self._size
        self._size = 2 * self._below if math.isinf(self._above) else (self._below + self._above) / 2

    def result(self) -> Strength:
        size = self._nearest()
        kl = self._tried[size]
        return Strength(self._target, self._sign * size, kl, self._hit(size), self._said())

    def _nearest(self) -> float:
        return min(self._tried, key=lambda size: abs(self._tried[size] - self._target))

    def _hit(self, size: float) -> bool:
        return abs(self._tried[size] - self._target) <= self._tolerance * self._target

    def _said(self) -> str:
        nearest = self._nearest()
        if not any(self._tried.values()):
            return "What is added here does not reach the next token: its KL stays 0."
        if not self._hit(nearest):
            how = "is not reached" if math.isinf(self._above) else "is passed at a jump"
            return (
                f"A KL of {self._target:g} {how}: of the strengths tried, to {self._sign * max(self._tried):.4g}, the "
                f"nearest is {self._tried[nearest]:.4g} at {self._sign * nearest:.4g}."
            )
        sizes = sorted(each for each in self._tried if each <= self._above)
        slack = self._tolerance * self._target
        if any(self._tried[larger] < self._tried[size] - slack for size, larger in pairwise(sizes)):
            found = f"{self._sign * nearest:.4g}"
            return f"The KL falls in places as the strength grows; {found} is the first that doubling came upon."
        return ""
