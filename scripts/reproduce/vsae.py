"""Variational sparse autoencoders (Baker and Li 2025, arXiv 2509.22994): what a KL term does to TopK.

    python scripts/reproduce/vsae.py
    python scripts/reproduce/vsae.py --part bundled

At the same k, rows and initial weights as TopK: a posterior without variance (the KL is then a penalty on squared
means), with a fixed one (standard deviation 1, the prior's, and 0.3), and with a learned one, over a grid of beta.

planted    256 features on random directions of 64 coordinates, 5 on in a row; 256 latents, 5 active.
bundled    the residual stream after layer 2 of the bundled language model; 512 latents, 32 active.

In the first every seed has other features, rows and initial weights; in the second other initial weights. All is
measured on held-out rows; "with noise" is what comes of leaving the sampling of training on there.
"""

from __future__ import annotations

import itertools
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
from sae_family import RESIDUAL, Config, named, plain_run, recovered
from torch import Tensor

from activation_store.store import open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import TopKConfig, VariationalConfig
from dictlearn.dictionaries.variational import COLLAPSED, Variational
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.synthetic import SparseFeatures, write_store

BETAS = (0.0, 0.01, 0.1, 0.5)
POSTERIORS: dict[str, dict[str, Any]] = {
    "no noise": {"variance": "none"},
    "σ = 0.3": {"sigma": 0.3},
    "σ = 1": {"sigma": 1.0},
    "σ learned": {"variance": "learned"},
}
TOPK = "TopK"


def grid(plain: Config, k: int, posteriors: Sequence[str], betas: Sequence[float]) -> dict[tuple[str, Any], Config]:
    """``(posterior, beta)`` -> a run on the rows of ``plain``; TopK, which has no beta, is the first."""
    common = {"d_sae": plain.dictionary.d_sae, "dead_after_rows": plain.dictionary.dead_after_rows, "k": k}
    runs: dict[tuple[str, Any], Config] = {(TOPK, "-"): named(plain, "topk", TopKConfig(**common))}
    for number, posterior in enumerate(posteriors):
        for beta in betas:
            dictionary = VariationalConfig(beta=beta, **POSTERIORS[posterior], **common)
            runs[posterior, beta] = named(plain, f"{number}-{beta}", dictionary)
    return runs


def measured(dictionary: Dictionary, rows: Tensor) -> Record:
    """FVU, L0 and the share alive; of a vSAE also its posterior, and the FVU with noise."""
    found = measure_reconstruction(dictionary, [(rows, None)])
    record: Record = {"fvu": found.fvu, "l0": found.l0, "alive": 100 * (1 - found.dead_share)}
    if isinstance(dictionary, Variational):
        with torch.no_grad():
            divergence_S = dictionary.posterior(rows).divergence().mean(dim=0)
        record |= {
            "kl": float(divergence_S.sum()),
            "collapsed": 100 * float((divergence_S < COLLAPSED).double().mean()),
        }
        record["noisy_fvu"] = measure_reconstruction(with_noise(dictionary), [(rows, None)]).fvu
    return record


def with_noise(dictionary: Variational) -> Variational:
    noisy = dictionary.copy()
    noisy.encode = noisy.sample  # type: ignore[method-assign]
    return noisy


def beside_topk(record: Record, dictionary: Dictionary, topk: Dictionary, of_topk: Record) -> Record:
    """What there is more of than in TopK, and how far the furthest weight is from TopK's."""
    weights = zip(topk.parameters(), dictionary.parameters(), strict=False)
    return {
        "fvu_more": record["fvu"] - of_topk["fvu"],
        "furthest": max(float((a - b).abs().max()) for a, b in weights),
    }


def measure_planted(options: Options) -> list[Record]:
    steps, rows = (30, 4096) if options.quick else (400, 100_000)
    features, betas = (96, BETAS[:2]) if options.quick else (256, BETAS)
    records = []
    for seed in options.seeds:
        planted = SparseFeatures(seed=seed, features=features)
        name, hook = f"planted-{seed}", next(iter(planted.widths))
        write_store(options.workspace.store(name), planted, rows)
        runs = grid(plain_run(name, name, hook, seed, features, steps, 5e-3, 256), 5, list(POSTERIORS), betas)
        x = torch.from_numpy(planted.draw(0, 4096, "test").x)
        of_this: list[Record] = []
        trained = train(list(runs.values()), options.workspace, name)
        for (posterior, beta), dictionary in zip(runs, trained, strict=True):
            scores = recovered(dictionary, planted)
            record = measured(dictionary, x) | {key: scores[key] for key in ("matched_cosine", "matched_cosine_floor")}
            of_this.append(record | {"posterior": posterior, "beta": beta, "seed": seed})
            of_this[-1] |= beside_topk(record, dictionary, trained[0], of_this[0])
        records += of_this
    return records


def measure_bundled(options: Options) -> list[Record]:
    steps, d_sae, tokens, k = (10, 64, 256, 4) if options.quick else (200, 512, 1024, 32)
    posteriors = [name for name in POSTERIORS if name != "σ = 0.3"]
    workspace = options.workspace
    store = harvested(options, [RESIDUAL], 300_000)
    records = []
    for seed in options.seeds:
        plain = plain_run(f"bundled-{seed}", store, RESIDUAL, seed, d_sae, steps, 5e-3, 256)
        runs = grid(replace(plain, order_seed=0), k, posteriors, BETAS[:2] if options.quick else BETAS[:3])
        x = torch.cat([rows for rows, _ in held_out(workspace, store, RESIDUAL, None, 8192)])
        of_this: list[Record] = []
        trained = train(list(runs.values()), workspace, plain.name)
        for (posterior, beta), dictionary in zip(runs, trained, strict=True):
            spliced = downstream(dictionary, open_store(workspace.store(store)), tokens)
            record = measured(dictionary, x) | {"recovered": spliced.loss_recovered}
            of_this.append(record | {"posterior": posterior, "beta": beta, "seed": seed})
            of_this[-1] |= beside_topk(record, dictionary, trained[0], of_this[0])
        records += of_this
    return records


def tables(records: list[Record]) -> dict[str, Table]:
    made = {}
    for part in PARTS:
        of = [record for record in records if record["part"] == part]
        if of:
            made[f"vsae {part}"] = tabulate(
                of,
                {"posterior": "posterior", "β": "beta"},
                {
                    "FVU": ("fvu", 3),
                    "FVU minus TopK's": ("fvu_more", 3),
                    "FVU with noise": ("noisy_fvu", 3),
                    "alive, %": ("alive", 1),
                    "KL of a row": ("kl", 1),
                    "collapsed, %": ("collapsed", 1),
                }
                | (
                    {"MCC": ("matched_cosine", 3), "(chance)": ("matched_cosine_floor", 3)}
                    if part == "planted"
                    else {"loss recovered": ("recovered", 3)}
                ),
            )
            made[f"vsae {part} steps"] = steps_of_beta(of)
    same = [record["furthest"] for record in records if record["posterior"] == "no noise" and record["beta"] == 0]
    if same:
        made["vsae is topk"] = Table(
            ["runs with no noise and β = 0", "largest difference of a weight from TopK's"],
            [[str(len(same)), f"{max(same):.0e}" if max(same) else "0, in every run"]],
        )
    return made


def steps_of_beta(records: list[Record]) -> Table:
    """From each beta to the next: what becomes of the FVU and of the share alive, seed by seed."""
    rows = []
    for posterior in dict.fromkeys(r["posterior"] for r in records if r["posterior"] != TOPK):
        betas = list(dict.fromkeys(r["beta"] for r in records if r["posterior"] == posterior))
        for before, after in itertools.pairwise(betas):
            pair = [{"posterior": posterior, "beta": beta} for beta in (after, before)]
            changes = [figure(differences(records, key, *pair), digits) for key, digits in (("fvu", 3), ("alive", 1))]
            rows.append([posterior, f"{before} to {after}", *changes])
    return Table(["posterior", "β", "FVU, change", "alive, change in %"], rows)


PARTS = {"planted": measure_planted, "bundled": measure_bundled}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("vsae", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
