"""The device that a section of gpu_step.py runs on, its clock, and what the section is asked and answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from gpu_arithmetic import Rates, Size

from dictlearn.ops.ahead import LAG

WAKE_SECONDS = 0.05
"""Of work before a measurement: an idle card lowers its clock."""
HOLD_CYCLES = 40_000_000
"""About 20 ms in which the device waits while the host queues what is measured, so that launches are not part of it."""
MORE_THAN_CACHED = 2**28
"""Bytes: what is written between two measurements leaves nothing else in the card's second-level cache (60 MB)."""

Emit = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class Card:
    """A GPU; or the CPU, where Triton's interpreter stands in for it and no time means anything."""

    device: torch.device

    @property
    def measures(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        if self.measures:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, calls: Sequence[Callable[[], object]], repeats: int = 10) -> float | None:
        """The median time of a call on the device, whose cache then holds nothing of the call's inputs."""
        for call in calls:
            call()  # compiles, and makes what is made once
        if not self.measures:
            return None
        self.synchronise()
        began_on_host, number = time.perf_counter(), 0
        while time.perf_counter() - began_on_host < WAKE_SECONDS:
            calls[number % len(calls)]()
            self.synchronise()
            number += 1
        marks, other = [], torch.empty(MORE_THAN_CACHED, dtype=torch.uint8, device=self.device)
        torch.cuda._sleep(HOLD_CYCLES)
        for number in range(repeats):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            began.record()
            calls[number % len(calls)]()
            ended.record()
            marks.append((began, ended))
        self.synchronise()
        return median(began.elapsed_time(ended) for began, ended in marks)

    def wall_ms(self, run: Callable[[], object]) -> float | None:
        """What a person waits for: from an idle device to an idle device."""
        self.synchronise()
        began = time.perf_counter()
        run()
        self.synchronise()
        return 1e3 * (time.perf_counter() - began) if self.measures else None

    def queue_ms(self, run: Callable[[], object]) -> float | None:
        """What the host needs to queue a call, while the device does something else."""
        if not self.measures:
            run()
            return None
        took = []
        for _ in range(5):
            self.synchronise()
            torch.cuda._sleep(HOLD_CYCLES)
            began = time.perf_counter()
            run()
            took.append(1e3 * (time.perf_counter() - began))
        return median(took)

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.measures else 0

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """The most that is held at once during a call, of all that torch gave out."""
        if not self.measures:
            run()
            return None
        self.synchronise()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronise()
        return torch.cuda.max_memory_allocated(self.device)


@dataclass(frozen=True)
class Ask:
    """What a section is to do.

    Attributes:
        sizes: on which it works.
        rates: of the card, as measured; as assumed before that.
        rounds, steps: of measured steps, and steps in each.
        until: on the clock of time.monotonic, when to have ended.
        emit: takes the name of a table and a row of it: values by column, times in ms, None what was not measured.
    """

    card: Card
    sizes: tuple[Size, ...]
    rates: Rates
    rounds: int
    steps: int
    until: float
    emit: Emit

    @property
    def quick(self) -> bool:
        """Whether only a little of everything is wanted: the interpreter takes milliseconds for each program."""
        return not self.card.measures

    @property
    def warm_up(self) -> int:
        """Steps before any is measured: kernels are compiled, moments made, what the host learns late has arrived."""
        return 1 if self.quick else LAG + 2

    @property
    def size(self) -> Size:
        """Of a section that has one."""
        (size,) = self.sizes
        return size

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


def in_words(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_lost(error: BaseException) -> bool:
    """Whether the process can do nothing more with its device after an error: memory alone can be freed."""
    return not isinstance(error, torch.OutOfMemoryError) and isinstance(error, RuntimeError) and "CUDA" in str(error)


def free() -> None:
    """Give back what nothing refers to any more, so that what comes next finds whole blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
