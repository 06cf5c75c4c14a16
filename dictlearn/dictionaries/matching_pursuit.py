"""MP-SAE: codes by matching pursuit, one atom at a time, with the atoms that decode them; there is no encoder.

Costa, Fel, Lubana, Tolooshams, Ba 2025, "From flat to hierarchical: extracting sparse representations with matching
pursuit" (arXiv 2506.03093):

    r_0 = u - b        j_t = argmax_j <w_j, r_(t-1)>        c_t = ReLU(<w_jt, r_(t-1)>)        r_t = r_(t-1) - c_t w_jt
    codes = the sum of c_t at j_t        output = codes W + b, so that u - output = r_T        u: the scaled input

A row stops after k steps, or before: when what is left of it is shorter than ``tolerance`` typical rows, when it would
choose an atom that it has chosen before (if ``stops_on_repeat``), and when no atom points its way. A step only shortens
the residual, so that k can be changed after training: set `MatchingPursuit.k`. Atoms have unit norm.

Which atom is chosen has no gradient; coefficients and residuals do, through all steps. They need not be kept: a step is
undone by r_(t-1) = r_t + c_t w_jt, so that the backward pass walks from the last residual to the first, and memory does
not grow with the number of steps. With g_t the gradient in r_t, and a_t = <g_t, w_jt>:

    g_(t-1) = g_t - a_t w_jt        gradient in w_jt: -c_t g_t - a_t r_(t-1)

Atoms that have not been chosen for long can be moved to where they would be: `MatchingPursuit._left_by`.

Choosing needs the products of the residual with all atoms. In a step they change by c_t times a row of W W^T, which is
computed once for all rows where that is less work than the products of every step.

Axes: B rows, D width, S latents (atoms), T steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Width
from dictlearn.dictionaries.configs import MatchingPursuitConfig
from dictlearn.dictionaries.dead_latents import Dead
from dictlearn.dictionaries.scaling import LEAST, ControlStatistics, scalings
from dictlearn.dictionaries.start import geometric_median, towards, unit_directions
from dictlearn.dictionaries.unit_rows import drop_gradient_along, restore_norms

PRODUCTS = 2**24
"""Products of residuals and atoms in memory at once: 64 MiB."""


class Pursuit(NamedTuple):
    """What matching pursuit found.

    Attributes:
        residual: (B, D) what is left of each row.
        coefficients: (B, T), 0 where a row had stopped.
        indices: (B, T) int64, the atoms chosen; an atom may be chosen more than once.
    """

    residual: Tensor
    coefficients: Tensor
    indices: Tensor


class MatchingPursuit(Dictionary):
    kind = "mp"
    Config = MatchingPursuitConfig
    config: MatchingPursuitConfig

    def __init__(self, config: MatchingPursuitConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in), requires_grad=config.bias == "learned")
        self.input_scaling, self.target_scaling = scalings(config.scaling, self.input_parts, None)
        self.register_buffer("tolerance", torch.tensor(config.tolerance * self.d_in**0.5))
        self.k = config.k
        """Most steps of the pursuit; another number than in training gives codes as good as it can."""

    tolerance: Tensor
    """() length of the residual at which a row stops, in the units of what is encoded."""

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        return self.W

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to codes in at most k slots; values times atoms are raw once folded, scaled before."""
        return self._codes(self._pursue(self.input_scaling(x)))

    def decode(self, codes: Codes) -> Tensor:
        return self.target_scaling.undo(ops.decode(codes.values, codes.indices, self.W) + self.b_dec)

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        """Squared error, in float32 at least: residuals are differences, and bfloat16 has no digits left for them."""
        with torch.autocast(x.device.type, enabled=False):
            x_BD = self.input_scaling(x)
            pursuit = self._pursue(x_BD)
            total = mse = pursuit.residual.square().mean()
            output_BD = (x_BD - pursuit.residual).detach()
            terms = {"mse": mse.detach()}
            revives = self.config.revive_weight > 0
            dead = self.dead_latents.of(self.rows_since_fired, self.config.dead_after_rows) if revives else None
            if dead is not None:
                left = dead.term(self._left_by(dead, pursuit.residual.detach()))
                terms["revive"] = left.detach()
                total = mse + self.config.revive_weight * left
        return Loss(total, terms, self._codes(pursuit).detach(), self.target_scaling.undo(output_BD))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Atoms along random directions or data points; b_dec at the rows' geometric median."""
        self.input_scaling.fit(x, control)
        x_BD = self.input_scaling(x)
        atoms_SD = unit_directions(self.d_sae, self.d_in, generator)
        if self.config.initial_decoder == "data":
            examples_S = torch.randint(len(x), (self.d_sae,), generator=generator)
            atoms_SD = towards(x_BD, examples_S, atoms_SD)
        self.W.copy_(atoms_SD)
        if self.config.bias == "learned":
            self.b_dec.copy_(geometric_median(x_BD))

    def project_gradients(self) -> None:
        drop_gradient_along(self.W)

    def constrain(self) -> None:
        restore_norms(self.W)

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations. Atoms stay what they are: coefficients grow with what they rebuild."""
        folded = self.copy()
        unit = self.target_scaling.unit()
        folded.b_dec.copy_(self.b_dec.double() * unit)
        folded.tolerance.mul_(unit)
        folded.drop_scaling()
        return folded

    def _pursue(self, x_BD: Tensor) -> Pursuit:
        return Pursuit(*_Pursue.apply(x_BD - self.b_dec, self.W, self.k, self.tolerance, self.config.stops_on_repeat))

    def _left_by(self, dead: Dead, residual_BD: Tensor) -> Tensor:
        """() share of the residuals' squares that one more step, among the dead atoms alone, would leave.

        Each row pulls the dead atom that is nearest to what is left of it, so that they part; the term that the paper
        and its authors' library have, the mean product of residuals and dead atoms, pulls all of them one way.
        """
        taken_B = dead.only(residual_BD @ self.W[dead.latents].T).amax(dim=1).relu()
        whole = ops.mean_over_rows(residual_BD.square().sum(dim=1).mean()).clamp_min(LEAST)
        return 1 - taken_B.square().mean() / whole

    def _codes(self, pursuit: Pursuit) -> Codes:
        return Codes.merged(pursuit.indices, pursuit.coefficients, self.d_sae)


class _Pursue(torch.autograd.Function):
    """`pursue` with the gradients above in rows and atoms, from that of the residual."""

    @staticmethod
    def forward(
        ctx: Any, rows_BD: Tensor, W_SD: Tensor, steps: int, tolerance: Tensor, stops_on_repeat: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = pursue(rows_BD, W_SD, steps, tolerance, stops_on_repeat)
        ctx.save_for_backward(W_SD, *found)
        ctx.mark_non_differentiable(found.coefficients, found.indices)
        return found.residual, found.coefficients, found.indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        W_SD, residual_BD, coefficients_BT, indices_BT = ctx.saved_tensors
        grad_SD = torch.zeros_like(W_SD)
        for c_B, j_B in zip(coefficients_BT.T.flip(0), indices_BT.T.flip(0), strict=True):
            atoms_BD, c_B1 = W_SD[j_B], c_B[:, None]
            a_B1 = torch.linalg.vecdot(grad_BD, atoms_BD)[:, None] * (c_B1 > 0)
            residual_BD = residual_BD + c_B1 * atoms_BD
            grad_SD.index_add_(0, j_B, -c_B1 * grad_BD - a_B1 * residual_BD)
            grad_BD = grad_BD - a_B1 * atoms_BD
        return grad_BD, grad_SD, None, None, None


@torch.no_grad()
def pursue(rows_BD: Tensor, W_SD: Tensor, steps: int, tolerance: Tensor, stops_on_repeat: bool) -> Pursuit:
    """Matching pursuit of each row with atoms of unit norm, block by block of rows."""
    gram_SS = W_SD @ W_SD.T if len(W_SD) <= (steps - 1) * len(rows_BD) else None
    blocks = rows_BD.split(max(1, PRODUCTS // len(W_SD)))
    found = [_pursue_block(block, W_SD, gram_SS, steps, tolerance, stops_on_repeat) for block in blocks]
    return Pursuit(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _pursue_block(
    residual_BD: Tensor, W_SD: Tensor, gram_SS: Tensor | None, steps: int, tolerance: Tensor, stops_on_repeat: bool
) -> Pursuit:
    coefficients_BT = residual_BD.new_zeros(len(residual_BD), steps)
    indices_BT = torch.zeros(len(residual_BD), steps, dtype=torch.int64, device=residual_BD.device)
    goes_B = torch.ones(len(residual_BD), dtype=torch.bool, device=residual_BD.device)
    products_BS = residual_BD @ W_SD.T
    for step in range(steps):
        j_B = products_BS.argmax(dim=1)
        atoms_BD = W_SD[j_B]
        c_B = torch.linalg.vecdot(residual_BD, atoms_BD)
        goes_B = goes_B & (c_B > 0) & (torch.linalg.vector_norm(residual_BD, dim=1) > tolerance)
        if stops_on_repeat:
            chosen_BT = (indices_BT == j_B[:, None]) & (coefficients_BT > 0)
            goes_B &= ~chosen_BT.any(dim=1)
        if not ops.runs_ahead(goes_B.device) and not goes_B.any():
            break  # what follows changes nothing
        c_B = c_B * goes_B
        residual_BD = residual_BD - c_B[:, None] * atoms_BD
        coefficients_BT[:, step], indices_BT[:, step] = c_B, j_B * goes_B
        if step + 1 < steps:
            if gram_SS is None:
                products_BS = residual_BD @ W_SD.T
            else:
                products_BS.addcmul_(gram_SS[j_B], c_B[:, None], value=-1)
    return Pursuit(residual_BD, coefficients_BT, indices_BT)
