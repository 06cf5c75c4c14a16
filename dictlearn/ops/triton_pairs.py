"""Sums over selected pairs in Triton: decoding, the gradient of the values, and sums by latent for the weights.

A pair is one selected latent of one row of the batch; pair p belongs to row p // K. Decoding sums, for each row, the
vectors of its K latents; the gradient of a weight matrix sums, for each latent, the rows that selected it. Both are one
kernel: a program owns 256 columns of one sum, so that a vector is read in 16-byte pieces by one warp, no width is
padded to a power of two, and the sums of one block of columns, which run at the same time, find their sources in the L2
cache (256 columns of 65,536 vectors in bfloat16 are 34 MB). There are no atomics and no [B * K, D] temporary: the order
of every sum is fixed by the data, so the same call gives the same bits.

Latents that are selected often (a power law is the normal case) would leave one program to work while all others have
ended. Their pairs are split into pieces, each summed by a program of its own; the pieces' sums are added in order.

Tensors are contiguous. Sums are in float32 whatever is stored, in float64 for float64.

Axes: B rows, K slots per row, P = B K pairs, D or O width of a vector, S latents.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dictlearn.ops.launching import parts, power_of_2

COLUMNS = 256
"""Columns of one program: 16 bytes of bfloat16 for each lane of a warp."""
UNROLL = 4
"""Pairs whose vectors are on their way at once."""
HOT = 256
"""Pairs of a latent beyond which they are split, into pieces of so many."""
PRODUCTS = 16
"""Pairs of a row that one program multiplies at once."""


@dataclass(frozen=True)
class Bags:
    """The pairs of a batch by latent.

    Attributes:
        order: (P,) int32 pairs, sorted by their latent and within it by row.
        offsets: (S + 1,) int32 where each latent's pairs begin in ``order``.
        pieces: (S + 1,) int32 where the pieces of each latent begin; a latent that is not split has none.
        latent_of_piece: (M,) int32, M the most pieces that there can be.
        slots: K.
    """

    order: Tensor
    offsets: Tensor
    pieces: Tensor
    latent_of_piece: Tensor
    slots: int

    @property
    def latents(self) -> int:
        return len(self.offsets) - 1


def bags(indices_BK: Tensor, latents: int) -> Bags:
    """Sort the pairs of ``indices_BK`` by latent, on the device alone: nothing is asked of it."""
    (B, K), device = indices_BK.shape, indices_BK.device
    keys_P = indices_BK.reshape(-1).to(torch.int32)
    sorted_P, order_P = keys_P.sort(stable=True)
    boundaries = torch.arange(latents + 1, device=device, dtype=torch.int32)
    offsets = torch.searchsorted(sorted_P, boundaries, out_int32=True)
    most = B * K // HOT + B * K // (HOT + 1) if B > HOT else 0  # a row selects a latent once
    pieces = torch.zeros_like(offsets)
    latent_of_piece = pieces[:0]
    if most:
        counts_S = offsets.diff()
        of_each_S = (counts_S + HOT - 1) // HOT * (counts_S > HOT)
        torch.cumsum(of_each_S, 0, dtype=torch.int32, out=pieces[1:])
        numbers = torch.arange(most, device=device, dtype=torch.int32)
        latent_of_piece = torch.searchsorted(pieces, numbers, right=True, out_int32=True) - 1
    return Bags(order_P.to(torch.int32), offsets, pieces, latent_of_piece, K)


def decode(values_BK: Tensor, indices_BK: Tensor, W_SO: Tensor) -> Tensor:
    """(B, O) for each row the weighted sum of its latents' vectors, in the type of the values."""
    out_BO = values_BK.new_empty(len(values_BK), W_SO.shape[1])
    nothing = indices_BK
    _launch_sums(out_BO, indices_BK, nothing, nothing, out_BO, values_BK, W_SO, indices_BK.shape[1], by_latent=False)
    return out_BO


def errors(
    values_BK: Tensor, indices_BK: Tensor, W_SO: Tensor, bias: Tensor, target_BO: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`decode` plus a bias (O,) or (B, O), compared with a target.

    Returns:
        the output (B, O) in the type of the values, target minus output (B, O) in that of the vectors, and the sum of
        its squares ().
    """
    (B, K), width = indices_BK.shape, W_SO.shape[1]
    columns = _columns(width)
    blocks = parts(width, columns)
    kind, sum_type = _sum_type(values_BK, W_SO)
    output_BO, errors_BO = values_BK.new_empty(B, width), W_SO.new_empty(B, width)
    squares = values_BK.new_empty(B, blocks, dtype=kind)
    if B:
        _errors_kernel[(B, blocks)](
            output_BO,
            errors_BO,
            squares,
            indices_BK,
            values_BK,
            W_SO,
            bias,
            target_BO,
            width,
            blocks,
            SLOTS=K,
            BIAS_OF_ROW=bias.ndim == 2,
            COLUMNS=columns,
            UNROLL=UNROLL,
            SUM=sum_type,
            num_warps=1,
        )
    return output_BO, errors_BO, squares.sum()


def sum_by_latent(of: Bags, weights_BK: Tensor, rows_BD: Tensor) -> Tensor:
    """(S, D) for each latent the sum over its pairs of weight times row, in the type of the weights."""
    out_SD = weights_BK.new_empty(of.latents, rows_BD.shape[1])
    partials = sums_of_pieces(of, weights_BK, rows_BD)
    _launch_sums(out_SD, of.order, of.offsets, of.pieces, partials, weights_BK, rows_BD, of.slots, by_latent=True)
    return out_SD


def sums_of_pieces(of: Bags, weights_BK: Tensor, rows_BD: Tensor) -> Tensor:
    """(M, D) in the row of a split latent's first piece the sum of all its pieces; other rows mean nothing."""
    width = rows_BD.shape[1]
    out_MD = rows_BD.new_empty(len(of.latent_of_piece), width, dtype=_sum_type(weights_BK, rows_BD)[0])
    columns = _columns(width)
    if len(out_MD):
        _pieces_kernel[(len(out_MD), parts(width, columns))](
            out_MD,
            of.order,
            of.offsets,
            of.pieces,
            of.latent_of_piece,
            of.latents,
            weights_BK,
            rows_BD,
            width,
            SLOTS=of.slots,
            PIECE=HOT,
            COLUMNS=columns,
            UNROLL=UNROLL,
            SUM=_sum_type(weights_BK, rows_BD)[1],
            num_warps=1,
        )
        _add_pieces_kernel[(len(out_MD), parts(width, columns))](
            out_MD, of.pieces, of.latent_of_piece, of.latents, width, COLUMNS=columns, num_warps=1
        )
    return out_MD


def pair_products(rows_BO: Tensor, W_SO: Tensor, indices_BK: Tensor) -> Tensor:
    """(B, K) float32 (float64 for float64): the dot product of each row with each of its latents' vectors."""
    (B, K), width = indices_BK.shape, W_SO.shape[1]
    kind, sum_type = _sum_type(rows_BO, W_SO)
    out_BK = rows_BO.new_empty(B, K, dtype=kind)
    tile = min(PRODUCTS, power_of_2(K))
    if B:
        _products_kernel[(B, parts(K, tile))](
            out_BK, rows_BO, W_SO, indices_BK, width, SLOTS=K, TILE=tile, COLUMNS=_columns(width), SUM=sum_type
        )
    return out_BK


def _launch_sums(
    out: Tensor,
    numbers: Tensor,
    offsets: Tensor,
    pieces: Tensor,
    partials: Tensor,
    weights: Tensor,
    rows: Tensor,
    slots: int,
    by_latent: bool,
) -> None:
    units, width = out.shape
    columns = _columns(width)
    if units:
        _sums_kernel[(units, parts(width, columns))](
            out,
            numbers,
            offsets,
            pieces,
            partials,
            weights,
            rows,
            width,
            SLOTS=slots,
            BY_LATENT=by_latent,
            COLUMNS=columns,
            UNROLL=UNROLL,
            SUM=_sum_type(weights, rows)[1],
            num_warps=1,
        )


def _columns(width: int) -> int:
    return min(COLUMNS, power_of_2(width))


def _sum_type(*tensors: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """What sums of products of these are kept in."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sums_kernel(
    out,
    numbers,
    offsets,
    pieces,
    partials,
    weights,
    rows,
    width,
    SLOTS: tl.constexpr,
    BY_LATENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if BY_LATENT:
        first, last, piece, split = part_of_latent(offsets, pieces, unit)
    else:
        first, last = unit * SLOTS, unit * SLOTS + SLOTS
    total = sum_of_pairs(
        numbers, weights, rows, first, last, columns, width, SLOTS, BY_LATENT, UNROLL, tl.zeros([COLUMNS], SUM)
    )
    if BY_LATENT:
        total += tl.load(partials + piece * width + columns, mask=split & (columns < width), other=0.0)
    tl.store(out + unit * width + columns, total, mask=columns < width)


@triton.jit
def _errors_kernel(
    outputs,
    errors,
    squares,
    indices,
    weights,
    vectors,
    bias,
    target,
    width,
    blocks,
    SLOTS: tl.constexpr,
    BIAS_OF_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first = row * SLOTS
    total = tl.zeros([COLUMNS], SUM)
    total = sum_of_pairs(indices, weights, vectors, first, first + SLOTS, columns, width, SLOTS, False, UNROLL, total)
    places = row * width + columns
    total += tl.load(bias + (places if BIAS_OF_ROW else columns), mask=inside, other=0.0).to(SUM)
    error = tl.load(target + places, mask=inside, other=0.0).to(SUM) - total
    tl.store(outputs + places, total, mask=inside)
    tl.store(errors + places, error, mask=inside)
    tl.store(squares + row * blocks + tl.program_id(1), tl.sum(error * error))


@triton.jit
def _pieces_kernel(
    out,
    order,
    offsets,
    pieces,
    latent_of_piece,
    latents,
    weights,
    rows,
    width,
    SLOTS: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SUM: tl.constexpr,
):
    piece = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if piece < tl.load(pieces + latents):
        latent = tl.load(latent_of_piece + piece)
        first = tl.load(offsets + latent) + (piece - tl.load(pieces + latent)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(offsets + latent + 1))
        total = sum_of_pairs(
            order, weights, rows, first, last, columns, width, SLOTS, True, UNROLL, tl.zeros([COLUMNS], SUM)
        )
        tl.store(out + tl.cast(piece, tl.int64) * width + columns, total, mask=columns < width)


@triton.jit
def _add_pieces_kernel(sums, pieces, latent_of_piece, latents, width, COLUMNS: tl.constexpr):
    piece = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if piece < tl.load(pieces + latents):
        latent = tl.load(latent_of_piece + piece)
        last = tl.load(pieces + latent + 1)
        if piece == tl.load(pieces + latent):
            own = sums + piece.to(tl.int64) * width + columns
            total = tl.load(own, mask=columns < width, other=0.0)
            for further in range(1, last - piece):
                total += tl.load(own + tl.cast(further, tl.int64) * width, mask=columns < width, other=0.0)
            tl.store(own, total, mask=columns < width)


@triton.jit
def _products_kernel(
    out,
    rows,
    vectors,
    indices,
    width,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * TILE + tl.arange(0, TILE)
    latents = tl.load(indices + row * SLOTS + slots, mask=slots < SLOTS, other=0).to(tl.int64)
    total = tl.zeros([TILE, COLUMNS], SUM)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        of_row = tl.load(rows + row * width + columns, mask=inside, other=0.0).to(SUM)
        there = (slots < SLOTS)[:, None] & inside[None, :]
        vector = tl.load(vectors + latents[:, None] * width + columns[None, :], mask=there, other=0.0)
        total += vector.to(SUM) * of_row[None, :]
    tl.store(out + row * SLOTS + slots, tl.sum(total, axis=1), mask=slots < SLOTS)


# --- parts of kernels, here and in triton_update ----------------------------------------------------------------------


@triton.jit
def part_of_latent(offsets, pieces, latent):
    """``(first pair, end, first piece, whether it is split)``; of a latent that is split no pair."""
    first, last = tl.load(offsets + latent), tl.load(offsets + latent + 1)
    piece = tl.load(pieces + latent)
    split = tl.load(pieces + latent + 1) > piece
    return first, tl.where(split, first, last), piece.to(tl.int64), split


@triton.jit
def sum_of_pairs(
    numbers,
    weights,
    rows,
    first,
    last,
    columns,
    width,
    SLOTS: tl.constexpr,
    BY_LATENT: tl.constexpr,
    UNROLL: tl.constexpr,
    total,
):
    """``total`` and weight times vector of each pair; by latent ``numbers`` are pairs, else they are latents."""
    for start in range(first, last, UNROLL):
        for step in tl.static_range(UNROLL):
            place = start + step
            there = place < last
            number = tl.load(numbers + place, mask=there, other=0).to(tl.int64)
            pair = number if BY_LATENT else place
            source = number // SLOTS if BY_LATENT else number
            weight = tl.load(weights + pair, mask=there, other=0.0).to(total.dtype)
            vector = tl.load(rows + source * width + columns, mask=there & (columns < width), other=0.0)
            total += weight * vector.to(total.dtype)
    return total
