"""What every fast path must equal: the operations written as dense autograd would do them, in any dtype.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides. Nothing here is
meant to be fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopKCodes(NamedTuple):
    """What `encode_topk` gives.

    Attributes:
        values: (B, K) the selected pre-activations through a ReLU, in no particular order.
        indices: (B, K) int64, the latents they belong to, each at most once in a row.
        also: (B, A) the pre-activations, without ReLU, of the latents asked for besides; None when none were.
    """

    values: Tensor
    indices: Tensor
    also: Tensor | None


def encode_topk(
    x_BD: Tensor,
    W_enc_SD: Tensor,
    b_enc_S: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    also_A: Tensor | None = None,
) -> TopKCodes:
    """The k largest of each row's pre-activations ``(x - b_pre) W_enc^T + b_enc``, and those of the latents ``also_A``.

    Gao et al. 2024 (arXiv 2406.04093), section 2.3. All values are differentiable in x, W_enc, b_enc and b_pre; the
    selection is not. Among pre-activations that tie at the k-th place any may be chosen.
    """
    centred_BD = x_BD if b_pre_D is None else x_BD - b_pre_D
    pre_BS = centred_BD @ W_enc_SD.T + b_enc_S
    values_BK, indices_BK = pre_BS.topk(k, dim=1, sorted=False)
    return TopKCodes(values_BK.relu(), indices_BK, None if also_A is None else pre_BS[:, also_A])


def keep_topk(pre_BA: Tensor, k: int) -> Tensor:
    """(B, A): of each row the k largest (all, if there are fewer) through a ReLU, and 0 in every other place."""
    values, places = pre_BA.topk(min(k, pre_BA.shape[1]), dim=1, sorted=False)
    return torch.zeros_like(pre_BA).scatter(1, places, values.relu())


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """(B, O): the weighted sum of the selected decoder rows, without bias."""
    dense_BS = values_BK.new_zeros(len(values_BK), len(W_dec_SO)).scatter_add(1, indices_BK, values_BK)
    return dense_BS @ W_dec_SO


def decode_also(
    values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor, also_BA: Tensor, latents_A: Tensor
) -> tuple[Tensor, Tensor]:
    """`decode`, and beside it what the dense activations ``also_BA`` of the latents ``latents_A`` decode to."""
    return decode(values_BK, indices_BK, W_dec_SO), also_BA @ W_dec_SO[latents_A]
