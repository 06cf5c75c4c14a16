"""The sparse path on a GPU: dense is the encoder's product alone, everything after it touches the selected pairs.

As `dictlearn.ops.portable` does it, with Triton kernels for the selection (`triton_select`), for sums over pairs
(`triton_pairs`) and, where the optimiser asks for it, for the update of a latent's row in one go (`triton_update`).
Nothing here asks the device for a number, so the host runs ahead of it.

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

from dictlearn.ops import portable, reference, row_gradients
from dictlearn.ops.reference import Rebuilt, Rule, TopKCodes
from dictlearn.ops.triton_pairs import Bags, bags, errors, launching_on, pair_products, sum_by_latent
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
        return TopKCodes(*_EncodeTopK.apply(x_BD, W_enc_SD, b_enc_S, k, b_pre_D, also_A, rule, _wanted(W_enc_SD)))


def keep_topk(pre_BA: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    """See `dictlearn.ops.reference.keep_topk`."""
    if k >= pre_BA.shape[1] or not fits(pre_BA.shape[1], pre_BA.dtype):
        return portable.keep_topk(pre_BA, k, rule)
    with launching_on(pre_BA.device):
        return _KeepTopK.apply(pre_BA, k, rule)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """See `dictlearn.ops.reference.decode`."""
    with launching_on(values_BK.device):
        return _Decode.apply(values_BK, indices_BK, W_dec_SO, None, None, _wanted(W_dec_SO))[0]


def decode_also(
    values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor, also_BA: Tensor, latents_A: Tensor
) -> tuple[Tensor, Tensor]:
    """See `dictlearn.ops.reference.decode_also`."""
    with launching_on(values_BK.device):
        return _Decode.apply(values_BK, indices_BK, W_dec_SO, also_BA, latents_A, _wanted(W_dec_SO))


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
    wanted = _wanted(W_dec_SO)
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


class _EncodeTopK(torch.autograd.Function):
    """One dense product forward; backward reaches x, W_enc, b_enc and b_pre through the selected pairs alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        W_enc_SD: Tensor,
        b_enc_S: Tensor,
        k: int,
        b_pre_D: Tensor | None,
        also_A: Tensor | None,
        rule: Rule,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        centred_BD = x_BD if b_pre_D is None else x_BD - b_pre_D
        stored_SD, kind = _stored(W_enc_SD), x_BD.dtype
        centred_BD = centred_BD.to(stored_SD.dtype).contiguous()
        with torch.autocast(x_BD.device.type, enabled=False):
            pre_BS = torch.addmm(b_enc_S.to(stored_SD.dtype), centred_BD, stored_SD.T)
            if selects(len(W_enc_SD), k, pre_BS.dtype):
                values_BK, indices_BK = select(pre_BS, group_maxima(pre_BS, rule), k, rule)
            else:
                values_BK, indices_BK = reference.largest(pre_BS, k, rule)
        also_BA = None if also_A is None else pre_BS.index_select(1, also_A).to(kind)
        values_BK = values_BK.to(kind)
        ctx.save_for_backward(centred_BD, stored_SD, values_BK, indices_BK, also_A)
        ctx.has_pre_bias, ctx.rectified, ctx.wanted, ctx.kind = b_pre_D is not None, rule == "relu", wanted, kind
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK, also_BA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor | None, _: None, grad_also_BA: Tensor | None) -> tuple[Tensor | None, ...]:
        centred_BD, stored_SD, values_BK, indices_BK, also_A = ctx.saved_tensors
        if grad_BK is None and grad_also_BA is None:
            return (None,) * 8
        if grad_BK is None:
            grad_BK = torch.zeros_like(values_BK)
        elif ctx.rectified:
            grad_BK = grad_BK * (values_BK > 0)
        grad_BK = grad_BK.contiguous()
        of = _bags(indices_BK, len(stored_SD))
        grad_b = sum_by_latent(of, grad_BK, grad_BK.new_ones(len(grad_BK), 1)).squeeze(1)
        grad_x = decode_pairs(grad_BK, indices_BK, stored_SD) if ctx.needs_input_grad[0] else None
        besides_AD = None
        if grad_also_BA is not None:
            grad_b.index_add_(0, also_A, grad_also_BA.sum(dim=0))
            grad_also_BA = grad_also_BA.to(stored_SD.dtype)
            besides_AD = grad_also_BA.T @ centred_BD
            if grad_x is not None:
                grad_x += grad_also_BA @ stored_SD[also_A]
        grad_W = None
        if ctx.needs_input_grad[1]:
            latents_A = None if besides_AD is None else also_A
            grad_W = _summed(PairGradient(of, grad_BK, centred_BD, latents_A, besides_AD), ctx.wanted)
        # each row's gradient with respect to b_pre is minus that with respect to x: sum before the product, not after
        grad_pre = -(grad_b.to(stored_SD.dtype) @ stored_SD).to(ctx.kind) if ctx.has_pre_bias else None
        return grad_x, grad_W, grad_b, None, grad_pre, None, None, None


class _Decode(torch.autograd.Function):
    """Sums over a row's pairs, with sums over a latent's pairs as the weight's gradient; a dense product besides."""

    @staticmethod
    def forward(
        ctx: Any,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        also_BA: Tensor | None,
        latents_A: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        stored_SO, values_BK, indices_BK = _stored(W_dec_SO), values_BK.contiguous(), indices_BK.contiguous()
        also_BA, also_BO = _decoded_also(also_BA, latents_A, stored_SO, values_BK.dtype)
        ctx.save_for_backward(values_BK, indices_BK, stored_SO, also_BA, latents_A)
        ctx.set_materialize_grads(False)
        ctx.wanted = wanted
        return decode_pairs(values_BK, indices_BK, stored_SO), also_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor | None, grad_also_BO: Tensor | None) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, stored_SO, also_BA, latents_A = ctx.saved_tensors
        if grad_BO is None and grad_also_BO is None:
            return (None,) * 6
        grad_values = grad_W = None
        besides_AO, grad_also = _gradients_also(ctx.needs_input_grad[3], grad_also_BO, also_BA, latents_A, stored_SO)
        if grad_BO is None:
            values_BK, grad_BO = torch.zeros_like(values_BK), stored_SO.new_zeros(len(values_BK), stored_SO.shape[1])
        grad_BO = grad_BO.to(stored_SO.dtype).contiguous()
        if ctx.needs_input_grad[0]:
            grad_values = pair_products(grad_BO, stored_SO, indices_BK).to(values_BK.dtype)
        if ctx.needs_input_grad[2]:
            of = _bags(indices_BK, len(stored_SO))
            latents_A = None if besides_AO is None else latents_A
            grad_W = _summed(PairGradient(of, values_BK, grad_BO, latents_A, besides_AO), ctx.wanted)
        return grad_values, None, grad_W, grad_also, None, None


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
        stored_SO, values_BK, indices_BK = _stored(W_dec_SO), values_BK.contiguous(), indices_BK.contiguous()
        output_BO, errors_BO, squares = errors(
            values_BK, indices_BK, stored_SO, bias.contiguous(), target_BO.contiguous()
        )
        also_BA, also_BO = _decoded_also(also_BA, latents_A, stored_SO, values_BK.dtype)
        ctx.save_for_backward(values_BK, indices_BK, stored_SO, errors_BO, also_BA, latents_A)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output_BO)
        ctx.wanted, ctx.of_row = wanted, bias.ndim == 2
        return squares / output_BO.numel(), output_BO, also_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_also_BO: Tensor | None) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, stored_SO, errors_BO, also_BA, latents_A = ctx.saved_tensors
        if grad is None and grad_also_BO is None:
            return (None,) * 8
        grad = values_BK.new_zeros(()) if grad is None else grad.to(values_BK.dtype)
        factor = grad * (-2 / errors_BO.numel())
        grad_values = grad_W = grad_bias = None
        besides_AO, grad_also = _gradients_also(ctx.needs_input_grad[5], grad_also_BO, also_BA, latents_A, stored_SO)
        if ctx.needs_input_grad[0]:
            grad_values = pair_products(errors_BO, stored_SO, indices_BK).to(values_BK.dtype) * factor
        if ctx.needs_input_grad[2]:
            of = _bags(indices_BK, len(stored_SO))
            latents_A = None if besides_AO is None else latents_A
            grad_W = _summed(PairGradient(of, values_BK * factor, errors_BO, latents_A, besides_AO), ctx.wanted)
        if ctx.needs_input_grad[3]:
            of_rows = errors_BO.to(values_BK.dtype) if ctx.of_row else errors_BO.sum(dim=0, dtype=values_BK.dtype)
            grad_bias = of_rows * factor
        return grad_values, None, grad_W, grad_bias, None, grad_also, None, None


def _decoded_also(
    also_BA: Tensor | None, latents_A: Tensor | None, stored_SO: Tensor, kind: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The dense activations as the product reads them, and what they decode to."""
    if also_BA is None or latents_A is None:
        return None, None
    also_BA = also_BA.to(stored_SO.dtype)
    with torch.autocast(also_BA.device.type, enabled=False):
        return also_BA, (also_BA @ stored_SO[latents_A]).to(kind)


def _gradients_also(
    needed: bool, grad_BO: Tensor | None, also_BA: Tensor | None, latents_A: Tensor | None, stored_SO: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of what `_decoded_also` decodes: the gradients (A, O) of the latents' vectors and (B, A) of their activations."""
    if grad_BO is None or also_BA is None:
        return None, None
    low_BO = grad_BO.to(stored_SO.dtype)
    return also_BA.T @ low_BO, (low_BO @ stored_SO[latents_A].T).to(grad_BO.dtype) if needed else None


def _wanted(weight: Tensor) -> Tensor | None:
    """The weight itself where its gradient is to be left on it as a row gradient."""
    return weight if row_gradients.is_wanted(weight) else None


def _summed(gradient: PairGradient, wanted: Tensor | None) -> Tensor | None:
    if wanted is None:
        return gradient.dense()
    row_gradients.leave(wanted, gradient)
    return None


def _stored(weight: Tensor) -> Tensor:
    """The weight as kernels and products read it: in bfloat16 under autocast to it."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return lowered(weight)
    return weight.detach().contiguous()


_sorted: list[tuple[Tensor, int, int, Bags]] = []


def _bags(indices_BK: Tensor, latents: int) -> Bags:
    """The pairs by latent, sorted once for decoder and encoder: the last call's, if it was about the same tensor."""
    for of, version, count, there in _sorted:
        same = of.data_ptr() == indices_BK.data_ptr() and of.shape == indices_BK.shape
        if same and version == indices_BK._version and count == latents and of.device == indices_BK.device:
            return there
    found = bags(indices_BK, latents)
    _sorted[:] = [(indices_BK, indices_BK._version, latents, found)]  # kept, so that its memory is nobody else's
    return found
