"""The inner operations of k-sparse dictionaries: one interface, one reference, and the choice between backends.

    encode_topk(x, W_enc, b_enc, k, b_pre, also) -> TopKCodes: values (B, K), indices (B, K), also (B, A)
    keep_topk(pre (B, A), k)                     -> (B, A), the k largest of each row through a ReLU, zeros elsewhere
    keep_largest_of_batch(values (B, K), k)      -> (B, K), the B k largest of all rows together, zeros elsewhere
    decode(values, indices, W_dec)               -> (B, d_out)
    decode_also(values, indices, W_dec, also (B, A), latents (A,)) -> the same, and also @ W_dec[latents]
    rebuild(values, indices, W_dec, bias, target (B, d_out), ...)  -> the squared error of decode + bias, and both

The first two take a ``rule`` besides: "relu", the default, "magnitude" for the k largest by absolute value, with their
sign, or "linear" for the k largest as they are.

What ``also`` is for: AuxK wants the pre-activations of the dead latents, densely. They come out of the encoder's one
matrix product, and their gradients go into the one buffer that the selected latents' gradients go into.

``set_backend("reference")`` forces the dense reference; "portable" is the sparse path that runs everywhere; "triton" is
the one for GPUs; "auto", the default, takes the fastest there is for the device. Every backend gives the reference's
outputs and gradients up to the order of floating-point sums. `dictlearn.ops.ranks` puts the same operations over
several processes; `dictlearn.ops.row_gradients` is how a backend leaves it to an optimiser to sum weight gradients.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from dictlearn.ops.ranks import Ranks
from dictlearn.ops.reference import Rebuilt, Rule, TopKCodes, compared

__all__ = [
    "BACKENDS",
    "Rebuilt",
    "Rule",
    "TopKCodes",
    "anywhere",
    "anywhere_over_rows",
    "backend",
    "decode",
    "decode_also",
    "encode_topk",
    "keep_largest_of_batch",
    "keep_topk",
    "latents_where",
    "least_over_rows",
    "mean_over_rows",
    "one_process",
    "ranks",
    "rebuild",
    "run_ahead",
    "runs_ahead",
    "set_backend",
    "total_over_latents",
    "use_ranks",
]


class Backend(Protocol):
    """What a module of this room has to offer; `dictlearn.ops.reference` says what each function means."""

    def encode_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_pre: Tensor | None, also: Tensor | None, rule: Rule, /
    ) -> TopKCodes: ...

    def keep_topk(self, pre: Tensor, k: int, rule: Rule, /) -> Tensor: ...

    def decode(self, values: Tensor, indices: Tensor, W_dec: Tensor, /) -> Tensor: ...

    def decode_also(
        self, values: Tensor, indices: Tensor, W_dec: Tensor, also: Tensor, latents: Tensor, /
    ) -> tuple[Tensor, Tensor]: ...

    def rebuild(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        bias: Tensor,
        target: Tensor,
        also: Tensor | None,
        latents: Tensor | None,
        /,
    ) -> Rebuilt: ...


def _module(name: str) -> Callable[[], Backend]:
    return lambda: cast(Backend, importlib.import_module(name))


BACKENDS = {
    "portable": _module("dictlearn.ops.portable"),
    "triton": _module("dictlearn.ops.triton_backend"),
    "reference": _module("dictlearn.ops.reference"),
}
"""What gives each backend by its name. Modules are imported on first use: Triton need not be there."""
_forced: str | None = None
_ranks: Ranks = Ranks()
_ahead: bool | None = None


def set_backend(name: str) -> None:
    """Use one backend for every following call; "auto" lets the device decide.

    Raises:
        ValueError: there is no such backend, or not the package that it needs.
    """
    global _forced
    if name not in BACKENDS and name != "auto":
        raise ValueError(f"There is no ops backend {name!r}; choose one of auto, {', '.join(BACKENDS)}.")
    if name == "triton" and not _there_is_triton():
        raise ValueError("The ops backend 'triton' needs the package triton (3.6 or later), which is not installed.")
    _forced = None if name == "auto" else name


def backend(device: str | torch.device = "cpu") -> str:
    """The name of the backend in use for tensors on ``device``; kernels for a GPU take no others."""
    if _forced == "triton" and torch.device(device).type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "portable"  # a dictionary begins in host memory, wherever it is trained
    if _forced is not None:
        return _forced
    return "triton" if torch.device(device).type == "cuda" and _runs_triton() else "portable"


def padded_slots(slots: int, device: str | torch.device) -> int:
    """How many slots to give codes whose busiest row needs ``slots``, where that changes from step to step.

    Triton compiles its kernels anew for each number, which takes seconds: there it is rounded up to a multiple of 16.
    """
    return -(-slots // 16) * 16 if backend(device) == "triton" else slots


def load(name: str) -> Backend:
    return BACKENDS[name]()


def _there_is_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _runs_triton() -> bool:
    """On NVIDIA's cards since Ampere, the first with bfloat16, where a Triton is installed."""
    is_nvidia = torch.version.hip is None and torch.cuda.is_available()
    return is_nvidia and _there_is_triton() and torch.cuda.get_device_capability() >= (8, 0)


def use_ranks(ranks: Ranks | None) -> None:
    """Put every following call over the processes of ``ranks``; None takes it back."""
    global _ranks
    _ranks = ranks or Ranks()


def run_ahead(forced: bool | None) -> None:
    """Whether steps wait for their device, whichever it is; None lets the device decide again."""
    global _ahead
    _ahead = forced


def runs_ahead(device: torch.device) -> bool:
    """Whether the host goes on while the device computes (see `dictlearn.ops.ahead`): on a GPU, on one process.

    A CPU has nothing to wait for. Processes have to agree on every branch, so they wait for each other anyway.
    """
    return not _ranks.several and (device.type == "cuda" if _ahead is None else _ahead)


@contextmanager
def one_process() -> Iterator[None]:
    """Within the block everything is here, on this process: what every process does for itself with whole tensors."""
    global _ranks
    before, _ranks = _ranks, Ranks()
    try:
        yield
    finally:
        _ranks = before


def ranks() -> Ranks:
    """The processes that rows and latents are spread over."""
    return _ranks


def _backend(x: Tensor) -> Backend:
    return load(backend(x.device))


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_pre: Tensor | None = None,
    also: Tensor | None = None,
    rule: Rule = "relu",
) -> TopKCodes:
    x, b_pre = _ranks.shared(x), None if b_pre is None else _ranks.shared(b_pre)
    codes = _backend(x).encode_topk(x, W_enc, b_enc, min(k, len(W_enc)), b_pre, also, rule)
    return codes._replace(values=_ranks.keep_largest_of_row(codes.values, k, rule))


def keep_topk(pre: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    return _ranks.keep_largest_of_dense_row(_backend(pre).keep_topk(pre, k, rule), k, rule)


def keep_largest_of_batch(values: Tensor, k: int) -> Tensor:
    """Of the selected values (B, K) of all rows, on all ranks, the k times as many as rows that are largest."""
    return values * _ranks.among_the_largest_of_batch(values, k)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return _ranks.total(_backend(values).decode(values, indices, W_dec))


def decode_also(values: Tensor, indices: Tensor, W_dec: Tensor, also: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    output, output_also = _backend(values).decode_also(values, indices, W_dec, also, latents)
    return _ranks.total(output), _ranks.total(output_also)


def rebuild(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    bias: Tensor,
    target: Tensor,
    also: Tensor | None = None,
    latents: Tensor | None = None,
) -> Rebuilt:
    """See `dictlearn.ops.reference.rebuild`."""
    if not _ranks.several:
        return _backend(values).rebuild(values, indices, W_dec, bias, target, also, latents)
    if also is None or latents is None:
        return compared(decode(values, indices, W_dec), bias, target, None)
    output, output_also = decode_also(values, indices, W_dec, also, latents)
    return compared(output, bias, target, output_also)


def latents_where(mask: Tensor) -> Tensor:
    """(A,) int64: the numbers of the latents, on this rank, where the mask (S,) is true, ascending."""
    return mask.nonzero().squeeze(1)


def anywhere(mask: Tensor) -> bool:
    """Whether a mask over latents is true anywhere, on any rank: all ranks must take the same branch."""
    return _ranks.anywhere(mask)


def mean_over_rows(scalar: Tensor) -> Tensor:
    """A detached mean over this rank's rows, made one over the whole batch."""
    return _ranks.mean_over_rows(scalar)


def anywhere_over_rows(found: bool, device: torch.device) -> bool:
    """Whether what this rank found in its rows is so on any rank: all ranks must take the same branch."""
    return bool(_ranks.anywhere_in_batch(torch.tensor(found, device=device))) if _ranks.several else found


def least_over_rows(scalar: Tensor) -> Tensor:
    """A detached minimum over this rank's rows, made one over the whole batch."""
    return _ranks.least_of_batch(scalar)


def total_over_latents(count: Tensor) -> Tensor:
    """A detached sum over this rank's latents, made one over all of them."""
    return _ranks.total_over_latents(count)
