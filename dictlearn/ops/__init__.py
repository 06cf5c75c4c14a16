"""The inner operations of k-sparse dictionaries: one interface, one reference, and the choice between backends.

    encode_topk(x, W_enc, b_enc, k)              -> values (B, K), indices (B, K)
    encode_topk_among(x, W_enc, b_enc, k, among) -> the same, choosing only where the mask ``among`` (S,) is true
    decode(values, indices, W_dec)               -> (B, d_out)

``set_backend("reference")`` forces the dense reference; "portable" (the default) is the sparse path that runs
everywhere. Every backend gives the reference's outputs and gradients up to the order of floating-point sums.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from dictlearn.ops import portable, reference

BACKENDS: dict[str, ModuleType] = {"portable": portable, "reference": reference}
_backend: ModuleType = portable


def set_backend(name: str) -> None:
    """Use one backend for every following call. Raises ValueError naming those there are."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"There is no ops backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    _backend = BACKENDS[name]


def backend() -> str:
    """The name of the backend in use."""
    return next(name for name, module in BACKENDS.items() if module is _backend)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _backend.encode_topk(x, W_enc, b_enc, k)


def encode_topk_among(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, among: Tensor) -> tuple[Tensor, Tensor]:
    return _backend.encode_topk_among(x, W_enc, b_enc, k, among)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return _backend.decode(values, indices, W_dec)
