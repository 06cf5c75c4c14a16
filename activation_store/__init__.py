"""Activations of neural networks on disk: write them once, read them shuffled, resume exactly.

Names are imported when they are first used, so that ``import activation_store`` costs nothing and never loads torch.
Checking a store is `activation_store.verify.verify`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_store.aligned import AlignedStores
    from activation_store.errors import UserError
    from activation_store.filters import RowFilter
    from activation_store.loader import Loader
    from activation_store.mixing import Mixing
    from activation_store.moments import Moments
    from activation_store.seeds import derive_seed, numpy_stream
    from activation_store.source import ActivationSource
    from activation_store.spec import DocumentRows, Geometry, HookSpec, Manifest, StorePlan
    from activation_store.store import HookStatistics, Store, open_store
    from activation_store.writer import StoreWriter

_HOMES = {
    "AlignedStores": "aligned",
    "UserError": "errors",
    "RowFilter": "filters",
    "ActivationSource": "source",
    "Loader": "loader",
    "Mixing": "mixing",
    "Moments": "moments",
    "derive_seed": "seeds",
    "numpy_stream": "seeds",
    "DocumentRows": "spec",
    "Geometry": "spec",
    "HookSpec": "spec",
    "Manifest": "spec",
    "StorePlan": "spec",
    "HookStatistics": "store",
    "Store": "store",
    "open_store": "store",
    "StoreWriter": "writer",
}

__all__ = [
    "ActivationSource",
    "AlignedStores",
    "DocumentRows",
    "Geometry",
    "HookSpec",
    "HookStatistics",
    "Loader",
    "Manifest",
    "Mixing",
    "Moments",
    "RowFilter",
    "Store",
    "StorePlan",
    "StoreWriter",
    "UserError",
    "derive_seed",
    "numpy_stream",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
