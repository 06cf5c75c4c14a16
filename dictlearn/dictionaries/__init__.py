"""The kinds of dictionary, by name. A new one is a file, a config, and one line in `REGISTRY`.

A third party registers a `Dictionary` subclass under the entry point group ``dictlearn.dictionaries``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from activation_store.errors import UserError

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

REGISTRY = {
    "topk": "dictlearn.dictionaries.topk:TopK",
}


def dictionary_class(kind: str) -> type[Dictionary]:
    """The class of a kind; imports torch. Raises UserError naming the kinds there are."""
    known = REGISTRY | {point.name: point.value for point in entry_points(group="dictlearn.dictionaries")}
    if kind not in known:
        raise UserError(f"There is no dictionary of kind {kind!r}; the kinds are {', '.join(sorted(known))}.")
    module, name = known[kind].split(":")
    return getattr(importlib.import_module(module), name)
