"""Activations at several hooks from one forward pass that goes no further than the last of them.

Names are those that were asked for: the Bridge fires ``attn.hook_z`` under the name ``attn.o.hook_in``, and what is
asked for is what comes back. When every hook has fired, the pass is ended from inside the last one with the Bridge's
own signal for stopping early, so neither the rest of that block nor the unembedding is computed. The same activations
can be had sooner from the model's own modules, without the Bridge: see modules.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from activation_store.errors import UserError

if TYPE_CHECKING:
    import torch


class HookedModel(Protocol):
    """What `Capture` uses of a TransformerBridge, or of whatever stands in for one."""

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """The hooks there are, by name."""

    def hooks(self, fwd_hooks: list[tuple[str, Any]]) -> AbstractContextManager[Any]:
        """Within the block, every pass calls each function with its hook's activation and the hook."""

    def __call__(self, tokens_BC: torch.Tensor, *, return_type: None, use_cache: bool) -> Any:
        """A forward pass, until a function raises TransformerLens' signal to stop."""


class Capture:
    """Reads ``hooks`` (name -> shape of one token's activation) from ``bridge``; use as a context manager.

    Legend: B windows, C tokens in a window, N rows kept.
    """

    def __init__(self, bridge: HookedModel, hooks: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.bridge = bridge
        self.hooks = dict(hooks)
        self.dtype = dtype
        self.forward_passes = 0
        self._context: Any = None
        self._kept: torch.Tensor | None = None
        self._positions: tuple[int, ...] = (0, 0)
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
            kept_N: the rows wanted (at least one), as indices into the B * C positions; None for all.

        Returns:
            For each hook, in the order asked for, rows of shape (N, *shape) in ``dtype`` on the model's device.

        Raises:
            UserError: when a hook did not fire, has another shape than the config says, or gave a value that is not
                finite or does not fit ``dtype``.
        """
        rows = self.peek(tokens_BC, kept_N)
        self.forward_passes += 1
        return rows

    def peek(self, tokens_BC: torch.Tensor, kept_N: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`run`, for a look that is no part of the harvest and not counted as a forward pass of it."""
        import torch

        self._rows, self._kept, self._positions = {}, kept_N, tuple(tokens_BC.shape)
        with torch.inference_mode():
            self.bridge(tokens_BC, return_type=None, use_cache=False)
        for hook in self.hooks:
            if hook not in self._rows:
                raise UserError(
                    f"The hook {hook!r} never fired in a forward pass of this model, so there is nothing to harvest "
                    "there; choose another hook."
                )
        rows, self._rows = self._rows, {}
        return {hook: rows[hook] for hook in self.hooks}

    def _read(self, hook: str, activation: torch.Tensor) -> None:
        """Copy the rows wanted (a later module may write into the activation), and stop once every hook has fired."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        windows, context = self._positions
        shape = self.hooks[hook]
        if tuple(activation.shape) not in ((windows, context, *shape), (windows * context, *shape)):
            raise UserError(
                f"The activation at {hook!r} has shape {tuple(activation.shape)} for {windows} windows of {context} "
                f"tokens, where the model's config makes it {(windows, context, *shape)}; "
                "this hook cannot be harvested here."
            )
        rows = activation.reshape(windows * context, *shape)
        if self._kept is None:
            kept = rows.to(self.dtype, copy=True)
        else:  # converting first and selecting by index_select is four times as fast as rows[kept].to(dtype)
            kept = rows.to(self.dtype).index_select(0, self._kept)
        # aminmax lets NaN through and takes 4 % of the time of isfinite().all().
        if not all(bound.isfinite() for bound in kept.aminmax()):
            raise UserError(_why_not_finite(hook, rows, kept.dtype))
        self._rows[hook] = kept
        if len(self._rows) == len(self.hooks):
            raise StopAtLayerException(activation)


class _Reader:
    """One hook's function; an object, so that TransformerLens' repr of it stays short."""

    def __init__(self, capture: Capture, hook: str) -> None:
        self.capture, self.hook_name = capture, hook

    def __call__(self, activation: torch.Tensor, hook: object) -> None:
        self.capture._read(self.hook_name, activation)


def _why_not_finite(hook: str, rows: torch.Tensor, dtype: torch.dtype) -> str:
    import torch

    count = int((~torch.isfinite(rows)).sum())
    if not count:
        name = str(dtype).removeprefix("torch.")
        largest = rows.abs().max().item()
        return f"An activation at {hook!r} is {largest:.3g}, too large for {name}; store bfloat16 or float32."
    return (
        f"The activation at {hook!r} has {count} values that are not finite (NaN or infinite); "
        "the weights are damaged, or the model overflows in the dtype it runs in (try float32)."
    )
