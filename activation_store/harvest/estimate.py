"""What a harvest will take of memory and time: estimates that say how they were come by."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from activation_store.harvest.batches import BatchPlan

if TYPE_CHECKING:
    from activation_store.harvest.request import Request


def estimate_memory(request: Request, plan: BatchPlan) -> int:
    """Peak of the process in bytes: what importing takes, the weights, one forward pass, and what is in hand."""
    spec, config = request.spec, request.config
    per_number = 4 if config.model_dtype == "float32" else 2
    weights = spec.n_layers * spec.parameters_per_layer() + 2 * spec.vocab_size * spec.d_model
    tokens = config.batch_size * config.context
    widest = 6 * spec.d_model + 4 * (spec.d_mlp or 4 * spec.d_model) + 4 * spec.n_heads * config.context
    rows = sum(hook.d for hook in request.hooks) * tokens * 8
    sums = sum(3 * 8 * hook.d * hook.d for hook in request.hooks)
    text = sum(len(document.text) for document in request.corpus.documents)
    return BEFORE_THE_MODEL + (weights + tokens * widest) * per_number + rows + sums + text + 12 * plan.rows


BEFORE_THE_MODEL = 680_000_000
"""Bytes resident after importing torch (CPU build) and transformer-lens, and tokenizing by the million characters."""


def estimate_seconds(request: Request, plan: BatchPlan, rows_left: int) -> tuple[float | None, str]:
    """Time for the forward passes that are left, from the floating-point operations in them."""
    if request.device != "cpu":
        return None, "not estimated on a GPU; the progress bar will tell after the first batches"
    if rows_left == 0:
        return 0.0, "nothing is left to compute"
    spec, config = request.spec, request.config
    layers = min(spec.n_layers, spec.last_layer_needed(config.hooks) + 1)
    products = 2 * spec.parameters_per_layer() / PRODUCTS_REACH
    score_takes = SCORE_TAKES if request.capture == "bridge" else FUSED_SCORE_TAKES
    scores = score_takes * spec.n_heads * config.context
    tokens = plan.batches * config.batch_size * config.context * rows_left / plan.rows
    work = tokens * layers * (products + scores)
    return work / _matrix_speed() + LOADING_TAKES, (
        f"an estimate: the work of {work / 1e9:,.0f} GFLOP, at the speed numpy multiplies matrices with here now, "
        f"and {LOADING_TAKES:.0f} s to load the model"
    )


PRODUCTS_REACH = 0.8
"""Share of the speed of a large matrix product that the model's own products reach."""

SCORE_TAKES = 1500
"""One attention score, at the Bridge's eager attention, takes as long as this many operations of a matrix product: it
is written and read by some ten elementwise steps (measured on 8 heads of 32, context 128 to 512, on a CPU)."""

FUSED_SCORE_TAKES = 150
"""The same in a model's own modules, with PyTorch's attention (measured on models of 0.3 to 26 million parameters)."""

LOADING_TAKES = 8.0
"""Seconds, nearly all of them imports."""


def _matrix_speed() -> float:
    """Floating-point operations per second of a float32 matrix product, the best of ten short ones."""
    a = np.ones((768, 768), dtype=np.float32)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best
