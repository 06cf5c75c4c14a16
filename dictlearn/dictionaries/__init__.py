"""The kinds of dictionary, by name. A new one is a file, a config, and one line in `REGISTRY`.

A third party registers a `Dictionary` subclass under the entry point group ``dictlearn.dictionaries``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import (
    AbsTopKConfig,
    BatchTopKConfig,
    GatedConfig,
    ICFLConfig,
    JumpReLUConfig,
    KSparseConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

REGISTRY = {
    "topk": "dictlearn.dictionaries.topk:TopK",
    "batchtopk": "dictlearn.dictionaries.batch_topk:BatchTopK",
    "matryoshka": "dictlearn.dictionaries.matryoshka:Matryoshka",
    "abstopk": "dictlearn.dictionaries.abs_topk:AbsTopK",
    "ksparse": "dictlearn.dictionaries.k_sparse:KSparse",
    "relu": "dictlearn.dictionaries.relu:ReLU",
    "jumprelu": "dictlearn.dictionaries.jumprelu:JumpReLU",
    "gated": "dictlearn.dictionaries.gated:Gated",
    "icfl": "dictlearn.dictionaries.icfl:ICFL",
}
CONFIGS = {
    config.kind: config
    for config in (
        TopKConfig,
        BatchTopKConfig,
        MatryoshkaConfig,
        AbsTopKConfig,
        KSparseConfig,
        ReLUConfig,
        JumpReLUConfig,
        GatedConfig,
        ICFLConfig,
    )
}


def config_class(kind: str) -> type:
    """The config of a kind; torch-free for the built-in ones. Raises UserError naming the kinds there are."""
    return CONFIGS[kind] if kind in CONFIGS else dictionary_class(kind).Config


def dictionary_class(kind: str) -> type[Dictionary]:
    """The class of a kind; imports torch. Raises UserError naming the kinds there are."""
    known = REGISTRY | {point.name: point.value for point in entry_points(group="dictlearn.dictionaries")}
    if kind not in known:
        raise UserError(f"There is no dictionary of kind {kind!r}; the kinds are {', '.join(sorted(known))}.")
    module, name = known[kind].split(":")
    return getattr(importlib.import_module(module), name)
