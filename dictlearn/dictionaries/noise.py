"""Normal noise that is a function of the row it is for, so that no generator need be resumed or divided.

A row's values, a key and a latent's number are hashed to 64 bits and these to a normal deviate. What a row gets depends
neither on its place in the batch nor on the other rows, so that a batch may be computed in parts, or by several
processes. Rows that are equal bit for bit get the same noise under the same key.

Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", for the function that mixes 64 bits.

Axes: B rows, D width, S latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 23
"""Of a hash that make a uniform number: with a half added it is still exact in float32, and never 0 or 1."""
AT_ONCE = 2**20
"""Hashes in memory at a time: 8 MiB."""


@torch.no_grad()
def row_noise(rows: Tensor, latents: int, *key: Tensor | int) -> Tensor:
    """(B, S) standard normal numbers of float32 rows, or of others, (B, D); all of the key's integers matter."""
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    bits_BD = rows.contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int64).long()
    places_D, latents_S = (
        torch.arange(1, 1 + count, device=rows.device) * GOLDEN for count in (rows.shape[1], latents)
    )
    streams_B = _mixed(_mixed(bits_BD) + places_D).mul_(places_D | 1).sum(dim=1)
    for part in key:
        streams_B = _mixed(streams_B + part)
    noise_BS = torch.empty(len(rows), latents, device=rows.device)
    block = max(1, AT_ONCE // latents)
    for noise_bS, streams_b in zip(noise_BS.split(block), streams_B.split(block), strict=True):
        uniform_bS = (_mixed(streams_b[:, None] + latents_S) & (2**BITS - 1)).float().add_(0.5).mul_(2.0 ** (1 - BITS))
        torch.erfinv(uniform_bS.sub_(1), out=noise_bS).mul_(math.sqrt(2))
    return noise_BS


def _mixed(numbers: Tensor) -> Tensor:
    """Int64 of which each bit depends on all bits of the number; torch shifts signed numbers, hence the masks."""
    numbers = (numbers ^ ((numbers >> 30) & (2**34 - 1))) * FIRST
    numbers = (numbers ^ ((numbers >> 27) & (2**37 - 1))) * SECOND
    return numbers ^ ((numbers >> 31) & (2**33 - 1))
