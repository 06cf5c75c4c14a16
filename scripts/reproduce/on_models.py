"""Kinds without the usual encoder beside TopK, on language models: ICFL, MP-SAE, vSAE and SNMF.

    python scripts/reproduce/on_models.py                     # the bundled model
    python scripts/reproduce/on_models.py --part stories260k  # of $DICTLEARN_SHARED/models, over data/text/novels

The residual stream after layer 2 for all but SNMF, which is made for what an MLP computes before it is written out;
there TopK stands beside it once more. All dictionaries of a model see the same rows in the same order, at the same
rate, with as many latents active where a kind can be told; the rest is each kind's default.

What a reader sees of them: the patterns of one token, there or up to two tokens before, that explain some latent (the
rule of `dictlearn.feature_index.selectivity`, of latents in up to a quarter of the rows), counted where precision and
recall have a harmonic mean of a half on held-out rows. TopK after a single step is the null.

Every seed has other initial weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from reproduction import (
    Options,
    Record,
    Table,
    downstream,
    harvested,
    harvested_stories260k,
    held_out,
    reproduce,
    tabulate,
    train,
)
from sae_family import RESIDUAL, Config, named, plain_run

from activation_store.store import Store, open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import (
    ICFLConfig,
    MatchingPursuitConfig,
    SemiNMFConfig,
    TopKConfig,
    VariationalConfig,
)
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.index import open_index
from dictlearn.feature_index.selectivity import Selective, recognisable
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.workspace import Workspace

NEURONS = "blocks.2.mlp.hook_post"
TOPK, UNTRAINED = "TopK", "TopK after one step"
PLACES = {0: "on", -1: "after", -2: "two after"}
EXAMPLES = 4


@dataclass(frozen=True)
class Task:
    store: str
    d_sae: int
    rounds: int
    """Of ICFL, four atoms each: latents active are four times as many."""
    features: int
    """Of the neurons."""
    steps: int
    tokens: int
    """Held-out tokens to run the model on."""


def measure_bundled(options: Options) -> list[Record]:
    store = harvested(options, [RESIDUAL, NEURONS], 120_000)
    if options.quick:
        return measure(Task(store, 64, rounds=2, features=12, steps=10, tokens=256), options)
    return measure(Task(store, 512, rounds=8, features=100, steps=200, tokens=1024), options)


def measure_stories260k(options: Options) -> list[Record]:
    store = harvested_stories260k(options, [RESIDUAL, NEURONS])
    if options.quick:
        return measure(Task(store, 64, rounds=2, features=12, steps=10, tokens=256), options)
    return measure(Task(store, 256, rounds=4, features=64, steps=200, tokens=2048), options)


def measure(task: Task, options: Options) -> list[Record]:
    workspace = options.workspace
    store = open_store(workspace.store(task.store))
    records = []
    for seed in options.seeds:
        runs = kinds(task, seed)
        dictionaries = train(list(runs.values()), workspace, f"seed-{seed}")
        first = replace(runs[RESIDUAL, TOPK], name=f"untrained-{seed}", steps=1)
        runs[RESIDUAL, UNTRAINED] = first
        dictionaries += train([first], workspace, first.name)
        for ((hook, kind), config), dictionary in zip(runs.items(), dictionaries, strict=True):
            words = {"hook": hook, "dictionary": kind, "seed": seed}
            seen = of_a_reader(config.name, workspace)
            records.append(words | measured(dictionary, hook, store, task, workspace) | seen)
    return records


def kinds(task: Task, seed: int) -> dict[tuple[str, str], Config]:
    """``(hook, kind)`` -> its run."""
    plain = plain_run(f"run-{seed}", task.store, RESIDUAL, seed, task.d_sae, task.steps, 5e-3, 256)
    plain = replace(plain, order_seed=0)
    common: dict[str, Any] = {"d_sae": task.d_sae, "dead_after_rows": plain.dictionary.dead_after_rows}
    active = 4 * task.rounds
    of_neurons = common | {"d_sae": task.features}
    at_neurons = replace(plain, hook=NEURONS)
    return {
        (RESIDUAL, TOPK): named(plain, "topk", TopKConfig(k=active, **common)),
        (RESIDUAL, "ICFL"): named(plain, "icfl", ICFLConfig(rounds=task.rounds, width=4, **common)),
        (RESIDUAL, "MP-SAE"): named(plain, "mp", MatchingPursuitConfig(k=active, **common)),
        (RESIDUAL, "vSAE"): named(plain, "vsae", VariationalConfig(k=active, **common)),
        (NEURONS, TOPK): named(at_neurons, "topk-neurons", TopKConfig(k=min(12, active), **of_neurons)),
        (NEURONS, "SNMF"): named(at_neurons, "snmf", SemiNMFConfig(**of_neurons)),
    }


def measured(dictionary: Dictionary, hook: str, store: Store, task: Task, workspace: Workspace) -> Record:
    found = measure_reconstruction(dictionary, held_out(workspace, task.store, hook, None, 8192))
    spliced = downstream(dictionary, store, task.tokens)
    return {
        "fvu": found.fvu,
        "l0": found.l0,
        "alive": 100 * (1 - found.dead_share),
        "recovered": spliced.loss_recovered,
    }


def of_a_reader(run: str, workspace: Workspace) -> Record:
    """How many different patterns of one token explain some latent, where they stand, and the best of them."""
    asked = IndexConfig(run, logits=False, coactive=False)
    index = open_index(run_index(asked, workspace))
    explained = [one for one in recognisable(index, index.d_sae, most_density=0.25) if harmonic_mean(one) >= 0.5]
    places = {f"at {offset}": sum(one.offset == offset for one in explained) for offset in PLACES}
    return {
        "patterns": len(explained),
        "precision": 100 * float(np.mean([one.precision for one in explained])) if explained else float("nan"),
        "examples": [f"{PLACES[one.offset]} {code(one.token)}" for one in explained[:EXAMPLES]],
        **places,
    }


def code(token: str) -> str:
    """As a cell of a table can show it."""
    return "`" + repr(token).replace("`", "'").replace("|", "\\|") + "`"


def harmonic_mean(one: Selective) -> float:
    return 2 * one.precision * one.recall / max(one.precision + one.recall, 1e-12)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(records: list[Record]) -> dict[str, Table]:
    made = {}
    for part in PARTS:
        of = sorted((r for r in records if r["part"] == part), key=lambda record: record["hook"] == NEURONS)
        if not of:
            continue
        words = {"hook": "hook", "": "dictionary"}
        made[f"models {part}"] = tabulate(
            [record for record in of if record["dictionary"] != UNTRAINED],
            words,
            {"L0": ("l0", 1), "FVU": ("fvu", 3), "loss recovered": ("recovered", 3), "alive, %": ("alive", 1)},
        )
        seen = tabulate(
            of,
            words,
            {"patterns": ("patterns", 1)}
            | {f"{place} a token": (f"at {offset}", 1) for offset, place in PLACES.items()}
            | {"precision, %": ("precision", 0)},
        )
        examples = {(r["hook"], r["dictionary"]): r["examples"] for r in of if r["seed"] == 0}
        made[f"models {part} reader"] = Table(
            [*seen.header, "the best of one seed"],
            [[*row, "; ".join(examples[row[0], row[1]])] for row in seen.rows],
        )
    return made


PARTS = {"bundled": measure_bundled, "stories260k": measure_stories260k}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("on_models", __doc__, PARTS, tables, argv, if_asked=["stories260k"])


if __name__ == "__main__":
    main()
