"""One step of training, from a batch to updated weights. Needs torch alone.

    schedule, loss (encode, decode, terms), backward, projection, clip, refuse what is not finite, optimise, constrain,
    count what fired

On a GPU the host does not wait for any of it (`dictlearn.ops.ahead`). What it decides elsewhere is decided on the
device: how much of a gradient is clipped, and whether the update is made at all. Nor are the gradients of the weight
matrices written there: Adam sums and uses them row by row (`dictlearn.ops.row_gradients`).

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
from dictlearn.ops import row_gradients
from dictlearn.ops.ahead import LAG
from dictlearn.training.finite import NotFinite, Unread
from dictlearn.training.optimisers import Average, Optimiser

__all__ = ["Member", "NotFinite", "Step", "backward", "clip", "side_by_side", "take_step"]


@dataclass
class Member:
    """A dictionary in training, and all that its next step depends on besides the batch.

    Attributes:
        generator: the run's own random stream.
        gradient_clip: largest norm of the whole gradient; 0 for none.
        accumulate: parts that a batch is computed in.
        precision: "float32", or "bfloat16" for autocast.
        average: the moving average of the weights, if one is kept.
        unread: steps that the host ran ahead of; nothing may be logged or saved before they are settled.
    """

    name: str
    dictionary: Dictionary
    optimiser: Optimiser
    generator: torch.Generator
    gradient_clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    average: Average | None = None
    unread: Unread = field(default_factory=Unread)


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
    extras: Mapping[str, float | Tensor] = field(default_factory=dict)


def side_by_side(rows: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """(B, sum of widths) the activations of several hooks as a dictionary takes them; of one, as they are."""
    return rows[hooks[0]] if len(hooks) == 1 else torch.cat([rows[hook] for hook in hooks], dim=1)


def take_step(member: Member, x: Tensor, target: Tensor | None, step: int, steps: int) -> Step:
    """Update a member with one batch of raw activations x (B, D), and targets (B, O) for a transcoder.

    Raises:
        NotFinite: a loss or gradient is not finite; the weights are those of before. Where the host runs ahead it is of
            the step `LAG` steps before; ``member.unread.settle()`` tells about the last ones.
    """
    dictionary, optimiser = member.dictionary, member.optimiser
    member.unread.settle(within=LAG - 1)
    dictionary.schedule(step, steps)
    rate = optimiser.set_rate(step, steps)
    optimiser.zero_grad()
    by_row = member.accumulate == 1 and not ops.ranks().several
    with row_gradients.wanted_for(optimiser.updates_rows_of if by_row else ()):
        loss = backward(member, x, target)
    row_gradients.settle(optimiser.parameters)
    ops.ranks().average_gradients(optimiser.parameters)
    dictionary.project_gradients()
    norm = clip(member)
    waits = not (ops.runs_ahead(x.device) and optimiser.conditional)
    finite = member.unread.add(step, loss, norm, x, target, waits)
    optimiser.step(finite)
    norm = norm if member.gradient_clip > 0 else with_rows(norm, member)
    extras = dictionary.after_update(Update(optimiser, step, steps, member.generator, x, target, loss, finite))
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
        # those of all parts are kept
        parts.append(loss if member.accumulate == 1 else replace(loss, codes=loss.codes.in_few_slots()))
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
    """Clip the whole gradient; returns its norm before clipping.

    Where nothing is to be clipped the norm of row gradients is not in it: it is known for nothing after the update
    (`with_rows`), and what it is asked for before, whether all is finite, is cheaper to have.
    """
    split = member.dictionary.latent_tensors
    named = {name: p.grad for name, p in member.dictionary.named_parameters() if p.grad is not None}
    parts = [grad for name, grad in named.items() if name in split]
    whole = [grad for name, grad in named.items() if name not in split]
    nothing = member.optimiser.parameters[0].new_zeros(())
    squares = sum((torch.linalg.vector_norm(grad).square() for grad in parts), nothing)
    squares = ops.total_over_latents(squares)
    squares = sum((torch.linalg.vector_norm(grad).square() for grad in whole), squares)
    for parameter, gradient in _row_gradients(member):
        squares = squares + (gradient.squares(parameter).sum() if member.gradient_clip > 0 else 0 * gradient.trace())
    norm = squares.sqrt()
    if member.gradient_clip > 0 and ops.runs_ahead(norm.device):
        factor = (member.gradient_clip / norm).clamp(max=1.0)
    elif 0 < member.gradient_clip < norm:
        factor = member.gradient_clip / norm
    else:
        return norm
    if named:
        torch._foreach_mul_(list(named.values()), factor if ops.runs_ahead(norm.device) else float(factor))
    for _, gradient in _row_gradients(member):
        gradient.factor = factor
    return norm


@torch.no_grad()
def with_rows(norm: Tensor, member: Member) -> Tensor:
    """After the update: the norm of the whole gradient, from that of all but the row gradients."""
    squares = [gradient.squares(parameter).sum() for parameter, gradient in _row_gradients(member)]
    return torch.stack([norm.square(), *squares]).sum().sqrt() if squares else norm


def _row_gradients(member: Member) -> list[tuple[Tensor, row_gradients.RowGradient]]:
    found = [(parameter, row_gradients.of(parameter)) for parameter in member.optimiser.parameters]
    return [(parameter, gradient) for parameter, gradient in found if gradient is not None]
