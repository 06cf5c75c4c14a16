"""Values out of somebody's JSON: each is what it should be, or is refused by its path, such as ``plan.rows``."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Set
from typing import Any

from activation_store.errors import UserError

LARGEST = 1 << 60
"""Whole numbers count rows or bytes; what is larger than any disk is damaged, and would overflow sums of offsets."""


def refusal(path: str, found: Any, wanted: str) -> UserError:
    return UserError(f"{path} is {reprlib.repr(found)}, where {wanted} should be.")


def whole(value: Any, path: str, least: int = 1) -> int:
    """A whole number; neither true nor 3.0 is one."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise refusal(path, value, f"a whole number from {least} on")
    return value


def text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise refusal(path, value, "text")
    return value


def list_(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise refusal(path, value, "a list")
    return value


def object_(value: Any, path: str, parts: Set[str] | None = None) -> dict[str, Any]:
    """An object; with ``parts``, exactly these."""
    if not isinstance(value, dict):
        raise refusal(path, value, "an object")
    if parts is not None and value.keys() != parts:
        odd = min(value.keys() ^ parts)
        raise UserError(f"{path} {'lacks' if odd in parts else 'has'} {reprlib.repr(odd)}.")
    return value


def checksums(values: list[Any], path: str) -> list[str]:
    """xxh3 checksums in hex."""
    for value in values:
        if not isinstance(value, str) or not _CHECKSUM.fullmatch(value):
            raise refusal(path, value, "a checksum")
    return values


_CHECKSUM = re.compile("[0-9a-f]{16}")
