"""From text to dictionaries on one GPU: a harvest of a million rows, three trainings, and what loading costs them.

    python scripts/bench/gpu_end_to_end.py --out DIR            # on the GPU where there is one, else on the CPU
    python scripts/bench/gpu_end_to_end.py --out DIR --tokens 6000 --steps 4 --d-sae 256 --batch 512 --device cpu

It runs what `dictlearn harvest` and `dictlearn train` run, on the bundled language model, so dictlearn has to be
installed with its dependencies. Tokens a second are counted from the first batch or step that is done to the last:
without loading the model, initialisation and compilation.

"From memory" are the same steps of the same dictionary on a few batches that stay on the device: where both are as
fast, loading is hidden behind the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from activation_store.harvest import HarvestConfig, harvest
from dictlearn.dictionaries import config_class
from dictlearn.ops.ahead import LAG
from dictlearn.training import parallel
from dictlearn.training.command import check, run_train
from dictlearn.training.configs import TrainConfig
from dictlearn.training.loop import INITIAL_ROWS, Run, build, first_rows
from dictlearn.training.step import take_step
from dictlearn.workspace import Workspace

HOOK = "blocks.2.hook_resid_post"
KINDS = ("topk", "batchtopk", "matryoshka")
BATCHES_IN_MEMORY = 8


class Clock:
    """A `Progress` that knows how fast the last task was between its first advance and its last."""

    def __init__(self) -> None:
        self.per_second = 0.0

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Clock]:
        self._advances: list[tuple[float, float]] = []
        yield self
        moved = [(at, n) for at, n in self._advances if n]  # a training begins by advancing by nothing
        if len(moved) > 1:
            self.per_second = sum(n for _, n in moved[1:]) / (moved[-1][0] - moved[0][0])

    def advance(self, n: float = 1, **shown: object) -> None:
        self._advances.append((time.perf_counter(), n))

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        pass


def training(options: argparse.Namespace, kind: str) -> TrainConfig[Any]:
    return TrainConfig(
        name=kind,
        store="store",
        hook=HOOK,
        dictionary=config_class(kind)(d_sae=options.d_sae, k=options.k),
        batch_size=options.batch,
        steps=options.steps,
        device=options.device,
        log_every=50,
        checkpoint_every=10**6,
    )


def from_memory(config: TrainConfig[Any], workspace: Workspace) -> float:
    """Tokens a second of the steps alone."""
    checked = check([config], workspace)
    processes = parallel.join(config)
    try:
        loader = checked.loader
        loader.device = processes.device
        first = first_rows(loader, min(INITIAL_ROWS, loader.rows))
        run = Run(config, workspace.run(config.name), checked.controls[0])
        member = build(run, first, loader, processes).member
        batches = [rows[HOOK] for rows in islice(loader, BATCHES_IN_MEMORY)]
        assert config.steps is not None
        warm_up = min(2 * LAG, config.steps)
        for step in range(config.steps + warm_up):
            if step == warm_up:
                synchronise(config.device)
                began = time.perf_counter()
            take_step(member, batches[step % len(batches)], None, step, config.steps + warm_up)
        member.unread.settle()
        synchronise(config.device)
        return config.steps * config.batch_size / (time.perf_counter() - began)
    finally:
        processes.close()


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace, workspace: Workspace) -> list[dict[str, Any]]:
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    clock = Clock()
    began = time.perf_counter()
    location = workspace.store_location("store")
    harvest(HarvestConfig(hooks=(HOOK,), store=location, tokens=options.tokens, device=options.device), clock)
    took = time.perf_counter() - began
    found: list[dict[str, Any]] = [
        {"what": f"harvest, {options.tokens:,} rows", "device": device, "tokens/s": clock.per_second, "seconds": took}
    ]
    show(found[-1])
    for kind in KINDS:
        config = training(options, kind)
        began = time.perf_counter()
        run_train(config, workspace, clock)
        took = time.perf_counter() - began
        alone = from_memory(config, workspace)
        found.append(
            {
                "what": f"{kind}, {options.steps:,} steps of {options.batch:,} rows",
                "device": device,
                "tokens/s": clock.per_second,
                "seconds": took,
                "from memory, tokens/s": alone,
                "from the store / from memory": clock.per_second / alone,
            }
        )
        show(found[-1])
    return found


def show(row: Mapping[str, Any]) -> None:
    print(", ".join(f"{name} {cell(value)}" for name, value in row.items()), file=sys.stderr, flush=True)


def cell(value: object) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[-1])
    lines = [columns, ["---"] * len(columns)] + [[cell(row.get(column, "-")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for end_to_end.json and end_to_end.md")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where store and runs are made; a temporary folder if not given")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Workspace(Path(folder)))
    (options.out / "end_to_end.json").write_text(json.dumps(found, indent=1))
    (options.out / "end_to_end.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
