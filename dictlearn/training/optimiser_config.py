"""What can be asked of an optimiser. No torch here, and nothing else that a bare PyTorch image lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from activation_store.errors import UserError


@dataclass(frozen=True)
class OptimiserConfig:
    """The update rule, and how its rate runs: linear warm-up, constant, linear decay to zero at the end."""

    rule: Literal["adam", "muon"] = "adam"
    """Adam (0.9, 0.999); or Muon for the two weight matrices, with Adam for the biases."""
    learning_rate: float | None = None
    """Peak learning rate; 2e-4 / sqrt(d_sae / 16384) when not given (Gao et al. 2024; the rule most trainers use)."""
    warm_up_steps: int = 1000
    """Steps of linear warm-up; at most a tenth of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the rate falls to zero."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    averaging: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; the average is then what is saved. 0 keeps none."""

    def check(self) -> None:
        """Raise UserError for a number out of its range."""
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate is {self.learning_rate}; it must be positive.")
        if self.warm_up_steps < 0 or not self.gradient_clip >= 0:
            raise UserError("warm_up_steps and gradient_clip must not be negative; 0 turns either off.")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"decay_share is {self.decay_share}; it is a share of the run, between 0 and 1.")
        if not 0 <= self.averaging < 1:
            raise UserError(f"averaging is {self.averaging}; it must be at least 0 (off) and below 1, such as 0.999.")
