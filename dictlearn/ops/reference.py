"""What every fast path must equal: the three operations written as dense autograd would do them, in any dtype.

Axes: B rows, D input width, O output width, S latents, K active per row. Nothing here is meant to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_topk(x_BD: Tensor, W_enc_SD: Tensor, b_enc_S: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of each row, through a ReLU: ``(values_BK, indices_BK)``.

    Gao et al. 2024 (arXiv 2406.04093), section 2.3. Values are differentiable in all three inputs, the selection not.
    """
    pre_BS = x_BD @ W_enc_SD.T + b_enc_S
    values_BK, indices_BK = pre_BS.topk(k, dim=1, sorted=False)
    return values_BK.relu(), indices_BK


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """(B, O): the weighted sum of the selected decoder rows, without bias."""
    dense_BS = values_BK.new_zeros(len(values_BK), len(W_dec_SO)).scatter_add(1, indices_BK, values_BK)
    return dense_BS @ W_dec_SO


def encode_topk_among(
    x_BD: Tensor, W_enc_SD: Tensor, b_enc_S: Tensor, k: int, among_S: Tensor
) -> tuple[Tensor, Tensor]:
    """As `encode_topk`, choosing only among the latents where the mask ``among_S`` is true.

    Rows have ``min(k, among.sum())`` slots. This is what the AuxK loss needs for its dead latents.
    """
    pre_BS = (x_BD @ W_enc_SD.T + b_enc_S).masked_fill(~among_S, -torch.inf)
    values_BK, indices_BK = pre_BS.topk(min(k, int(among_S.sum())), dim=1, sorted=False)
    return values_BK.relu(), indices_BK
