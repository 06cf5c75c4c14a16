"""A harvest: a corpus through a language model, the activations at its hooks into a store.

What comes first is what can be refused cheaply. ``describe`` needs no torch: names, hooks, context length, corpus,
disk space and an existing store are all settled before a model is loaded. ``harvest`` then loads the model, computes
one batch to see every hook fire with the shape its config promises, and only then makes the store.

The same command continues an unfinished harvest at the batch that holds the first row not yet committed. Batches are
always computed whole and at one shape, so the finished store has the bytes of one that was never interrupted (on the
same device, with the same versions; the versions are recorded, and a store begun with others is refused by name).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from activation_store.harvest.compute import compute
from activation_store.harvest.disk_space import bytes_free, bytes_on_disk, refuse_full_disk
from activation_store.harvest.estimate import estimate_memory, estimate_seconds
from activation_store.harvest.ranks import Group
from activation_store.harvest.request import HarvestConfig, Request, existing_manifest
from activation_store.location import open_place
from activation_store.progress import NoProgress, Progress
from activation_store.writer import sweep_complete


@dataclass(frozen=True)
class HarvestPlan:
    """What a harvest will do, for ``--dry-run``. Sizes in bytes, times in seconds."""

    rows: int
    rows_asked: int
    hooks: dict[str, tuple[int, ...]]
    documents: int
    batches: int
    excluded: dict[str, int]
    bytes_on_disk: int
    bytes_free: int | None
    """None where that cannot be told: in an object store."""
    peak_memory: int
    seconds: float | None
    seconds_are: str
    """How ``seconds`` was come by: it is an estimate, and this says of what kind."""
    rows_committed: int
    """Rows already there, when the harvest continues a store."""
    complete: bool
    """The store is already there, whole: nothing will be computed."""


class HarvestInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during a harvest; the text says what is safe and how to go on."""


def harvest(config: HarvestConfig, progress: Progress | None = None, stop_after: int | None = None) -> str:
    """Make the store of ``config``, or continue it, or find it already complete.

    Started by ``torchrun``, the processes share the work: see `activation_store.harvest.ranks`.

    Args:
        stop_after: compute this many batches and stop, leaving a store that the same call continues. In one process.

    Returns:
        The store's folder or URL.

    Raises:
        UserError: see the module; nothing is computed when the request cannot be met.
        HarvestInterrupted: on Ctrl-C or SIGTERM; committed rows stay.
    """
    request = Request.of(config)
    if request.is_complete():
        sweep_complete(request.place)
        return request.place.location
    group = Group.of_environment()
    progress = progress if progress is not None and group.rank == 0 else NoProgress()
    plan = None
    try:
        with _sigterm_interrupts():
            plan = request.plan(progress)
            request.refuse_another_store(request.manifest(plan))
            refuse_full_disk(request.place, plan.rows, request.hooks, request.geometry, request.existing)
            compute(request, plan, group, progress, stop_after)
    except KeyboardInterrupt:
        committed = existing_manifest(open_place(config.store))
        rows = f"{committed.rows if committed else 0:,}" + (f" of {plan.rows:,}" if plan else "")
        raise HarvestInterrupted(
            f"Stopped with {rows} rows safe in {config.store}; the same command continues from there."
        ) from None
    finally:
        group.close()
    return request.place.location


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """What Ctrl-C does, SIGTERM does too: leave in good order. Only the main thread can ask for that."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def describe(config: HarvestConfig, progress: Progress | None = None) -> HarvestPlan:
    """What ``harvest(config)`` would do, without doing it and without torch.

    The corpus is tokenized, so rows and bytes are exact; memory and time are estimates.

    Raises:
        UserError: whatever ``harvest`` would refuse before loading the model.
    """
    request = Request.of(config)
    plan = request.plan(progress or NoProgress())
    request.refuse_another_store(request.manifest(plan))
    existing = request.existing
    refuse_full_disk(request.place, plan.rows, request.hooks, request.geometry, existing)
    rows_left = plan.rows - (existing.rows if existing else 0)
    seconds, how = estimate_seconds(request, plan, rows_left)
    return HarvestPlan(
        rows=plan.rows,
        rows_asked=config.tokens,
        hooks={hook.name: hook.shape for hook in request.hooks},
        documents=len(plan.document_ids),
        batches=plan.batches,
        excluded=plan.excluded,
        bytes_on_disk=bytes_on_disk(plan.rows, request.hooks, request.geometry),
        bytes_free=bytes_free(request.place),
        peak_memory=estimate_memory(request, plan),
        seconds=seconds,
        seconds_are=how,
        rows_committed=existing.rows if existing else 0,
        complete=bool(existing and existing.complete),
    )
