"""Kinds of dictionary that other packages bring, as entry points of the group ``dictlearn.dictionaries``.

The name of an entry point is the kind, its value the class: ``mine = "my_package.mine:Mine"``. They are listed without
importing anything; a package is imported when its kind is asked for, and what is wrong with it is said with its name.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TYPE_CHECKING

from activation_store.errors import UserError

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

GROUP = "dictlearn.dictionaries"


def kinds_brought() -> list[str]:
    """Every kind that an installed package brings, sorted."""
    return sorted({point.name for point in _entry_points(tuple(sys.path))})


def brought(kind: str) -> list[EntryPoint]:
    """The entry points that bring a kind; more than one is a conflict, which `class_brought` refuses."""
    return list(dict.fromkeys(_entry_points(tuple(sys.path)).select(name=kind)))


@cache
def _entry_points(path: tuple[str, ...]) -> EntryPoints:
    """Of the packages on a path. Finding them reads a file for each package installed, and a sweep asks often."""
    return entry_points(group=GROUP)


def refuse_built_in(kind: str) -> None:
    """Raise UserError when a package brings a kind that dictlearn has itself: saved files would mean two things."""
    for point in brought(kind):
        raise UserError(
            f"The package {_package(point)} brings a dictionary of kind {kind!r}, which is one of dictlearn's own; "
            "uninstall it, or have it renamed in the package's entry points."
        )


def class_brought(kind: str) -> type[Dictionary]:
    """The class of a kind that a package brings.

    Raises:
        UserError: two packages bring it, it cannot be imported, or it is no such dictionary; the package is named.
    """
    point, *others = brought(kind)
    if others:
        packages = " and ".join(sorted({_package(one) for one in (point, *others)}))
        raise UserError(
            f"Dictionaries of kind {kind!r} are brought by {packages}, and only one can be meant; uninstall the other."
        )
    try:
        loaded = point.load()
    except Exception as problem:  # whatever somebody else's module does when it is imported
        reason = str(problem).splitlines()[0] if str(problem) else "no reason given"
        raise UserError(
            f"The package {_package(point)} brings the kind {kind!r} as {point.value}, which cannot be imported "
            f"({type(problem).__name__}: {reason}); repair the package, or uninstall it."
        ) from problem
    if (fault := _fault(kind, loaded)) is not None:
        raise UserError(
            f"The package {_package(point)} brings the kind {kind!r} as {point.value}, {fault}; repair the package, "
            "or uninstall it."
        )
    return loaded


def _fault(kind: str, loaded: object) -> str | None:
    """What keeps something from being a kind of dictionary, or None."""
    from dictlearn.dictionaries.base import Dictionary

    if not (isinstance(loaded, type) and issubclass(loaded, Dictionary)):
        return "which is not a subclass of dictlearn.Dictionary"
    config = getattr(loaded, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config) and hasattr(config, "check")):
        return "whose Config is not a dataclass with a method check(d_in, d_out)"
    for name, of in ((loaded.__name__, loaded), (config.__name__, config)):
        if getattr(of, "kind", None) != kind:
            return f"where {name}.kind is {getattr(of, 'kind', None)!r}"
    return None


def _package(point: EntryPoint) -> str:
    return repr(point.dist.name) if point.dist is not None else "that defines it"
