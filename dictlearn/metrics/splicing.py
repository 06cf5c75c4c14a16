"""Run a language model with dictionaries in place of its own activations, and put it back afterwards.

    with splice(model, {"blocks.2.hook_mlp_out": transcoder}):
        logits = model(tokens)

An autoencoder replaces a hook's activation by its reconstruction of it. A transcoder replaces its output hook by what
it predicts from its input hook, wherever that is. A cross-layer transcoder replaces all its output hooks, each by what
it predicts from the inputs up to that layer. A hook that one dictionary reads and another replaces is read as replaced,
as the rest of the model reads it. Leaving the block removes every hook, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary
from dictlearn.hook_names import check_editable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Replacement = Callable[[Tensor], Tensor]
"""(positions, d) activations to their replacement; used for ablations."""


@contextmanager
def splice(
    model: TransformerBridge,
    dictionaries: Mapping[str | tuple[str, ...], Dictionary | Replacement],
    skip_first: bool | None = None,
) -> Iterator[TransformerBridge]:
    """Replace the activation at each hook for as long as the block runs.

    Args:
        model: a TransformerBridge.
        dictionaries: hook whose value is replaced -> a dictionary, or a function of (n, d) activations; all the hooks
            that a cross-layer transcoder predicts, in its order -> the transcoder.
        skip_first: leave the first position of every row alone. Harvested rows leave the BOS position out, so a
            dictionary has never seen it; None means "when the dictionary's provenance says BOS was left out".

    Raises:
        UserError: a hook the model does not have, one that cannot be edited, or several for a dictionary whose outputs
            need later inputs.
    """
    hooks: list[tuple[str, Callable]] = []
    read_elsewhere: list[tuple[str, Callable]] = []
    seen: dict[str, Tensor] = {}
    for replaced, replacement in dictionaries.items():
        targets = (replaced,) if isinstance(replaced, str) else replaced
        provenance = getattr(replacement, "provenance", {})
        hook_in = provenance.get("hook_in", targets)
        sources = (hook_in,) if isinstance(hook_in, str) else tuple(hook_in)
        _check_hooks(model, {*targets, *sources})
        for target in targets:
            check_editable(target)
        skips = provenance.get("bos_left_out", False) if skip_first is None else skip_first
        if len(targets) == len(sources) == 1:
            computed: list[Callable[[Sequence[Tensor]], Tensor]] = [partial(_of_one, replacement)]
        else:
            computed = [partial(_of_several(replacement, sources, targets), part=part) for part in range(len(targets))]
        for source in sources:
            (hooks if source in targets else read_elsewhere).append((source, _remember(seen, source)))
        hooks += [
            (target, _replace(target, seen, sources[: part + 1], compute, skips))
            for part, (target, compute) in enumerate(zip(targets, computed, strict=True))
        ]
    with model.hooks(fwd_hooks=hooks + read_elsewhere):
        yield model


@torch.no_grad()
def activations_at(model: TransformerBridge, tokens: Tensor, hooks: Sequence[str]) -> list[Tensor]:
    """What the unchanged model has at each hook for tokens (B, T): (B, T, ...).

    Raises:
        UserError: a hook the model does not have.
    """
    _check_hooks(model, set(hooks))
    seen: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[(hook, _remember(seen, hook)) for hook in set(hooks)]):
        model(tokens)
    return [seen[hook] for hook in hooks]


def _check_hooks(model: TransformerBridge, hooks: set[str]) -> None:
    for hook in sorted(hooks):
        if hook not in model.hook_dict:
            raise UserError(f"The model has no hook {hook!r}; name one of its hooks, such as blocks.0.hook_resid_post.")


def _of_one(replacement: Dictionary | Replacement, inputs: Sequence[Tensor]) -> Tensor:
    return replacement(inputs[0])


def _of_several(
    replacement: Dictionary | Replacement, sources: Sequence[str], targets: Sequence[str]
) -> Callable[..., Tensor]:
    """What gives the value at one of several targets, from the inputs up to it."""
    if not isinstance(replacement, Dictionary) or not replacement.causal or len(sources) != len(targets):
        raise UserError(
            f"A dictionary of {', '.join(sources)} needs activations that the model computes after the hooks it would "
            "replace; replace one hook at a time by what it makes of activations that were kept."
        )
    return replacement.rebuild_part


def _remember(seen: dict[str, Tensor], name: str) -> Callable:
    def hook_function(activation: Tensor, hook: Any) -> None:
        seen[name] = activation

    return hook_function


def _replace(
    target: str,
    seen: dict[str, Tensor],
    sources: Sequence[str],
    compute: Callable[[Sequence[Tensor]], Tensor],
    skips_first: bool,
) -> Callable:
    def hook_function(activation: Tensor, hook: Any) -> Tensor:
        for source in sources:
            if source not in seen:
                raise UserError(
                    f"What is to stand at {target!r} is computed from {source!r}, which the model has only later; "
                    "replace a hook that comes after it."
                )
        # heads, when there are any, are one vector to a dictionary
        inputs = [seen[source].flatten(0, 1).flatten(1).to(torch.float32) for source in sources]
        with torch.no_grad():
            flat = compute(inputs)
        replaced = flat.to(activation.dtype).reshape(activation.shape)
        if skips_first:
            replaced = torch.cat([activation[:, :1], replaced[:, 1:]], dim=1)
        return replaced

    return hook_function
