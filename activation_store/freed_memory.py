"""Memory that one forward pass, or one training step, gives back and the next one asks for again.

A pass allocates and frees tens to hundreds of megabytes. By default glibc's malloc returns large blocks to the kernel
and has them back page by page, zeroed anew: 10,000 to 40,000 page faults in each pass of 4096 tokens through models of
4 to 26 million parameters, 5 to 20 % of its time on a CPU. Kept, none.

Blocks are kept where they lie, so some do not fit what is asked for next and more lie about. Through a model's own
modules that came to nothing (peaks of 104 to 246 MB either way). Through the Bridge, which writes down all attention
scores, the peak was up to twice as high, and there it is left alone. A training step of 512 to 8192 on a CPU took 3 %
less time with memory kept, 9 to 12 % less where AuxK was at work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""
AS_A_RULE = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 64 << 20}
"""What malloc starts with, and what it arrives at by itself once blocks of 32 MiB have been freed."""


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Within the block, malloc keeps what is freed; what it has then goes back to the kernel. Gives whether it can."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        yield False
        return
    try:
        yield bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    finally:
        for option, value in AS_A_RULE.items():
            mallopt(option, value)
        malloc_trim(0)
