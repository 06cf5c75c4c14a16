"""The sparse path in plain PyTorch: exact, deterministic, on any device. No [B*K, D] temporary, no dense gradient GEMM.

The encoder's GEMM and the selection are dense; everything after them touches only the B*K selected pairs:

* decode is an embedding bag over decoder rows;
* the gradient of a value is a sampled product, one dot product per selected pair;
* both weight gradients are the *reversed* embedding bag: the latents are the bags and the rows of the batch are what
  is summed, after one sort of the B*K latent numbers. No atomics, hence deterministic.

Axes: B rows, D input width, O output width, S latents, K active per row.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encode_topk(x_BD: Tensor, W_enc_SD: Tensor, b_enc_S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `dictlearn.ops.reference.encode_topk`."""
    with torch.no_grad():
        pre_BS = torch.addmm(b_enc_S, x_BD, W_enc_SD.T)
        top_BK, indices_BK = pre_BS.topk(k, dim=1, sorted=False)
        top_BK = top_BK.relu_()
    return _SelectedActivations.apply(x_BD, W_enc_SD, b_enc_S, top_BK, indices_BK), indices_BK


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """See `dictlearn.ops.reference.decode`."""
    return _Decode.apply(values_BK, indices_BK, W_dec_SO)


def encode_topk_among(
    x_BD: Tensor, W_enc_SD: Tensor, b_enc_S: Tensor, k: int, among_S: Tensor
) -> tuple[Tensor, Tensor]:
    """See `dictlearn.ops.reference.encode_topk_among`: dense algebra, but only over the chosen sub-dictionary."""
    among = among_S.nonzero().squeeze(1)
    pre_BA = F.linear(x_BD, W_enc_SD[among], b_enc_S[among])
    values_BK, position_BK = pre_BA.topk(min(k, len(among)), dim=1, sorted=False)
    return values_BK.relu(), among[position_BK]


def _bags(indices_BK: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """The B*K pairs sorted by latent, as ``(order (B*K,), offsets (S,))``: bag s holds the pairs that selected s."""
    sorted_latents, order = indices_BK.reshape(-1).sort(stable=True)
    counts_S = torch.bincount(sorted_latents, minlength=latents)
    return order, counts_S.cumsum(0) - counts_S


def _sum_by_latent(bags: tuple[Tensor, Tensor], values_BK: Tensor, rows_BD: Tensor) -> Tensor:
    """(S, D): for each latent, the sum over its pairs of value times row. The reversed embedding bag."""
    order, offsets_S = bags
    weights = values_BK.reshape(-1)[order]
    return F.embedding_bag(order // values_BK.shape[1], rows_BD, offsets_S, mode="sum", per_sample_weights=weights)


def _pair_products(rows_BO: Tensor, W_SO: Tensor, indices_BK: Tensor) -> Tensor:
    """(B, K): the dot product of each row with each of its selected latents' vectors."""
    B, K = indices_BK.shape
    if rows_BO.device.type != "cpu" or rows_BO.dtype not in (torch.float32, torch.float64):
        return torch.einsum("bo,bko->bk", rows_BO, F.embedding(indices_BK, W_SO))
    columns_BK, order_BK = indices_BK.sort(dim=1)
    with warnings.catch_warnings():
        # torch prints once that CSR tensors are in beta; this one documented function of them is stable
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        pattern = torch.sparse_csr_tensor(
            torch.arange(0, B * K + 1, K),
            columns_BK.reshape(-1),
            rows_BO.new_zeros(B * K),
            (B, len(W_SO)),
            check_invariants=False,
        )
        products = torch.sparse.sampled_addmm(pattern, rows_BO, W_SO.T, beta=0.0).values().view(B, K)
    return torch.empty_like(products).scatter_(1, order_BK, products)


class _SelectedActivations(torch.autograd.Function):
    """ReLU'd pre-activations at the selected pairs, already computed; backward reaches x, W_enc and b_enc."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_SD: Tensor, b_enc_S: Tensor, values_BK: Tensor, indices_BK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BD, W_enc_SD, values_BK, indices_BK)
        return values_BK.clone()

    @staticmethod
    def backward(ctx: Any, grad_BK: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_enc_SD, values_BK, indices_BK = ctx.saved_tensors
        grad_BK = grad_BK * (values_BK > 0)
        grad_x = decode(grad_BK, indices_BK, W_enc_SD) if ctx.needs_input_grad[0] else None
        bags = _bags(indices_BK, len(W_enc_SD))
        grad_W = _sum_by_latent(bags, grad_BK, x_BD) if ctx.needs_input_grad[1] else None
        grad_b = _sum_by_latent(bags, grad_BK, x_BD.new_ones(len(x_BD), 1)).squeeze(1)
        return grad_x, grad_W, grad_b, None, None


class _Decode(torch.autograd.Function):
    """Embedding bag with the reversed embedding bag as the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, W_dec_SO)
        return F.embedding_bag(indices_BK, W_dec_SO, mode="sum", per_sample_weights=values_BK)

    @staticmethod
    def backward(ctx: Any, grad_BO: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, W_dec_SO = ctx.saved_tensors
        grad_BO = grad_BO.contiguous()
        grad_values = _pair_products(grad_BO, W_dec_SO, indices_BK) if ctx.needs_input_grad[0] else None
        grad_W = None
        if ctx.needs_input_grad[2]:
            grad_W = _sum_by_latent(_bags(indices_BK, len(W_dec_SO)), values_BK, grad_BO)
        return grad_values, None, grad_W
