"""Gradients of weight matrices that are left as what their rows are sums of, for an optimiser that updates row by row.

A backend that can leaves such a gradient on the parameter, beside torch's own ``grad``, when the forward pass ran
within `wanted_for`. What the optimiser must then do with it is the protocol `RowGradient`. A parameter whose gradient
has several sources (decoded twice, or in another way besides) gets an ordinary ``grad`` after all: `settle`.

Axes: S latents, D width of a row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one step, on the device where the host does not know them.

    Attributes:
        rate: learning rate.
        betas, eps: Adam's.
        number: () float32, of this step, from 1.
        finite: () bool; where it is false nothing is updated. None for true.
    """

    rate: float
    betas: tuple[float, float]
    eps: float
    number: Tensor
    finite: Tensor | None = None


class RowGradient(Protocol):
    """The gradient of a weight matrix (S, D), not yet summed.

    Attributes:
        unit_rows: rows have unit norm: the gradient's component along them is dropped, and the norm restored after
            the update.
        factor: () that clipping multiplies the gradient by; None for 1.
    """

    unit_rows: bool
    factor: Tensor | None

    def dense(self) -> Tensor:
        """(S, D) the gradient itself, all of it."""
        ...

    def squares(self, weight_SD: Tensor) -> Tensor:
        """(S,) squared norms of its rows, before clipping and without the component along unit rows.

        After an update they are known; before it they cost as much as the gradient itself.
        """
        ...

    def trace(self) -> Tensor:
        """() a number that is finite if all that is summed is, and cheap to have."""
        ...

    def update(self, weight_SD: Tensor, mean_SD: Tensor, square_SD: Tensor, step: AdamStep) -> None:
        """Take one step of Adam in place: the weights, and both moments."""
        ...


_wanted = threading.local()


@contextmanager
def wanted_for(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block forward passes, on this thread, may leave row gradients on these parameters."""
    _wanted.numbers = {id(parameter) for parameter in parameters}
    try:
        yield
    finally:
        _wanted.numbers = set()


def is_wanted(parameter: Tensor) -> bool:
    return id(parameter) in getattr(_wanted, "numbers", ())


def leave(parameter: Tensor, gradient: RowGradient) -> None:
    """One more term of the parameter's gradient."""
    parameter.__dict__.setdefault("row_gradients", []).append(gradient)


def of(parameter: Tensor) -> RowGradient | None:
    """What `settle` left of a parameter's row gradients."""
    left = parameter.__dict__.get("row_gradients")
    return left[0] if left else None


def settle(parameters: Iterable[Tensor]) -> None:
    """After a backward pass: a row gradient that is all there is stays; any other becomes a part of ``grad``."""
    for parameter in parameters:
        left = parameter.__dict__.get("row_gradients", [])
        if len(left) == 1 and parameter.grad is None:
            continue
        for gradient in left:
            dense_SD = gradient.dense()
            parameter.grad = dense_SD if parameter.grad is None else parameter.grad.add_(dense_SD)
        drop([parameter])


def drop(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.__dict__.pop("row_gradients", None)


def state_of(parameter: Tensor) -> tuple[int, int]:
    """What changes when a parameter is written, or its memory is replaced (as moving it to another device does)."""
    return parameter._version, parameter.data_ptr()


def note_unit_rows(parameter: Tensor) -> None:
    """Say that an update has left all rows at unit norm; it holds until the parameter is written again."""
    parameter.__dict__["unit_rows_at"] = state_of(parameter)


def has_unit_rows(parameter: Tensor) -> bool:
    found = parameter.__dict__.get("unit_rows_at")
    return found is not None and found == state_of(parameter)
