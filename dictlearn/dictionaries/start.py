"""Where dictionaries begin: directions of latents, and the bias of the decoder.

Axes: B rows, D width, S latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXAMPLE_SHARE = 0.8
"""How much of a direction that begins at a data point is its example, the rest being random."""


def unit_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(S, D) random unit rows."""
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def towards(rows_BD: Tensor, examples_S: Tensor, directions_SD: Tensor) -> Tensor:
    """(S, D) unit rows: mostly the centred example of each latent, partly its random unit direction."""
    centred_SD = F.normalize((rows_BD - rows_BD.mean(dim=0))[examples_S], dim=1)
    return F.normalize(EXAMPLE_SHARE * centred_SD + (1 - EXAMPLE_SHARE) * directions_SD, dim=1)


def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least mean distance to the rows (B, D), by Weiszfeld's iteration from the mean."""
    guess = rows.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (rows - guess).norm(dim=1).clamp_min(1e-8)
        better = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        if (better - guess).norm() <= tolerance * better.norm():
            return better
        guess = better
    return guess
