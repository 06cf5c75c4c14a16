"""MP-SAE: matching pursuit through the decoder's atoms (Costa et al. 2025, arXiv 2506.03093).

    python scripts/reproduce/mp_sae.py
    python scripts/reproduce/mp_sae.py --part tree

tree       Their benchmark, with their number of steps, rate and stop: one tree of 20 features, a child on only where
           its parent is, 1.36 on in a row, 20 atoms without a bias; a row stops when its residual is below 0.05, or
           after 5 steps of the pursuit. And the three trees side by side of sae_family.py, 60 atoms, at most 9 steps,
           beside BatchTopK with 4 active.
bundled    The residual stream after layer 2 of the bundled language model, 512 atoms or latents, trained with k = 32
           and then rebuilt with another k; in how many directions the codes spread (effective rank), and how far atoms
           overlap (the Babel function): all of them, those active together, and as many drawn as often as they fire.
revive     The same rows with 1,024 atoms and k = 8, where each is chosen seldom, over the weight of the revive term.

In the first every seed has other features, rows and initial weights; in the others other initial weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    held_out,
    reproduce,
    tabulate,
    train,
)
from sae_family import RESIDUAL, Trees, named, plain_run, recovered

from activation_store.store import open_store
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import BatchTopKConfig, MatchingPursuitConfig, TopKConfig
from dictlearn.metrics.coherence import babel, babel_of_active, effective_rank
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.synthetic import FeatureTree, write_store
from dictlearn.training.configs import TrainConfig

SHORT = 0.05
"""Length of a residual at which a row stops, in the units of the tree, where a feature's magnitude is about 1.5."""
KS = (4, 8, 16, 32, 64, 128)
SIZES = (1, 4, 16)
"""Of the sets that an atom is compared with."""
SETS = {"all": "all atoms", "active": "active together", "random": "as many at random"}
REVIVE = (0.0, 0.03, 0.3)


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
    steps, d_sae, tokens = (10, 64, 256) if options.quick else (200, 512, 1024)
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
        x = torch.cat([rows for rows, _ in held_out(workspace, store, RESIDUAL, None, 8192)])
        for name, dictionary in zip(("MP-SAE", "TopK"), train(configs, workspace, plain.name), strict=True):
            before = torch.full((len(x),), torch.inf)
            for other in ks:
                dictionary.k = other  # type: ignore[assignment]
                codes = dictionary.encode(x)
                found = measure_reconstruction(dictionary, [(x, None)])
                error = (dictionary.decode(codes) - x).square().sum(dim=1)
                record = {"dictionary": name, "k": other, "seed": seed, "fvu": found.fvu, "l0": found.l0}
                record |= {"alive": 100 * (1 - found.dead_share), "rank": effective_rank([codes])}
                record["worse"] = 100 * float((error > before * (1 + 1e-5)).double().mean())
                before = error
                if other == k:
                    record["recovered"] = downstream(
                        dictionary, open_store(workspace.store(store)), tokens
                    ).loss_recovered
                    record |= overlaps(dictionary, codes, seed)
                records.append(record)
    return records


def overlaps(dictionary: Dictionary, codes: Codes, seed: int) -> Record:
    """The Babel function for each of `SIZES`, of each of `SETS`."""
    indices, active = codes.indices.clone(), codes.active()
    fired = indices[active]
    indices[active] = fired[torch.randperm(len(fired), generator=torch.Generator().manual_seed(seed))]
    sizes = [size for size in SIZES if size < codes.indices.shape[1]]
    found = {
        "all": babel(dictionary.W_dec, sizes),
        "active": babel_of_active(dictionary.W_dec, codes, sizes),
        "random": babel_of_active(dictionary.W_dec, replace(codes, indices=indices), sizes),
    }
    return {f"babel {name} {size}": value for name, of in found.items() for size, value in zip(sizes, of, strict=True)}


def measure_revive(options: Options) -> list[Record]:
    steps, d_sae = (10, 64) if options.quick else (150, 1024)
    workspace = options.workspace
    store = harvested(options, [RESIDUAL], 300_000)
    records = []
    for seed in options.seeds:
        plain: TrainConfig[Any] = plain_run(f"revive-{seed}", store, RESIDUAL, seed, d_sae, steps, 5e-3, 256)
        plain = replace(plain, order_seed=0)
        dead = plain.dictionary.dead_after_rows
        configs = [
            named(plain, str(w), MatchingPursuitConfig(d_sae=d_sae, k=8, dead_after_rows=dead, revive_weight=w))
            for w in REVIVE
        ]
        of_this: list[Record] = []
        for weight, dictionary in zip(REVIVE, train(configs, workspace, plain.name), strict=True):
            found = measure_reconstruction(dictionary, held_out(workspace, store, RESIDUAL, None, 8192))
            record = {"weight": weight, "seed": seed, "fvu": found.fvu, "alive": 100 * (1 - found.dead_share)}
            of_this.append(record)
            record |= {f"{key} more": record[key] - of_this[0][key] for key in ("fvu", "alive")}
        records += of_this
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
                "rows worse than with the k before, %": ("worse", 2),
                "effective rank": ("rank", 1),
                "alive, %": ("alive", 1),
                "loss recovered": ("recovered", 3),
            },
        )
        ks = list(dict.fromkeys(r["k"] for r in of["bundled"]))
        mp, topk = ({"dictionary": name} for name in ("MP-SAE", "TopK"))
        made["mp bundled over TopK"] = Table(
            ["MP-SAE minus TopK", *(f"k = {k}" for k in ks)],
            [
                [name, *(figure(differences(of["bundled"], key, mp | {"k": k}, topk | {"k": k}), digits) for k in ks)]
                for name, key, digits in (("FVU", "fvu", 3), ("effective rank", "rank", 1))
            ],
        )
        made["mp coherence"] = coherence(of["bundled"])
    if of["revive"]:
        made["mp revive"] = tabulate(
            of["revive"],
            {"weight": "weight"},
            {
                "FVU": ("fvu", 4),
                "minus that of weight 0": ("fvu more", 4),
                "alive, %": ("alive", 1),
                "minus that of weight 0 ": ("alive more", 1),
            },
        )
    return made


def coherence(records: list[Record]) -> Table:
    """The Babel function at the k of training."""
    rows = []
    for size in SIZES:
        for name, words in SETS.items():
            key = f"babel {name} {size}"
            measured = [record for record in records if key in record]
            if measured:
                of = [figure([r[key] for r in measured if r["dictionary"] == d]) for d in ("MP-SAE", "TopK")]
                pair = differences(measured, key, {"dictionary": "MP-SAE"}, {"dictionary": "TopK"})
                rows.append([str(size), words, *of, figure(pair)])
    return Table(["r", "μ₁(r) of", "MP-SAE", "TopK", "MP-SAE minus TopK"], rows)


PARTS = {"tree": measure_tree, "bundled": measure_bundled, "revive": measure_revive}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("mp_sae", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
