"""Several processes on one run, started by ``torchrun``: a mesh of data parts and latent parts.

Processes of one latent part hold the same latents and share each batch's rows; processes of one data part see the same
rows and hold a part of the latents each. A dictionary knows nothing of it: `dictlearn.ops` does, and what is here cuts
a finished dictionary down to this process's latents. The batch is the same whatever the number of processes, so a run
may be continued by more or fewer of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: see `activation_store.harvest.ranks`

from activation_store.errors import UserError
from dictlearn import ops
from dictlearn.ops.ranks import ProcessMesh, Ranks

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import Dictionary
    from dictlearn.training.configs import TrainConfig

PATIENCE = timedelta(minutes=30)
"""A process that dies closes its connections, which is seen at once; this is for one that is slow."""


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together; one process is place 0 of 1.

    Attributes:
        data_part, latent_part: (which, of how many).
        device: of this process.
    """

    data_part: tuple[int, int] = (0, 1)
    latent_part: tuple[int, int] = (0, 1)
    device: str = "cpu"
    ranks: Ranks | None = None

    @property
    def leads(self) -> bool:
        """Whether it does what one process does for all: metrics, progress, what is not per part."""
        return self.data_part[0] == self.latent_part[0] == 0

    @property
    def several(self) -> bool:
        return self.data_part[1] * self.latent_part[1] > 1

    def wait(self) -> None:
        """Return when all have come here."""
        if self.several:
            dist.barrier()

    def any(self, mine: bool) -> bool:
        """Whether it is so on any process; all call it together."""
        if not self.several:
            return mine
        found = torch.tensor(int(mine), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def rows_of(self, latents: int) -> tuple[int, int]:
        """(first, past the last) of this process's latents, of so many."""
        part, parts = self.latent_part
        return latents * part // parts, latents * (part + 1) // parts

    def close(self) -> None:
        ops.use_ranks(None)
        if self.several:
            dist.destroy_process_group()


def processes_asked() -> int:
    """As ``torchrun`` says in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_what_cannot_be_shared(config: TrainConfig[Any], splits_latents: bool) -> None:
    """Before anything is loaded.

    Raises:
        UserError: processes that cannot be divided so, or a kind of dictionary whose latents cannot be spread.
    """
    size = processes_asked()
    if config.latent_parts < 1 or size % config.latent_parts:
        raise UserError(
            f"latent_parts is {config.latent_parts}, and there are {size} processes; it must divide their number "
            "(start them with torchrun --nproc-per-node)."
        )
    if config.latent_parts > 1 and not splits_latents:
        raise UserError(
            f"The latents of a dictionary of kind {config.dictionary.kind!r} cannot be spread over processes yet; "
            "leave latent_parts out, and the processes share the rows."
        )
    data_parts = size // config.latent_parts
    if config.batch_size % (data_parts * config.accumulate):
        raise UserError(
            f"batch_size is {config.batch_size}, which {data_parts} processes in {config.accumulate} parts each cannot "
            f"share evenly; make it a multiple of {data_parts * config.accumulate}."
        )
    if config.latent_parts > 1 and config.optimiser.rule == "muon":
        raise UserError(
            "Muon's step of a weight matrix needs all of its rows, which latent_parts spreads over processes; leave "
            "latent_parts out, and the processes share the batch, or set optimiser.rule to adam."
        )
    if size > 1 and getattr(config.dictionary, "resample_every", False):
        raise UserError("resample_every draws from all rows of a batch, which no process has; set it to 0, or use one.")
    if size > 1 and config.follow:
        raise UserError("follow is for one process: several may not see a row of a growing store at the same time.")


def join(config: TrainConfig[Any]) -> Processes:
    """Take this process's place; with ``close`` it is left again. Without torchrun there is one process."""
    size = processes_asked()
    if size == 1:
        return Processes(device=config.device)
    device = config.device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    kind = torch.device(device).type
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    parts = (size // config.latent_parts, config.latent_parts)
    mesh = dist.init_device_mesh(kind, parts, mesh_dim_names=("data", "latents"))
    ranks = ProcessMesh(mesh.get_group("data"), mesh.get_group("latents"))
    ops.use_ranks(ranks)
    return Processes((mesh.get_local_rank("data"), parts[0]), (mesh.get_local_rank("latents"), parts[1]), device, ranks)


@torch.no_grad()
def keep_latents(dictionary: Dictionary, rows: tuple[int, int]) -> None:
    """Cut a dictionary down to some of its latents, in place: [first, past the last)."""
    first, last = rows
    if last - first == dictionary.d_sae:
        return
    for name in dictionary.latent_tensors:
        tensor = getattr(dictionary, name)
        tensor.data = tensor.data[first:last].clone()
    dictionary.d_sae = last - first


@torch.no_grad()
def with_all_latents(part: Dictionary) -> Dictionary:
    """A copy in host memory with room for the latents of all parts, and zeros in it; all else is the part's."""
    whole = part.copy().cpu()
    whole.d_sae = whole.config.d_sae
    for name in whole.latent_tensors:
        tensor = getattr(whole, name)
        tensor.data = tensor.new_zeros(whole.d_sae, *tensor.shape[1:])
    return whole
