"""What is compiled for a Hopper card is what was meant: nothing spilled, wide loads, tensor cores where there are sums.

This says nothing of speed, only that nothing known to be slow is in the code. `CASES` names operations at the sizes of
the benchmark and elsewhere; a new kernel is a new line, and a line in a table below for what its code must contain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.compiling import DISASSEMBLER, Compiler, no_memory

pytestmark = pytest.mark.needs("interpreter")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ROWS = 8192
SHARED_MEMORY = 227 * 1024 - 1024
"""Bytes that a program may have on a Hopper card; a kilobyte is the system's."""

OVERLAPPED = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
"""A wait for a product while the next one runs. The compiler gives this up in silence for a load in the wrong place."""

Operation = Callable[[], object]


def select(latents: int, k: int, dtype: torch.dtype, rule: str = "relu") -> Operation:
    def operation() -> object:
        from dictlearn.ops import triton_select

        pre_BS = no_memory(ROWS, latents, dtype=dtype)
        return triton_select.select(pre_BS, triton_select.group_maxima(pre_BS, rule), k, rule)

    return operation


def keep_topk(width: int, k: int, dtype: torch.dtype) -> Operation:
    def operation() -> object:
        from dictlearn.ops import triton_select

        assert triton_select.fits(width, dtype)
        return triton_select.keep_topk(no_memory(ROWS, width, dtype=dtype), k, "relu")

    return operation


def product(latents: int, width: int, dtype: torch.dtype, *tiling: int) -> Operation:
    def operation() -> object:
        from dictlearn.ops import triton_select as kernels

        x_BD, W_SD = no_memory(ROWS, width, dtype=dtype), no_memory(latents, width, dtype=dtype)
        chosen = kernels.Tiling(*tiling) if tiling else None
        return kernels.product_with_maxima(x_BD, W_SD, no_memory(latents), chosen)

    return operation


def pairs(latents: int, width: int, k: int, stored: torch.dtype) -> Operation:
    """Decoding, the values' gradient, a weight's gradient, and its update with everything that may be asked for."""

    def operation() -> object:
        from dictlearn.ops import triton_pairs as kernels
        from dictlearn.ops.row_gradients import AdamStep
        from dictlearn.ops.triton_update import PairGradient, lowered

        kind = FP64 if stored == FP64 else FP32
        values_BK, indices_BK = no_memory(ROWS, k, dtype=kind), no_memory(ROWS, k, dtype=torch.int64)
        W_SD, x_BD = no_memory(latents, width, dtype=stored), no_memory(ROWS, width, dtype=stored)
        kernels.decode(values_BK, indices_BK, W_SD)
        kernels.pair_products(x_BD, W_SD, indices_BK)
        kernels.errors(values_BK, indices_BK, W_SD, no_memory(width, dtype=kind), no_memory(ROWS, width, dtype=kind))
        of = kernels.bags(indices_BK, latents)
        kernels.sum_by_latent(of, values_BK, x_BD)
        master_SD = torch.nn.Parameter(no_memory(latents, width, dtype=kind))
        if stored == BF16:
            lowered(master_SD)
        dead_A, besides_AD = no_memory(99, dtype=torch.int64), no_memory(99, width, dtype=stored)
        gradient = PairGradient(of, values_BK, x_BD, dead_A, besides_AD, unit_rows=True)
        gradient.squares(master_SD)
        gradient.factor = no_memory(dtype=kind)
        mean_SD, square_SD = no_memory(latents, width, dtype=kind), no_memory(latents, width, dtype=kind)
        step = AdamStep(1e-4, (0.9, 0.999), 1e-8, no_memory(), no_memory(dtype=torch.bool))
        return gradient.update(master_SD, mean_SD, square_SD, step)

    return operation


CASES: dict[str, Operation] = {
    "pairs, 768 wide": pairs(24576, 768, 32, BF16),
    "pairs, 2304 wide": pairs(65536, 2304, 64, BF16),
    "pairs, 4096 wide": pairs(131072, 4096, 64, BF16),
    "pairs, 2304 wide, float32": pairs(65536, 2304, 64, FP32),
    "pairs, 770 wide": pairs(24570, 770, 33, BF16),
    "pairs, 2304 wide, float64": pairs(65536, 2304, 64, FP64),
    "select 32 of 24576": select(24576, 32, BF16),
    "select 64 of 65536": select(65536, 64, BF16),
    "select 64 of 131072": select(131072, 64, BF16),
    "select 64 of 65536, float32": select(65536, 64, FP32),
    "select 64 of 65536, float64": select(65536, 64, FP64),
    "select 256 of 65536, float32": select(65536, 256, FP32),
    "select 1 of 64": select(64, 1, FP32),
    "select 64 of 65536 by magnitude": select(65536, 64, BF16, "magnitude"),
    "keep 384 of 2458": keep_topk(2458, 384, BF16),
    "keep 1152 of 6560": keep_topk(6560, 1152, BF16),
    "keep 2048 of 16384": keep_topk(16384, 2048, BF16),
    "keep 2048 of 32768": keep_topk(32768, 2048, BF16),
    "keep 2048 of 32768, float32": keep_topk(32768, 2048, FP32),
    "keep 2048 of 16384, float64": keep_topk(16384, 2048, FP64),
    "product, width 2304": product(65536, 2304, BF16),
    "product, rows at odd places": product(24570, 770, BF16),
    "product, two programs on a multiprocessor": product(65536, 2304, BF16, 128, 128, 64, 16, 3, 4, 2),
    "product, float32": product(65536, 2304, FP32),
    "product, width 1 and one latent": product(1, 1, BF16),
}
CONTAINS = {
    **{
        f"pairs, {width} wide": {
            kernel: ["LDG.E.128"]
            for kernel in ("_sums_kernel", "_errors_kernel", "_pieces_kernel", "_products_kernel", "_rows_kernel")
        }
        for width in (768, 2304, 4096)
    },
    "select 64 of 65536": {"_group_maxima": ["LDG.E.128", "FMNMX.NAN"], "_choose_groups": ["LDG.E.128"]},
    "select 64 of 65536, float32": {"_group_maxima": ["LDG.E.128"]},
    "keep 2048 of 16384": {"_keep_topk": ["LDG.E.128", "STG.E.128"]},
    "product, width 2304": {"_product_with_maxima": ["HGMMA", OVERLAPPED, "UTMALDG", "UTMASTG", "FMNMX.NAN"]},
    "product, rows at odd places": {"_product_with_maxima": ["HGMMA"]},
    "product, two programs on a multiprocessor": {"_product_with_maxima": ["HGMMA", OVERLAPPED, "UTMALDG"]},
}
"""What the code of a kernel must have: 16-byte loads and stores, tensor cores, the copying unit, maxima of NaN."""

REGISTERS = {"_choose_groups": 128, "_select_elements": 128, "_keep_topk": 128}
"""At most, so that at least 16 of the 64 warps that a multiprocessor can have are there to hide each other's waits."""

HEAVY = {
    "select 1 of 64",
    "select 32 of 24576",
    "select 64 of 65536, float32",
    "product, float32",
    "product, width 1 and one latent",
    "pairs, 768 wide",
    "pairs, 4096 wide",
    "pairs, 2304 wide, float32",
    "pairs, 770 wide",
    "pairs, 2304 wide, float64",
    "select 64 of 131072",
    "select 64 of 65536, float64",
    "select 256 of 65536, float32",
    "select 64 of 65536 by magnitude",
    "keep 384 of 2458",
    "keep 1152 of 6560",
    "keep 2048 of 32768, float32",
    "keep 2048 of 16384, float64",
    "product, two programs on a multiprocessor",
}
"""Cases that differ from others in a size or a type; a second or two each."""


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / DISASSEMBLER).exists():
        pytest.skip("this build of triton has no compiler for CUDA")
    found = Compiler()
    yield found
    found.close()


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.heavy) if c in HEAVY else c for c in CASES])
def test_compiles_to_what_was_meant(compiler, case):
    kernels = compiler(case)
    assert kernels
    for kernel in kernels:
        assert not spills(kernel), f"{kernel['kernel']} spills with {kernel['registers']} registers"
        assert kernel["shared"] <= SHARED_MEMORY
        assert kernel["registers"] <= REGISTERS.get(kernel["kernel"], 255)
    code = {kernel["kernel"]: kernel["instructions"] for kernel in kernels}
    for name, instructions in CONTAINS.get(case, {}).items():
        for instruction in instructions:
            assert any(found.startswith(instruction) for found in code[name]), f"{name} has no {instruction}"


def spills(kernel: dict[str, Any]) -> int:
    """Instructions that read or write a thread's registers in memory."""
    return sum(count for name, count in kernel["instructions"].items() if name.startswith(("LDL", "STL")))


if __name__ == "__main__":  # a table of all of them
    answer = Compiler()
    for case in sys.argv[1:] or CASES:
        for kernel in answer(case):
            found = {
                n: c
                for n, c in kernel["instructions"].items()
                if n.startswith(("LD", "ST", "HGMMA", "UTMA", "WARPGROUP.DEPBAR"))
            }
            print(
                f"{case}: {kernel['kernel']}, {kernel['registers']} registers, {kernel['shared']} bytes shared,",
                end=" ",
            )
            print(f"{sum(kernel['instructions'].values())} instructions, spills {spills(kernel)}: {found}")
