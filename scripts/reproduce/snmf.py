"""SNMF of MLP activations (Shafran, Geiger, Geva 2025, arXiv 2506.10920).

    python scripts/reproduce/snmf.py
    python scripts/reproduce/snmf.py --part planted

planted    400 rows and 400 unseen ones of 8 features, 5 of 100 neurons each, with codes uniform between 0 and 1: the
           share of neurons that winner-take-all keeps, and where the factorisation begins.
hierarchy  12 features of four parents: 4 neurons that children of a parent share, and 3 of each child's own. Two
           levels, before and after the levels are trained together.
neurons    What the MLP of layer 2 of the bundled language model computes before it is written out, 704 neurons: 100
           features, factorised alone and trained, beside TopK of as many latents.

In the first two every seed has other features, rows and starts; in the third other starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from reproduction import (
    Options,
    Record,
    Table,
    downstream,
    harvested,
    held_out,
    reproduce,
    tabulate,
    train,
)
from sae_family import named, plain_run

from activation_store.seeds import numpy_stream
from activation_store.store import Store, open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import SemiNMFConfig, TopKConfig
from dictlearn.factorisation import HierarchicalSemiNMF, SemiNMF
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.metrics.recovery import match_directions, matched_cosine

HOOK = "blocks.2.mlp.hook_post"
CORE = 8
"""Neurons whose part in a feature is told."""
STRONGEST = 20
"""Rows that a reader would look at."""


# --- planted features -------------------------------------------------------------------------------------------------

NEURONS = 100


def sparse_features(seed: int) -> np.ndarray:
    """(8, 100), five neurons each, which features may share."""
    stream = numpy_stream(seed, "snmf: features")
    features = np.zeros((8, NEURONS))
    for feature in features:
        feature[stream.permutation(NEURONS)[:5]] = stream.normal(size=5)
    return features


def measure_planted(options: Options) -> list[Record]:
    iterations = 20 if options.quick else 2000
    records = []
    for seed in options.seeds:
        features = sparse_features(seed)
        X, unseen = numpy_stream(seed, "snmf: codes").random((2, 400, 8)) @ features
        cases = [(winners, "random") for winners in (1.0, 0.2, 0.1, 0.05, 0.03)] + [(0.05, "kmeans"), (0.05, "svd")]
        for winners, start in cases:
            model = SemiNMF(8, winners=winners, start=start, iterations=iterations, random_state=seed).fit(X)
            score = matched_cosine(model.components_, features, draws=3)
            left_over = unseen - model.inverse_transform(model.transform(unseen))
            records.append(
                {
                    "neurons kept": f"{winners * NEURONS:.0f}" if winners < 1 else "all",
                    "start": start,
                    "seed": seed,
                    "error": float(model.errors_.min()) ** 0.5,
                    "unseen": float(np.linalg.norm(left_over) / np.linalg.norm(unseen)),
                    # what double precision and the ridge may add is no increase
                    "increases": int((np.diff(model.errors_) > 1e-9).sum()),
                    "mcc": score.value,
                    "floor": score.floor,
                    "iterations": model.n_iter_,
                }
            )
    return records


# --- a hierarchy ------------------------------------------------------------------------------------------------------


def families(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """12 features of 100 neurons, 4 shared within each of four families and 3 their own: ``(features, family)``."""
    stream = numpy_stream(seed, "snmf: families")
    family = np.repeat(np.arange(4), 3)
    places, signs = stream.permutation(NEURONS), np.sign(stream.normal(size=NEURONS))
    features = np.zeros((12, NEURONS))
    for child, parent in enumerate(family):
        has = np.concatenate([places[4 * parent : 4 * parent + 4], places[16 + 3 * child : 19 + 3 * child]])
        features[child, has] = signs[has]
    return features, family


def measure_hierarchy(options: Options) -> list[Record]:
    iterations, steps = (20, 20) if options.quick else (1000, 1000)
    records = []
    for seed in options.seeds:
        features, family = families(seed)
        stream = numpy_stream(seed, "snmf: codes of families")
        X = (stream.random((1000, 12)) < 0.2) * stream.exponential(size=(1000, 12)) @ features
        for start in ("random", "kmeans"):
            for trained in (0, steps):
                model = HierarchicalSemiNMF(
                    (12, 4),
                    winners=(7 / NEURONS, 13 / NEURONS),
                    start=start,
                    steps=trained,
                    iterations=iterations,
                    random_state=seed,
                ).fit(X)
                words = {"start": start, "trained": "yes" if trained else "no", "seed": seed}
                records.append(words | {"error": model.error_**0.5} | of_families(model, features, family))
    return records


def of_families(model: HierarchicalSemiNMF, features: np.ndarray, family: np.ndarray) -> Record:
    """How many children were found, and of these how many pairs are siblings where the planted ones are."""
    matching = match_directions(model.levels_[0], features)
    found = np.flatnonzero(matching.cosines > 0.9)
    parents = model.coefficients_[0].argmax(axis=1)[matching.latents]
    pairs = list(combinations(found, 2))
    together = [(parents[a] == parents[b]) == (family[a] == family[b]) for a, b in pairs]
    # most pairs are no siblings: who calls none siblings is right about these
    apart = [family[a] != family[b] for a, b in pairs]
    neurons = [(model.levels_[1][parents[child]] != 0)[features[child] != 0].mean() for child in found]
    return {
        "children": 100 * len(found) / len(features),
        "pairs": 100 * float(np.mean(together)) if pairs else float("nan"),
        "floor": 100 * float(np.mean(apart)) if pairs else float("nan"),
        "union": 100 * float(np.mean(neurons)) if len(found) else float("nan"),
        "parents": float(model.parents_[0].sum(axis=1).mean()),
    }


# --- neurons of a language model --------------------------------------------------------------------------------------


def measure_neurons(options: Options) -> list[Record]:
    d_sae, steps, iterations, tokens = (12, 5, 3, 256) if options.quick else (100, 100, 100, 2048)
    workspace = options.workspace
    name = harvested(options, [HOOK], 300_000)
    store = open_store(workspace.store(name))
    records = []
    for seed in options.seeds:
        plain = replace(plain_run(f"neurons-{seed}", name, HOOK, seed, d_sae, steps, 5e-3, 512), order_seed=0)
        dead = plain.dictionary.dead_after_rows
        asked: dict[str, Any] = {"d_sae": d_sae, "iterations": iterations, "dead_after_rows": dead}
        few, more = (SemiNMFConfig(winners=kept / store.hooks[HOOK].shape[0], **asked) for kept in (8, 36))
        made = {"SNMF of 8 neurons": few, "SNMF of 36 neurons": more} | {
            f"TopK, k = {k}": TopKConfig(d_sae=d_sae, k=k, dead_after_rows=dead) for k in (4, 12)
        }
        configs = [named(plain, f"{number}", config) for number, config in enumerate(made.values())]
        found: dict[str, Dictionary] = dict(zip(made, train(configs, workspace, f"neurons-{seed}"), strict=True))
        alone = factorised(few, store, seed)
        alone.provenance = next(iter(found.values())).provenance
        for words, dictionary in ({"SNMF of 8 neurons, not trained": alone} | found).items():
            measured = measure_reconstruction(dictionary, held_out(workspace, name, HOOK, None, 4096))
            records.append(
                {"dictionary": words, "seed": seed, "l0": measured.l0, "fvu": measured.fvu}
                | {"alive": 100 * (1 - measured.dead_share)}
                | {"recovered": downstream(dictionary, store, tokens).loss_recovered}
                | of_neurons(dictionary)
                | of_tokens(dictionary, store, seed)
            )
    return records


def factorised(config: SemiNMFConfig, store: Store, seed: int) -> Dictionary:
    """The paper's factorisation of the first rows of the store, and no more."""
    rows = store.tensor(HOOK, 0, config.rows).float().numpy()
    model = SemiNMF(
        config.d_sae,
        winners=config.winners,
        iterations=config.iterations,
        patience=config.patience,
        sweeps=config.sweeps,
        tolerance=config.tolerance,
        random_state=seed,
    )
    return model.fit(rows).dictionary()


def of_neurons(dictionary: Dictionary) -> Record:
    """Means over latents: the share of squared weight in the heaviest neurons, and how many it takes for half of it."""
    weights = dictionary.W_dec.detach().double().square()
    shares = (weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)).sort(dim=1, descending=True).values
    half = (shares.cumsum(dim=1) < 0.5).sum(dim=1) + 1
    alive = weights.sum(dim=1) > 0
    return {
        "core": 100 * float(shares[:, :CORE].sum(dim=1)[alive].mean()),
        "half": float(half[alive].double().mean()),
    }


def of_tokens(dictionary: Dictionary, store: Store, seed: int) -> Record:
    """The share of a latent's strongest rows that have the same token, there or just before; beside drawn rows."""
    rows = min(store.rows, 30_000)
    with torch.no_grad():
        codes = torch.cat(
            [
                dictionary.encode(store.tensor(HOOK, at, min(at + 2048, rows)).float()).dense()
                for at in range(0, rows, 2048)
            ]
        )
    tokens = store.token_ids(0, rows)
    drawn = numpy_stream(seed, "snmf: rows").integers(rows, size=(len(codes.T), STRONGEST))
    shares, floor = [], []
    for latent, code in enumerate(codes.T):
        strongest = code.topk(STRONGEST)
        if strongest.values[-1] > 0:
            shares.append(same_token(tokens, strongest.indices.numpy()))
            floor.append(same_token(tokens, drawn[latent]))
    return {"same token": 100 * float(np.mean(shares)), "same token floor": 100 * float(np.mean(floor))}


def same_token(tokens: np.ndarray, rows: np.ndarray) -> float:
    """The largest share of the rows (n,) with one token there, or with one just before."""
    return max(float(np.unique(tokens[at], return_counts=True)[1].max() / len(rows)) for at in (rows, rows - 1))


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(records: list[Record]) -> dict[str, Table]:
    made = {}
    of = {part: [r for r in records if r["part"] == part] for part in PARTS}
    if of["planted"]:
        made["snmf planted"] = tabulate(
            of["planted"],
            {"neurons kept": "neurons kept", "start": "start"},
            {
                "relative error": ("error", 4),
                "of unseen rows": ("unseen", 4),
                "iterations": ("iterations", 0),
                "of them with a higher error": ("increases", 1),
                "MCC": ("mcc", 3),
                "(chance)": ("floor", 3),
            },
        )
    if of["hierarchy"]:
        made["snmf hierarchy"] = tabulate(
            of["hierarchy"],
            {"start": "start", "levels trained together": "trained"},
            {
                "relative error": ("error", 3),
                "children found, %": ("children", 0),
                "pairs of them told apart, %": ("pairs", 1),
                "(calling none siblings)": ("floor", 1),
                "neurons that their parent has, %": ("union", 1),
                "parents of a child": ("parents", 2),
            },
        )
    if of["neurons"]:
        made["snmf neurons"] = tabulate(
            of["neurons"],
            {"": "dictionary"},
            {
                "L0": ("l0", 1),
                "FVU": ("fvu", 3),
                "alive, %": ("alive", 1),
                "loss recovered": ("recovered", 3),
                f"weight in {CORE} neurons, %": ("core", 1),
                "neurons for half of it": ("half", 1),
                f"{STRONGEST} strongest rows with one token, %": ("same token", 1),
                "(drawn rows)": ("same token floor", 1),
            },
        )
    return made


PARTS = {"planted": measure_planted, "hierarchy": measure_hierarchy, "neurons": measure_neurons}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("snmf", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
