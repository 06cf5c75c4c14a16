"""The sparse path (`dictlearn.ops.sparse`) on a GPU.

Triton kernels select (`triton_select`), sum over pairs (`triton_pairs`) and, where the optimiser asks for it, update a
latent's row in one go (`triton_update`). The encoder's product is torch's. Nothing here asks the device for a number,
so the host runs ahead of it.

Under autocast to bfloat16 the large operands are rounded to it: the rows of the batch, the encoder's and the decoder's
vectors where they are read, and the gradient of the output. Sums are in float32, and so are values, gradients and what
comes out. In float32 and float64 nothing is rounded but by the order of sums.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.ops import portable, reference, sparse
from dictlearn.ops.launching import launching_on
from dictlearn.ops.reference import Rebuilt, Rule, TopKCodes
from dictlearn.ops.triton_pairs import bags, errors, pair_products, sum_by_latent
from dictlearn.ops.triton_pairs import decode as decode_pairs
from dictlearn.ops.triton_select import fits, group_maxima, select, selects
from dictlearn.ops.triton_select import keep_topk as keep_topk_of_rows
from dictlearn.ops.triton_update import PairGradient, lowered


def encode_topk(
    x_BD: Tensor,
    W_enc_SD: Tensor,
    b_enc_S: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    also_A: Tensor | None = None,
    rule: Rule = "relu",
) -> TopKCodes:
    """See `dictlearn.ops.reference.encode_topk`."""
    with launching_on(x_BD.device):
        return sparse.encode_topk(PRIMITIVES, x_BD, W_enc_SD, b_enc_S, k, b_pre_D, also_A, rule)


def keep_topk(pre_BA: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    """See `dictlearn.ops.reference.keep_topk`."""
    if k >= pre_BA.shape[1] or not fits(pre_BA.shape[1], pre_BA.dtype):
        return portable.keep_topk(pre_BA, k, rule)
    with launching_on(pre_BA.device):
        return _KeepTopK.apply(pre_BA, k, rule)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """See `dictlearn.ops.reference.decode`."""
    with launching_on(values_BK.device):
        return sparse.decode(PRIMITIVES, values_BK, indices_BK, W_dec_SO)[0]


def decode_also(
    values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor, also_BA: Tensor, latents_A: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See `dictlearn.ops.reference.decode_also`."""
    with launching_on(values_BK.device):
        return sparse.decode(PRIMITIVES, values_BK, indices_BK, W_dec_SO, also_BA, latents_A)


def rebuild(
    values_BK: Tensor,
    indices_BK: Tensor,
    W_dec_SO: Tensor,
    bias: Tensor,
    target_BO: Tensor,
    also_BA: Tensor | None = None,
    latents_A: Tensor | None = None,
) -> Rebuilt:
    """See `dictlearn.ops.reference.rebuild`."""
    wanted = PRIMITIVES.wanted(W_dec_SO)
    with launching_on(values_BK.device):
        return Rebuilt(*_Rebuild.apply(values_BK, indices_BK, W_dec_SO, bias, target_BO, also_BA, latents_A, wanted))


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


class _Rebuild(torch.autograd.Function):
    """Decoding, bias, error and its square in one pass.

    The gradient of the mean squared error by the output is -2 / (B O) times the error. So the error is kept as the
    backward pass reads it, and the factor goes into what is summed over pairs, of which there are few.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        bias: Tensor,
        target_BO: Tensor,
        also_BA: Tensor | None,
        latents_A: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        read_SO, values_BK, indices_BK = _read(W_dec_SO), values_BK.contiguous(), indices_BK.contiguous()
        output_BO, errors_BO, squares = errors(
            values_BK, indices_BK, read_SO, bias.contiguous(), target_BO.contiguous()
        )
        with torch.autocast(values_BK.device.type, enabled=False):
            ctx.also = sparse.Also(PRIMITIVES, also_BA, latents_A, read_SO)
            also_BO = ctx.also.decoded(values_BK.dtype)
        ctx.save_for_backward(values_BK, indices_BK, read_SO, errors_BO)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output_BO)
        ctx.wanted, ctx.bias_of_row = wanted, bias.ndim == 2
        return squares / output_BO.numel(), output_BO, also_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_also_BO: Tensor | None) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, read_SO, errors_BO = ctx.saved_tensors
        grad_values = grad_W = grad_bias = grad_also = None
        if grad_also_BO is not None and ctx.needs_input_grad[5]:
            grad_also = ctx.also.gradient(grad_also_BO)
        weights_BK, rows_BO = values_BK, None
        if grad is not None:
            factor = grad.to(values_BK.dtype) * (-2 / errors_BO.numel())
            weights_BK, rows_BO = values_BK * factor, errors_BO
            if ctx.needs_input_grad[0]:
                grad_values = pair_products(errors_BO, read_SO, indices_BK).to(values_BK.dtype) * factor
            if ctx.needs_input_grad[3]:
                of_rows = errors_BO.to(values_BK.dtype) if ctx.bias_of_row else errors_BO.sum(0, dtype=values_BK.dtype)
                grad_bias = of_rows * factor
        if ctx.needs_input_grad[2] and (grad is not None or grad_also_BO is not None):
            grad_W = ctx.also.weight_gradient(weights_BK, indices_BK, rows_BO, grad_also_BO, ctx.wanted)
        return grad_values, None, grad_W, grad_bias, None, grad_also, None, None


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
    row_gradient=PairGradient,
)
