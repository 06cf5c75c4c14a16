"""Update rules, their rates, and the moving average of the weights.

Adam is torch's fused one; where a backend leaves a gradient row by row (`dictlearn.ops.row_gradients`), it makes the
update too, in torch's state. Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the
momentum of a weight matrix by the nearest matrix with equal singular values; its step is scaled to the size of an Adam
step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate does for both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dictlearn.dictionaries.base import Dictionary
from dictlearn.ops import row_gradients
from dictlearn.training.optimiser_config import OptimiserConfig


class Optimiser:
    """One of torch's optimisers, or two for different parameters, with states by the names of the parameters."""

    def __init__(self, config: OptimiserConfig, dictionary: Dictionary) -> None:
        self._named = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
        self.peak = config.learning_rate or 2e-4 / (dictionary.config.d_sae / 2**14) ** 0.5
        self._config, self._by_row = config, dictionary.updated_by_row
        matrices = [p for p in self._named.values() if p.ndim == 2 and config.rule == "muon"]
        others = [p for p in self._named.values() if not any(p is m for m in matrices)]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(matrices, lr=self.peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._parts.append(torch.optim.Adam(others, lr=self.peak, betas=(0.9, 0.999), eps=1e-8, fused=True))

    @property
    def parameters(self) -> list[Tensor]:
        return list(self._named.values())

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The moments of each parameter, as the optimiser uses them: to change them is to change the next step."""
        return {parameter: moments for part in self._parts for parameter, moments in part.state.items()}

    def set_rate(self, step: int, steps: int) -> float:
        """Linear warm-up (at most a tenth of the run), constant, linear decay over the last ``decay_share``."""
        warm_up = max(1.0, min(self._config.warm_up_steps, steps / 10))
        decay = max(1.0, steps * self._config.decay_share)
        rate = self.peak * min(1.0, (step + 1) / warm_up, (steps - step) / decay)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
        return rate

    def zero_grad(self) -> None:
        row_gradients.drop(self._named.values())
        for parameter in self._named.values():
            parameter.grad = None

    @property
    def updates_rows_of(self) -> list[Tensor]:
        """The weight matrices whose gradient may come as a row gradient: those of the kind that Adam updates."""
        return [self._named[name] for name in self._by_row if self._config.rule == "adam"]

    @property
    def conditional(self) -> bool:
        """Whether the device can leave a step out by itself: torch's Adam can, its Muon cannot."""
        return all(isinstance(part, torch.optim.Adam) for part in self._parts)

    def step(self, finite: Tensor | None = None) -> None:
        """Update the parameters; where ``finite`` () bool, on their device, is false, nothing is changed."""
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    gradient = row_gradients.of(parameter)
                    if gradient is not None:
                        _update_rows(parameter, gradient, part.state[parameter], group, finite)
            # read by torch's fused Adam
            part.found_inf = None if finite is None else (~finite).float()  # type: ignore[attr-defined]
            part.step()
        increment_version([p for p in self.parameters if p.grad is not None])  # which the fused one does not raise

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as ``parameter.moment``; empty before the first step."""
        state = self.state
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for part in self._parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = next(n for n, p in self._named.items() if p is parameter)
                    moments = {
                        key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")
                    }
                    if moments:
                        part.state[parameter] = {
                            key: value.to(parameter.device).clone() for key, value in moments.items()
                        }


@torch.no_grad()
def _update_rows(
    parameter: Tensor,
    gradient: row_gradients.RowGradient,
    state: dict[str, Tensor],
    group: dict[str, Any],
    finite: Tensor | None,
) -> None:
    """What torch's Adam would do with the dense gradient, in its own state."""
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1 if finite is None else finite
    step = row_gradients.AdamStep(group["lr"], group["betas"], group["eps"], state["step"], finite)
    gradient.update(parameter, state["exp_avg"], state["exp_avg_sq"], step)


class Average:
    """An exponential moving average of a dictionary's weights; short at first, so that the start is soon forgotten."""

    def __init__(self, decay: float, dictionary: Dictionary) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in dictionary.named_parameters()}

    @torch.no_grad()
    def update(self, dictionary: Dictionary, step: int) -> None:
        """Take in the weights after step number ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in dictionary.named_parameters():
            self.weights[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def applied(self, dictionary: Dictionary) -> Dictionary:
        """A copy of the dictionary with the averaged weights, its constraints restored."""
        averaged = dictionary.copy()
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self.weights[name])
        averaged.constrain()
        return averaged
