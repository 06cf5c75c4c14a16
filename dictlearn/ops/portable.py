"""The sparse path (`dictlearn.ops.sparse`) in plain PyTorch: exact, deterministic, on any device.

The encoder's product and the selection are made in blocks of rows over one reused buffer, so that on a CPU the (B, S)
matrix of pre-activations never exists. Decoding is an embedding bag over decoder rows, a value's gradient a sampled
product, and a weight's gradient the *reversed* embedding bag: the latents are the bags, and the rows of the batch are
what is summed. No atomics, hence deterministic; no [B*K, D] temporary, but where `_pair_products` is not on a CPU.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dictlearn.ops import reference, sparse
from dictlearn.ops.reference import Rule

# torch says once that CSR tensors are in beta; the one documented function of them used here is stable
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")

BUFFER_ELEMENTS = 2**24
"""Pre-activations that are there at once on a CPU (64 MB of float32): 2048 rows of 8192 latents. With half of that a
step takes 3 to 5 % longer, with all 4096 rows of a batch no less."""


def keep_topk(pre_BA: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    """See `dictlearn.ops.reference.keep_topk`."""
    if rule != "relu":
        return reference.keep_topk(pre_BA, k, rule)
    return pre_BA.relu() if k >= pre_BA.shape[1] else _KeepTopK.apply(pre_BA, k)


class _KeepTopK(torch.autograd.Function):
    """Dense in, dense out: the gradient passes where something was kept."""

    @staticmethod
    def forward(ctx: Any, pre_BA: Tensor, k: int) -> Tensor:
        kept_BA = _keep_by_threshold(pre_BA, k) if pre_BA.device.type == "cpu" else _keep_by_place(pre_BA, k)
        ctx.save_for_backward(kept_BA)
        return kept_BA

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor, None]:
        (kept_BA,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad_BA, kept_BA, 0), None


@dataclass(frozen=True)
class _Pairs:
    """The rows and latents of dense activations that are not zero, in row order: bags of different lengths.

    Attributes:
        weights, rows, latents: (P,) of each pair.
        offsets: (B,) where each row's pairs begin.
    """

    weights: Tensor
    rows: Tensor
    latents: Tensor
    offsets: Tensor

    def bag_rows(self, W_SO: Tensor) -> Tensor:
        """(B, O): for each row the weighted sum of its latents' rows of W."""
        return F.embedding_bag(self.latents, W_SO, self.offsets, mode="sum", per_sample_weights=self.weights)

    def sum_by_latent(self, rows_BO: Tensor, latents: int) -> Tensor:
        """(S, O): for each latent the weighted sum of its rows."""
        order, offsets_S = _bags(self.latents, latents)
        return F.embedding_bag(self.rows[order], rows_BO, offsets_S, mode="sum", per_sample_weights=self.weights[order])


DENSE_FROM = 1 / 4
"""Share of activations that are not zero from which on a dense product is faster than gathering, on a CPU."""


def _pairs(also_BA: Tensor, latents_A: Tensor) -> _Pairs | None:
    """None where a dense product is faster."""
    if also_BA.device.type != "cpu" or also_BA.dtype not in (torch.float32, torch.float64):
        return None
    places = np.flatnonzero(also_BA.numpy() != 0)  # several times faster than torch's nonzero
    if len(places) >= DENSE_FROM * also_BA.numel():
        return None
    rows_P, columns_P = (torch.from_numpy(part) for part in np.divmod(places, also_BA.shape[1]))
    counts_B = torch.bincount(rows_P, minlength=len(also_BA))
    weights_P = also_BA.reshape(-1)[torch.from_numpy(places)]
    return _Pairs(weights_P, rows_P, latents_A[columns_P], counts_B.cumsum(0) - counts_B)


# --- forward ----------------------------------------------------------------------------------------------------------


def _select(
    x_BD: Tensor, W_SD: Tensor, b_S: Tensor, k: int, also_A: Tensor | None, rule: Rule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values as the rule makes them, indices, and the pre-activations of the latents asked for besides."""
    if torch.is_autocast_enabled(x_BD.device.type):
        low = torch.get_autocast_dtype(x_BD.device.type)
        x_BD, W_SD, b_S = x_BD.to(low), W_SD.to(low), b_S.to(low)
    B, S = len(x_BD), len(W_SD)
    block = B if x_BD.device.type != "cpu" else min(B, max(256, BUFFER_ELEMENTS // S))
    values_BK = x_BD.new_empty(B, k, dtype=dtype)
    indices_BK = x_BD.new_empty(B, k, dtype=torch.int64)
    also_BA = None if also_A is None else x_BD.new_empty(B, len(also_A))
    with torch.autocast(x_BD.device.type, enabled=False):
        buffer = _buffer(block, S, x_BD)
        magnitudes = _buffer(block, S, x_BD, "magnitudes") if rule == "magnitude" else buffer
        for start in range(0, B, block):
            rows = slice(start, min(start + block, B))
            pre_bS = torch.addmm(b_S, x_BD[rows], W_SD.T, out=buffer[: rows.stop - start])
            if rule == "magnitude":
                by_bS = torch.abs(pre_bS, out=magnitudes[: rows.stop - start])
                indices_BK[rows] = by_bS.topk(k, dim=1, sorted=False).indices
                values_BK[rows] = pre_bS.gather(1, indices_BK[rows])
            else:
                top_bK, indices_BK[rows] = pre_bS.topk(k, dim=1, sorted=False)
                values_BK[rows] = top_bK.relu_() if rule == "relu" else top_bK
            if also_A is not None and also_BA is not None:
                torch.index_select(pre_bS, 1, also_A, out=also_BA[rows])
    return values_BK, indices_BK, None if also_BA is None else also_BA.to(dtype)


def _keep_by_place(pre_BA: Tensor, k: int) -> Tensor:
    values_BK, places_BK = pre_BA.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre_BA).scatter_(1, places_BK, values_BK.relu_())


def _keep_by_threshold(pre_BA: Tensor, k: int) -> Tensor:
    """As `_keep_by_place`; numpy finds the k-th largest of a row in a fifth of the time that torch.topk takes."""
    first = pre_BA.shape[1] - k
    parted = np.partition(pre_BA.numpy(), first, axis=1)
    kth_B1, below_B1 = parted[:, first, None].copy(), parted[:, :first].max(axis=1, keepdims=True)
    threshold_B1 = torch.from_numpy(kth_B1).clamp_min(torch.finfo(pre_BA.dtype).tiny)
    # into the memory that is there already: fresh memory would cost as much again
    kept_BA = torch.where(pre_BA >= threshold_B1, pre_BA, pre_BA.new_zeros(()), out=torch.from_numpy(parted))
    tied_B = torch.from_numpy((kth_B1 == below_B1) & (kth_B1 > 0)).squeeze(1)
    if tied_B.any():
        kept_BA[tied_B] = _keep_by_place(pre_BA[tied_B], k)
    return kept_BA


_reused = threading.local()


def _buffer(rows: int, S: int, like: Tensor, name: str = "pre-activations") -> Tensor:
    """(rows, S), reused by this thread's next call for the name: fresh memory costs a page fault every 4 kB."""
    if like.device.type != "cpu":
        return like.new_empty(rows, S)
    kept: Tensor | None = _reused.__dict__.get(name)
    if kept is None or kept.dtype != like.dtype or kept.numel() < rows * S:
        with torch.inference_mode(False):  # what is made in inference mode may not be written to outside it
            kept = _reused.__dict__[name] = torch.empty(rows * S, dtype=like.dtype)
    return kept[: rows * S].view(rows, S)


def _bag_rows(weights_BK: Tensor, indices_BK: Tensor, W_SO: Tensor) -> Tensor:
    """(B, O): for each row the weighted sum of the rows of W that it names."""
    return F.embedding_bag(indices_BK, W_SO, mode="sum", per_sample_weights=weights_BK.to(W_SO.dtype))


# --- backward ---------------------------------------------------------------------------------------------------------


def _bags(indices_BK: Tensor, latents: int) -> tuple[Tensor, Tensor]:
    """The B*K pairs sorted by latent, as ``(order (B*K,), offsets (S,))``: bag s holds the pairs that selected s."""
    keys = indices_BK.reshape(-1)
    # a radix sort of half as many bytes
    sorted_latents, order = (keys.to(torch.int32) if latents < 2**31 else keys).sort(stable=True)
    if sorted_latents.device.type != "cpu":  # a GPU would be asked for the largest of them
        every_S = torch.arange(latents, dtype=sorted_latents.dtype, device=sorted_latents.device)
        return order, torch.searchsorted(sorted_latents, every_S)
    counts_S = torch.bincount(sorted_latents, minlength=latents)
    return order, counts_S.cumsum(0) - counts_S


def _sum_by_latent(bags: tuple[Tensor, Tensor], values_BK: Tensor, rows_BD: Tensor) -> Tensor:
    """(S, D): for each latent, the sum over its pairs of value times row. The reversed embedding bag."""
    order, offsets_S = bags
    weights = values_BK.reshape(-1)[order].to(rows_BD.dtype)
    return F.embedding_bag(order // values_BK.shape[1], rows_BD, offsets_S, mode="sum", per_sample_weights=weights)


def _pair_products(rows_BO: Tensor, W_SO: Tensor, indices_BK: Tensor) -> Tensor:
    """(B, K): the dot product of each row with each of its selected latents' vectors."""
    B, K = indices_BK.shape
    if rows_BO.device.type != "cpu" or rows_BO.dtype not in (torch.float32, torch.float64):
        return torch.einsum("bo,bko->bk", rows_BO, F.embedding(indices_BK, W_SO))
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, B * K + 1, K),
        indices_BK.reshape(-1),
        rows_BO.new_zeros(B * K),
        (B, len(W_SO)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, rows_BO, W_SO.T, beta=0.0).values().view(B, K)


PRIMITIVES = sparse.Primitives(
    read=lambda weight: weight,  # in full precision: it is lowered for the encoder's product alone
    select=_select,
    bags=_bags,
    sum_by_latent=_sum_by_latent,
    decode=_bag_rows,
    pair_products=_pair_products,
    pairs=_pairs,
)
_operations = sparse.Operations(PRIMITIVES)
encode_topk, rebuild = _operations.encode_topk, _operations.rebuild
decode, decode_also = _operations.decode, _operations.decode_also
