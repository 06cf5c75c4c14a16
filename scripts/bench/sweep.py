"""Many dictionaries in one pass against as many runs of their own, and what one large product for all would save.

    python scripts/bench/sweep.py --members 8 --d-in 512 --d-sae 2048 --k 32 --batch 4096 --steps 12 --rounds 5

Each round trains the members once as a sweep and once one after the other, in random order, over the same store; timed
are the steps, from after initialisation to the last, with the loading. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.training.command import train_group
from dictlearn.training.configs import TrainConfig
from dictlearn.workspace import Workspace

HOOK = "blocks.0.hook_resid_post"


@dataclass
class Stopwatch:
    """A `Progress` that measures from a run's first advance, which comes after initialisation, to its last."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Stopwatch]:
        self._begun: tuple[float, float] | None = None
        yield self
        assert self._begun is not None
        self.wall += self._last[0] - self._begun[0]
        self.cpu += self._last[1] - self._begun[1]

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        pass

    def advance(self, n: float = 1, **shown: object) -> None:
        self._last = time.perf_counter(), time.process_time()
        self._begun = self._begun or self._last


def make_store(path: Path, rows: int, d: int) -> None:
    """Sparse combinations of known directions, and noise."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4 * d, d)).astype(np.float32)
    documents = [
        DocumentRows(f"d{i}", "train", first, min(512, rows - first)) for i, first in enumerate(range(0, rows, 512))
    ]
    plan = StorePlan(rows, documents, {}, {"seed": 0, "context": 512, "bos_token_id": None})
    provenance = {"model": {"name": "planted", "fingerprint": "sha256:planted"}, "corpus": {"name": "none"}}
    with StoreWriter(path, plan, [HookSpec(HOOK, (d,), "float32")], Geometry(256, 65536), provenance) as writer:
        for first in range(0, rows, 8192):
            part = np.arange(first, min(first + 8192, rows))
            codes = (rng.random((len(part), 4 * d)) < 0.01) * rng.exponential(size=(len(part), 4 * d))
            x = codes.astype(np.float32) @ directions + 0.1 * rng.normal(size=(len(part), d)).astype(np.float32)
            writer.append({HOOK: x}, part % 1000, part % 512, part // 512)
        writer.finish()


def configs(arguments: argparse.Namespace, name: str) -> list[TrainConfig[TopKConfig]]:
    first = TrainConfig(
        name=f"{name}-0",
        store="s",
        hook=HOOK,
        dictionary=TopKConfig(d_sae=arguments.d_sae, k=arguments.k),
        batch_size=arguments.batch,
        steps=arguments.steps,
        buffer_rows=32_768,
        order_seed=0,
        log_every=10**6,
        checkpoint_every=10**6,
    )
    return [replace(first, name=f"{name}-{seed}", seed=seed) for seed in range(arguments.members)]


def measure_runs(arguments: argparse.Namespace, workspace: Workspace) -> None:
    """A sweep beside its members alone."""
    found: dict[str, list[Stopwatch]] = {"one pass": [], "runs of their own": []}
    chance = random.Random(0)
    for number in range(arguments.rounds):
        for way in chance.sample(sorted(found), 2):
            name = f"{way.replace(' ', '-')}-{number}"
            group, watch = configs(arguments, name), Stopwatch()
            if way == "one pass":
                train_group(group, workspace, workspace.sweep(name).checkpoints, name, watch)
            else:
                for config in group:
                    train_group([config], workspace, workspace.run(config.name).checkpoints, None, watch)
            found[way].append(watch)
    print(f"| {arguments.members} members | s per step of all | best | CPU-s | ratio (wall) | ratio (CPU) |")
    print("| --- | --- | --- | --- | --- | --- |")
    alone = found["runs of their own"]
    for way in ("runs of their own", "one pass"):
        watches = found[way]
        ratios = [
            statistics.median(w / a for w, a in pairs)
            for pairs in (
                [(w.wall, a.wall) for w, a in zip(watches, alone, strict=True)],
                [(w.cpu, a.cpu) for w, a in zip(watches, alone, strict=True)],
            )
        ]
        walls = [w.wall / arguments.steps for w in watches]
        cpu = statistics.median(w.cpu / arguments.steps for w in watches)
        numbers = f"{statistics.median(walls):.3f} | {min(walls):.3f} | {cpu:.3f}"
        print(f"| {way} | {numbers} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def measure_product(arguments: argparse.Namespace) -> None:
    """The encoders' products: one for all members, or one for each."""
    x = torch.randn(arguments.batch, arguments.d_in)
    W = torch.randn(arguments.members, arguments.d_sae, arguments.d_in)
    one, all_ = torch.empty(arguments.batch, arguments.d_sae), torch.empty(1024, arguments.members * arguments.d_sae)

    def for_each() -> None:
        for weight in W:
            torch.mm(x, weight.T, out=one)

    def together() -> None:
        flat = W.view(-1, arguments.d_in)
        for first in range(0, arguments.batch, 1024):
            torch.mm(x[first : first + 1024], flat.T, out=all_[: len(x[first : first + 1024])])

    ways: dict[str, Callable[[], None]] = {"one for each": for_each, "one for all": together}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter(), time.process_time()
            way()
            took[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    print("\n| product of the encoders | s | CPU-s |")
    print("| --- | --- | --- |")
    for name, times in took.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[1:], strict=True))
        print(f"| {name} | {wall:.3f} | {cpu:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("members", 8), ("d-in", 512), ("d-sae", 2048), ("k", 32), ("batch", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("steps", 12), ("rounds", 5), ("rows", 131_072)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        (workspace.root / "stores").mkdir()
        make_store(workspace.store("s"), arguments.rows, arguments.d_in)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}\n")
        measure_runs(arguments, workspace)
        measure_product(arguments)


if __name__ == "__main__":
    main()
