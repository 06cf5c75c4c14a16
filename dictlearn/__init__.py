"""dictlearn: a local workbench for sparse dictionaries of neural-network activations.

import dictlearn
dictionary = dictlearn.load("workspace/runs/sae")          # or any folder that holds a saved dictionary
with dictlearn.splice(model, {hook: dictionary}): ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activation_store.on_first_use import on_first_use

if TYPE_CHECKING:
    from dictlearn.codes import Codes
    from dictlearn.dictionaries.base import Dictionary
    from dictlearn.loading import load
    from dictlearn.metrics.record import evaluations
    from dictlearn.metrics.splicing import splice
    from dictlearn.workspace import Workspace

__version__ = "0.1.0"
__all__ = ["Codes", "Dictionary", "Workspace", "evaluations", "load", "splice"]

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "codes": "Codes",
        "dictionaries.base": "Dictionary",
        "loading": "load",
        "metrics.record": "evaluations",
        "metrics.splicing": "splice",
        "workspace": "Workspace",
    },
)
