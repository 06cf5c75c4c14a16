"""The kinds of dictionary, by name. A new one is a file, a config, and one line in `REGISTRY`.

Other packages bring kinds of their own as entry points: `dictlearn.dictionaries.third_party`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from activation_store.errors import UserError
from dictlearn.dictionaries import third_party
from dictlearn.dictionaries.configs import (
    AbsTopKConfig,
    BatchTopKConfig,
    CrosscoderConfig,
    CrossLayerConfig,
    GatedConfig,
    ICFLConfig,
    JumpReLUConfig,
    KSparseConfig,
    MatchingPursuitConfig,
    MatryoshkaConfig,
    ReLUConfig,
    SemiNMFConfig,
    SkipConfig,
    TopKConfig,
    VariationalConfig,
)

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary

REGISTRY = {
    "topk": "dictlearn.dictionaries.topk:TopK",
    "batchtopk": "dictlearn.dictionaries.batch_topk:BatchTopK",
    "matryoshka": "dictlearn.dictionaries.matryoshka:Matryoshka",
    "abstopk": "dictlearn.dictionaries.abs_topk:AbsTopK",
    "vsae": "dictlearn.dictionaries.variational:Variational",
    "skip": "dictlearn.dictionaries.skip:Skip",
    "ksparse": "dictlearn.dictionaries.k_sparse:KSparse",
    "relu": "dictlearn.dictionaries.relu:ReLU",
    "jumprelu": "dictlearn.dictionaries.jumprelu:JumpReLU",
    "gated": "dictlearn.dictionaries.gated:Gated",
    "crosscoder": "dictlearn.dictionaries.crosscoder:Crosscoder",
    "clt": "dictlearn.dictionaries.cross_layer:CrossLayer",
    "mp": "dictlearn.dictionaries.matching_pursuit:MatchingPursuit",
    "icfl": "dictlearn.dictionaries.icfl:ICFL",
    "snmf": "dictlearn.dictionaries.semi_nmf:SemiNMF",
}
CONFIGS = {
    config.kind: config
    for config in (
        TopKConfig,
        BatchTopKConfig,
        MatryoshkaConfig,
        AbsTopKConfig,
        VariationalConfig,
        SkipConfig,
        KSparseConfig,
        ReLUConfig,
        JumpReLUConfig,
        GatedConfig,
        CrosscoderConfig,
        CrossLayerConfig,
        MatchingPursuitConfig,
        ICFLConfig,
        SemiNMFConfig,
    )
}


def kinds() -> list[str]:
    """Every kind there is: the built-in ones, then those that installed packages bring. Imports none of them."""
    return list(dict.fromkeys([*REGISTRY, *third_party.kinds_brought()]))


def config_class(kind: str) -> type:
    """The config of a kind; torch-free for the built-in ones. Raises UserError as `dictionary_class` does."""
    if kind in CONFIGS:
        third_party.refuse_built_in(kind)
        return CONFIGS[kind]
    return dictionary_class(kind).Config


def dictionary_class(kind: str) -> type[Dictionary]:
    """The class of a kind; imports torch.

    Raises:
        UserError: no such kind, naming those there are; a package that brings it is broken, or brings one of another's.
    """
    if kind in REGISTRY:
        third_party.refuse_built_in(kind)
        module, name = REGISTRY[kind].split(":")
        return getattr(importlib.import_module(module), name)
    if kind not in kinds():
        raise UserError(
            f"There is no dictionary of kind {kind!r}; the kinds are {', '.join(sorted(kinds()))}. If another package "
            "brings it, install that."
        )
    return third_party.class_brought(kind)
