"""Forward passes into a store, in one process or in several.

The store is written by a thread of its own, one batch behind the model, so that neither waits for the other. Batches
are handed over in order and one at a time, so nothing about the store depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.commit import columns_of
from activation_store.errors import UserError
from activation_store.freed_memory import freed_memory_kept
from activation_store.harvest.batches import Batch, BatchPlan
from activation_store.harvest.ranks import Group, harvest_together
from activation_store.harvest.request import Request
from activation_store.progress import Progress, Task
from activation_store.writer import StoreWriter

if TYPE_CHECKING:
    import torch

    from activation_store.harvest.capture import Capture


def compute(request: Request, plan: BatchPlan, group: Group, progress: Progress, stop_after: int | None = None) -> None:
    """Run the forward passes that are left and write their rows."""
    config = request.config
    rows_committed = request.existing.rows if request.existing else 0
    if rows_committed == plan.rows and group.size == 1:  # killed between the last commit and the statistics
        with _one_blas_thread():
            _open_writer(request, plan).finish()
        return

    import torch

    threads_before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with progress.task("Loading the model", total=1, unit="model") as task:
            capture, way, words = capture_of(request, plan)
            task.advance(1, through=words)
        request = replace(request, capture=way)
        kept = freed_memory_kept() if way == "modules" and request.device == "cpu" else nullcontext()
        with _one_blas_thread(), kept, capture:
            if group.size > 1:
                _write_together(request, plan, capture, group, progress)
                return
            computed = computed_batches(capture, plan, rows_committed, request.device)
            title = f"Harvesting from row {rows_committed:,}" if rows_committed else "Harvesting"
            with progress.task(title, total=plan.rows - rows_committed, unit="rows") as task:
                _write(request, plan, computed, task, stop_after)
    finally:
        torch.set_num_threads(threads_before)


def _one_blas_thread() -> Any:
    """For the writer's sums, which are small matrix products in numpy.

    Its BLAS has threads of its own beside torch's: they wait for each other by spinning, and one product then takes ten
    times as long as on a single thread. And the last bits of a sum depend on how many threads have shared it.
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas").limit(limits=1)


def capture_of(request: Request, plan: BatchPlan) -> tuple[Capture, str, str]:
    """The capture, "bridge" or "modules", and the same in words; compared on the first batch if the store is new."""
    import torch

    from activation_store.harvest.modules import open_capture

    config = request.config
    first, _ = next(plan.batches_from(0))

    def first_batch(capture: Capture) -> dict[str, torch.Tensor]:
        with capture:
            return _run(capture.peek, first, plan, request.device)

    return open_capture(
        request.spec,
        {hook.name: hook.shape for hook in request.hooks},
        getattr(torch, config.dtype),
        way=request.capture,
        device=request.device,
        model_dtype=config.model_dtype,
        first_batch=first_batch if request.existing is None else None,
    )


def computed_batches(
    capture: Capture, plan: BatchPlan, first_row: int, device: str
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Batches with the activations of their kept rows, from the batch that holds ``first_row``."""
    for batch, _ in plan.batches_from(first_row):
        rows = _run(capture.run, batch, plan, device)
        yield batch, {hook: _as_stored(values) for hook, values in rows.items()}


def _run(
    forward: Callable[[torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]],
    batch: Batch,
    plan: BatchPlan,
    device: str,
) -> dict[str, torch.Tensor]:
    """The kept rows of a batch at every hook."""
    import torch

    tokens = torch.from_numpy(batch.tokens_BC).to(device)
    all_kept = batch.rows == batch.tokens_BC.size
    kept = None if all_kept else torch.from_numpy(batch.kept_N).to(device)
    try:
        return forward(tokens, kept)
    except UserError as error:
        raise UserError(f"Batch {batch.index} of {plan.batches}: {error}") from error


def _as_stored(rows: Any) -> np.ndarray:
    """A tensor as numpy carries it to disk: bfloat16 as its uint16 bits."""
    import torch

    rows = rows.cpu()
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _write(
    request: Request,
    plan: BatchPlan,
    computed: Iterator[tuple[Batch, dict[str, np.ndarray]]],
    task: Task,
    stop_after: int | None,
) -> None:
    """Append batch after batch, and finish the store when the last row is in.

    The first batch is computed before the store is made: a hook that does not fire must not leave an empty one behind.
    """
    started = time.perf_counter()
    first = next(computed)
    with _open_writer(request, plan) as writer, _Behind() as behind:
        before = rows_before = writer.next_row
        for count, (batch, rows) in enumerate(chain([first], computed), start=1):
            behind.call(_append, writer, batch, rows)
            after = batch.first_row + batch.rows
            rate = (after - rows_before) / (time.perf_counter() - started)
            task.advance(after - before, tokens_per_s=f"{rate:,.0f}")
            before = after
            if count == stop_after and after < plan.rows:
                break
        else:
            behind.wait()
            writer.finish()


def _append(writer: StoreWriter, batch: Batch, rows: dict[str, np.ndarray]) -> None:
    writer.append(rows, batch.token_ids_N, batch.positions_N, batch.documents_N, first_row=batch.first_row)


class _Behind:
    """Does one thing at a time in a thread of its own. What goes wrong there is raised at the next call or the end."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="activation store writer")
        self._under_way: Future[None] | None = None

    def call(self, do: Callable[..., None], *arguments: Any) -> None:
        """Begin once the last call has ended."""
        self.wait()
        self._under_way = self._thread.submit(do, *arguments)

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()  # lets the last call come to its end: a commit is not torn
        if kind is None:
            self.wait()


def _write_together(request: Request, plan: BatchPlan, capture: Capture, group: Group, progress: Progress) -> None:
    """This process's part of a harvest by several."""
    fingerprints = group.gather(request.manifest(plan).fingerprint)
    if len({*fingerprints}) > 1:
        other = next(rank for rank, found in enumerate(fingerprints) if found != fingerprints[0])
        raise UserError(
            f"Rank {other} would make another store than rank 0: give all ranks the same command, model, corpus and "
            "versions of the libraries."
        )
    # Rank 0 sweeps the staging folder when it opens the store; only then may the others write there.
    writer = _open_writer(request, plan) if group.rank == 0 else None
    manifest = group.gather(writer.manifest if writer else None)[0]

    def columns(index: int) -> dict[str, np.ndarray]:
        batch = plan.batch(index)
        rows = {hook: _as_stored(values) for hook, values in _run(capture.run, batch, plan, request.device).items()}
        return columns_of(manifest, rows, batch.token_ids_N, batch.positions_N, batch.documents_N)

    try:
        started = time.perf_counter()
        with progress.task("Harvesting", total=plan.rows - manifest.rows, unit="rows") as task:

            def committed(rows: int) -> None:
                assert writer is not None
                rate = (writer.committed_rows - manifest.rows) / (time.perf_counter() - started)
                task.advance(rows, tokens_per_s=f"{rate:,.0f}", ranks=group.size)

            harvest_together(group, plan, request.place, manifest, writer, columns, committed)
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.close()


def _open_writer(request: Request, plan: BatchPlan) -> StoreWriter:
    return StoreWriter(
        request.place,
        request.store_plan(plan),
        request.hooks,
        request.geometry,
        request.provenance,
        compression=request.config.compression,
    )
