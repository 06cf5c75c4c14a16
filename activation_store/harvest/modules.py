"""The activations that the Bridge gives, read from the model's own modules, which compute them sooner.

The Bridge has an attention of its own, with every score written out, and a hook at every step. Where a hook's
activation is nothing but some module's input or output (the residual stream, a norm's output, what goes into the
output projection), the model as transformers loads it computes the same with its fastest attention and without other
hooks.

Which module that is, the Bridge knows, as every part of it wraps one: so there is no table of layouts here. But it is
not taken on trust. On the first batch of a harvest both are computed and compared, hook by hook, and where they differ
by more than another order of the same sums explains, the whole harvest goes through the Bridge.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from activation_store.errors import UserError
from activation_store.harvest.capture import Capture
from activation_store.harvest.language_model import ModelSpec, load_language_model, load_modules

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

WAYS = ("auto", "bridge", "modules")

TOLERANCES = {"float32": 3e-5, "float16": 0.015, "bfloat16": 0.07}
"""How far apart, by `difference`, the two may be, for each type that a model computes in.

Every hook of nineteen layouts (4 layers, random weights of three seeds), of three layouts with 40 layers, and of the
bundled model and stories260K came to 1.5e-6, 0.0044 and 0.035 at most. Another place of the model, the nearest among
all pairs of hooks of these, came to 0.098.
"""

FirstBatch = Callable[[Capture], "dict[str, torch.Tensor]"]
"""Computes the first batch of a harvest with a capture, by `Capture.peek`."""


def open_capture(
    spec: ModelSpec,
    hooks: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    way: str,
    device: str,
    model_dtype: str,
    first_batch: FirstBatch | None,
) -> tuple[Capture, str, str]:
    """Load the model and decide how ``hooks`` (name -> shape of one token's activation) are read from it.

    One model is in memory at a time: the Bridge, which computes what is compared with, and after it the modules.

    Args:
        dtype: what the capture converts the rows to.
        way: "bridge"; "modules", refused where they will not do; or "auto", the modules where they will do.
        first_batch: what to compare on; None to trust the modules, when a store is continued whose first batch agreed.

    Returns:
        The capture; "bridge" or "modules"; and the same in words, with the reason where "auto" came to the Bridge.

    Raises:
        UserError: when the model cannot be loaded, ``first_batch`` refuses what the Bridge computes, or "modules" was
            asked for and will not do.
    """
    import torch

    bridge: Any = load_language_model(spec, device, model_dtype)
    if way == "bridge" or spec.loader != "transformers":
        return Capture(bridge, hooks, dtype), "bridge", "the Bridge"
    places = find_places(bridge, hooks)
    try:
        if missing := [hook for hook in hooks if hook not in places]:
            raise WillNotDo(f"{missing[0]} is no module's input or output in this model")
        same_dtype = getattr(torch, model_dtype)
        expected = first_batch(Capture(bridge, hooks, same_dtype)) if first_batch else None
        model_class = type(bridge.original_model)
        bridge = None
        gc.collect()  # its parts point at each other
        modules = HookedModules(load_modules(spec, model_class, device, model_dtype), places, hooks)
        if first_batch and expected:
            _compare(expected, first_batch, Capture(modules, hooks, same_dtype), TOLERANCES[model_dtype])
    except WillNotDo as reason:
        if way == "modules":
            raise UserError(f"--capture modules was asked for, but {reason}; use --capture bridge.") from reason
        bridge = bridge or load_language_model(spec, device, model_dtype)
        return Capture(bridge, hooks, dtype), "bridge", f"the Bridge, because {reason}"
    return Capture(modules, hooks, dtype), "modules", "the Hugging Face modules"


class WillNotDo(Exception):
    """Why a harvest cannot be captured from the modules."""


@dataclass(frozen=True)
class Place:
    """Where a hook's activation passes in a Hugging Face model."""

    module: str
    """Path of the module, such as model.layers.1.self_attn.o_proj."""
    is_input: bool


def find_places(bridge: TransformerBridge, hooks: Iterable[str]) -> dict[str, Place]:
    """The module whose input or output each hook shows, by what the Bridge's parts wrap; hooks without one left out.

    Hooks in the middle of a computation have none, and neither have those of parts that the Bridge makes itself, such
    as the queries of a GPT-2, whose own module computes queries, keys and values in one.
    """
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    paths = {id(module): path for path, module in _originals(bridge.original_model)}
    places = {}
    for part in bridge.modules():
        if isinstance(part, GeneralizedComponent):
            for point, end in ((part.hook_in, "in"), (part.hook_out, "out")):
                # A part without a name wraps nothing: it stands for the first and the last of the parts in it.
                wrapped = part if part.name else part.submodules.get(end)
                path = wrapped and paths.get(id(wrapped.original_component))
                if path:
                    places[point] = Place(path, is_input=end == "in")
    points = bridge.hook_dict
    return {hook: places[points[hook]] for hook in hooks if points.get(hook) in places}


def _originals(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module that the Bridge's parts wrap, or that is not wrapped, under its path in the plain model."""
    module = module._modules.get("_original_component") or module
    yield path, module
    for name, child in module.named_children():
        yield from _originals(child, f"{path}.{name}" if path else name)


class HookedModules:
    """A Hugging Face model, with as much of the Bridge's interface as `Capture` uses."""

    def __init__(
        self, model: PreTrainedModel, places: Mapping[str, Place], hooks: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.model = model
        self.hook_dict = dict(places)
        self._shapes = dict(hooks)

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[tuple[str, Callable[[torch.Tensor, Any], None]]]) -> Iterator[None]:
        """Within the block, every pass calls each function with its hook's activation (B, C, *shape)."""
        with ExitStack() as attached:
            for hook, read in fwd_hooks:
                attached.callback(self._attach(hook, read).remove)
            yield

    def __call__(self, tokens_BC: torch.Tensor, **of_the_bridge: object) -> None:
        """A pass through the blocks, without the unembedding, until a reader raises the Bridge's signal to stop."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        with suppress(StopAtLayerException):
            self.model.base_model(tokens_BC, use_cache=False)

    def _attach(self, hook: str, read: Callable[[torch.Tensor, Any], None]) -> RemovableHandle:
        place, shape = self.hook_dict[hook], self._shapes[hook]
        module = self.model.get_submodule(place.module)

        def tell(activation: torch.Tensor) -> None:
            read(activation.unflatten(-1, shape) if len(shape) > 1 else activation, None)

        if place.is_input:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: tell((*args, *kwargs.values())[0]), with_kwargs=True
            )
        return module.register_forward_hook(
            lambda _, args, output: tell(output[0] if isinstance(output, tuple) else output)
        )


# --- the comparison -------------------------------------------------------------------------------------------------


def _compare(expected: Mapping[str, torch.Tensor], first_batch: FirstBatch, capture: Capture, tolerance: float) -> None:
    try:
        found = first_batch(capture)
    except Exception as error:  # whatever a model's own code raises when it is called without the Bridge
        raise WillNotDo(f"the Hugging Face modules cannot be read: {str(error).strip().splitlines()[0]}") from error
    for hook, rows in expected.items():
        far = difference(found[hook], rows)
        if not far <= tolerance:
            raise WillNotDo(
                f"the Hugging Face modules differ from the Bridge's at {hook} by {far:.2g} of the activation's size"
            )


def difference(found_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    """How far activations (N, *shape) of N tokens are from those expected: root mean square over the tokens.

    Each token's distance is measured by the length of its expected activation, or by the median one where that is
    longer: of an activation that is the small rest of large terms, rounding changes much.
    """
    found, expected = found_N.flatten(1).float(), expected_N.flatten(1).float()
    lengths = expected.norm(dim=1)
    shares = (found - expected).norm(dim=1) / lengths.clamp(min=float(lengths.median()))
    return float(shares.square().mean().sqrt())
