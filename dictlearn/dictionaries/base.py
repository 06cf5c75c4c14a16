"""The contract of a dictionary: encode to sparse codes, decode, and a loss made of named terms.

Axes: B rows, D input width, O output width, S latents, K slots per row of codes.

Weights are latent-major: row s of `W_enc` reads latent s, row s of `W_dec` writes it. In training a dictionary holds
the scale of its input and target; `fold` turns it into one that takes raw activations, and that is what gets saved.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from dictlearn.codes import Codes


@dataclass(frozen=True)
class Loss:
    """What one batch cost.

    Attributes:
        total: scalar to differentiate: the weighted sum of the terms.
        terms: each term by name, unweighted, detached.
        codes: the activations, detached, for counting what fired.
        output: (B, O) the reconstruction in raw units, detached.
    """

    total: Tensor
    terms: dict[str, Tensor]
    codes: Codes
    output: Tensor


@dataclass(frozen=True)
class Update:
    """One optimiser step that has just been taken, for `Dictionary.after_update`.

    Attributes:
        optimiser: the one that holds this dictionary's parameters.
        step, steps: number of the step taken, from 0, and how many the run has.
        generator: the run's own random stream; what is drawn from it is resumed exactly.
        x: (B, D) the raw activations of the batch.
        target: (B, O) its raw targets, or None for an autoencoder.
        loss: what the batch cost before the step.
    """

    optimiser: torch.optim.Optimizer
    step: int
    steps: int
    generator: torch.Generator
    x: Tensor
    target: Tensor | None
    loss: Loss


class ControlStatistics(Protocol):
    """What centring and whitening need to know of the control rows (a store's statistics of one hook have it).

    Attributes:
        mean: (D,) float64.
        second_moment: (D, D) float64, the mean of outer products.
    """

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def second_moment(self) -> np.ndarray: ...


class Dictionary(nn.Module):
    """A sparse dictionary from d_in to d_out; with target None (or ``d_out`` = the same hook) it is an autoencoder.

    Attributes:
        provenance: what it was trained on (model, store, hooks), filled by training and by loading.
        rows_since_fired: (S,) int64 buffer: rows seen since each latent last fired.
        input_scale, target_scale: scalars that raw activations are divided by; 1 once folded.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    latent_parallel: ClassVar[bool] = False
    """Whether the loss goes through `dictlearn.ops` alone, so that ranks may hold a part of the latents each."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rows_since_fired: Tensor
    input_scale: Tensor
    target_scale: Tensor

    def __init__(self, config: Any, d_in: int, d_out: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        self.d_sae: int = config.d_sae
        self.provenance: dict[str, Any] = {}
        config.check(self.d_in, self.d_out)
        self.register_buffer("rows_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("target_scale", torch.ones(()))

    # --- what every kind defines --------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes."""
        raise NotImplementedError

    def decode(self, codes: Codes) -> Tensor:
        """Codes to a raw reconstruction (B, O)."""
        raise NotImplementedError

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        """The training loss on raw activations (B, D) and targets (B, O); no target means x itself."""
        raise NotImplementedError

    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Set parameters and scales from a first large batch of raw activations and the control rows' statistics."""
        raise NotImplementedError

    def fold(self) -> Self:
        """A copy with the same raw outputs whose scales are 1 and whose biases need no special case."""
        raise NotImplementedError

    # --- what a kind may define -----------------------------------------------------------------------------------

    def schedule(self, step: int, steps: int) -> None:
        """Called before each step of a run of ``steps``: sets what varies with the step, from these numbers alone."""

    def project_gradients(self) -> None:
        """Called between backward and the optimiser's step."""

    def after_update(self, update: Update) -> dict[str, float]:
        """Called after the optimiser's step: restore constraints, reset latents. Returns numbers worth logging."""
        return {}

    # --- shared -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) raw activations to their (B, O) raw reconstruction."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        """Count which latents fired in a batch, in rows."""
        self.rows_since_fired += len(codes)
        self.rows_since_fired[codes.indices[codes.active()]] = 0

    def described(self) -> dict[str, Any]:
        """Kind, widths and config as plain values: what a file needs to build it again."""
        return {"kind": self.kind, "d_in": self.d_in, "d_out": self.d_out, "config": asdict(self.config)}

    def copy(self) -> Self:
        return copy.deepcopy(self)


def forget_moments(optimiser: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero what an optimiser remembers of some rows of a parameter: redrawn rows start without a past.

    Args:
        optimiser: any that keeps tensors of the parameter's own length in its state (Adam's moments, momentum buffers).
        parameter: one of the optimiser's parameters, with rows along its first axis.
        rows: (N,) int64 numbers of the rows.
    """
    for moment in optimiser.state.get(parameter, {}).values():
        if isinstance(moment, Tensor) and moment.shape[:1] == parameter.shape[:1]:
            moment[rows] = 0
