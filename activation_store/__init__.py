"""Activations of neural networks on disk: write them once, read them shuffled, resume exactly.

Names are imported when they are first used, so that ``import activation_store`` costs nothing and never loads torch.
Checking a store is `activation_store.verify.verify`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from activation_store.on_first_use import on_first_use

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
    from activation_store.statistics import HookStatistics
    from activation_store.store import Store, open_store
    from activation_store.writer import StoreWriter

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

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "aligned": "AlignedStores",
        "errors": "UserError",
        "filters": "RowFilter",
        "loader": "Loader",
        "mixing": "Mixing",
        "moments": "Moments",
        "seeds": "derive_seed numpy_stream",
        "source": "ActivationSource",
        "spec": "DocumentRows Geometry HookSpec Manifest StorePlan",
        "statistics": "HookStatistics",
        "store": "Store open_store",
        "writer": "StoreWriter",
    },
)
