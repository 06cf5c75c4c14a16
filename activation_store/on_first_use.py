"""Packages whose names are imported when they are first used (PEP 562), so that the package itself imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_first_use(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        names: module of the package -> the names that are at home there, separated by spaces.
    """
    homes = {name: module for module, its_names in names.items() for name in its_names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def all_names() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return get, all_names
