"""Normal noise that is a function of the row it is for, so that no generator need be resumed or divided.

A row's values, a key and a latent's number are hashed to 64 bits and these to a normal deviate. What a row gets depends
neither on its place in the batch nor on the other rows, so that a batch may be computed in parts, or by several
processes. Rows that are equal bit for bit get the same noise under the same key.

Axes: B rows, D width, S latents.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

STEP, FACTOR = 0x9E3779B97F4A7C15 - 2**64, 0xD6E8FEB86659FD93 - 2**64
"""Odd, with bits in no pattern: 2^64 over the golden ratio, and a factor that mixes well (degski's)."""
BITS = 23
"""Of a hash that make a uniform number: with a half added it is still exact in float32, and never 0 or 1."""
AT_ONCE = 2**15
"""Hashes in memory at a time: 256 KiB, which stay in the processor's cache."""


@torch.no_grad()
def row_noise(rows: Tensor, latents: int, *key: Tensor | int) -> Tensor:
    """(B, S) standard normal numbers of float32 rows, or of others, (B, D); all of the key's integers matter."""
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    bits_BD = (
        rows.contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int64).to(torch.int64, copy=True)
    )
    places_D, latents_S = (torch.arange(1, 1 + n, device=rows.device) * STEP for n in (rows.shape[1], latents))
    streams_B = _mix(_mix(bits_BD) + places_D).mul_(places_D | 1).sum(dim=1)
    for part in key:
        streams_B = _mix(streams_B + part)
    noise_BS = torch.empty(len(rows), latents, device=rows.device)
    block = max(1, AT_ONCE // latents)
    for noise_bS, streams_b in zip(noise_BS.split(block), streams_B.split(block), strict=True):
        hashes_bS = _mix(streams_b[:, None] + latents_S).bitwise_and_(2**BITS - 1)
        noise_bS.copy_(hashes_bS).add_(0.5).mul_(2.0 ** (1 - BITS)).sub_(1).erfinv_().mul_(math.sqrt(2))
    return noise_BS


def _mix(numbers: Tensor) -> Tensor:
    """Int64, contiguous, in place: each bit comes to depend on all bits of its number. Nothing is lost on the way."""
    first_half, second_half = numbers.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    low, high = (first_half, second_half) if sys.byteorder == "little" else (second_half, first_half)
    for _ in range(2):
        low ^= high
        numbers *= FACTOR
    low ^= high
    return numbers
