"""Several processes make the store that one process makes, byte for byte, and compute each batch once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.commit import columns_of
from activation_store.harvest.ranks import batches_that_begin_in, harvest_together
from activation_store.spec import Geometry
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk, assert_same_files
from tests.activation_store.small_store import HOOKS, ROWS, append, document_of_row, open_writer, stored, token_ids
from tests.command_with_threads import no_group_is_left


@dataclass
class Cuts:
    """Batches of known rows: what `harvest_together` asks of a plan."""

    first_rows: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.first_rows[-1])


class Threads:
    """The ranks of a job as threads of this process."""

    def __init__(self, size: int):
        self.given: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def of_rank(self, rank: int):
        threads = self

        class Group:
            def __init__(self):
                self.rank, self.size = rank, len(threads.given)

            def gather(self, value):
                threads.given[rank] = value
                threads.barrier.wait()
                gathered = list(threads.given)
                threads.barrier.wait()
                return gathered

        return Group()


def one_process(path: Path, cuts: Cuts, geometry: Geometry, stop: int | None = None) -> None:
    with open_writer(path, UnsyncedDisk(), geometry=geometry) as writer:
        for first, end in zip(cuts.first_rows[:-1].tolist(), cuts.first_rows[1:].tolist(), strict=True):
            if stop is not None and end > stop:
                return
            if end > writer.next_row:
                append(writer, first, end)
        writer.finish()


def by_ranks(path: Path, cuts: Cuts, geometry: Geometry, size: int) -> list[int]:
    """Make the store or continue it; returns the batches computed, by all ranks."""
    computed: list[int] = []
    problems: list[BaseException] = []
    threads = Threads(size)
    with open_writer(path, UnsyncedDisk(), geometry=geometry) as writer:
        manifest = writer.manifest

        def columns(batch: int):
            computed.append(batch)
            first, end = cuts.first_rows[batch : batch + 2].tolist()
            rows = {hook.name: stored(hook, first, end) for hook in HOOKS}
            about = token_ids(first, end), np.arange(first, end) % 50, document_of_row()[first:end]
            return columns_of(manifest, rows, *about)

        def work(rank: int) -> None:
            try:
                harvest_together(
                    threads.of_rank(rank),  # type: ignore[arg-type]
                    cuts,  # type: ignore[arg-type]
                    writer.place,
                    manifest,
                    writer if rank == 0 else None,
                    columns,
                    lambda rows: None,
                )
            except BaseException as problem:
                problems.append(problem)
                threads.barrier.abort()

        workers = [threading.Thread(target=work, args=[rank]) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not problems, problems
        writer.finish()
    return computed


cuts_of_the_rows = st.lists(st.integers(0, ROWS), max_size=30).map(
    lambda cuts: Cuts(np.array(sorted([0, *cuts, ROWS])))
)


@settings(max_examples=20, deadline=None)
@given(cuts=cuts_of_the_rows, size=st.integers(1, 5), chunks=st.integers(1, 9), stop=st.integers(0, ROWS))
def test_any_number_of_ranks_makes_the_same_store(tmp_path_factory, cuts, size, chunks, stop):
    """Batches of any size, empty ones too and ones that span several shards; also where one process has left off."""
    geometry = Geometry(rows_per_chunk=16, rows_per_shard=16 * chunks)
    folder = tmp_path_factory.mktemp("ranks")
    one_process(folder / "one", cuts, geometry)
    with_rows = np.flatnonzero(np.diff(cuts.first_rows)).tolist()

    assert sorted(by_ranks(folder / "many", cuts, geometry, size)) == with_rows
    assert_same_files(folder / "many", folder / "one")

    one_process(folder / "continued", cuts, geometry, stop)
    committed = open_store(folder / "continued").rows
    missing = [batch for batch in with_rows if cuts.first_rows[batch + 1] > committed]
    assert sorted(by_ranks(folder / "continued", cuts, geometry, size)) == missing
    assert_same_files(folder / "continued", folder / "one")


@given(cuts=cuts_of_the_rows, per_shard=st.integers(1, 200))
def test_every_batch_with_rows_begins_in_one_shard(cuts, per_shard):
    dealt = [batches_that_begin_in(cuts, shard, per_shard) for shard in range(-(-ROWS // per_shard))]  # type: ignore[arg-type]
    assert sorted(batch for batches in dealt for batch in batches) == np.flatnonzero(np.diff(cuts.first_rows)).tolist()


# --- the real command -------------------------------------------------------------------------------------------------

HARVEST = ["--hooks", "blocks.0.hook_resid_post", "--tokens", "6000", "--rows-per-shard", "512", "--context", "64"]
HARVEST += ["--batch-size", "4", "--threads", "1"]


def dictlearn(*arguments: str, cwd: Path, ranks: int = 1, environment: dict[str, str] | None = None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "tests.command_with_threads", *arguments]
    found = {"PYTHONPATH": os.getcwd()} | (environment or {})
    return subprocess.run(command, cwd=cwd, env=os.environ | found, capture_output=True, text=True, timeout=300)


@pytest.mark.heavy
@pytest.mark.needs("distributed")
def test_torchrun_gives_the_store_of_one_process(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(12):
        lines = (f"def function_{i}(x):\n    return x * {number + i}\n" for i in range(60))
        (tmp_path / "text" / f"{number}.py").write_text("\n".join(lines))
    harvest = ["harvest", *HARVEST, "--corpus", "text"]
    alone = dictlearn(*harvest, "--store", "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    together = dictlearn(*harvest, "--store", "two", cwd=tmp_path, ranks=2)
    assert together.returncode == 0, together.stderr
    assert_same_files(tmp_path / "workspace/stores/two.zarr", tmp_path / "workspace/stores/one.zarr")
    said = together.stdout.splitlines()
    assert len([line for line in said if "rows of blocks.0.hook_resid_post" in line]) == 1, "only rank 0 speaks"
    assert no_group_is_left(together.stdout, 2)


DYING = """
import os, signal, sys
from activation_store.harvest import ranks
from dictlearn.cli import main

made = 0

class Dying(ranks.Commit):
    def publish(self):
        global made
        made += 1
        if os.environ["RANK"] == "1" and made == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().publish()

ranks.Commit = Dying
main()
"""


@pytest.mark.heavy
@pytest.mark.needs("distributed")
def test_a_rank_that_dies_stops_the_job_by_name_and_the_same_command_goes_on(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    harvest = ["harvest", *HARVEST]
    assert dictlearn(*harvest, "--store", "one", cwd=tmp_path).returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "dying.py"]
    killed = subprocess.run(
        [*torchrun, *harvest, "--store", "two"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode != 0
    assert "rank      : 1" in killed.stderr and "SIGKILL" in killed.stderr
    store = tmp_path / "workspace/stores/two.zarr"
    assert open_store(store).rows == 2 * 2 * 512  # two rounds of two ranks
    again = dictlearn(*harvest, "--store", "two", cwd=tmp_path, ranks=2)
    assert again.returncode == 0, again.stderr
    assert_same_files(store, tmp_path / "workspace/stores/one.zarr")
