"""What is done to the bytes of a chunk on their way to disk and back: nothing, or zstd.

The compressor is numcodecs', which is zarr-python's own, so a chunk has the bytes that zarr-python would give it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from activation_store.errors import UserError
from activation_store.spec import COMPRESSIONS

Encode = Callable[[Any], bytes]
Decode = Callable[[Any, int], bytes]


def check_compression(name: object) -> str:
    """``name`` itself; UserError when there is no such compression."""
    if not isinstance(name, str) or name not in COMPRESSIONS:
        raise UserError(f"There is no compression {name!r}; use {' or '.join(COMPRESSIONS)}.")
    return name


def encoder(compression: str) -> Encode | None:
    """A function from a chunk's bytes to those stored; None when they are the same."""
    return _zstd(compression).encode if compression != "none" else None


def decoder(compression: str) -> Decode:
    """A function from the stored bytes, and how many they should become, to a chunk's bytes.

    It raises ValueError when they are not what the encoder made; zstd's own checksum finds a flipped bit.
    """
    if compression == "none":
        return _same
    zstd = _zstd(compression)

    def decode(stored: Any, length: int) -> bytes:
        try:
            content = zstd.decode(stored)
        except RuntimeError as problem:
            raise ValueError(str(problem)) from None
        if len(content) != length:
            raise ValueError(f"{len(content)} bytes where {length} should be")
        return content

    return decode


def _same(stored: Any, length: int) -> Any:
    if len(stored) != length:
        raise ValueError(f"{len(stored)} bytes where {length} should be")
    return stored


def _zstd(compression: str) -> Any:
    from numcodecs.zstd import Zstd

    settings = COMPRESSIONS[compression][0]["configuration"]
    return Zstd(level=settings["level"], checksum=settings["checksum"])
