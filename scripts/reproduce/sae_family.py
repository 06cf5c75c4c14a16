"""The family of sparse autoencoders on planted features, on a tree of features, and on the bundled language model.

    python scripts/reproduce/sae_family.py                 # all three parts
    python scripts/reproduce/sae_family.py --part tree     # the hierarchical benchmark of Costa et al. (2506.03093)

TopK, BatchTopK, Matryoshka and JumpReLU are told how many latents should be active. ReLU and Gated have a penalty,
whose weights are looked for on a seed kept apart from those that are reported: a few weights, and between them log L0
is a straight line in log weight. What is reported is the L0 that was reached. All else is each kind's default, but for
the rate, which suits short runs, and for dead_after_rows, which has to lie within them. It is one rate for
all kinds, chosen on that seed so that JumpReLU's thresholds, which move by their logarithm, arrive.

planted    256 features on random directions of 64 coordinates, their rates a power law, 5 on in a row; 256 latents.
tree       Features whose children are on only where their parent is: three of the benchmark's trees side by side, 20
           features in 20 coordinates each, 4.08 on in a row, because a number of latents is whole, which the 1.36 of
           a single tree is not. 60 latents, 4 active.
bundled    the residual stream after layer 2; 512 latents, about 16, 32 and 64 active.

In the first two every seed has other features, rows and initial weights; in the third other initial weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
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
from scipy.linalg import block_diag

from activation_store.seeds import derive_seed
from activation_store.store import open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.metrics.recovery import measure_recovery
from dictlearn.synthetic import FeatureTree, Planted, PlantedBatch, SparseFeatures, write_store
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.workspace import Workspace

SEARCH_SEED = 1000
"""Of the runs from which weights of penalties are read off; no result is of this seed."""
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)
NAMES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "relu": "ReLU",
}
RESIDUAL = "blocks.2.hook_resid_post"
Config = TrainConfig[Any]


def family(plain: Config, l0: int, weights: dict[str, float]) -> list[Config]:
    """A run of each kind with about ``l0`` latents active, on the rows of ``plain``."""
    common = {"d_sae": plain.dictionary.d_sae, "dead_after_rows": plain.dictionary.dead_after_rows}
    dictionaries = [
        TopKConfig(k=l0, **common),
        BatchTopKConfig(k=l0, **common),
        MatryoshkaConfig(k=l0, **common),
        JumpReLUConfig(target_l0=l0, l0_weight=0.3, **common),
        GatedConfig(l1_weight=weights["gated"], **common),
        ReLUConfig(l1_weight=weights["relu"], **common),
    ]
    return [named(plain, f"{d.kind}-{l0}", d) for d in dictionaries]  # type: ignore[attr-defined]


def named(plain: Config, name: str, dictionary: Any) -> Config:
    return replace(plain, name=f"{plain.name}-{name}", dictionary=dictionary)


def find_weights(plain: Config, targets: Sequence[float], workspace: Workspace) -> dict[float, dict[str, float]]:
    """L0 -> kind -> weight of its L1 penalty, from runs on ``plain``'s store."""
    common = {"d_sae": plain.dictionary.d_sae, "dead_after_rows": plain.dictionary.dead_after_rows}
    kinds = {"gated": GatedConfig, "relu": ReLUConfig}
    configs = [
        named(plain, f"{kind}-{weight}", config(l1_weight=weight, **common))
        for kind, config in kinds.items()
        for weight in WEIGHTS
    ]
    reached = [
        measure_reconstruction(dictionary, held_out(workspace, plain.store, plain.hooks[0], None, 4096)).l0
        for dictionary in train(configs, workspace, plain.name)
    ]
    found: dict[float, dict[str, float]] = {target: {} for target in targets}
    for number, kind in enumerate(kinds):
        l0s = np.array(reached[number * len(WEIGHTS) : (number + 1) * len(WEIGHTS)])
        logs = np.log(np.maximum(l0s[::-1], 1e-6))  # rising, since more weight leaves fewer active
        for target in targets:
            found[target][kind] = float(np.exp(np.interp(np.log(target), logs, np.log(WEIGHTS[::-1]))))
    return found


# --- planted features -------------------------------------------------------------------------------------------------


def plain_run(
    name: str, store: str, hook: str, seed: int, d_sae: int, steps: int, rate: float, batch: int = 512
) -> Config:
    return TrainConfig(
        name=name,
        store=store,
        hook=hook,
        dictionary=TopKConfig(d_sae=d_sae, k=1, dead_after_rows=steps * batch // 10),
        optimiser=OptimiserConfig(learning_rate=rate),
        batch_size=batch,
        steps=steps,
        buffer_rows=65_536,
        seed=seed,
        log_every=100,
        checkpoint_every=steps,
    )


def recovered(dictionary: Dictionary, planted: Planted) -> Record:
    """Scores on rows of no store, each beside its floor."""
    batch = planted.draw(0, 4096, "test")
    x = torch.from_numpy(batch.x)
    scores = measure_recovery(dictionary, x, batch.codes, planted.directions, planted.parents, draws=3)
    found = measure_reconstruction(dictionary, [(x, None)])
    record: Record = {"l0": found.l0, "fvu": found.fvu}
    for name in ("matched_cosine", "absorption", "purity", "alive_share"):
        if (score := getattr(scores, name)) is not None:
            record |= {name: score.value, f"{name}_floor": score.floor}
    return record


def measure_planted(options: Options) -> list[Record]:
    steps, rows = (30, 4096) if options.quick else (1000, 100_000)
    features = 96 if options.quick else 256

    def run(seed: int) -> tuple[Config, SparseFeatures]:
        planted = SparseFeatures(seed=seed, features=features)
        name, hook = f"planted-{seed}", next(iter(planted.widths))
        plain = plain_run(name, name, hook, seed, features, steps, 5e-3)
        write_store(options.workspace.store(plain.store), planted, rows)
        return plain, planted

    weights = find_weights(run(SEARCH_SEED)[0], [5], options.workspace)[5]
    records = []
    for seed in options.seeds:
        plain, planted = run(seed)
        configs = family(plain, 5, weights)
        for config, dictionary in zip(configs, train(configs, options.workspace, plain.name), strict=True):
            words = {"dictionary": NAMES[config.dictionary.kind], "seed": seed}
            records.append(words | recovered(dictionary, planted))
    return records


@dataclass(frozen=True)
class Trees:
    """Three `FeatureTree`s, each in coordinates of its own. One of the kinds of `dictlearn.synthetic.Planted`."""

    seed: int

    @cached_property
    def each(self) -> list[FeatureTree]:
        return [FeatureTree(seed=derive_seed(self.seed, "tree", number)) for number in range(3)]

    @property
    def widths(self) -> dict[str, int]:
        return {hook: 3 * width for hook, width in self.each[0].widths.items()}

    @property
    def directions(self) -> np.ndarray:
        return block_diag(*(tree.directions for tree in self.each))

    @property
    def rates(self) -> np.ndarray:
        return np.concatenate([tree.rates for tree in self.each])

    @property
    def parents(self) -> np.ndarray:
        return np.concatenate([np.where(t.parents < 0, -1, t.parents + 20 * n) for n, t in enumerate(self.each)])

    def draw(self, number: int, rows: int, purpose: str = "train") -> PlantedBatch:
        drawn = [tree.draw(number, rows, purpose) for tree in self.each]
        x, codes = (np.concatenate(parts, axis=1) for parts in zip(*((d.x, d.codes) for d in drawn), strict=True))
        return PlantedBatch(dict.fromkeys(self.widths, x), codes)


LEVELS = "Matryoshka, groups as the trees' levels"


def measure_tree(options: Options) -> list[Record]:
    steps, rows = (30, 4096) if options.quick else (3000, 200_000)

    def run(seed: int) -> tuple[Config, Trees]:
        planted = Trees(seed)
        plain = plain_run(f"tree-{seed}", f"tree-{seed}", next(iter(planted.widths)), seed, 60, steps, 1e-2)
        write_store(options.workspace.store(plain.store), planted, rows)
        return plain, planted

    weights = find_weights(run(SEARCH_SEED)[0], [4], options.workspace)[4]
    records = []
    for seed in options.seeds:
        plain, planted = run(seed)
        configs = family(plain, 4, weights)
        of_levels = replace(configs[2].dictionary, group_sizes=(33, 27))
        configs.insert(3, replace(configs[2], name=f"{configs[2].name}-levels", dictionary=of_levels))
        for config, dictionary in zip(configs, train(configs, options.workspace, plain.name), strict=True):
            name = LEVELS if config.dictionary == of_levels else NAMES[config.dictionary.kind]
            records.append({"dictionary": name, "seed": seed} | recovered(dictionary, planted))
    return records


# --- the bundled language model ---------------------------------------------------------------------------------------


def measure_bundled(options: Options) -> list[Record]:
    sparsities = (4, 8) if options.quick else (16, 32, 64)
    steps, d_sae, tokens = (10, 64, 256) if options.quick else (400, 512, 1024)
    workspace = options.workspace
    store = harvested(options, [RESIDUAL], 300_000)

    def plain(seed: int) -> Config:
        return replace(plain_run(f"bundled-{seed}", store, RESIDUAL, seed, d_sae, steps, 5e-3, 256), order_seed=0)

    weights = find_weights(plain(SEARCH_SEED), sparsities, workspace)
    records = []
    for seed, l0 in itertools.product(options.seeds, sparsities):
        configs = family(plain(seed), l0, weights[l0])
        dictionaries = train(configs, workspace, f"bundled-{seed}-{l0}")
        for config, dictionary in zip(configs, dictionaries, strict=True):
            found = measure_reconstruction(dictionary, held_out(workspace, store, RESIDUAL, None, 8192))
            spliced = downstream(dictionary, open_store(workspace.store(store)), tokens)
            records.append(
                {"dictionary": NAMES[config.dictionary.kind], "wanted": l0, "seed": seed, "fvu": found.fvu}
                | {"l0": found.l0, "alive": 100 * (1 - found.dead_share)}
                | {"recovered": spliced.loss_recovered, "ce": spliced.ce_spliced - spliced.ce_clean}
            )
    return records


# --- tables -----------------------------------------------------------------------------------------------------------

RECOVERY = {
    "L0": ("l0", 2),
    "FVU": ("fvu", 3),
    "MCC": ("matched_cosine", 3),
    "(chance)": ("matched_cosine_floor", 3),
    "purity": ("purity", 3),
    "(chance) ": ("purity_floor", 3),
    "alive": ("alive_share", 3),
}
ABSORPTION = {
    "L0": ("l0", 2),
    "absorption": ("absorption", 3),
    "(chance)": ("absorption_floor", 3),
    "MCC": ("matched_cosine", 3),
    "(chance) ": ("matched_cosine_floor", 3),
    "FVU": ("fvu", 3),
}
ON_THE_MODEL = {
    "L0": ("l0", 1),
    "FVU": ("fvu", 3),
    "alive, %": ("alive", 1),
    "loss recovered": ("recovered", 3),
    "nats lost": ("ce", 3),
}


def tables(records: Sequence[Record]) -> dict[str, Table]:
    of = {part: [r for r in records if r["part"] == part] for part in ("planted", "tree", "bundled")}
    made = {}
    if of["planted"]:
        made["family planted"] = tabulate(of["planted"], {"": "dictionary"}, RECOVERY)
    if of["tree"]:
        made["family tree"] = tabulate(of["tree"], {"": "dictionary"}, ABSORPTION)
        one = {"dictionary": NAMES["batchtopk"]}
        others = [name for name in dict.fromkeys(r["dictionary"] for r in of["tree"]) if name != one["dictionary"]]
        rows = [
            [
                name,
                *(
                    figure(differences(of["tree"], key, {"dictionary": name}, one))
                    for key in ("absorption", "matched_cosine")
                ),
            ]
            for name in others
        ]
        made["family tree over BatchTopK"] = Table(["minus BatchTopK, seed by seed", "absorption", "MCC"], rows)
    if of["bundled"]:
        made["family bundled"] = tabulate(
            sorted(of["bundled"], key=lambda r: r["wanted"]), {"L0 wanted": "wanted", "": "dictionary"}, ON_THE_MODEL
        )
        made["family bundled over ReLU"] = over_relu(of["bundled"])
    return made


def over_relu(records: Sequence[Record]) -> Table:
    """FVU of each kind minus that of ReLU, seed by seed."""
    wanted = sorted({record["wanted"] for record in records})
    rows = []
    for name in list(NAMES.values())[:-1]:
        pairs = [({"dictionary": name, "wanted": w}, {"dictionary": NAMES["relu"], "wanted": w}) for w in wanted]
        rows.append([name, *(figure(differences(records, "fvu", *pair)) for pair in pairs)])
    return Table(["FVU minus ReLU's", *(f"L0 about {w}" for w in wanted)], rows)


PARTS = {"planted": measure_planted, "tree": measure_tree, "bundled": measure_bundled}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("sae_family", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
