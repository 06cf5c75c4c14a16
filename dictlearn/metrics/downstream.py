"""What splicing a dictionary into its language model costs: next-token cross-entropy and KL on held-out text.

Loss recovered is ``(CE_ablated - CE_spliced) / (CE_ablated - CE_clean)``: 1 is as good as the model's own activation, 0
no better than the ablation. Both ablations in use are reported: zero, and the mean activation.

A dictionary of several hooks can be put in place at all of them where each of its outputs needs no later input, as a
cross-layer transcoder's does: `measure_downstream`. Where an output needs inputs that the model computes only after it,
as a crosscoder's does, or that another model computes, `measure_each_downstream` puts what the dictionary makes of the
unchanged activations in place, at one hook at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary
from dictlearn.metrics.splicing import Replacement, activations_at, splice

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Changes = Mapping[str, Mapping[str | tuple[str, ...], Dictionary | Replacement]]
"""Name of a change -> what is spliced in where."""
CHANGES = ("spliced", "zero_ablated", "mean_ablated")


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
    hook_out: str | tuple[str, ...],
    mean: Tensor,
    windows: Iterable[tuple[Tensor, Tensor]],
    skip_first: bool,
) -> Downstream:
    """Compare the model with itself under three replacements of ``hook_out``.

    Args:
        model: the language model the dictionary was trained on.
        dictionary: takes raw activations; a transcoder names its ``hook_in`` in its provenance.
        hook_out: the hook whose activation is replaced, or several that are replaced together.
        mean: (d_out,) the mean activation, for mean ablation.
        windows: batches of ``(tokens (B, T) int64, real (B, T) bool)``; padding, on the right, is not real.
        skip_first: whether the first position keeps its own activation in all three (BOS, which no row covers).

    Raises:
        UserError: when no window holds two tokens.
    """
    if isinstance(hook_out, str):
        means = {hook_out: mean}
    else:
        means = dict(zip(hook_out, mean.split(dictionary.output_parts), strict=True))
    changes: Changes = {"spliced": {hook_out: dictionary}, **ablations(means)}
    costs = Costs()
    for tokens_BT, real_BT in windows:
        costs.add(model, tokens_BT, real_BT, changes, skip_first)
    return costs.result()


@torch.no_grad()
def measure_each_downstream(
    models: Mapping[str, TransformerBridge],
    dictionary: Dictionary,
    hooks_in: Sequence[str],
    means: Mapping[str, Tensor],
    windows: Iterable[tuple[Tensor, Tensor]],
    skip_first: bool,
) -> dict[str, Downstream]:
    """At one hook at a time, what the dictionary makes of the unchanged activations of all ``hooks_in``.

    Args:
        models: the language model of each hook, of those that are encoded and of those in ``means``.
        dictionary: takes raw activations of ``hooks_in``, side by side.
        means: hook that is rebuilt -> (d,) its mean activation, in the dictionary's order.
        windows: as for `measure_downstream`; all models read the same tokens.

    Raises:
        UserError: when no window holds two tokens.
    """
    costs = {hook: Costs() for hook in means}
    for tokens_BT, real_BT in windows:
        parts: dict[str, Tensor] = {}
        for model in set(models.values()):
            of_model = [hook for hook in hooks_in if models[hook] is model]
            found = activations_at(model, tokens_BT, [own_name(hook) for hook in of_model])
            parts |= dict(zip(of_model, found, strict=True))
        rebuilt = dictionary(torch.cat([parts[hook].flatten(0, 1).flatten(1).float() for hook in hooks_in], dim=1))
        for hook, part in zip(means, rebuilt.split(dictionary.output_parts, dim=1), strict=True):
            own = own_name(hook)
            changes: Changes = {"spliced": {own: partial(_instead, part)}, **ablations({own: means[hook]})}
            costs[hook].add(models[hook], tokens_BT, real_BT, changes, skip_first)
    return {hook: of_hook.result() for hook, of_hook in costs.items()}


def own_name(hook: str) -> str:
    """What a hook of a store that is aligned with others, STORE:HOOK, is called in its own model."""
    return hook.rpartition(":")[2]


def ablations(means: Mapping[str, Tensor]) -> dict[str, dict[str | tuple[str, ...], Dictionary | Replacement]]:
    """Zero, and the mean, in the place of the activation at each hook."""
    return {
        "zero_ablated": dict.fromkeys(means, torch.zeros_like),
        "mean_ablated": {hook: partial(_all, mean) for hook, mean in means.items()},
    }


def _all(value: Tensor, rows: Tensor) -> Tensor:
    return value.to(rows).expand(len(rows), -1)


def _instead(value: Tensor, rows: Tensor) -> Tensor:
    return value


class Costs:
    """Sums, over windows, of what changes to a model cost."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(["ce_clean", *(f"{kind}_{name}" for kind in ("ce", "kl") for name in CHANGES)], 0.0)
        self._predicted = 0

    def add(
        self, model: TransformerBridge, tokens_BT: Tensor, real_BT: Tensor, changes: Changes, skip_first: bool
    ) -> None:
        keep = real_BT[:, 1:] & real_BT[:, :-1]
        targets = tokens_BT[:, 1:][keep]
        clean = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
        self._sums["ce_clean"] -= float(clean.gather(1, targets[:, None]).sum())
        for name, replacements in changes.items():
            with splice(model, replacements, skip_first=skip_first):
                changed = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
            self._sums[f"ce_{name}"] -= float(changed.gather(1, targets[:, None]).sum())
            self._sums[f"kl_{name}"] += float((clean.exp() * (clean - changed)).sum())
        self._predicted += len(targets)

    def result(self) -> Downstream:
        """Raises UserError when nothing was predicted."""
        if self._predicted == 0:
            raise UserError("No held-out document has two tokens to predict on; harvest more tokens.")
        means = {name: value / self._predicted for name, value in self._sums.items()}

        def recovered(ablated: float) -> float:
            return (ablated - means["ce_spliced"]) / (ablated - means["ce_clean"])

        return Downstream(
            tokens=self._predicted,
            loss_recovered=recovered(means["ce_zero_ablated"]),
            loss_recovered_from_mean=recovered(means["ce_mean_ablated"]),
            **means,
        )
