"""Random streams derived from (seed, purpose, indices), never from arithmetic on seeds.

``seed + epoch`` would make seed 3 at epoch 1 and seed 4 at epoch 0 the same run. Here every use of randomness names its
purpose, and two names never share a stream. Nothing has to be saved for a resume: the stream is derived again.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 64-bit seed for one purpose: the same on every machine and in every version.

    Args:
        seed: the seed a person chose; any integer.
        purpose: what the numbers are for, such as "chunk order".
        indices: what tells the uses of one purpose apart: an epoch, a window, a step.
    """
    parts = [
        b"activation_store seed",
        str(int(seed)).encode(),
        purpose.encode(),
        *(str(int(i)).encode() for i in indices),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest()[:8], "little")


def numpy_stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A numpy generator for one purpose. Its bits are stable; its distributions may change between numpy versions."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *indices)))


def permutation(n: int, seed: int, purpose: str, *indices: int) -> np.ndarray:
    """A permutation of range(n) as int64 that no numpy version will change.

    ``Generator.permutation`` may change with numpy, the raw bits of PCG64 may not. Each position gets 64 raw bits whose
    lowest ones are replaced by the position itself; sorting these keys permutes the positions. There are no ties, so
    the kind of sort does not matter, and sorting plain integers is about as fast as numpy's own shuffle.
    """
    if n >= 1 << 40:
        raise ValueError(f"cannot permute {n} positions: 24 random bits above the position are the least we accept")
    position_bits = max(1, (n - 1).bit_length())
    mask = np.uint64((1 << position_bits) - 1)
    keys = np.random.PCG64(derive_seed(seed, purpose, *indices)).random_raw(n)
    keys &= ~mask
    add_positions(keys)
    keys.sort()
    keys &= mask
    return keys.view(np.int64)


def add_positions(values: np.ndarray) -> np.ndarray:
    """Add 0, 1, 2, .. to ``values`` in place.

    In blocks, because a temporary of full size costs more in fresh memory pages than the sum itself.
    """
    for start in range(0, len(values), 8192):
        block = values[start : start + 8192]
        block += np.arange(start, start + len(block), dtype=values.dtype)
    return values
