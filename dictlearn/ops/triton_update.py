"""A latent's gradient and its Adam step in one kernel: what no weight matrix's gradient is written for.

A program owns one row of a weight matrix. It sums the row's gradient from the latent's pairs (and, for AuxK, a row that
a dense product gave), drops its component along the row where rows have unit norm, takes the Adam step, restores the
norm, and writes the row, its moments and, if asked, the row rounded to bfloat16 for the next step's products. A latent
that no row selected takes the same way with a gradient of zero, as dense Adam does.

Clipping needs the norm of the whole gradient before any row is updated. `PairGradient.squares` gives it: the same sums,
of which only each row's square is kept. Summing twice reads the batch again, which stays in the L2 cache; writing the
gradient and reading it would take eight bytes for each parameter, and a copy of the matrix.

Adam: Kingma and Ba 2014 (arXiv 1412.6980), algorithm 1; the arithmetic is that of torch.optim.Adam.

Axes: S latents, D width of a row, A latents with a dense gradient besides.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from dictlearn.ops.launching import launching_on, power_of_2
from dictlearn.ops.row_gradients import AdamStep, note_unit_rows, state_of
from dictlearn.ops.triton_pairs import UNROLL, Bags, part_of_latent, sum_by_latent, sums_of_pieces

LEAST = 1e-12
"""Norm below which a row is not scaled up."""
BYTES_PER_THREAD = 16


@dataclass
class PairGradient:
    """A `RowGradient` made of selected pairs.

    Attributes:
        of: the pairs by latent.
        weights: (B, K) of each pair.
        rows: (B, D) what the pairs sum.
        latents, besides: (A,) and (A, D) dense gradients of some latents, each latent at most once; None for none.
    """

    of: Bags
    weights: Tensor
    rows: Tensor
    latents: Tensor | None = None
    besides: Tensor | None = None
    unit_rows: bool = False
    factor: Tensor | None = None
    _pieces: Tensor | None = None
    _squares: Tensor | None = None

    def dense(self) -> Tensor:
        with launching_on(self.weights.device):
            sums_SD = sum_by_latent(self.of, self.weights, self.rows)
        if self.latents is not None and self.besides is not None:
            sums_SD.index_add_(0, self.latents, self.besides.to(sums_SD.dtype))
        return sums_SD

    def squares(self, weight_SD: Tensor) -> Tensor:
        if self._squares is None:
            with launching_on(weight_SD.device):
                self._launch(weight_SD, None)
        assert self._squares is not None
        return self._squares

    def trace(self) -> Tensor:
        besides = 0.0 if self.besides is None else self.besides.sum().float()
        return self.weights.sum().float() + self.rows.sum().float() + besides

    def update(self, weight_SD: Tensor, mean_SD: Tensor, square_SD: Tensor, step: AdamStep) -> None:
        """The moments are in the weight's type. A copy of the weight that `lowered` holds is updated as well."""
        with launching_on(weight_SD.device):
            self._launch(weight_SD, (mean_SD, square_SD, step))

    def _launch(self, weight_SD: Tensor, update: tuple[Tensor, Tensor, AdamStep] | None) -> None:
        """The norms of the rows, and the update if there is one."""
        latents, width = weight_SD.shape
        first, second = two_blocks(width)
        kind = torch.float64 if weight_SD.dtype == torch.float64 else torch.float32
        if self._pieces is None:
            self._pieces = sums_of_pieces(self.of, self.weights, self.rows)
        self._squares = nothing = torch.empty(latents, dtype=kind, device=weight_SD.device)
        mean_SD = square_SD = numbers = nothing
        copy_SD, beta1, beta2, eps = None, 0.0, 0.0, 0.0
        if update is not None:
            mean_SD, square_SD, step = update
            numbers, (beta1, beta2), eps = _numbers(step, kind), step.betas, step.eps
            copy_SD = _copy_of(weight_SD)
        _rows_kernel[(latents,)](
            weight_SD,
            mean_SD,
            square_SD,
            nothing if copy_SD is None else copy_SD,
            self._squares,
            self.of.order,
            self.of.offsets,
            self.of.pieces,
            self._pieces,
            self.weights,
            self.rows,
            nothing if self.latents is None else self._slots(self.latents),
            nothing if self.besides is None else self.besides,
            nothing if self.factor is None else self.factor,
            numbers,
            width,
            BETA1=beta1,
            BETA2=beta2,
            EPS=eps,
            SLOTS=self.of.slots,
            BESIDES=self.besides is not None,
            UNIT_ROWS=self.unit_rows,
            CLIPPED=self.factor is not None,
            UPDATE=update is not None,
            COPIED=copy_SD is not None,
            FIRST=first,
            SECOND=second,
            UNROLL=UNROLL,
            SMALLEST=LEAST,
            SUM=tl.float64 if kind == torch.float64 else tl.float32,
            num_warps=max(1, min(8, first * 4 // (2 * BYTES_PER_THREAD * 32))),
        )
        if update is not None:
            increment_version(weight_SD)  # torch does not see what a kernel writes
            if copy_SD is not None:
                _keep(weight_SD, copy_SD)
            if self.unit_rows:
                note_unit_rows(weight_SD)

    def _slots(self, latents_A: Tensor) -> Tensor:
        """(S,) int32 the place of each latent in ``latents_A``, -1 where it is not among them."""
        slot_S = torch.full((self.of.latents,), -1, dtype=torch.int32, device=latents_A.device)
        return slot_S.scatter_(0, latents_A, torch.arange(len(latents_A), dtype=torch.int32, device=slot_S.device))


# --- copies in bfloat16 -----------------------------------------------------------------------------------------------


def lowered(weight_SD: Tensor) -> Tensor:
    """The weights in bfloat16: the copy that the last update wrote, or a new one, which updates will write from now on.

    A copy belongs to one state of the weights; whoever writes them in any other way changes that.
    """
    copy_SD = _copy_of(weight_SD)
    if copy_SD is None:
        copy_SD = weight_SD.detach().to(torch.bfloat16)
        for_training = not (weight_SD.is_inference() or torch.is_inference_mode_enabled())
        if isinstance(weight_SD, torch.nn.Parameter) and for_training:
            _keep(weight_SD, copy_SD)
    return copy_SD


def _copy_of(weight_SD: Tensor) -> Tensor | None:
    made_of, copy_SD = weight_SD.__dict__.get("copy_in_bfloat16", (None, None))
    return copy_SD if made_of is not None and made_of == state_of(weight_SD) else None


def _keep(weight_SD: Tensor, copy_SD: Tensor) -> None:
    weight_SD.__dict__["copy_in_bfloat16"] = (state_of(weight_SD), copy_SD)


def two_blocks(width: int) -> tuple[int, int]:
    """Two powers of two that cover a row: 512 and 256 for 768, 2048 and 256 for 2304, two of 2048 for 4096."""
    first = 1 << max(0, (width - 1).bit_length() - 1)
    return first, power_of_2(max(1, width - first))


def _numbers(step: AdamStep, dtype: torch.dtype) -> Tensor:
    """(3,) on the device: rate / (1 - beta1^t), sqrt(1 - beta2^t), and whether to update at all."""
    out = torch.empty(3, dtype=dtype, device=step.number.device)
    finite = step.number if step.finite is None else step.finite
    logs = [math.log(beta) for beta in step.betas]
    _numbers_kernel[(1,)](out, step.number, finite, step.rate, *logs, CONDITIONAL=step.finite is not None, num_warps=1)
    return out


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _numbers_kernel(out, number, finite, rate, LOG1: tl.constexpr, LOG2: tl.constexpr, CONDITIONAL: tl.constexpr):
    # 1 - beta^t loses four digits in float32 where t is small
    t = tl.load(number).to(tl.float64)
    tl.store(out, rate / (1.0 - tl.exp(t * LOG1)))
    tl.store(out + 1, tl.sqrt(1.0 - tl.exp(t * LOG2)))
    tl.store(out + 2, tl.load(finite).to(tl.float64) if CONDITIONAL else 1.0)


@triton.jit
def _rows_kernel(
    weight,
    mean,
    square,
    copied,
    squares,
    order,
    offsets,
    pieces,
    partials,
    weights,
    rows,
    slots,
    besides,
    factor,
    numbers,
    width,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    SLOTS: tl.constexpr,
    BESIDES: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    CLIPPED: tl.constexpr,
    UPDATE: tl.constexpr,
    COPIED: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    UNROLL: tl.constexpr,
    SMALLEST: tl.constexpr,
    SUM: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    row = latent * width
    columns1 = tl.arange(0, FIRST)
    columns2 = FIRST + tl.arange(0, SECOND)
    inside1, inside2 = columns1 < width, columns2 < width
    first, last, piece, split = part_of_latent(offsets, pieces, latent)
    gradient1, gradient2 = tl.zeros([FIRST], SUM), tl.zeros([SECOND], SUM)
    for start in range(first, last, UNROLL):
        for step in tl.static_range(UNROLL):
            there = start + step < last
            pair = tl.load(order + start + step, mask=there, other=0).to(tl.int64)
            weight_of_pair = tl.load(weights + pair, mask=there, other=0.0).to(SUM)
            source = rows + (pair // SLOTS) * width
            gradient1 += weight_of_pair * tl.load(source + columns1, mask=there & inside1, other=0.0).to(SUM)
            gradient2 += weight_of_pair * tl.load(source + columns2, mask=there & inside2, other=0.0).to(SUM)
    gradient1 += tl.load(partials + piece * width + columns1, mask=split & inside1, other=0.0)
    gradient2 += tl.load(partials + piece * width + columns2, mask=split & inside2, other=0.0)
    if BESIDES:
        slot = tl.load(slots + latent).to(tl.int64)
        gradient1 += tl.load(besides + slot * width + columns1, mask=inside1 & (slot >= 0), other=0.0).to(SUM)
        gradient2 += tl.load(besides + slot * width + columns2, mask=inside2 & (slot >= 0), other=0.0).to(SUM)
    if UPDATE or UNIT_ROWS:
        weight1 = tl.load(weight + row + columns1, mask=inside1, other=0.0).to(SUM)
        weight2 = tl.load(weight + row + columns2, mask=inside2, other=0.0).to(SUM)
    if UNIT_ROWS:
        along = tl.sum(gradient1 * weight1) + tl.sum(gradient2 * weight2)
        gradient1 -= along * weight1
        gradient2 -= along * weight2
    tl.store(squares + latent, tl.sum(gradient1 * gradient1) + tl.sum(gradient2 * gradient2))
    if UPDATE:
        rate, root = tl.load(numbers), tl.load(numbers + 1)
        go = tl.load(numbers + 2).to(tl.int32) > 0
        inside1, inside2 = inside1 & go, inside2 & go
        if CLIPPED:
            gradient1 *= tl.load(factor)
            gradient2 *= tl.load(factor)
        weight1 = _adam(mean, square, row + columns1, inside1, weight1, gradient1, rate, root, BETA1, BETA2, EPS)
        weight2 = _adam(mean, square, row + columns2, inside2, weight2, gradient2, rate, root, BETA1, BETA2, EPS)
        if UNIT_ROWS:
            norm = tl.sqrt(tl.sum(weight1 * weight1) + tl.sum(weight2 * weight2))
            weight1 /= tl.maximum(norm, SMALLEST)
            weight2 /= tl.maximum(norm, SMALLEST)
        tl.store(weight + row + columns1, weight1, mask=inside1)
        tl.store(weight + row + columns2, weight2, mask=inside2)
        if COPIED:
            tl.store(copied + row + columns1, weight1.to(tl.float32).to(tl.bfloat16), mask=inside1)
            tl.store(copied + row + columns2, weight2.to(tl.float32).to(tl.bfloat16), mask=inside2)


@triton.jit
def _adam(
    mean,
    square,
    places,
    inside,
    weight,
    gradient,
    rate,
    root,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
):
    """The updated weights; the moments are written."""
    moment1 = BETA1 * tl.load(mean + places, mask=inside, other=0.0) + (1 - BETA1) * gradient
    moment2 = BETA2 * tl.load(square + places, mask=inside, other=0.0) + (1 - BETA2) * gradient * gradient
    tl.store(mean + places, moment1, mask=inside)
    tl.store(square + places, moment2, mask=inside)
    return weight - rate * moment1 / (tl.sqrt(moment2) / root + EPS)
