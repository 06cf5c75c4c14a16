"""The contract of a dictionary: encode to sparse codes, decode, and a loss made of named terms.

Axes: B rows, D input width, O output width, S latents, K slots per row of codes.

Weights are latent-major: row s of `W_enc` reads latent s, row s of `W_dec` writes it. In training a dictionary holds
the scaling of its input and target; `fold` turns it into one that takes raw activations, and that is what gets saved.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.configs import check_hooks
from dictlearn.dictionaries.dead_latents import DeadLatents
from dictlearn.dictionaries.scaling import ControlStatistics, Scaling

Width = int | Sequence[int]
"""Of the activations of one hook, or of each of several."""


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
        finite: () bool, on the device, where the host runs ahead: false where the step, or one that it has not asked
            about, was not finite and was left out. What waits for the device anyway looks at it first.
    """

    optimiser: Remembers
    step: int
    steps: int
    generator: torch.Generator
    x: Tensor
    target: Tensor | None
    loss: Loss
    finite: Tensor | None = None


class Remembers(Protocol):
    """An optimiser: torch's, or a trainer's own."""

    @property
    def state(self) -> Mapping[Any, Mapping[str, Any]]:
        """Of each parameter, what the next step will use besides its gradient."""


class Dictionary(nn.Module):
    """A sparse dictionary from d_in to d_out; with ``d_out`` None it is an autoencoder, which rebuilds its own input.

    Either may be several hooks: their activations side by side, given by the width of each.

    Attributes:
        autoencoder: whether the target is the input.
        input_parts, output_parts: width of each hook that is encoded, and of each that is rebuilt.
        d_in, d_out: widths of all of them together.
        provenance: what it was trained on (model, store, hooks), filled by training and by loading.
        rows_since_fired: (S,) int64 buffer: rows seen since each latent last fired.
        dead_latents: lists the latents that have not fired for long.
        input_scaling, target_scaling: what is done to raw activations before they are encoded and compared; an
            autoencoder's are the same. Nothing is left of them once folded, but for a row's own scale.
    """

    kind: ClassVar[str]
    Config: ClassVar[type]
    latent_tensors: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers with a row for each latent, of kinds whose loss reaches the latents through
    `dictlearn.ops` alone: processes may then hold a part of the latents each. Empty for kinds that cannot be split."""

    updated_by_row: ClassVar[tuple[str, ...]] = ()
    """Weight matrices whose gradient may be left row by row (`dictlearn.ops.row_gradients`), with no ``grad`` beside
    it: `project_gradients` then does to it what `unit_rows.drop_gradient_along` does, or nothing."""

    causal: ClassVar[bool] = False
    """Whether each hook that is rebuilt needs the inputs up to its own place alone; there is `rebuild_part` then."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rows_since_fired: Tensor

    def __init__(self, config: Any, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = d_out is None
        self.input_parts = _parts(d_in)
        self.output_parts = self.input_parts if d_out is None else _parts(d_out)
        self.d_in, self.d_out = sum(self.input_parts), sum(self.output_parts)
        self.d_sae: int = config.d_sae
        self.provenance: dict[str, Any] = {}
        check_hooks(config, self.input_parts, None if self.autoencoder else self.output_parts)
        self.register_buffer("rows_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.dead_latents = DeadLatents()
        self.input_scaling = self.target_scaling = Scaling()

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
        """A copy with the same raw outputs whose scaling is in its weights and whose biases need no special case."""
        raise NotImplementedError

    # --- what a kind may define -----------------------------------------------------------------------------------

    def schedule(self, step: int, steps: int) -> None:
        """Called before each step of a run of ``steps``: sets what varies with the step, from these numbers alone."""

    def project_gradients(self) -> None:
        """Called between backward and the optimiser's step."""

    def constrain(self) -> None:
        """Restore what an update, or an average of weights, may have broken, such as the norm of decoder rows."""

    def after_update(self, update: Update) -> Mapping[str, float | Tensor]:
        """Called after the optimiser's step: reset or resample latents. Returns numbers worth logging."""
        self.constrain()
        return {}

    def rebuild_part(self, parts: Sequence[Tensor], part: int) -> Tensor:
        """(B, width) what a causal kind makes of one hook, raw, from the raw inputs ``parts`` 0 to ``part``."""
        raise NotImplementedError

    # --- shared -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) raw activations to their (B, O) raw reconstruction."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def observe(self, codes: Codes) -> None:
        """Count which latents fired in a batch, in rows."""
        rows = ops.ranks().total_rows(len(codes))
        self.rows_since_fired += rows
        self.rows_since_fired.masked_fill_(ops.ranks().anywhere_in_batch(codes.fired_anywhere()), 0)
        self.dead_latents.foresee(self.rows_since_fired, rows)

    def described(self) -> dict[str, Any]:
        """Kind, widths and config as plain values: what a file needs to build it again."""
        parts = {"input_parts": list(self.input_parts), "output_parts": list(self.output_parts)}
        return {
            "kind": self.kind,
            "d_in": self.d_in,
            "d_out": self.d_out,
            **{name: widths for name, widths in parts.items() if len(widths) > 1},
            "autoencoder": self.autoencoder,
            "config": asdict(self.config),
        }

    def drop_scaling(self) -> None:
        """Let raw activations through, as what is folded does; a row's own scale stays, no weight can hold it."""
        if not self.input_scaling.row_wise:
            self.input_scaling = Scaling()
        if not self.target_scaling.row_wise:
            self.target_scaling = Scaling()

    def copy(self) -> Self:
        return copy.deepcopy(self)


def _parts(width: Width) -> tuple[int, ...]:
    return (width,) if isinstance(width, int) else tuple(width)


def forget_moments(optimiser: Remembers, parameter: Tensor, rows: Tensor) -> None:
    """Zero what an optimiser remembers of some rows of a parameter: redrawn rows start without a past.

    Args:
        optimiser: any that keeps tensors of the parameter's own length in its state (Adam's moments, momentum buffers).
        parameter: one of the optimiser's parameters, with rows along its first axis.
        rows: (N,) int64 numbers of the rows.
    """
    for moment in optimiser.state.get(parameter, {}).values():
        if isinstance(moment, Tensor) and moment.shape[:1] == parameter.shape[:1]:
            moment[rows] = 0
