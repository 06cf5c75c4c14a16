"""How much memory a run takes, and what to lower when it is not there. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dictlearn.terminal import bytes_in_words
from dictlearn.training.configs import TrainConfig

FLOAT = 4
CPU_BUFFER = 2**24
"""Pre-activations that are there at once on a CPU (`dictlearn.ops.portable`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes: what a run takes whatever its batches, and what it takes for each row of the part it computes at once."""

    fixed: int
    per_row: int
    rows: int

    @property
    def total(self) -> int:
        return self.fixed + self.per_row * self.rows


Widths = tuple[Sequence[int], Sequence[int]]
"""Of the hooks that a dictionary encodes, and of those that it rebuilds."""


def parameters(config: Any, widths: Widths) -> int:
    """Numbers that a dictionary of this config learns; of a kind that does not say, those of two matrices."""
    if hasattr(config, "parameters"):
        return config.parameters(*widths)
    d_in, d_out = map(sum, widths)
    return config.d_sae * (d_in + d_out + 1) + d_out


def estimate(configs: Sequence[TrainConfig[Any]], widths: Sequence[Widths]) -> Memory:
    """Of runs that train together: weights, gradients, two moments and an average; batches; pairs and outputs.

    The mixing buffer is not in it: it is the page cache, or counted by the store. Nor are AuxK's products, which grow
    with the number of dead latents (12 bytes for each row and dead latent).

    Args:
        widths: of each run.
    """
    fixed = per_row = 0
    for config, of_run in zip(configs, widths, strict=True):
        d_in, d_out = map(sum, of_run)
        pairs = getattr(config.dictionary, "k", 32) * (2 * FLOAT + 2 * 8)
        if config.device.startswith("cuda"):
            of_parameter, dense = _on_gpu(config)
        else:
            of_parameter, dense = 4 * FLOAT, 0
            fixed += FLOAT * CPU_BUFFER
        of_parameter += FLOAT * (config.optimiser.averaging > 0)
        fixed += of_parameter * parameters(config.dictionary, of_run)
        per_row += FLOAT * (3 * d_in + 6 * d_out) + pairs + dense * config.dictionary.d_sae
    first = configs[0]
    return Memory(fixed, per_row, math.ceil(first.batch_size / first.accumulate))


def _on_gpu(config: TrainConfig[Any]) -> tuple[int, int]:
    """Bytes of a parameter without an average, and of a row's latent: pre-activations are there, all at once.

    The kernels read a bfloat16 copy of the weights, and Adam updates with gradients that are never written, where a
    batch is computed in one part. The portable operations write them, and a second (B, S) matrix.
    """
    low = 2 if config.product_precision == "bfloat16" else FLOAT
    if config.ops not in ("auto", "triton"):
        return 4 * FLOAT, 2 * low
    by_row = config.optimiser.rule == "adam" and config.accumulate == 1
    return (3 if by_row else 4) * FLOAT + (2 if low == 2 else 0), low


def what_to_lower(memory: Memory, there: int, batch_size: int, data_parts: int = 1) -> str:
    """A sentence for a run that found too little memory; its batch is shared by ``data_parts`` processes."""
    batch_size //= data_parts
    memory = replace(memory, rows=math.ceil(memory.rows / data_parts))
    said = (
        f"weights and moments take {bytes_in_words(memory.fixed)}, a batch of {memory.rows:,} rows takes another "
        f"{bytes_in_words(memory.per_row * memory.rows)}, and there are {bytes_in_words(there)}"
    )
    room = 0.8 * there - memory.fixed  # what others use, and what cannot be used for being in pieces
    if room < memory.per_row:
        return f"{said}; lower d_sae to at most {0.8 * there / memory.fixed:.0%} of what it is, or train fewer at once."
    # if by this count there was room, then something that is not in it took it: half as many rows at once, at least
    rows = min(int(room // memory.per_row), max(1, memory.rows // 2))
    accumulate = next(parts for parts in range(math.ceil(batch_size / rows), batch_size + 1) if batch_size % parts == 0)
    return (
        f"{said}; set accumulate to {accumulate}, which computes the same batch in parts of "
        f"{batch_size // accumulate:,} rows, or lower batch_size to {data_parts * 2 ** int(math.log2(rows)):,}."
    )
