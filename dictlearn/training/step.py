"""One step of training, from a batch to updated weights. Needs torch alone.

    schedule, loss (encode, decode, terms), backward, projection, clip, refuse what is not finite, optimise, constrain,
    count what fired

Several processes share a batch, or the latents, through `dictlearn.ops`: gradients are averaged after the backward
pass, and norms summed, where there is more than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn import ops
from dictlearn.dictionaries.base import Dictionary, Loss, Update
from dictlearn.training.optimisers import Average, Optimiser


@dataclass
class Member:
    """A dictionary in training, and all that its next step depends on besides the batch.

    Attributes:
        generator: the run's own random stream.
        gradient_clip: largest norm of the whole gradient; 0 for none.
        accumulate: parts that a batch is computed in.
        precision: "float32", or "bfloat16" for autocast.
        average: the moving average of the weights, if one is kept.
    """

    name: str
    dictionary: Dictionary
    optimiser: Optimiser
    generator: torch.Generator
    gradient_clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    average: Average | None = None


@dataclass(frozen=True)
class Step:
    """What a step found.

    Attributes:
        loss: of the batch, before the update.
        gradient_norm: before clipping.
        learning_rate: that the update was made with.
        extras: numbers of the kind's own, such as how many atoms were drawn anew.
    """

    loss: Loss
    gradient_norm: Tensor
    learning_rate: float
    extras: dict[str, float] = field(default_factory=dict)


class NotFinite(Exception):
    """A step whose loss or gradient is not finite; nothing was updated.

    Attributes:
        terms: the numbers that tell where it began, as words.
        rows: (n,) int64, the rows of the batch in which it shows; empty where it shows in no row alone.
    """

    def __init__(self, terms: str, rows: Tensor) -> None:
        super().__init__(terms)
        self.terms = terms
        self.rows = rows


def side_by_side(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """(B, sum of widths) the activations of several hooks as a dictionary takes them; of one, as they are."""
    return rows[hooks[0]] if len(hooks) == 1 else torch.cat([rows[hook] for hook in hooks], dim=1)


def take_step(member: Member, x: Tensor, target: Tensor | None, step: int, steps: int) -> Step:
    """Update a member with one batch of raw activations x (B, D), and targets (B, O) for a transcoder.

    Raises:
        NotFinite: a loss or gradient is not finite; the weights are those of before.
    """
    dictionary, optimiser = member.dictionary, member.optimiser
    dictionary.schedule(step, steps)
    rate = optimiser.set_rate(step, steps)
    optimiser.zero_grad()
    loss = backward(member, x, target)
    ops.ranks().average_gradients(optimiser.parameters)
    dictionary.project_gradients()
    norm = clip(member)
    if not torch.isfinite(loss.total + norm):
        raise not_finite(loss, norm, x, target)
    optimiser.step()
    extras = dictionary.after_update(Update(optimiser, step, steps, member.generator, x, target, loss))
    dictionary.observe(loss.codes)
    if member.average is not None:
        member.average.update(dictionary, step)
    return Step(loss, norm, rate, extras)


def backward(member: Member, x: Tensor, target: Tensor | None) -> Loss:
    """Gradients of the batch's loss, computed in ``accumulate`` parts; each counts by its share of the rows."""
    parts = []
    targets = [None] * member.accumulate if target is None else target.chunk(member.accumulate)
    for x_part, target_part in zip(x.chunk(member.accumulate), targets, strict=False):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=member.precision == "bfloat16"):
            loss = member.dictionary.loss(x_part, target_part)
        (loss.total * (len(x_part) / len(x))).backward()
        parts.append(loss)
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Loss]) -> Loss:
    """The loss of a whole batch from those of its parts. A term that some parts lack counts as 0 there."""
    rows = sum(len(part.codes) for part in parts)
    shares = [len(part.codes) / rows for part in parts]
    names = dict.fromkeys(name for part in parts for name in part.terms)
    zero = torch.zeros((), device=parts[0].total.device)
    slots = max(part.codes.values.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        """Indices or values; rows with fewer slots than others get empty ones."""
        return torch.cat([F.pad(getattr(part.codes, name), (0, slots - part.codes.values.shape[1])) for part in parts])

    return Loss(
        total=sum((part.total.detach() * share for part, share in zip(parts, shares, strict=True)), zero),
        terms={
            name: sum((part.terms.get(name, zero) * share for part, share in zip(parts, shares, strict=True)), zero)
            for name in names
        },
        codes=replace(parts[0].codes, indices=joined("indices"), values=joined("values"), offset=None),
        output=torch.cat([part.output for part in parts]),
    )


@torch.no_grad()
def clip(member: Member) -> Tensor:
    """Clip the whole gradient; returns its norm before clipping."""
    split = member.dictionary.latent_tensors
    named = {name: p.grad for name, p in member.dictionary.named_parameters() if p.grad is not None}
    parts = [grad for name, grad in named.items() if name in split]
    whole = [grad for name, grad in named.items() if name not in split]
    squares = sum(
        (torch.linalg.vector_norm(grad).square() for grad in parts), torch.zeros(()).to(next(iter(named.values())))
    )
    squares = ops.total_over_latents(squares)
    squares = sum((torch.linalg.vector_norm(grad).square() for grad in whole), squares)
    norm = squares.sqrt()
    if 0 < member.gradient_clip < norm:
        torch._foreach_mul_(list(named.values()), float(member.gradient_clip / norm))
    return norm


def not_finite(loss: Loss, norm: Tensor, x: Tensor, target: Tensor | None) -> NotFinite:
    """Which numbers are not finite, and the rows in which they show: in the data, or else in the reconstruction."""
    numbers = {**loss.terms, "gradient norm": norm}
    terms = ", ".join(f"{name} {float(value)}" for name, value in numbers.items() if not torch.isfinite(value))
    for where, rows in (("input", x), ("target", target), ("output", loss.output)):
        if rows is not None:
            bad = (~torch.isfinite(rows).all(dim=1)).nonzero().squeeze(1)
            if len(bad):
                return NotFinite(f"{terms}; the {where} is not finite", bad.cpu())
    return NotFinite(terms, torch.empty(0, dtype=torch.int64))
