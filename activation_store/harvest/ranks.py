"""One harvest by several processes, started by ``torchrun``: the store is, byte for byte, that of a single process.

The plan of batches is the same in every process. The shards are dealt out in rounds: of a round's shards, rank r makes
the r-th, from the batches that begin in it, and rank 0 then counts all of them in one commit. A batch that goes on into
a later shard is computed once, by the rank in whose shard it begins, and before that rank's other batches, so that the
rows the others need are there when they start. Killed, the job has lost one round at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.commit import Commit
from activation_store.errors import UserError

if TYPE_CHECKING:
    from activation_store.harvest.batches import BatchPlan
    from activation_store.place import Place
    from activation_store.spec import Manifest
    from activation_store.writer import StoreWriter

PATIENCE = timedelta(days=1)
"""A rank that dies closes its connections, which is seen at once; this is for one that is slow."""

Columns = Mapping[str, np.ndarray]


class Group:
    """The processes of a job, and what they tell each other. ``size`` 1 needs no other process, and no torch."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size
        if size > 1:
            import torch.distributed as dist

            # Its functions keep, as a default, the group that there is when it is imported. Imported later, by the
            # model's libraries, it kept gloo's threads past `close`, and one of them that let go of its last tensor
            # while the interpreter ended aborted the process (github.com/pytorch/pytorch/issues/190489).
            import torch.distributed.nn.functional  # noqa: F401

            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=PATIENCE)

    @classmethod
    def of_environment(cls) -> Group:
        """As ``torchrun`` says in RANK and WORLD_SIZE."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def gather(self, value: Any) -> list[Any]:
        """What every rank has given, in the order of ranks, on every rank.

        Raises:
            UserError: a rank is gone.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(gathered, value)
        except RuntimeError as problem:  # gloo's word for a connection that was closed
            raise UserError(
                f"Rank {self.rank} stops, because another rank of this harvest has gone; torchrun names it below. What "
                "has been committed is safe, and the same command continues from there."
            ) from problem
        return gathered

    def close(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


@dataclass(frozen=True)
class Piece:
    """Consecutive rows from ``first_row`` on, which all lie in ``shard``."""

    shard: int
    first_row: int
    columns: Columns


def harvest_together(
    group: Group,
    plan: BatchPlan,
    place: Place,
    manifest: Manifest,
    writer: StoreWriter | None,
    compute: Callable[[int], Columns],
    committed: Callable[[int], None],
) -> None:
    """Make all shards that are not there yet.

    Args:
        manifest: as rank 0 has opened it.
        writer: of rank 0; None on the others.
        compute: number of a batch -> its rows, by the path of each array.
        committed: told, on rank 0, how many rows each commit has added.
    """
    shards = manifest.geometry.shards(plan.rows)
    base = manifest.committed_shards
    pieces = _cut_batch(plan, manifest, compute) if group.rank == 0 else []
    while base < shards:
        shard = base + group.rank
        begun = batches_that_begin_in(plan, shard, manifest.geometry.rows_per_shard) if shard < shards else []
        tail: list[Piece] = []
        if begun:
            last = _pieces(plan, begun[-1], compute(begun[-1]), manifest.geometry.rows_per_shard)
            tail = [piece for piece in last if piece.shard == shard]
            pieces += [piece for piece in last if piece.shard > shard]
        pieces = [piece for given in group.gather(pieces) for piece in given]
        published = None
        if shard < shards:
            commit = Commit(place, manifest, shard)
            heads = sorted((piece for piece in pieces if piece.shard == shard), key=lambda piece: piece.first_row)
            for piece in heads:
                commit.append(piece.columns)
            for batch in begun[:-1]:
                commit.append(compute(batch))
            for piece in tail:
                commit.append(piece.columns)
            assert not commit.room, "the pieces of a shard do not fill it"
            published = commit.publish()
        parts = [part for part in group.gather(published) if part is not None]
        base += len(parts)
        # What is left is for later rounds. One rank keeps it, so that it is not given to all again by all.
        pieces = [piece for piece in pieces if piece.shard >= base] if group.rank == 0 else []
        if writer is not None:
            before = writer.committed_rows
            writer.add(parts)
            committed(writer.committed_rows - before)


def batches_that_begin_in(plan: BatchPlan, shard: int, rows_per_shard: int) -> list[int]:
    """Numbers of the batches whose first row lies in a shard, ascending; those without rows are left out."""
    bounds = np.searchsorted(plan.first_rows[:-1], [shard * rows_per_shard, (shard + 1) * rows_per_shard])
    numbers = np.arange(*bounds)
    return numbers[plan.first_rows[numbers + 1] > plan.first_rows[numbers]].tolist()


def _cut_batch(plan: BatchPlan, manifest: Manifest, compute: Callable[[int], Columns]) -> list[Piece]:
    """The rows, not committed yet, of the batch that the last commit has cut, if it has cut one."""
    rows, per_shard = manifest.rows, manifest.geometry.rows_per_shard
    if not 0 < rows < plan.rows:
        return []
    batch = int(np.searchsorted(plan.first_rows, rows, side="right")) - 1
    if plan.first_rows[batch] == rows:
        return []
    pieces = _pieces(plan, batch, compute(batch), per_shard)
    return [piece for piece in pieces if piece.shard >= manifest.committed_shards]


def _pieces(plan: BatchPlan, batch: int, columns: Columns, rows_per_shard: int) -> list[Piece]:
    """The rows of a batch, cut at the ends of shards."""
    first, stop = int(plan.first_rows[batch]), int(plan.first_rows[batch + 1])
    pieces = []
    for shard in range(first // rows_per_shard, -(-stop // rows_per_shard)):
        start, end = max(first, shard * rows_per_shard), min(stop, (shard + 1) * rows_per_shard)
        part = slice(start - first, end - first)
        pieces.append(Piece(shard, start, {path: column[part] for path, column in columns.items()}))
    return pieces
