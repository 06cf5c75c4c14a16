"""Which way to steer: what a latent writes, a difference of means, or any vector, at one hook and of length 1.

Axes: N rows or directions, D width of the hook (heads side by side).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.description import hooks_of
from dictlearn.steering.choice import check_latent, choose_hook


@dataclass(frozen=True)
class Direction:
    """A direction at a hook.

    Attributes:
        hook: where it is added.
        unit: (D,) float32 of length 1.
        name: what it is called in a report.
    """

    hook: str
    unit: Tensor
    name: str


def direction(vector: Tensor, hook: str, name: str) -> Direction:
    """That of a given vector (D,).

    Raises:
        UserError: the vector is zero, or not finite.
    """
    length = float(vector.detach().double().norm())
    if not 0 < length < float("inf"):
        raise UserError(f"The vector of {name} at {hook} has length {length:g}, so it has no direction; name another.")
    return Direction(hook, (vector.detach().double() / length).float().cpu(), name)


def of_latent(dictionary: Dictionary, latent: int, hook: str | None = None) -> Direction:
    """What one latent writes: its decoder row, at the hook that the dictionary rebuilds.

    Args:
        hook: one of the hooks that are rebuilt, where they are several.

    Raises:
        UserError: no such latent; a hook that is not rebuilt, or none named of several; a latent that writes nothing.
    """
    _, hooks = hooks_of(dictionary.provenance)
    hook = choose_hook(hooks, hook)
    check_latent(latent, dictionary.d_sae)
    row = dictionary.W_dec[latent].split(dictionary.output_parts)[hooks.index(hook)]
    return direction(row, hook, f"latent {latent}")


def difference_of_means(having: Tensor, lacking: Tensor, hook: str, name: str = "difference of means") -> Direction:
    """From the mean of activations (N, D) that lack a concept to the mean of those that have it.

    Raises:
        UserError: no rows on one side, or means that are the same.
    """
    for rows, which in ((having, "have"), (lacking, "lack")):
        if not len(rows):
            raise UserError(f"No activation at {hook} is said to {which} what {name} is about; give some text.")
    return direction(having.double().mean(dim=0) - lacking.double().mean(dim=0), hook, name)


def random_directions(count: int, width: int, hook: str, seed: int) -> list[Direction]:
    """Directions that know nothing, uniform on the sphere: the null of every score."""
    rows = numpy_stream(seed, "random directions").standard_normal((count, width))
    return [direction(torch.from_numpy(row), hook, f"random {number}") for number, row in enumerate(rows)]
