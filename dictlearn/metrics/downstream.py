"""What splicing a dictionary into its language model costs: next-token cross-entropy and KL on held-out text.

Loss recovered is ``(CE_ablated - CE_spliced) / (CE_ablated - CE_clean)``: 1 is as good as the model's own activation, 0
no better than the ablation. Both ablations in use are reported: zero, and the mean activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary
from dictlearn.metrics.splicing import Replacement, splice

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Downstream:
    """Nats per predicted token, over the same tokens in every column.

    Attributes:
        tokens: predicted tokens.
        ce_clean, ce_spliced, ce_zero_ablated, ce_mean_ablated: cross-entropy of the next token.
        kl_spliced, kl_zero_ablated, kl_mean_ablated: KL(clean || changed) of the next-token distribution.
        loss_recovered: against zero ablation.
        loss_recovered_from_mean: against mean ablation.
    """

    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    kl_spliced: float
    kl_zero_ablated: float
    kl_mean_ablated: float
    loss_recovered: float
    loss_recovered_from_mean: float


@torch.no_grad()
def measure_downstream(
    model: TransformerBridge,
    dictionary: Dictionary,
    hook_out: str,
    mean: Tensor,
    windows: Iterable[tuple[Tensor, Tensor]],
    skip_first: bool,
) -> Downstream:
    """Compare the model with itself under three replacements of ``hook_out``.

    Args:
        model: the language model the dictionary was trained on.
        dictionary: takes raw activations; a transcoder names its ``hook_in`` in its provenance.
        hook_out: the hook whose activation is replaced.
        mean: (d_out,) the mean activation, for mean ablation.
        windows: batches of ``(tokens (B, T) int64, real (B, T) bool)``; padding, on the right, is not real.
        skip_first: whether the first position keeps its own activation in all three (BOS, which no row covers).

    Raises:
        UserError: when no window holds two tokens.
    """
    replacements: dict[str, Dictionary | Replacement] = {
        "spliced": dictionary,
        "zero_ablated": lambda rows: rows.new_zeros(len(rows), dictionary.d_out),
        "mean_ablated": lambda rows: mean.to(rows).expand(len(rows), -1),
    }
    sums = dict.fromkeys(["ce_clean", *(f"{kind}_{name}" for kind in ("ce", "kl") for name in replacements)], 0.0)
    predicted = 0
    for tokens_BT, real_BT in windows:
        keep = real_BT[:, 1:] & real_BT[:, :-1]
        targets = tokens_BT[:, 1:][keep]
        clean = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
        sums["ce_clean"] -= float(clean.gather(1, targets[:, None]).sum())
        for name, replacement in replacements.items():
            with splice(model, {hook_out: replacement}, skip_first=skip_first):
                changed = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
            sums[f"ce_{name}"] -= float(changed.gather(1, targets[:, None]).sum())
            sums[f"kl_{name}"] += float((clean.exp() * (clean - changed)).sum())
        predicted += len(targets)
    if predicted == 0:
        raise UserError("No held-out document has two tokens to predict on; harvest more tokens.")
    means = {name: value / predicted for name, value in sums.items()}

    def recovered(ablated: float) -> float:
        return (ablated - means["ce_spliced"]) / (ablated - means["ce_clean"])

    return Downstream(
        tokens=predicted,
        loss_recovered=recovered(means["ce_zero_ablated"]),
        loss_recovered_from_mean=recovered(means["ce_mean_ablated"]),
        **means,
    )
