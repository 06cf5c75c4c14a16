"""Encoding and decoding through the selected pairs alone, forward and backward: what every sparse backend does.

The encoder's product is dense. After it only the B * K selected pairs are touched: a row is decoded as the weighted sum
of its latents' vectors, a value's gradient is one dot product, and the gradient of a weight matrix is, for each latent,
the weighted sum of the rows that selected it, after one sort of the pairs by latent. The gradient of the pre-bias is
one product with the summed gradients of the pre-activations. Latents that are looked at besides (AuxK's dead ones) are
small dense products that end in the same gradients.

How each of these is computed is a backend's own: its `Primitives`. `Operations` are what it makes of them.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.ops import row_gradients
from dictlearn.ops.reference import Rebuilt, Rule, TopKCodes, compared


class Pairs(Protocol):
    """Dense activations of which few are not zero."""

    def bag_rows(self, vectors_SO: Tensor) -> Tensor:
        """(B, O): for each row the weighted sum of its latents' vectors."""
        ...

    def sum_by_latent(self, rows_BO: Tensor, latents: int) -> Tensor:
        """(S, O): for each latent the weighted sum of its rows."""
        ...


def _dense(also_BA: Tensor, latents_A: Tensor) -> None:
    """A dense product is always the faster one."""


@dataclass(frozen=True)
class Primitives:
    """What differs between backends.

    Attributes:
        read: a weight matrix as products and sums read it, perhaps in a lower precision.
        select: rows (B, D) as read, W_enc as read, b_enc, k, latents besides, rule -> values (B, K) as the rule makes
            them, indices (B, K), and the pre-activations of the latents besides; in the type ``kind``.
        bags: indices, number of latents -> the pairs by latent.
        sum_by_latent: bags, weights (B, K), rows (B, D) -> (S, D).
        decode: weights (B, K), indices, vectors (S, O) -> (B, O).
        pair_products: rows (B, O), vectors (S, O), indices -> (B, K).
        pairs: dense activations (B, A) and their latents as pairs, or None where a dense product is faster.
        errors: values, indices, vectors, bias, target -> the output (B, O), target minus output as the backward pass
            reads it, and the sum of its squares; where decoding and comparing are one.
        row_gradient: bags, weights, rows, latents, dense gradients (A, D) -> a `RowGradient`, where there are any.
        launching_on: a context for the forward pass on a device.
    """

    read: Callable[[Tensor], Tensor]
    select: Callable[
        [Tensor, Tensor, Tensor, int, Tensor | None, Rule, torch.dtype], tuple[Tensor, Tensor, Tensor | None]
    ]
    bags: Callable[[Tensor, int], Any]
    sum_by_latent: Callable[[Any, Tensor, Tensor], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor], Tensor]
    pair_products: Callable[[Tensor, Tensor, Tensor], Tensor]
    pairs: Callable[[Tensor, Tensor], Pairs | None] = _dense
    errors: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    row_gradient: Callable[..., row_gradients.RowGradient] | None = None
    launching_on: Callable[[torch.device], AbstractContextManager[object]] = nullcontext

    def wanted(self, weight: Tensor) -> Tensor | None:
        """The weight itself, where its gradient is to be left on it as a row gradient."""
        return weight if self.row_gradient is not None and row_gradients.is_wanted(weight) else None


class Operations:
    """The operations of `dictlearn.ops` over a backend's primitives; `dictlearn.ops.reference` says what each means."""

    def __init__(self, by: Primitives) -> None:
        self._by = by

    def encode_topk(
        self,
        x_BD: Tensor,
        W_enc_SD: Tensor,
        b_enc_S: Tensor,
        k: int,
        b_pre_D: Tensor | None = None,
        also_A: Tensor | None = None,
        rule: Rule = "relu",
    ) -> TopKCodes:
        by, wanted = self._by, self._by.wanted(W_enc_SD)
        with by.launching_on(x_BD.device):
            return TopKCodes(*_EncodeTopK.apply(by, x_BD, W_enc_SD, b_enc_S, k, b_pre_D, also_A, rule, wanted))

    def decode(self, values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
        return self._decoded(values_BK, indices_BK, W_dec_SO, None, None)[0]

    def decode_also(
        self, values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor, also_BA: Tensor, latents_A: Tensor
    ) -> tuple[Tensor, Tensor]:
        decoded_BO, also_BO = self._decoded(values_BK, indices_BK, W_dec_SO, also_BA, latents_A)
        assert also_BO is not None
        return decoded_BO, also_BO

    def rebuild(
        self,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        bias: Tensor,
        target_BO: Tensor,
        also_BA: Tensor | None = None,
        latents_A: Tensor | None = None,
    ) -> Rebuilt:
        by, wanted = self._by, self._by.wanted(W_dec_SO)
        if by.errors is None:
            decoded_BO, also_BO = self._decoded(values_BK, indices_BK, W_dec_SO, also_BA, latents_A)
            return compared(decoded_BO, bias, target_BO, also_BO)
        with by.launching_on(values_BK.device):
            return Rebuilt(
                *_Rebuild.apply(by, values_BK, indices_BK, W_dec_SO, bias, target_BO, also_BA, latents_A, wanted)
            )

    def _decoded(
        self,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        also_BA: Tensor | None,
        latents_A: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        by, wanted = self._by, self._by.wanted(W_dec_SO)
        with by.launching_on(values_BK.device):
            return _Decode.apply(by, values_BK, indices_BK, W_dec_SO, also_BA, latents_A, wanted)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        by: Primitives,
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
        read_SD = by.read(W_enc_SD)
        centred_BD = centred_BD.to(read_SD.dtype).contiguous()
        values_BK, indices_BK, also_BA = by.select(centred_BD, read_SD, b_enc_S, k, also_A, rule, x_BD.dtype)
        ctx.save_for_backward(centred_BD, read_SD, values_BK, indices_BK, also_A)
        ctx.by, ctx.wanted = by, wanted
        ctx.has_pre_bias, ctx.rectified = b_pre_D is not None, rule == "relu"
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK, also_BA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BK: Tensor | None, _: None, grad_also_BA: Tensor | None) -> tuple[Tensor | None, ...]:
        centred_BD, read_SD, values_BK, indices_BK, also_A = ctx.saved_tensors
        by: Primitives = ctx.by
        if grad_BK is None and grad_also_BA is None:
            return (None,) * 9
        if grad_BK is None:
            grad_BK = torch.zeros_like(values_BK)
        elif ctx.rectified:
            grad_BK = grad_BK * (values_BK > 0)
        grad_BK = grad_BK.contiguous()
        bags = bags_of(by, indices_BK, len(read_SD))
        grad_b = by.sum_by_latent(bags, grad_BK, grad_BK.new_ones(len(grad_BK), 1)).squeeze(1)
        grad_x = by.decode(grad_BK, indices_BK, read_SD) if ctx.needs_input_grad[1] else None
        besides_AD = None
        if grad_also_BA is not None:
            grad_b.index_add_(0, also_A, grad_also_BA.sum(dim=0))
            grad_also_BA = grad_also_BA.to(read_SD.dtype)
            besides_AD = grad_also_BA.T @ centred_BD
            if grad_x is not None:
                grad_x += grad_also_BA @ read_SD[also_A]
        grad_W = None
        if ctx.needs_input_grad[2]:
            grad_W = weight_gradient(by, bags, grad_BK, centred_BD, also_A, besides_AD, ctx.wanted)
        # each row's gradient with respect to b_pre is minus that with respect to x: sum before the product, not after
        grad_pre = -(grad_b.to(read_SD.dtype) @ read_SD).to(grad_b.dtype) if ctx.has_pre_bias else None
        return None, grad_x, grad_W, grad_b, None, grad_pre, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        by: Primitives,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        also_BA: Tensor | None,
        latents_A: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        read_SO, values_BK, indices_BK = by.read(W_dec_SO), values_BK.contiguous(), indices_BK.contiguous()
        with torch.autocast(values_BK.device.type, enabled=False):
            ctx.also = Also(by, also_BA, latents_A, read_SO)
            output_BO, output_also_BO = by.decode(values_BK, indices_BK, read_SO), ctx.also.decoded(values_BK.dtype)
        ctx.save_for_backward(values_BK, indices_BK, read_SO)
        ctx.set_materialize_grads(False)
        ctx.by, ctx.wanted = by, wanted
        return output_BO, output_also_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BO: Tensor | None, grad_also_BO: Tensor | None) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, read_SO = ctx.saved_tensors
        by: Primitives = ctx.by
        grad_values = grad_W = grad_also = None
        if grad_BO is not None:
            grad_BO = grad_BO.to(read_SO.dtype).contiguous()
            if ctx.needs_input_grad[1]:
                grad_values = by.pair_products(grad_BO, read_SO, indices_BK).to(values_BK.dtype)
        if grad_also_BO is not None and ctx.needs_input_grad[4]:
            grad_also = ctx.also.gradient(grad_also_BO)
        if ctx.needs_input_grad[3] and (grad_BO is not None or grad_also_BO is not None):
            grad_W = ctx.also.weight_gradient(values_BK, indices_BK, grad_BO, grad_also_BO, ctx.wanted)
        return None, grad_values, None, grad_W, grad_also, None, None


class _Rebuild(torch.autograd.Function):
    """Decoding, bias, error and its square in one pass.

    The gradient of the mean squared error by the output is -2 / (B O) times the error. So the error is kept as the
    backward pass reads it, and the factor goes into what is summed over pairs, of which there are few.
    """

    @staticmethod
    def forward(
        ctx: Any,
        by: Primitives,
        values_BK: Tensor,
        indices_BK: Tensor,
        W_dec_SO: Tensor,
        bias: Tensor,
        target_BO: Tensor,
        also_BA: Tensor | None,
        latents_A: Tensor | None,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        read_SO, values_BK, indices_BK = by.read(W_dec_SO), values_BK.contiguous(), indices_BK.contiguous()
        assert by.errors is not None
        output_BO, errors_BO, squares = by.errors(
            values_BK, indices_BK, read_SO, bias.contiguous(), target_BO.contiguous()
        )
        with torch.autocast(values_BK.device.type, enabled=False):
            ctx.also = Also(by, also_BA, latents_A, read_SO)
            also_BO = ctx.also.decoded(values_BK.dtype)
        ctx.save_for_backward(values_BK, indices_BK, read_SO, errors_BO)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output_BO)
        ctx.by, ctx.wanted, ctx.bias_of_row = by, wanted, bias.ndim == 2
        return squares / output_BO.numel(), output_BO, also_BO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_also_BO: Tensor | None) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, read_SO, errors_BO = ctx.saved_tensors
        grad_values = grad_W = grad_bias = grad_also = None
        if grad_also_BO is not None and ctx.needs_input_grad[6]:
            grad_also = ctx.also.gradient(grad_also_BO)
        weights_BK, rows_BO = values_BK, None
        if grad is not None:
            factor = grad.to(values_BK.dtype) * (-2 / errors_BO.numel())
            weights_BK, rows_BO = values_BK * factor, errors_BO
            if ctx.needs_input_grad[1]:
                grad_values = ctx.by.pair_products(errors_BO, read_SO, indices_BK).to(values_BK.dtype) * factor
            if ctx.needs_input_grad[4]:
                of_rows = errors_BO.to(values_BK.dtype) if ctx.bias_of_row else errors_BO.sum(0, dtype=values_BK.dtype)
                grad_bias = of_rows * factor
        if ctx.needs_input_grad[3] and (grad is not None or grad_also_BO is not None):
            grad_W = ctx.also.weight_gradient(weights_BK, indices_BK, rows_BO, grad_also_BO, ctx.wanted)
        return None, grad_values, None, grad_W, grad_bias, None, grad_also, None, None


class Also:
    """Dense activations of some latents, which are decoded beside the selected ones; perhaps there are none.

    Args:
        also_BA, latents_A: the activations and their latents.
        read_SO: the decoder's vectors.
    """

    def __init__(self, by: Primitives, also_BA: Tensor | None, latents_A: Tensor | None, read_SO: Tensor) -> None:
        self._by, self._read_SO = by, read_SO
        self._latents_A = latents_A
        self._also_BA = None if also_BA is None else also_BA.to(read_SO.dtype)
        self._pairs = None if also_BA is None or latents_A is None else by.pairs(also_BA, latents_A)

    def decoded(self, kind: torch.dtype) -> Tensor | None:
        """(B, O) what the activations decode to."""
        if self._also_BA is None:
            return None
        if self._pairs is not None:
            return self._pairs.bag_rows(self._read_SO)
        return (self._also_BA @ self._read_SO[self._latents_A]).to(kind)

    def gradient(self, grad_BO: Tensor) -> Tensor:
        """(B, A) of the activations."""
        return (grad_BO.to(self._read_SO.dtype) @ self._read_SO[self._latents_A].T).to(grad_BO.dtype)

    def weight_gradient(
        self,
        weights_BK: Tensor,
        indices_BK: Tensor,
        rows_BO: Tensor | None,
        grad_also_BO: Tensor | None,
        wanted: Tensor | None,
    ) -> Tensor | None:
        """(S, O) of the vectors: from the selected pairs and their rows, and from these activations; or left."""
        by, latents, besides_AO, of_pairs_SO = self._by, len(self._read_SO), None, None
        if grad_also_BO is not None and self._also_BA is not None:
            grad_also_BO = grad_also_BO.to(self._read_SO.dtype)
            if self._pairs is None:
                besides_AO = self._also_BA.T @ grad_also_BO
            else:
                of_pairs_SO = self._pairs.sum_by_latent(grad_also_BO.contiguous(), latents)
        if rows_BO is None:
            grad_SO = weights_BK.new_zeros(self._read_SO.shape)
            return _plus(grad_SO, self._latents_A, besides_AO) if of_pairs_SO is None else of_pairs_SO
        bags = bags_of(by, indices_BK, latents)
        left = wanted if of_pairs_SO is None else None
        grad_W = weight_gradient(by, bags, weights_BK, rows_BO, self._latents_A, besides_AO, left)
        return grad_W if of_pairs_SO is None or grad_W is None else grad_W.add_(of_pairs_SO)


def weight_gradient(
    by: Primitives,
    bags: Any,
    weights_BK: Tensor,
    rows_BD: Tensor,
    latents_A: Tensor | None,
    besides_AD: Tensor | None,
    wanted: Tensor | None,
) -> Tensor | None:
    """(S, D) the sum over each latent's pairs, and what there is of some latents besides; or None, and it is left."""
    if wanted is not None and by.row_gradient is not None:
        latents_A = None if besides_AD is None else latents_A
        row_gradients.leave(wanted, by.row_gradient(bags, weights_BK, rows_BD, latents_A, besides_AD))
        return None
    return _plus(by.sum_by_latent(bags, weights_BK, rows_BD), latents_A, besides_AD)


def _plus(grad_SD: Tensor, latents_A: Tensor | None, besides_AD: Tensor | None) -> Tensor:
    if latents_A is not None and besides_AD is not None:
        grad_SD.index_add_(0, latents_A, besides_AD.to(grad_SD.dtype))
    return grad_SD


_last = threading.local()


def bags_of(by: Primitives, indices_BK: Tensor, latents: int) -> Any:
    """The pairs by latent, sorted once for decoder and encoder: those of this thread's last call, if for the same."""
    found: tuple[Primitives, Tensor, int, int, Any] | None = getattr(_last, "found", None)
    if found is not None:
        of, there, version, count, bags = found
        same = there.data_ptr() == indices_BK.data_ptr() and there.shape == indices_BK.shape
        if same and of is by and version == indices_BK._version and count == latents:
            return bags
    bags = by.bags(indices_BK, latents)
    _last.found = (by, indices_BK, indices_BK._version, latents, bags)  # kept, so that its memory is nobody else's
    return bags
