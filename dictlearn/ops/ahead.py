"""A host that runs ahead of its GPU: what it has to know is asked for in one step and read some steps later.

To read a number that a GPU computes is to wait for all that was queued before it; until the host has queued more, the
GPU has nothing to do. A number that was asked for `LAG` steps ago has arrived long since, so that reading it stops
nobody, and there is always work queued. What a later step needs to know is therefore foreseen, or done without.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAG = 4
"""Steps after which a number is read. The host is never further ahead of the GPU than that."""


class Arriving:
    """A number () on its way to the host."""

    def __init__(self, number: Tensor) -> None:
        number = number.detach()
        self._copied: torch.cuda.Event | None = None
        if number.is_cuda:
            # into memory that the GPU can write by itself, or else the copy would be waited for
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(number.device))
        else:
            self._host = number.clone()

    def read(self) -> int | float | bool:
        """The number; waits for it if it has not arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.item()
