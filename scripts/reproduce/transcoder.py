"""Transcoders (Dunefsky et al. 2024, arXiv 2406.11944), and with a skip connection (Paulo et al. 2025, 2501.18823).

    python scripts/reproduce/transcoder.py                     # the bundled model; minutes of one core
    python scripts/reproduce/transcoder.py --part stories260k  # of $DICTLEARN_SHARED/models, over data/text/novels

Of one MLP in the middle of the model: what the language model loses (nats per token) when the MLP's output is replaced,
at equal L0 and equal numbers of latents, by

- a transcoder, which predicts the output from the MLP's input,
- a sparse autoencoder of the output,
- a skip transcoder, a transcoder with a linear path beside the latents,
- the linear path alone: ridge regression of the output on the input, without a single latent.

All dictionaries of a model see the same rows in the same order, and are evaluated on the same held-out text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from reproduction import (
    Options,
    Record,
    Table,
    differences,
    downstream,
    figure,
    harvested,
    harvested_stories260k,
    held_out,
    reproduce,
    tabulate,
    train,
)
from torch import Tensor

from activation_store.store import Store, open_store
from dictlearn.dictionaries.configs import SkipConfig, TopKConfig
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig

TRANSCODER, AUTOENCODER, SKIP, LINEAR = "transcoder", "SAE of the output", "skip transcoder", "linear path alone"
LAYER = 2
INPUT, OUTPUT = f"blocks.{LAYER}.mlp.hook_in", f"blocks.{LAYER}.hook_mlp_out"
RIDGE = 1e-3
"""Added to every eigenvalue of the inputs' covariance, as a share of their mean."""


@dataclass(frozen=True)
class Task:
    store: str
    d_sae: int
    ks: tuple[int, ...]
    steps: int
    tokens: int
    """Held-out tokens to run the model on."""


def measure_bundled(options: Options) -> list[Record]:
    store = harvested(options, [INPUT, OUTPUT], 300_000)
    if options.quick:
        return measure(Task(store, 64, (4,), steps=10, tokens=256), options)
    return measure(Task(store, 512, (16, 32), steps=500, tokens=2048), options)


def measure_stories260k(options: Options) -> list[Record]:
    store = harvested_stories260k(options, [INPUT, OUTPUT])
    if options.quick:
        return measure(Task(store, 64, (4,), steps=10, tokens=256), options)
    return measure(Task(store, 256, (8, 16), steps=500, tokens=2048), options)


def measure(task: Task, options: Options) -> list[Record]:
    plain: TrainConfig[Any] = TrainConfig(
        name="transcoder",
        store=task.store,
        hook=INPUT,
        target_hook=OUTPUT,
        dictionary=TopKConfig(d_sae=task.d_sae, dead_after_rows=task.steps * 256 // 10),
        optimiser=OptimiserConfig(learning_rate=5e-3),
        batch_size=256,
        steps=task.steps,
        order_seed=0,
        log_every=100,
        checkpoint_every=task.steps,
    )
    skip = SkipConfig(d_sae=task.d_sae, dead_after_rows=plain.dictionary.dead_after_rows)
    kinds = {
        TRANSCODER: plain,
        AUTOENCODER: replace(plain, hook=OUTPUT, target_hook=None),
        SKIP: replace(plain, dictionary=skip),
    }
    store = open_store(options.workspace.store(task.store))
    linear = Linear(store)
    records = [{"kind": LINEAR, "k": 0, "seed": 0} | measured(linear, INPUT, store, task, options)]
    for seed in options.seeds:
        asked = [(kind, k) for k in task.ks for kind in kinds]
        configs = [
            replace(
                kinds[kind],
                name=f"{kind.split()[0]}-{k}-{seed}",
                seed=seed,
                dictionary=replace(kinds[kind].dictionary, k=k),
            )
            for kind, k in asked
        ]
        for (kind, k), dictionary in zip(asked, train(configs, options.workspace, f"seed-{seed}"), strict=True):
            hook = OUTPUT if kind == AUTOENCODER else INPUT
            words: Record = {"kind": kind, "k": k, "seed": seed}
            records.append(words | measured(dictionary, hook, store, task, options))
    return records


def measured(dictionary: Any, hook: str, store: Store, task: Task, options: Options) -> Record:
    spliced = downstream(dictionary, store, task.tokens)
    record: Record = {"nats": spliced.ce_spliced - spliced.ce_clean, "recovered": spliced.loss_recovered}
    batches = held_out(options.workspace, task.store, hook, OUTPUT if hook == INPUT else None, 16_384)
    if isinstance(dictionary, Linear):
        return record | {"l0": 0, "fvu": dictionary.fvu(batches)}
    found = measure_reconstruction(dictionary, batches)
    return record | {"l0": found.l0, "fvu": found.fvu, "dead": 100 * found.dead_share}


class Linear:
    """Ridge regression of the output on the input, from the training rows; takes the place of a dictionary."""

    def __init__(self, store: Store) -> None:
        self.provenance = {"hook_in": INPUT, "hook_out": OUTPUT}
        self.d_out = store.d(OUTPUT)
        xx, xy = (torch.zeros(store.d(INPUT), store.d(hook), dtype=torch.float64) for hook in (INPUT, OUTPUT))
        rows = 0
        means = [torch.tensor(store.statistics(hook).mean).flatten() for hook in (INPUT, OUTPUT)]
        for start, stop in store.split_rows("train"):
            x, y = (
                store.tensor(hook, start, stop).flatten(1).double() - mean
                for hook, mean in zip((INPUT, OUTPUT), means, strict=True)
            )
            xx, xy, rows = xx + x.T @ x, xy + x.T @ y, rows + len(x)
        xx, xy = xx / rows, xy / rows
        self.weight = torch.linalg.solve(xx + RIDGE * xx.diagonal().mean() * torch.eye(len(xx)), xy).float()
        self.bias = (means[1] - means[0] @ self.weight.double()).float()

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias

    def fvu(self, batches: Any) -> float:
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return float((y - self(x)).square().sum() / (y - y.mean(dim=0)).square().sum())


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> dict[str, Table]:
    made = {}
    for part in ("bundled", "stories260k"):
        of = sorted((record for record in records if record["part"] == part), key=lambda record: record["k"])
        if of:
            columns = {"L0": ("l0", 1), "FVU": ("fvu", 3), "nats lost": ("nats", 4), "loss recovered": ("recovered", 3)}
            made[f"transcoder {part}"] = tabulate(of, {"k": "k", "": "kind"}, columns)
            made[f"transcoder {part} differences"] = pairs(of)
    return made


def pairs(records: Sequence[Record]) -> Table:
    rows = []
    for k in sorted({record["k"] for record in records} - {0}):
        for first, second in ((TRANSCODER, AUTOENCODER), (SKIP, TRANSCODER)):
            found = [
                figure(differences(records, key, {"kind": first, "k": k}, {"kind": second, "k": k}), 4)
                for key in ("fvu", "nats")
            ]
            rows.append([str(k), f"{first} minus {second}", *found])
    return Table(["k", "seed by seed", "FVU", "nats lost"], rows)


PARTS = {"bundled": measure_bundled, "stories260k": measure_stories260k}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("transcoder", __doc__, PARTS, tables, argv, if_asked=["stories260k"])


if __name__ == "__main__":
    main()
