"""What is done to the bytes of a chunk on their way to disk and back: nothing, or zstd.

The compressor is numcodecs', which is zarr-python's own, so a chunk has the bytes that zarr-python would give it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from activation_store.errors import UserError
from activation_store.spec import COMPRESSIONS

Encode = Callable[[Any], bytes]
Decode = Callable[[Any, np.ndarray], None]


def check_compression(name: object) -> str:
    """``name`` itself; UserError when there is no such compression."""
    if not isinstance(name, str) or name not in COMPRESSIONS:
        raise UserError(f"There is no compression {name!r}; use {' or '.join(COMPRESSIONS)}.")
    return name


def encoder(compression: str) -> Encode | None:
    """A function from a chunk's bytes to those stored; None when they are the same."""
    return _zstd(compression).encode if compression != "none" else None


def decoder(compression: str) -> Decode:
    """A function that puts the chunk of stored bytes into a uint8 array of a chunk's length.

    It raises ValueError when they are not what the encoder made; zstd's own checksum finds a flipped bit. It never
    takes more memory than those bytes and the chunk.
    """
    if compression == "none":
        return _copy
    zstd = _zstd(compression)

    def decode(stored: Any, chunk: np.ndarray) -> None:
        stated = _stated_length(bytes(stored[:LONGEST_HEADER]))
        if stated not in (len(chunk), None):
            raise ValueError(f"{stated} bytes where {len(chunk)} should be")
        try:
            zstd.decode(stored, chunk)
        except (RuntimeError, MemoryError) as problem:
            raise ValueError(str(problem) or "it says that it is larger than the memory") from None

    return decode


LONGEST_HEADER = 18


def _stated_length(header: bytes) -> int | None:
    """How many bytes a zstd frame says it becomes (RFC 8878, section 3.1.1.1); None when it does not say."""
    descriptor = header[4] if len(header) > 4 else 0
    in_one_segment, width_flag = descriptor >> 5 & 1, descriptor >> 6
    width = (in_one_segment, 2, 4, 8)[width_flag]
    start = 5 + (not in_one_segment) + (0, 1, 2, 4)[descriptor & 3]
    number = int.from_bytes(header[start : start + width], "little")
    return None if width == 0 else number + 256 if width == 2 else number


def _copy(stored: Any, chunk: np.ndarray) -> None:
    if len(stored) != len(chunk):
        raise ValueError(f"{len(stored)} bytes where {len(chunk)} should be")
    chunk[:] = np.frombuffer(stored, dtype=np.uint8)


def _zstd(compression: str) -> Any:
    from numcodecs.zstd import Zstd

    settings = COMPRESSIONS[compression][0]["configuration"]
    return Zstd(level=settings["level"], checksum=settings["checksum"])
