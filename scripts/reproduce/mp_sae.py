"""MP-SAE: matching pursuit through the decoder's atoms (Costa et al. 2025, arXiv 2506.03093).

    python scripts/reproduce/mp_sae.py
    python scripts/reproduce/mp_sae.py --part tree

tree       Their benchmark, with their number of steps, rate and stop: one tree of 20 features, a child on only where
           its parent is, 1.36 on in a row, 20 atoms without a bias; a row stops when its residual is below 0.05, or
           after 5 steps of the pursuit. And the three trees side by side of sae_family.py, 60 atoms, at most 9 steps,
           beside BatchTopK with 4 active.
bundled    The residual stream after layer 2 of the bundled language model, 512 atoms or latents, trained with k = 32
           and then rebuilt with another k.

In the first every seed has other features, rows and initial weights; in the second other initial weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reproduction import (
    Options,
    Record,
    Table,
    differences,
    downstream,
    figure,
    harvested,
    held_out,
    reproduce,
    tabulate,
    train,
)
from sae_family import RESIDUAL, Trees, named, plain_run, recovered

from activation_store.store import open_store
from dictlearn.dictionaries.configs import BatchTopKConfig, MatchingPursuitConfig, TopKConfig
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.synthetic import FeatureTree, write_store
from dictlearn.training.configs import TrainConfig

SHORT = 0.05
"""Length of a residual at which a row stops, in the units of the tree, where a feature's magnitude is about 1.5."""
KS = (4, 8, 16, 32, 64, 128)


def measure_tree(options: Options) -> list[Record]:
    steps, rows = (30, 4096) if options.quick else (15_000, 200_000)
    records = []
    for seed in options.seeds:
        for planted, atoms, most in ((FeatureTree(seed=seed), 20, 5), (Trees(seed), 60, 9)):
            hook, width = next(iter(planted.widths.items()))
            name = f"{'three' if atoms > 20 else 'one'}-{seed}"
            plain = plain_run(name, name, hook, seed, atoms, steps, 3e-2)
            write_store(options.workspace.store(name), planted, rows)
            common: dict[str, Any] = {"d_sae": atoms, "dead_after_rows": plain.dictionary.dead_after_rows}
            pursuit = MatchingPursuitConfig(k=most, tolerance=SHORT / width**0.5, scaling="none", bias="none", **common)
            configs = [named(plain, "mp", pursuit)]
            if atoms > 20:
                configs.append(named(plain, "batchtopk", BatchTopKConfig(k=4, **common)))
            for config, dictionary in zip(configs, train(configs, options.workspace, name), strict=True):
                words = {
                    "trees": 1 if atoms == 20 else 3,
                    "dictionary": "MP-SAE" if config.dictionary is pursuit else "BatchTopK",
                    "seed": seed,
                }
                records.append(words | recovered(dictionary, planted))
    return records


def measure_bundled(options: Options) -> list[Record]:
    steps, d_sae, tokens = (10, 64, 256) if options.quick else (400, 512, 1024)
    k, ks = (8, KS[:3]) if options.quick else (32, KS)
    workspace = options.workspace
    store = harvested(options, [RESIDUAL], 300_000)
    records = []
    for seed in options.seeds:
        plain: TrainConfig[Any] = plain_run(f"bundled-{seed}", store, RESIDUAL, seed, d_sae, steps, 5e-3, 256)
        plain = replace(plain, order_seed=0)
        dead = plain.dictionary.dead_after_rows
        configs = [
            named(plain, "mp", MatchingPursuitConfig(d_sae=d_sae, k=k, dead_after_rows=dead)),
            named(plain, "topk", TopKConfig(d_sae=d_sae, k=k, dead_after_rows=dead)),
        ]
        names = ("MP-SAE", "TopK")
        for name, dictionary in zip(names, train(configs, workspace, f"bundled-{seed}"), strict=True):
            for other in ks:
                dictionary.k = other  # type: ignore[assignment]
                found = measure_reconstruction(dictionary, held_out(workspace, store, RESIDUAL, None, 8192))
                spliced = downstream(dictionary, open_store(workspace.store(store)), tokens) if other == k else None
                records.append(
                    {"dictionary": name, "k": other, "seed": seed, "fvu": found.fvu, "l0": found.l0}
                    | {"alive": 100 * (1 - found.dead_share)}
                    | ({"recovered": spliced.loss_recovered} if spliced else {})
                )
    return records


def tables(records: list[Record]) -> dict[str, Table]:
    made = {}
    of = {part: [r for r in records if r["part"] == part] for part in PARTS}
    if of["tree"]:
        made["mp tree"] = tabulate(
            of["tree"],
            {"trees": "trees", "": "dictionary"},
            {
                "L0": ("l0", 2),
                "absorption": ("absorption", 4),
                "(chance)": ("absorption_floor", 3),
                "MCC": ("matched_cosine", 4),
                "(chance) ": ("matched_cosine_floor", 3),
                "FVU": ("fvu", 4),
            },
        )
    if of["bundled"]:
        made["mp bundled"] = tabulate(
            of["bundled"],
            {"k afterwards": "k", "": "dictionary"},
            {
                "L0": ("l0", 1),
                "FVU": ("fvu", 3),
                "alive, %": ("alive", 1),
                "loss recovered": ("recovered", 3),
            },
        )
        ks = list(dict.fromkeys(r["k"] for r in of["bundled"]))
        mp, topk = ({"dictionary": name} for name in ("MP-SAE", "TopK"))
        made["mp bundled over TopK"] = Table(
            ["FVU of MP-SAE minus TopK's", *(f"k = {k}" for k in ks)],
            [["", *(figure(differences(of["bundled"], "fvu", mp | {"k": k}, topk | {"k": k})) for k in ks)]],
        )
    return made


PARTS = {"tree": measure_tree, "bundled": measure_bundled}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("mp_sae", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
