"""What every fast path must equal: the operations written as dense autograd would do them, in any dtype.

Axes: B rows, D input width, O output width, S latents, K active per row, A latents looked at besides. Nothing here is
meant to be fast.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["relu", "magnitude", "linear"]
"""What is selected, and what becomes of it: the largest through a ReLU; the largest by absolute value, with their sign;
or the largest, negative ones too, as they are."""


class TopKCodes(NamedTuple):
    """What `encode_topk` gives.

    Attributes:
        values: (B, K) the selected pre-activations, through a ReLU if that is the rule, in no particular order.
        indices: (B, K) int64, the latents they belong to, each at most once in a row.
        also: (B, A) the pre-activations, without ReLU, of the latents asked for besides; None when none were.
    """

    values: Tensor
    indices: Tensor
    also: Tensor | None


class Rebuilt(NamedTuple):
    """What `rebuild` gives.

    Attributes:
        mse: () the mean squared error.
        output: (B, O) what was compared with the target, detached.
        also: (B, O) what the dense activations decode to; None when there were none.
    """

    mse: Tensor
    output: Tensor
    also: Tensor | None


def encode_topk(
    x_BD: Tensor,
    W_enc_SD: Tensor,
    b_enc_S: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    also_A: Tensor | None = None,
    rule: Rule = "relu",
) -> TopKCodes:
    """The k largest of each row's pre-activations ``(x - b_pre) W_enc^T + b_enc``, and those of the latents ``also_A``.

    Gao et al. 2024 (arXiv 2406.04093), section 2.3, for the rule "relu". All values are differentiable in x, W_enc,
    b_enc and b_pre; the selection is not. Among pre-activations that tie at the k-th place any may be chosen.
    """
    centred_BD = x_BD if b_pre_D is None else x_BD - b_pre_D
    pre_BS = centred_BD @ W_enc_SD.T + b_enc_S
    values_BK, indices_BK = largest(pre_BS, k, rule)
    return TopKCodes(values_BK, indices_BK, None if also_A is None else pre_BS[:, also_A])


def keep_topk(pre_BA: Tensor, k: int, rule: Rule = "relu") -> Tensor:
    """(B, A): what the rule makes of the k of each row that it selects (all, if there are fewer), 0 in other places."""
    values, places = largest(pre_BA, min(k, pre_BA.shape[1]), rule)
    return torch.zeros_like(pre_BA).scatter(1, places, values)


def largest(pre_BS: Tensor, k: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """``(values, places)`` (B, K): what the rule makes of the k of each row that it selects, and where they are."""
    by_BS = pre_BS.abs() if rule == "magnitude" else pre_BS
    places_BK = by_BS.topk(k, dim=1, sorted=False).indices
    values_BK = pre_BS.gather(1, places_BK)
    return values_BK.relu() if rule == "relu" else values_BK, places_BK


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor) -> Tensor:
    """(B, O): the weighted sum of the selected decoder rows, without bias."""
    dense_BS = values_BK.new_zeros(len(values_BK), len(W_dec_SO)).scatter_add(1, indices_BK, values_BK)
    return dense_BS @ W_dec_SO


def decode_also(
    values_BK: Tensor, indices_BK: Tensor, W_dec_SO: Tensor, also_BA: Tensor, latents_A: Tensor
) -> tuple[Tensor, Tensor]:
    """`decode`, and beside it what the dense activations ``also_BA`` of the latents ``latents_A`` decode to."""
    return decode(values_BK, indices_BK, W_dec_SO), also_BA @ W_dec_SO[latents_A]


def rebuild(
    values_BK: Tensor,
    indices_BK: Tensor,
    W_dec_SO: Tensor,
    bias: Tensor,
    target_BO: Tensor,
    also_BA: Tensor | None = None,
    latents_A: Tensor | None = None,
) -> Rebuilt:
    """The mean squared error of `decode` plus a bias (O,) or (B, O), differentiable in values, W_dec and the bias.

    With dense activations ``also_BA`` of the latents ``latents_A`` also what they decode to, as in `decode_also`.
    """
    if also_BA is None or latents_A is None:
        return compared(decode(values_BK, indices_BK, W_dec_SO), bias, target_BO, None)
    decoded_BO, also_BO = decode_also(values_BK, indices_BK, W_dec_SO, also_BA, latents_A)
    return compared(decoded_BO, bias, target_BO, also_BO)


def compared(decoded_BO: Tensor, bias: Tensor, target_BO: Tensor, also_BO: Tensor | None) -> Rebuilt:
    """What `rebuild` gives, of what has been decoded."""
    output_BO = decoded_BO + bias
    return Rebuilt((target_BO - output_BO).square().mean(), output_BO.detach(), also_BO)
