"""Triton kernels that find the k largest pre-activations of each row, exactly, and read them once.

Two stages, as the k groups with the largest maxima hold the k largest elements: if an element stands in another group,
each of those k groups has one that comes before it.

1. The largest of every 64 consecutive pre-activations, `group_maxima`, one pass at the speed of memory; or out of the
   encoder's product itself, `product_with_maxima`.
2. `select`: the k groups of a row by their maxima, then the k largest of those groups' 64 k elements. What this reads
   is small: at 65536 latents and k = 64 one part in sixteen.

The k-th largest is found bit by bit on integers that sort as the floats do: as many counts over registers as a number
has bits. The same elements, out of the nearest cache now, are then put where they belong. Nothing is sorted, nothing
depends on the data but values, and the same input gives the same bits.

Everything is ordered as torch.topk orders it: NaN is the largest, -0 is 0. What ties is taken from the left. Tensors
are contiguous, of bfloat16, float32 or float64, and on a GPU, or on a CPU for Triton's interpreter.

Axes: B rows, S latents, G groups of a row, K selected per row, A elements of a row of `keep_topk`, N elements of a row
or of its groups rounded up to a power of 2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (what a kernel is given has no type in Python)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dictlearn.ops.launching import parts, power_of_2
from dictlearn.ops.reference import Rule

GROUP = 64
"""Latents that share a maximum. Twice as many halve what stage 1 writes and double what stage 2 reads."""

LARGEST_ROW = 32768
"""Elements that one program holds in its registers: 64 a thread with 16 warps. Half as many of float64."""

BYTES_PER_PROGRAM = 16384
"""What one program of `group_maxima` reads: each of its threads asks for 8 times 16 bytes at once."""

_GROUP = tl.constexpr(GROUP)


class Tiling(NamedTuple):
    """How `product_with_maxima` cuts its work.

    Attributes:
        rows, latents: what one program computes at once; latents are a power of 2 of at least `GROUP`.
        width: of D, what one step of its sum takes.
        rows_together: tiles of rows that go through all latents together, so that W is read once for all of them while
            their rows stay in the card's cache.
        stages: steps whose inputs are under way at once.
        warps: that compute a tile.
        programs: on each multiprocessor at once.
    """

    rows: int = 128
    latents: int = 256
    width: int = 64
    rows_together: int = 16
    stages: int = 4
    warps: int = 8
    programs: int = 1


TILING = Tiling()
"""A Hopper card's: 128 accumulators in each thread, 225 of 227 kB of shared memory, one program on each multiprocessor.
Its 16 times 128 rows of width 4096 are 17 of 50 MB of cache."""

TILING_BY_ADDRESS = Tiling(latents=128, stages=3)
"""Where the copying unit cannot fetch tiles, and each thread needs registers for what it fetches."""

TILING_FLOAT32 = Tiling(rows=64, latents=64, width=16, stages=3, warps=4)
"""Without tensor cores, which know float32 only shortened."""

TILING_INTERPRETED = Tiling(rows=16, latents=128, width=16)
"""Triton's interpreter takes as long for what a tile holds beyond the matrix."""


def fits(width: int, dtype: torch.dtype) -> bool:
    """Whether `keep_topk` may be called on rows of ``width`` elements: they must fit into one program's registers."""
    largest = {torch.bfloat16: LARGEST_ROW, torch.float32: LARGEST_ROW, torch.float64: LARGEST_ROW // 2}
    return power_of_2(width) <= largest.get(dtype, 0)


def selects(latents: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `select` may be called for the k largest of ``latents``: k groups must fit, and all groups' maxima."""
    groups = number_of_groups(latents)
    return fits(groups, dtype) and fits(GROUP * power_of_2(min(k, groups)), dtype)


def number_of_groups(latents: int) -> int:
    return parts(latents, GROUP)


def group_maxima(pre_BS: Tensor, rule: Rule) -> Tensor:
    """(B, G): the largest of each `GROUP` consecutive elements of each row, by magnitude if that is the rule."""
    B, S = pre_BS.shape
    maxima_BG = pre_BS.new_empty(B, number_of_groups(S))
    G = maxima_BG.shape[1]
    groups = min(power_of_2(G), BYTES_PER_PROGRAM // (GROUP * pre_BS.element_size()))
    chunks = parts(G, groups)
    interpreted = pre_BS.device.type == "cpu"
    _group_maxima[(B * chunks,)](
        pre_BS, maxima_BG, S, G, chunks, groups, rule == "magnitude", S % GROUP != 0, interpreted, num_warps=4
    )
    return maxima_BG


def product_with_maxima(x_BD: Tensor, W_SD: Tensor, b_S: Tensor, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """``x W^T + b`` (B, S) and the maxima (B, G) of its groups, in the type of x and W: bfloat16 or float32.

    Summed in float32, not shortened to fewer bits; the maxima are those of what was rounded and stored. The maxima of
    magnitudes, which the rule "magnitude" wants, are not among what it gives.
    """
    (B, D), S = x_BD.shape, len(W_SD)
    interpreted = x_BD.device.type == "cpu"
    pre_BS, maxima_BG = x_BD.new_empty(B, S), x_BD.new_empty(B, number_of_groups(S))
    described = all(_describable(matrix) for matrix in (x_BD, W_SD, pre_BS))
    if tiling is None:
        tiling = TILING if described else TILING_BY_ADDRESS if x_BD.dtype == torch.bfloat16 else TILING_FLOAT32
        tiling = TILING_INTERPRETED if interpreted else tiling
    half = tiling.latents // 2 if tiling.latents > GROUP else tiling.latents
    matrices = ((x_BD, tiling.width, tiling.rows), (W_SD, tiling.width, tiling.latents), (pre_BS, half, tiling.rows))
    x, W, pre = (
        TensorDescriptor.from_tensor(matrix, [rows, columns]) if described else matrix
        for matrix, columns, rows in matrices
    )
    tiles = parts(B, tiling.rows) * parts(S, tiling.latents)
    _product_with_maxima[(min(tiles, tiling.programs * _multiprocessors(x_BD.device)),)](
        x, W, b_S, pre, maxima_BG, B, S, D, maxima_BG.shape[1],
        described, *tiling[:4], S % GROUP != 0, interpreted, num_stages=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
    return pre_BS, maxima_BG


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _describable(matrix: Tensor) -> bool:
    """Whether a Hopper card's copying unit can fetch tiles of it: rows begin at multiples of 16 bytes."""
    if matrix.device.type == "cuda" and torch.cuda.get_device_capability(matrix.device) < (9, 0):
        return False
    in_bytes = matrix.data_ptr(), matrix.shape[1] * matrix.element_size()
    return matrix.dtype == torch.bfloat16 and all(number % 16 == 0 for number in in_bytes)


def select(pre_BS: Tensor, maxima_BG: Tensor, k: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """What the rule makes of the k largest of each row, (B, K), and their places, (B, K) int64, from left to right.

    Exact, given the `group_maxima` of the same rule. Call it where `selects` says so, with 1 <= k <= S.
    """
    (B, S), G = pre_BS.shape, maxima_BG.shape[1]
    chosen = min(k, G)
    groups_BK = torch.empty(B, chosen, dtype=torch.int32, device=pre_BS.device)
    N, slots = power_of_2(G), power_of_2(chosen)
    warps = _warps(N)
    _choose_groups[(B,)](maxima_BG, groups_BK, G, chosen, N, _part(N, warps), num_warps=warps)
    values_BK = pre_BS.new_empty(B, k)
    indices_BK = torch.empty(B, k, dtype=torch.int64, device=pre_BS.device)
    warps = _warps(slots * GROUP)
    _select_elements[(B,)](
        pre_BS, groups_BK, values_BK, indices_BK, S, chosen, k,
        rule, slots, max(_part(slots * GROUP, warps) // GROUP, 1), num_warps=warps,
    )  # fmt: skip
    return values_BK, indices_BK


def keep_topk(pre_BA: Tensor, k: int, rule: Rule) -> Tensor:
    """(B, A): what the rule makes of the k largest of each row, 0 in other places. Call it where `fits` says so."""
    B, A = pre_BA.shape
    kept_BA = torch.empty_like(pre_BA)
    N = power_of_2(A)
    warps = _warps(N)
    _keep_topk[(B,)](pre_BA, kept_BA, A, min(k, A), rule, N, _part(N, warps), num_warps=warps)
    return kept_BA


def _warps(elements: int) -> int:
    """32 elements a thread; beyond 16384, 64, since more than 16 warps would have too few registers each."""
    return min(max(elements // 1024, 1), 16)


def _part(elements: int, warps: int) -> int:
    """What is looked at a second time at once: 8 elements a thread, 16 bytes of bfloat16."""
    return min(elements, 256 * warps)


# --- order on integers ------------------------------------------------------------------------------------------------


@triton.jit
def _order(x, BY_MAGNITUDE: tl.constexpr):
    """Unsigned integers that sort as x does: 0 for -inf, more for larger ones and still more for any NaN.

    The bits of the magnitude, negated where x is negative, with those of infinity added. A negative NaN lies below
    -inf and so passes through 0 and comes out on top. bfloat16 is the upper half of a float32.
    """
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    if BITS == 64:
        bits = x.to(tl.int64, bitcast=True)
        negative = bits >> 63
    else:
        bits = x.to(tl.int32, bitcast=True) if BITS == 32 else x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        negative = bits >> 31  # all ones where it is, else 0
    signed = bits & ~_sign(x.dtype)
    if not BY_MAGNITUDE:
        signed = (signed ^ negative) - negative
    return (signed + _infinity(x.dtype)).to(tl.uint64 if BITS == 64 else tl.uint32, bitcast=True)


@triton.jit
def _keys(x, BY_MAGNITUDE: tl.constexpr):
    """`_order`, in which one NaN is like another."""
    return tl.minimum(_order(x, BY_MAGNITUDE), _key_of_nan(x.dtype))


@triton.jit
def _numbers(order, dtype: tl.constexpr):
    """What `_order` was made from, -0 as 0."""
    BITS: tl.constexpr = dtype.primitive_bitwidth
    signed = order.to(tl.int64 if BITS == 64 else tl.int32, bitcast=True) - _infinity(dtype)
    bits = tl.where(signed < 0, _sign(dtype) - signed, signed)
    return ((bits >> 16).to(tl.int16) if BITS == 16 else bits).to(dtype, bitcast=True)


@triton.constexpr_function
def _infinity(dtype):
    """Its bits."""
    return 0x7FF0000000000000 if dtype.primitive_bitwidth == 64 else 0x7F800000


@triton.constexpr_function
def _sign(dtype):
    """The bit that says that a number is negative, and no other, as a signed integer."""
    return -(1 << (63 if dtype.primitive_bitwidth == 64 else 31))


@triton.constexpr_function
def _key_of_nan(dtype):
    """The next after infinity's."""
    return {16: 0xFF010000, 32: 0xFF000001, 64: 0xFFE0000000000001}[dtype.primitive_bitwidth]


@triton.jit
def _threshold(keys_N, k, BITS: tl.constexpr):
    """The k-th largest of the keys, and how many of those that equal it are among the k largest.

    It is the largest integer that at least k keys reach, found from its highest bit to the lowest that a key can have.
    """
    threshold = tl.zeros([], keys_N.dtype)
    highest = (threshold + 1) << (keys_N.dtype.primitive_bitwidth - 1)
    for bit in range(BITS):
        higher = threshold | (highest >> bit)
        threshold = tl.where(tl.sum((keys_N >= higher).to(tl.int32)) >= k, higher, threshold)
    return threshold, k - tl.sum((keys_N > threshold).to(tl.int32))


@triton.jit
def _chosen(keys_P, threshold, needed, seen):
    """Which of the keys of a part of a row are among the k largest, and their places among them, from left to right.

    ``seen`` counts, in the parts before, keys above the threshold and, 2^16 times, keys that equal it; it is 0 for the
    first part and given back for the next. Rows have at most 2^15 elements, so that one scan counts both.
    """
    above_P = (keys_P > threshold).to(tl.int32)
    equal_P = (keys_P == threshold).to(tl.int32)
    counts_P = above_P + (equal_P << 16)
    before_P = seen + tl.cumsum(counts_P, 0) - counts_P
    equal_before_P = before_P >> 16
    chosen_P = (above_P | (equal_P & (equal_before_P < needed).to(tl.int32))) != 0
    place_P = (before_P & 0xFFFF) + tl.minimum(equal_before_P, needed)
    return chosen_P, place_P, seen + tl.sum(counts_P)


@triton.jit
def _by_rule(x, keys, RULE: tl.constexpr):
    return tl.where(keys > _infinity(x.dtype), x, tl.zeros_like(x)) if RULE == "relu" else x


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _group_maxima(
    pre, maxima, S, G, chunks,
    GROUPS: tl.constexpr, BY_MAGNITUDE: tl.constexpr, RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    group_g = tl.program_id(0) % chunks * GROUPS + tl.arange(0, GROUPS)
    column_gN = group_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    pre_gN = tl.load(pre + row * S + column_gN, mask=column_gN < S, other=0.0)
    if INTERPRETED:  # it takes one element at a time for a function of ours, and all at once for the largest integer
        order_gN = _order(pre_gN, BY_MAGNITUDE)
        order_gN = tl.where(column_gN < S, order_gN, 0) if RAGGED else order_gN
        maxima_g = _numbers(tl.max(order_gN, 1), pre.dtype.element_ty)
    else:
        by_gN = pre_gN.to(tl.float32) if pre.dtype.element_ty == tl.bfloat16 else pre_gN
        by_gN = tl.abs(by_gN) if BY_MAGNITUDE else by_gN
        by_gN = tl.where(column_gN < S, by_gN, float("-inf")) if RAGGED else by_gN
        maxima_g = tl.reduce(by_gN, 1, _larger)
    tl.store(maxima + row * G + group_g, maxima_g, mask=group_g < G)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _choose_groups(maxima, groups, G, k, N: tl.constexpr, PART: tl.constexpr):
    BITS: tl.constexpr = maxima.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    keys_N = _part_of_row(maxima, row, G, 0, N, False)[0]
    threshold, needed = _threshold(keys_N, k, BITS)
    seen = 0
    for first in range(0, N, PART):
        keys_P, _, group_P = _part_of_row(maxima, row, G, first, PART, False)
        chosen_P, place_P, seen = _chosen(keys_P, threshold, needed, seen)
        tl.store(groups + row * k + place_P, group_P, mask=chosen_P)


@triton.jit
def _select_elements(
    pre, groups, values, indices, S, G, k, RULE: tl.constexpr, GROUPS: tl.constexpr, PART: tl.constexpr
):
    BITS: tl.constexpr = pre.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    keys_N = _groups_of_row(pre, groups, row, S, G, 0, GROUPS, RULE == "magnitude")[0]
    threshold, needed = _threshold(keys_N, k, BITS)
    seen = 0
    for first in range(0, GROUPS, PART):
        keys_P, pre_P, latent_P = _groups_of_row(pre, groups, row, S, G, first, PART, RULE == "magnitude")
        chosen_P, place_P, seen = _chosen(keys_P, threshold, needed, seen)
        tl.store(values + row * k + place_P, _by_rule(pre_P, keys_P, RULE), mask=chosen_P)
        tl.store(indices + row * k + place_P, latent_P.to(tl.int64), mask=chosen_P)


@triton.jit
def _keep_topk(pre, kept, A, k, RULE: tl.constexpr, N: tl.constexpr, PART: tl.constexpr):
    BITS: tl.constexpr = pre.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    keys_N = _part_of_row(pre, row, A, 0, N, RULE == "magnitude")[0]
    threshold, needed = _threshold(keys_N, k, BITS)
    seen = 0
    for first in range(0, N, PART):
        keys_P, pre_P, column_P = _part_of_row(pre, row, A, first, PART, RULE == "magnitude")
        chosen_P, _, seen = _chosen(keys_P, threshold, needed, seen)
        kept_P = tl.where(chosen_P, _by_rule(pre_P, keys_P, RULE), tl.zeros_like(pre_P))
        tl.store(kept + row * A + column_P, kept_P, mask=column_P < A)


@triton.jit
def _part_of_row(matrix, row, width, first, COLUMNS: tl.constexpr, BY_MAGNITUDE: tl.constexpr):
    """Keys, numbers and columns of a part of a row; beyond the row's end the key 0, which no number is below.

    That -inf has it too does no harm: the left ones of those that tie are taken, and the end is to the right.
    """
    column_P = first + tl.arange(0, COLUMNS)
    x_P = tl.load(matrix + row * width + column_P, mask=column_P < width, other=0.0)
    return tl.where(column_P < width, _keys(x_P, BY_MAGNITUDE), 0), x_P, column_P


@triton.jit
def _groups_of_row(pre, groups, row, S, G, first, GROUPS: tl.constexpr, BY_MAGNITUDE: tl.constexpr):
    """The same of some of the row's G chosen groups."""
    slot_g = first + tl.arange(0, GROUPS)
    group_g = tl.load(groups + row * G + slot_g, mask=slot_g < G, other=0)
    latent_gN = group_g[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    there_gN = (slot_g < G)[:, None] & (latent_gN < S)
    x_gN = tl.load(pre + row * S + latent_gN, mask=there_gN, other=0.0)
    keys_gN = tl.where(there_gN, _keys(x_gN, BY_MAGNITUDE), 0)
    N: tl.constexpr = GROUPS * _GROUP
    return tl.reshape(keys_gN, [N]), tl.reshape(x_gN, [N]), tl.reshape(latent_gN, [N])


# --- the encoder's product --------------------------------------------------------------------------------------------


@triton.jit
def _product_with_maxima(
    x, W, b, pre, maxima, B, S, D, G,
    DESCRIBED: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
    RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Each program goes through every so many of the tiles; the next one's first inputs come while one is written."""
    tiles_of_rows = tl.cdiv(B, ROWS)
    tiles_of_latents = tl.cdiv(S, LATENTS)
    for tile in tl.range(tl.program_id(0), tiles_of_rows * tiles_of_latents, tl.num_programs(0), flatten=True):
        # TOGETHER tiles of rows, or what is left of them, for one tile of latents after the other
        rows_before = tile // (TOGETHER * tiles_of_latents) * TOGETHER
        within = tile % (TOGETHER * tiles_of_latents)
        height = tl.minimum(tiles_of_rows - rows_before, TOGETHER)
        row = (rows_before + within % height) * ROWS
        latent = within // height * LATENTS
        pre_rl = tl.zeros([ROWS, LATENTS], tl.float32)
        for d in range(0, D, WIDTH):
            x_rd = _tile(x, row, d, B, D, ROWS, WIDTH, DESCRIBED)
            W_ld = _tile(W, latent, d, S, D, LATENTS, WIDTH, DESCRIBED)
            if INTERPRETED:  # it would multiply bfloat16 as the integers that it keeps them in
                x_rd, W_ld = x_rd.to(tl.float32), W_ld.to(tl.float32)
            pre_rl = tl.dot(x_rd, W_ld.T, pre_rl, input_precision="ieee")
        if LATENTS == _GROUP:
            _finish(pre_rl, b, pre, maxima, row, latent, B, S, G, DESCRIBED, RAGGED)
        else:  # in two halves, since shared memory has no room for both beside the next tile's inputs
            HALF: tl.constexpr = LATENTS // 2
            left_rl, right_rl = tl.split(tl.permute(tl.reshape(pre_rl, [ROWS, 2, HALF]), [0, 2, 1]))
            _finish(left_rl, b, pre, maxima, row, latent, B, S, G, DESCRIBED, RAGGED)
            _finish(right_rl, b, pre, maxima, row, latent + HALF, B, S, G, DESCRIBED, RAGGED)


@triton.jit
def _tile(matrix, row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """Zeros beyond the matrix."""
    if DESCRIBED:
        tile = matrix.load([row, column])
    else:
        row_r, column_c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        there_rc = (row_r < height)[:, None] & (column_c < width)[None, :]
        tile = tl.load(matrix + row_r[:, None].to(tl.int64) * width + column_c[None, :], mask=there_rc, other=0.0)
    return tile


@triton.jit
def _finish(pre_rl, b, pre, maxima, row, latent, B, S, G, DESCRIBED: tl.constexpr, RAGGED: tl.constexpr):
    """Add the bias, write the tile, and write the maxima of its groups."""
    ROWS: tl.constexpr = pre_rl.shape[0]
    LATENTS: tl.constexpr = pre_rl.shape[1]
    GROUPS: tl.constexpr = LATENTS // _GROUP
    latent_l = latent + tl.arange(0, LATENTS)
    pre_rl += tl.load(b + latent_l, mask=latent_l < S, other=0.0).to(tl.float32)[None, :]
    row_r1 = row + tl.arange(0, ROWS)[:, None]
    if DESCRIBED:
        pre.store([row, latent], pre_rl.to(tl.bfloat16))
    else:
        there_rl = (row_r1 < B) & (latent_l < S)[None, :]
        tl.store(pre + row_r1.to(tl.int64) * S + latent_l[None, :], pre_rl, mask=there_rl)
    if RAGGED:
        pre_rl = tl.where((latent_l < S)[None, :], pre_rl, float("-inf"))
    # rounding keeps order, so the largest may be rounded after it is found
    maxima_rg = tl.reduce(tl.reshape(pre_rl, [ROWS, GROUPS, _GROUP]), 2, _larger)
    group_1g = latent // _GROUP + tl.arange(0, GROUPS)[None, :]
    tl.store(maxima + row_r1.to(tl.int64) * G + group_1g, maxima_rg, mask=(row_r1 < B) & (group_1g < G))
