"""dictlearn: a local workbench for sparse dictionaries of neural-network activations.

import dictlearn
dictionary = dictlearn.load("workspace/runs/sae")          # or any folder that holds a saved dictionary
with dictlearn.splice(model, {hook: dictionary}): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.codes import Codes
    from dictlearn.dictionaries.base import Dictionary
    from dictlearn.loading import load
    from dictlearn.metrics.command import evaluations
    from dictlearn.metrics.splicing import splice
    from dictlearn.workspace import Workspace

__version__ = "0.1.0"
__all__ = ["Codes", "Dictionary", "Workspace", "evaluations", "load", "splice"]

_HOMES = {
    "Codes": "dictlearn.codes",
    "Dictionary": "dictlearn.dictionaries.base",
    "Workspace": "dictlearn.workspace",
    "evaluations": "dictlearn.metrics.command",
    "load": "dictlearn.loading",
    "splice": "dictlearn.metrics.splicing",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import dictlearn` and `dictlearn --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dictlearn' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
