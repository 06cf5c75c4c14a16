"""Run a language model with dictionaries in place of its own activations, and put it back afterwards.

    with splice(model, {"blocks.2.hook_mlp_out": transcoder}):
        logits = model(tokens)

An autoencoder replaces a hook's activation by its reconstruction of it. A transcoder replaces its output hook by what
it predicts from its input hook, wherever that is. Leaving the block removes every hook, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from activation_store.errors import UserError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from dictlearn.dictionaries.base import Dictionary

Replacement = Callable[[Tensor], Tensor]
"""(positions, d) activations to their replacement; used for ablations."""


def check_editable(hook: str) -> None:
    """Refuse a hook whose edit would not mean what it says."""
    if hook.endswith("hook_resid_mid"):
        raise UserError(
            f"An edit at {hook} misses the skip connection (the Bridge's resid_mid feeds the MLP branch alone); "
            "splice at hook_attn_out or hook_resid_post instead."
        )


@contextmanager
def splice(
    model: TransformerBridge,
    dictionaries: Mapping[str, Dictionary | Replacement],
    skip_first: bool | None = None,
) -> Iterator[TransformerBridge]:
    """Replace the activation at each hook for as long as the block runs.

    Args:
        model: a TransformerBridge.
        dictionaries: hook whose value is replaced -> a dictionary, or a function of (n, d) activations.
        skip_first: leave the first position of every row alone. Harvested rows leave the BOS position out, so a
            dictionary has never seen it; None means "when the dictionary's provenance says BOS was left out".

    Raises:
        UserError: a hook the model does not have, or one that cannot be edited.
    """
    hooks: list[tuple[str, Callable]] = []
    seen: dict[str, Tensor] = {}
    for hook, replacement in dictionaries.items():
        check_editable(hook)
        provenance = getattr(replacement, "provenance", {})
        hook_in = provenance.get("hook_in", hook)
        for name in {hook, hook_in}:
            if name not in model.hook_dict:
                raise UserError(
                    f"The model has no hook {name!r}; name one of its hooks, such as blocks.0.hook_resid_post."
                )
        skips = provenance.get("bos_left_out", False) if skip_first is None else skip_first
        if hook_in != hook:
            hooks.append((hook_in, _remember(seen, hook_in)))
        hooks.append((hook, _replace(seen, hook_in if hook_in != hook else None, replacement, skips)))
    with model.hooks(fwd_hooks=hooks):
        yield model


def _remember(seen: dict[str, Tensor], name: str) -> Callable:
    def hook_function(activation: Tensor, hook: Any) -> None:
        seen[name] = activation

    return hook_function


def _replace(
    seen: dict[str, Tensor], source: str | None, replacement: Dictionary | Replacement, skips_first: bool
) -> Callable:
    def hook_function(activation: Tensor, hook: Any) -> Tensor:
        inputs = activation if source is None else seen[source]
        inputs = inputs.reshape(*activation.shape[:2], -1)  # heads, when there are any, are one vector to a dictionary
        with torch.no_grad():
            flat = replacement(inputs.flatten(0, 1).to(torch.float32))
        replaced = flat.to(activation.dtype).reshape(activation.shape)
        if skips_first:
            replaced = torch.cat([activation[:, :1], replaced[:, 1:]], dim=1)
        return replaced

    return hook_function
