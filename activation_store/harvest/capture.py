"""Activations at several hooks from one forward pass that goes no further than the last of them.

Names are those that were asked for: the Bridge fires ``attn.hook_z`` under the name ``attn.o.hook_in``, and what is
asked for is what comes back. When every hook has fired, the pass is ended from inside the last one with the Bridge's
own signal for stopping early, so neither the rest of that block nor the unembedding is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from activation_store.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge


class Capture:
    """Reads ``hooks`` (name -> shape of one token's activation) from ``bridge``; use as a context manager.

    Legend: B windows, C tokens in a window, N rows kept.
    """

    def __init__(self, bridge: TransformerBridge, hooks: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.bridge = bridge
        self.hooks = dict(hooks)
        self.dtype = dtype
        self.forward_passes = 0
        self._context: Any = None
        self._kept: torch.Tensor | None = None
        self._positions = (0, 0)
        self._rows: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Capture:
        points = self.bridge.hook_dict
        for hook in self.hooks:
            if hook not in points:
                raise UserError(f"TransformerLens gives this model no hook {hook!r}; harvest another one.")
        self._context = self.bridge.hooks(fwd_hooks=[(hook, _Reader(self, hook)) for hook in self.hooks])
        try:
            self._context.__enter__()
        except ValueError as error:  # a hook point that is switched off
            raise UserError(f"TransformerLens cannot read these hooks: {error}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(None, None, None)

    def run(self, tokens_BC: torch.Tensor, kept_N: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """One forward pass.

        Args:
            tokens_BC: token ids, on the model's device.
            kept_N: the rows wanted, as indices into the B * C positions; None for all.

        Returns:
            For each hook, in the order asked for, rows of shape (N, *shape) in ``dtype`` on the model's device.

        Raises:
            UserError: when a hook did not fire, has another shape than the config says, or gave a value that is not
                finite or does not fit ``dtype``.
        """
        import torch

        self._rows, self._kept, self._positions = {}, kept_N, tuple(tokens_BC.shape)
        with torch.inference_mode():
            self.bridge(tokens_BC, return_type=None, use_cache=False)
        self.forward_passes += 1
        for hook in self.hooks:
            if hook not in self._rows:
                raise UserError(
                    f"The hook {hook!r} never fired in a forward pass of this model, so there is nothing to harvest there; "
                    "choose another hook."
                )
        rows, self._rows = self._rows, {}
        return {hook: rows[hook] for hook in self.hooks}

    def _read(self, hook: str, activation: torch.Tensor) -> None:
        """Copy the rows wanted (a later module may write into the activation), and stop once every hook has fired."""
        import torch
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        windows, context = self._positions
        shape = self.hooks[hook]
        if tuple(activation.shape) not in ((windows, context, *shape), (windows * context, *shape)):
            raise UserError(
                f"The activation at {hook!r} has shape {tuple(activation.shape)} for {windows} windows of {context} tokens, "
                f"where the model's config makes it {(windows, context, *shape)}; this hook cannot be harvested here."
            )
        rows = activation.detach().reshape(windows * context, *shape)
        rows = rows[self._kept] if self._kept is not None else rows.clone()
        converted = rows.to(self.dtype)
        if not torch.isfinite(converted).all():
            raise UserError(_why_not_finite(hook, rows, converted))
        self._rows[hook] = converted
        if len(self._rows) == len(self.hooks):
            raise StopAtLayerException(activation)


class _Reader:
    """One hook's function; an object, so that TransformerLens' repr of it stays short."""

    def __init__(self, capture: Capture, hook: str) -> None:
        self.capture, self.hook_name = capture, hook

    def __call__(self, activation: torch.Tensor, hook: object) -> None:
        self.capture._read(self.hook_name, activation)


def _why_not_finite(hook: str, rows: torch.Tensor, converted: torch.Tensor) -> str:
    import torch

    if torch.isfinite(rows).all():
        dtype = str(converted.dtype).removeprefix("torch.")
        return f"An activation at {hook!r} is {rows.abs().max().item():.3g}, too large for {dtype}; store bfloat16 or float32."
    count = int((~torch.isfinite(rows)).sum())
    return (
        f"The activation at {hook!r} has {count} values that are not finite (NaN or infinite); "
        "the weights are damaged, or the model overflows in the dtype it runs in (try float32)."
    )
