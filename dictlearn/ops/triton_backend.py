"""The sparse path (`dictlearn.ops.sparse`) on a GPU.

Triton kernels select (`triton_select`), sum over pairs (`triton_pairs`) and, where the optimiser asks for it, update a
latent's row in one go (`triton_update`). The encoder's product is torch's. Nothing here asks the device for a number,
so the host runs ahead of it.

Under autocast to bfloat16 the large operands are rounded to it: the rows of the batch, the encoder's and the decoder's
vectors where they are read, and the gradient of the output. Sums are in float32, and so are values, gradients and what
comes out. In float32 and float64 no operand is rounded; quotients and roots of float32 are the card's, a few bits off.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.ops import portable, reference, sparse
from dictlearn.ops.launching import launching_on
from dictlearn.ops.reference import Rule
from dictlearn.ops.triton_pairs import bags, errors, pair_products, sum_by_latent
from dictlearn.ops.triton_pairs import decode as decode_pairs
from dictlearn.ops.triton_select import fits, group_maxima, select, selects
from dictlearn.ops.triton_select import keep_topk as keep_topk_of_rows
from dictlearn.ops.triton_update import PairGradient, lowered


def keep_topk(pre_BA: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    """See `dictlearn.ops.reference.keep_topk`."""
    if k >= pre_BA.shape[1] or not fits(pre_BA.shape[1], pre_BA.dtype):
        return portable.keep_topk(pre_BA, k, rule)
    with launching_on(pre_BA.device):
        return _KeepTopK.apply(pre_BA, k, rule)


class _KeepTopK(torch.autograd.Function):
    """Dense in, dense out: the gradient passes where something was kept."""

    @staticmethod
    def forward(ctx: Any, pre_BA: Tensor, k: int, rule: Rule) -> Tensor:
        kept_BA = keep_topk_of_rows(pre_BA.contiguous(), k, rule)
        ctx.save_for_backward(kept_BA)
        return kept_BA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor, None, None]:
        (kept_BA,) = ctx.saved_tensors
        return grad_BA * (kept_BA != 0), None, None


def _read(weight: Tensor) -> Tensor:
    """The weight as kernels and products read it: in bfloat16 under autocast to it."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return lowered(weight)
    return weight.detach().contiguous()


def _select(
    x_BD: Tensor, W_SD: Tensor, b_S: Tensor, k: int, also_A: Tensor | None, rule: Rule, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.autocast(x_BD.device.type, enabled=False):
        pre_BS = torch.addmm(b_S.to(W_SD.dtype), x_BD, W_SD.T)
        if selects(len(W_SD), k, pre_BS.dtype):
            values_BK, indices_BK = select(pre_BS, group_maxima(pre_BS, rule), k, rule)
        else:
            values_BK, indices_BK = reference.largest(pre_BS, k, rule)
    return values_BK.to(kind), indices_BK, None if also_A is None else pre_BS.index_select(1, also_A).to(kind)


PRIMITIVES = sparse.Primitives(
    read=_read,
    select=_select,
    bags=bags,
    sum_by_latent=sum_by_latent,
    decode=decode_pairs,
    pair_products=pair_products,
    errors=errors,
    row_gradient=PairGradient,
    launching_on=launching_on,
)
_operations = sparse.Operations(PRIMITIVES)
encode_topk, rebuild = _operations.encode_topk, _operations.rebuild
decode, decode_also = _operations.decode, _operations.decode_also
