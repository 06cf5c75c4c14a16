"""Rows gathered by numpy, delivered as torch tensors on a device.

On CUDA rows are gathered into pinned memory, travel in the type they are stored in, on a stream of their own beside
what the device computes, and are converted there. Elsewhere they are converted by the thread that gathered them.

Memory is used again once the last tensor on it is gone: what the allocator would do instead, give it back to the
system and have every page filled with zeros anew, takes as long as gathering the rows.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
import torch

from activation_store.spec import HookSpec

ALIGNMENT = 64
"""As torch's own memory has it: matrix products round differently where operands lie differently."""


class Delivery:
    """Makes the tensors of one device and type; safe to use from several threads.

    Args:
        kept: pieces of memory of each size to keep for later batches.
    """

    def __init__(self, device: str | torch.device, dtype: torch.dtype | None, kept: int):
        self.device = torch.device(device)
        self.dtype = dtype or torch.float32
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._memory = ReusedMemory(kept)

    def tensor(self, hook: HookSpec, count: int, gather: Callable[[np.ndarray], object]) -> torch.Tensor:
        """What ``gather`` puts into the array it is given (count, *shape), as (count, d); queued on the current stream.

        The array has the type that carries the hook's on disk: bfloat16 is uint16 bits.
        """
        stored: torch.dtype = getattr(torch, hook.dtype)
        if self._copies is not None:
            host = torch.empty((count, hook.d), dtype=stored, pin_memory=True)
        else:
            host = self._memory.empty((count, hook.d), stored)
        bits = host.view(torch.uint16) if stored == torch.bfloat16 else host
        gather(bits.numpy().reshape(count, *hook.shape))
        if self._copies is not None or self.device.type != "cpu" or stored == self.dtype:
            return host.to(self.device, non_blocking=self._copies is not None).to(self.dtype)
        return self._memory.empty((count, hook.d), self.dtype).copy_(host)

    def ahead(
        self, read: Callable[[np.ndarray], dict[str, torch.Tensor]], rows: np.ndarray
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """``read(rows)`` beside what the device computes, and what to wait for before the tensors may be used."""
        if self._copies is None:
            return read(rows), None
        with torch.cuda.stream(self._copies):
            return read(rows), self._copies.record_event()

    def receive(self, tensors: dict[str, torch.Tensor], copied: torch.cuda.Event | None) -> None:
        """Make the current stream wait for what was read `ahead`, and keep its memory until this stream is done."""
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in tensors.values():
                tensor.record_stream(current)


class ReusedMemory:
    """Host memory for tensors, used again when no tensor, view or array refers to it any more.

    Args:
        kept: pieces of each size kept for use; what comes back beyond that is freed.
    """

    def __init__(self, kept: int):
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=kept))

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """As torch.empty."""
        size = shape[0] * shape[1] * dtype.itemsize
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            memory = memory[start : start + size]
        # What torch holds on to, until the last tensor is gone, is this very array; a view of it would not do.
        lent = memory[:]
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).reshape(shape)
