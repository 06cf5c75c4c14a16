"""Many members over one batch: on a CPU each takes its step on a thread of its own.

Threads that share a product wait for each other at its end, and where other programs want the processors they wait
long: with a member to each processor none does. On a quiet machine of two processors both ways take the same, and one
large product for all members takes no less than one for each (docs/benchmarks.md). On a GPU members take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from activation_store.freed_memory import freed_memory_kept
from dictlearn.training.step import Member, NotFinite, Step, side_by_side, take_step


class Together:
    """A context in which members take steps together."""

    def __init__(self, members: int, on_cpu: bool, several_processes: bool) -> None:
        # processes that share a member must make the same calls in the same order: no threads
        self._on_cpu = on_cpu
        self._memory = ExitStack()
        self._workers = min(members, torch.get_num_threads()) if on_cpu and not several_processes else 1

    def __enter__(self) -> Together:
        if self._on_cpu:
            self._memory.enter_context(freed_memory_kept())
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._workers, "member") if self._workers > 1 else None
        if self._workers > 1:
            torch.set_num_threads(self._threads // self._workers)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)
        self._memory.close()

    def take_step(
        self,
        members: Sequence[Member],
        hooks: Sequence[tuple[Sequence[str], Sequence[str] | None]],
        rows: Mapping[str, Tensor],
        step: int,
        steps: int,
    ) -> list[Step | NotFinite]:
        """What each member's step found, in their order; every member's step is over when this returns.

        Args:
            hooks: of each member, the hooks it encodes and those it predicts.
        """

        def one(member: Member, of: tuple[Sequence[str], Sequence[str] | None]) -> Step | NotFinite:
            encoded, predicted = of
            target = None if predicted is None else side_by_side(rows, predicted)
            try:
                return take_step(member, side_by_side(rows, encoded), target, step, steps)
            except NotFinite as found:
                return found

        if self._pool is None:
            return [one(member, of) for member, of in zip(members, hooks, strict=True)]
        return list(self._pool.map(one, members, hooks))
