"""Which of several hooks a latent writes to: the length of its decoder row in each of them.

Lengths are in units of each hook's own spread (the root of its variance per coordinate), whatever the dictionary was
trained with, so that a hook with large activations does not seem to be the one that latents are about.

Axes: S latents, O output width, P hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dictlearn.dictionaries.two_matrices import TwoMatrices


def norms_of_parts(W_SO: Tensor, parts: tuple[int, ...]) -> Tensor:
    """(S, P) length of each row within each hook."""
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in W_SO.split(parts, dim=1)], dim=1)


@torch.no_grad()
def relative_norms(dictionary: TwoMatrices) -> Tensor:
    """(S, P) share of each hook in the sum of a latent's decoder norms: for two, |W_b| / (|W_a| + |W_b|) is ``[:, 1]``.

    About 1/P each is a latent shared by all hooks, near 1 one that is exclusive to a hook (Lindsey et al. 2024). A
    latent that writes to none has 0 everywhere.

    Raises:
        ValueError: a dictionary of one hook.
    """
    if len(dictionary.output_parts) < 2:
        raise ValueError("A dictionary of one hook writes to nothing else, so there is nothing to compare.")
    norms_SP = norms_of_parts(dictionary.fold().W_dec, dictionary.output_parts) / dictionary.spread_of_parts
    return norms_SP / norms_SP.sum(dim=1, keepdim=True).clamp_min(torch.finfo(norms_SP.dtype).tiny)
