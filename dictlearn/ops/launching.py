"""What it takes to launch a kernel: the device, and the arithmetic of a grid.

Triton has functions for the arithmetic, but each call from the host goes through its compiler's wrappers: a twentieth
of the time that the host takes for a training step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which Triton launches on a device: it takes the current one, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def parts(whole: int, part: int) -> int:
    """How many parts of a size cover a whole."""
    return -(-whole // part)


def power_of_2(least: int) -> int:
    """The smallest power of two that is at least so large; 1 for 0."""
    return 1 << max(0, least - 1).bit_length()
