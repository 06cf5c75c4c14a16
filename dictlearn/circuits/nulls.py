"""Transcoders that know nothing, of the same shape: what the scores of a graph have to be compared with.

- untrained: encoder and decoder rows, and those of a linear path, point in random directions, with the trained rows'
  lengths and biases.
- permuted decoder: the trained encoder, so the same features are active, but each writes another feature's row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activation_store.seeds import derive_seed

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary


def untrained(transcoder: Dictionary, seed: int, layer: int) -> Dictionary:
    """A copy with rows of W_enc, W_dec and, where there is one, W_skip turned at random."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "untrained transcoder", layer) % 2**63)
    null = transcoder.copy()
    for name in ("W_enc", "W_dec", *(["W_skip"] if hasattr(null, "W_skip") else [])):
        rows_SD = _weight(null, name)
        random_SD = torch.randn(rows_SD.shape, generator=generator).to(rows_SD)
        rows_SD.copy_(random_SD / random_SD.norm(dim=1, keepdim=True) * rows_SD.norm(dim=1, keepdim=True))
    return null


def permuted_decoder(transcoder: Dictionary, seed: int, layer: int) -> Dictionary:
    """A copy whose decoder rows are permuted among the latents."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "permuted decoder", layer) % 2**63)
    null = transcoder.copy()
    rows_SD = _weight(null, "W_dec")
    rows_SD.copy_(rows_SD[torch.randperm(len(rows_SD), generator=generator)])
    return null


NULLS: dict[str, Callable[[Dictionary, int, int], Dictionary]] = {
    "untrained transcoders": untrained,
    "permuted decoder rows": permuted_decoder,
}


def _weight(dictionary: Dictionary, name: str) -> Tensor:
    weight = getattr(dictionary, name)
    assert isinstance(weight, Tensor)
    return weight.detach()
