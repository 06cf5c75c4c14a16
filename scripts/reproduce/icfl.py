"""ICFL beside TopK (Donhauser et al. 2024, arXiv 2412.16247), on planted features and on images with batch effects.

    python scripts/reproduce/icfl.py
    python scripts/reproduce/icfl.py --part mnist    # MNIST, from $DICTLEARN_SHARED/data/mnist

Both have the same number of latents and the same most active in a row (k = rounds * width), the same rows, rate and
steps. The rates are those at which TopK did best of five from 0.001 to 0.01, on one seed of "easy" and of "hard".
TopK is run with AuxK and without: whether the paper's had it is not clear from its text.

easy       256 features in 64 coordinates, 512 latents; rows as they are.
hard       32 latents for each of 32 coordinates, features of low rates, rows that eight conditions shift, all rows of
           unit norm, once as they are and once PCA-whitened before that: where TopK's latents die.
nuisance   Features of 16 topics among rows of 24 conditions, whose shifts hold most of the variance. Control rows are
           about no topic. Whitened by them or not: how many latents are selective for a topic, and for a condition; and
           what a probe reads of the topic, split by condition, from the reconstruction and from the rows.
variants   The rows of "easy": the same k in other rounds and widths, and atoms chosen by inner product.
images     scikit-learn's digits, 8 x 8, in 24 batches with a gain and a smooth offset of their own. The zeros of all
           batches are the controls; the labels are the other digits.
mnist      The same with MNIST, pooled to 14 x 14.

Every seed has other features, rows, batches and initial weights. A share of dead latents is of those that fire in no
held-out row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import k_sparse
import numpy as np
import torch
from reproduction import Options, Record, Table, differences, figure, reproduce, tabulate, train, write_rows
from sae_family import named, plain_run
from torch import Tensor

from activation_store.seeds import numpy_stream, permutation
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.dictionaries.scaling import whitening
from dictlearn.metrics.label_selectivity import label_selectivity, selective_counts
from dictlearn.metrics.probe import probe_reconstruction
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.metrics.recovery import matched_cosine
from dictlearn.synthetic import HOOK, SparseFeatures
from dictlearn.training.configs import TrainConfig
from dictlearn.workspace import Workspace

RATE = 3e-3
RATE_WHERE_HARD = 5e-3
SHRINKAGE = 0.01
MNIST_ROWS = 4000
"""Of its test images, chosen anew for each seed, since the file has digit after digit."""
ICFL, TOPK, TOPK_NO_AUXK = "ICFL", "TopK", "TopK without AuxK"
Config = TrainConfig[Any]


@dataclass(frozen=True)
class Size:
    """Of the dictionaries of a part, and of their runs."""

    d_sae: int
    rounds: int
    width: int
    steps: int
    batch: int = 512

    @property
    def common(self) -> dict[str, Any]:
        """Settings that both kinds have."""
        return {"d_sae": self.d_sae, "dead_after_rows": max(1, self.steps * self.batch // 10), "shrinkage": SHRINKAGE}

    @property
    def icfl(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "width": self.width, **self.common}

    @property
    def topk(self) -> dict[str, Any]:
        return {"k": self.rounds * self.width, **self.common}


def plain(name: str, store: str, seed: int, size: Size, rate: float = RATE) -> Config:
    return plain_run(name, store, HOOK, seed, size.d_sae, size.steps, rate, size.batch)


# --- planted features -------------------------------------------------------------------------------------------------


def measure_easy(options: Options) -> list[Record]:
    size = Size(64, 2, 2, 20, 128) if options.quick else Size(512, 5, 4, 950)
    records = []
    for seed in options.seeds:
        planted = SparseFeatures(seed=seed, features=96 if options.quick else 256)
        rows = [planted.draw(0, n, purpose).x for n, purpose in of_both(options)]
        records += measure_rows(f"easy-{seed}", planted.directions, rows, size, seed, options.workspace, RATE)
    return records


def measure_hard(options: Options) -> list[Record]:
    size = Size(128, 2, 2, 20, 128) if options.quick else Size(1024, 4, 2, 650)
    records = []
    for seed, whitened in itertools.product(options.seeds, (False, True)):
        planted = SparseFeatures(
            seed=seed, d=32, features=256, exponent=1.2, mean_l0=3, nuisances=8, nuisance_strength=5
        )
        drawn = [planted.draw(0, n, purpose).x for n, purpose in of_both(options)]
        change, T_DD = preparation(planted.draw_controls(0, 4096 if options.quick else 20_000).x, whitened)
        rows = [change(x) for x in drawn]
        name = f"hard-{'white' if whitened else 'raw'}-{seed}"
        found = measure_rows(name, planted.directions @ T_DD, rows, size, seed, options.workspace, RATE_WHERE_HARD)
        records += [{"whitened": "yes" if whitened else "no", **record} for record in found]
    return records


def of_both(options: Options) -> list[tuple[int, str]]:
    """``(rows, purpose)`` of what is trained on and of what is held out."""
    return [(4096 if options.quick else 100_000, "train"), (1024 if options.quick else 8192, "test")]


def preparation(controls: np.ndarray, whitened: bool) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """What makes rows of unit mean square that are centred, and perhaps whitened, by control rows; and its matrix."""
    exact = torch.from_numpy(controls).double()
    mean = exact.mean(dim=0)
    T_DD = whitening(mean, exact.T @ exact / len(exact), SHRINKAGE)[0].numpy() if whitened else np.eye(len(mean))

    def change(x: np.ndarray) -> np.ndarray:
        u = (x - mean.numpy()) @ T_DD
        return (u / np.sqrt(np.square(u).mean(axis=1, keepdims=True))).astype(np.float32)

    return change, T_DD


def measure_rows(
    name: str, directions: np.ndarray, rows: list[np.ndarray], size: Size, seed: int, workspace: Workspace, rate: float
) -> list[Record]:
    """Every dictionary on the same rows, ``[to train on, held out]``, made from these directions."""
    write_rows(workspace.store(name), HOOK, rows[0], rows[1], name)
    run = plain(name, name, seed, size, rate)
    dictionaries = {
        ICFL: ICFLConfig(whiten=False, **size.icfl),
        "ICFL without resets": ICFLConfig(whiten=False, reset_every=size.steps + 1, **size.icfl),
        TOPK: TopKConfig(**size.topk),
        TOPK_NO_AUXK: TopKConfig(auxk_weight=0, **size.topk),
    }
    return compared(run, dictionaries, directions, torch.from_numpy(rows[1]), seed, workspace)


def compared(
    run: Config, dictionaries: dict[str, Any], directions: np.ndarray, x: Tensor, seed: int, workspace: Workspace
) -> list[Record]:
    configs = [named(run, f"d{number}", config) for number, config in enumerate(dictionaries.values())]
    records = []
    for words, config, found in zip(dictionaries, configs, train(configs, workspace, run.name), strict=True):
        mcc = matched_cosine(found.W_dec.detach().numpy(), directions, draws=3)
        lines = [json.loads(line) for line in workspace.run(config.name).metrics.read_text().splitlines()]
        records.append(
            {"dictionary": words, "seed": seed, **reconstructed(found, x), "mcc": mcc.value, "mcc_floor": mcc.floor}
            | {"closest": closest(found), "resets": sum(line.get("resets", 0.0) for line in lines)}
        )
    return records


def reconstructed(dictionary: Dictionary, x: Tensor) -> Record:
    found = measure_reconstruction(dictionary, [(x, None)])
    return {"fvu": found.fvu, "cosine": found.cosine, "l0": found.l0, "dead": 100 * found.dead_share}


def closest(dictionary: Dictionary) -> float:
    """The largest cosine of two decoder rows."""
    unit_SD = torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=1)
    return float((unit_SD @ unit_SD.T).fill_diagonal_(-1).max())


def measure_variants(options: Options) -> list[Record]:
    size = Size(64, 2, 2, 20, 128) if options.quick else Size(512, 4, 4, 450)
    splits = ((4, 1), (1, 4)) if options.quick else ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16))
    records = []
    for seed in options.seeds:
        planted = SparseFeatures(seed=seed, features=96 if options.quick else 256)
        rows = [planted.draw(0, n, purpose).x for n, purpose in of_both(options)]
        name = f"variants-{seed}"
        write_rows(options.workspace.store(name), HOOK, rows[0], rows[1], name)
        dictionaries = {
            f"J = {rounds}, L = {width}": ICFLConfig(rounds=rounds, width=width, whiten=False, **size.common)
            for rounds, width in splits
        }
        dictionaries[f"J = {size.rounds}, L = {size.width}, by inner product"] = ICFLConfig(
            select_by_cosine=False, whiten=False, **size.icfl
        )
        run = plain(name, name, seed, size)
        records += compared(run, dictionaries, planted.directions, torch.from_numpy(rows[1]), seed, options.workspace)
    return records


# --- labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Rows to learn from, control rows, and rows with labels, each (N, D), in batches or conditions."""

    train: np.ndarray
    controls: np.ndarray
    x: np.ndarray
    labels: np.ndarray
    batches: np.ndarray


def measure_labelled(name: str, of: Labelled, size: Size, seed: int, workspace: Workspace) -> list[tuple[Any, Record]]:
    """``(dictionary, record)`` of both kinds, whitened by the controls and not."""
    write_rows(workspace.store(name), HOOK, of.train, of.x, name)
    write_rows(workspace.store(f"{name}-controls"), HOOK, of.controls[:-1], of.controls[-1:], name)
    dictionaries = {
        (ICFL, "yes"): ICFLConfig(**size.icfl),
        (ICFL, "no"): ICFLConfig(whiten=False, **size.icfl),
        (TOPK, "yes"): TopKConfig(scaling="whiten", **size.topk),
        (TOPK, "no"): TopKConfig(**size.topk),
    }
    run = replace(plain(name, name, seed, size), control_store=f"{name}-controls")
    configs = [named(run, f"d{number}", config) for number, config in enumerate(dictionaries.values())]
    x = torch.from_numpy(of.x.astype(np.float32))
    found = []
    for (kind, whitened), dictionary in zip(dictionaries, train(configs, workspace, name), strict=True):
        with torch.no_grad():
            codes = dictionary.encode(x)
        record: Record = {"dictionary": kind, "whitened": whitened, "seed": seed, **reconstructed(dictionary, x)}
        record |= selectivity(codes, of, seed)
        of_output, of_x = probe_reconstruction(dictionary, x, of.labels, of.batches, seed=seed)
        record |= {"probe": 100 * of_output.accuracy, "probe_x": 100 * of_x.accuracy, "chance": 100 * of_x.chance}
        found.append((dictionary, record | {"probe_less": 100 * (of_output.accuracy - of_x.accuracy)}))
    return found


def selectivity(codes: Codes, of: Labelled, seed: int) -> Record:
    record: Record = {}
    for what, labels in (("label", of.labels), ("batch", of.batches)):
        for threshold, count in selective_counts(codes, labels, seed=seed).items():
            record |= {f"{what}{threshold}": count.value, f"{what}{threshold}_null": count.floor}
        record[f"{what}_best"] = float(label_selectivity(codes, labels).best().mean())
    return record


def measure_nuisance(options: Options) -> list[Record]:
    size = Size(64, 2, 2, 20, 128) if options.quick else Size(512, 4, 4, 550)
    rows, controls, test = (4096, 2048, 2048) if options.quick else (60_000, 20_000, 8192)
    records = []
    for seed in options.seeds:
        planted = SparseFeatures(
            seed=seed,
            features=128,
            exponent=0.5,
            mean_l0=6,
            topics=16,
            topic_strength=0.95,
            nuisances=24,
            nuisance_directions=8,
            nuisance_strength=8,
        )
        drawn = planted.draw(0, test, "test")
        labelled = Labelled(
            planted.draw(0, rows).x,
            planted.draw_controls(0, controls).x,
            drawn.x,
            drawn.labels["topic"],
            drawn.labels["nuisance"],
        )
        truth = selectivity(Codes.from_dense(torch.from_numpy(drawn.codes)), labelled, seed)
        records.append({"dictionary": "the features themselves", "whitened": "", "seed": seed, **truth})
        for dictionary, record in measure_labelled(f"nuisance-{seed}", labelled, size, seed, options.workspace):
            mcc = matched_cosine(dictionary.W_dec.detach().numpy(), planted.directions, draws=3)
            records.append(record | {"mcc": mcc.value, "mcc_floor": mcc.floor})
    return records


# --- images -----------------------------------------------------------------------------------------------------------


def in_batches(images: np.ndarray, batches: np.ndarray, seed: int) -> np.ndarray:
    """(N, D) images with the gain and the offset of their batches, and a little noise.

    The offset is a smooth field, as uneven light makes one: random multiples of the nine lowest cosines of the square.
    """
    side = round(images.shape[1] ** 0.5)
    waves = np.cos(np.pi * np.outer(np.arange(3), np.arange(side) + 0.5) / side)
    fields = np.einsum("ix,jy->ijxy", waves, waves).reshape(9, -1)
    stream = numpy_stream(seed, "batch effects")
    count = int(batches.max()) + 1
    gains, offsets = stream.lognormal(sigma=0.3, size=count), stream.normal(scale=0.2, size=(count, 9)) @ fields
    noise = 0.02 * stream.normal(size=images.shape)
    return gains[batches, None] * images + offsets[batches] + noise


def labelled_images(
    x: np.ndarray, y: np.ndarray, test: tuple[np.ndarray, np.ndarray], copies: int, seed: int
) -> Labelled:
    """Training images in ``copies`` batches each, of which the zeros are the controls; test images in one each."""
    stream = numpy_stream(seed, "which batch")
    batches = [stream.integers(24, size=n) for n in (copies * len(x), len(test[0]))]
    images = np.concatenate([np.tile(x, (copies, 1)), test[0]])
    rows = in_batches(images, np.concatenate(batches), seed)
    train_rows, test_rows = rows[: copies * len(x)], rows[copies * len(x) :]
    other = test[1] != 0
    return Labelled(
        train_rows, train_rows[np.tile(y, copies) == 0], test_rows[other], test[1][other], batches[1][other]
    )


def measure_images(options: Options) -> list[Record]:
    size = Size(32, 2, 2, 20, 128) if options.quick else Size(256, 4, 4, 550, 256)
    records = []
    for seed in options.seeds:
        images = k_sparse.digits(seed)
        # few images: those with labels are all of them, in batches drawn anew. No dictionary sees a label
        whole = np.concatenate([images.x, images.test_x]), np.concatenate([images.y, images.test_y])
        labelled = labelled_images(images.x, images.y, whole, 8, seed)
        records += [r for _, r in measure_labelled(f"images-{seed}", labelled, size, seed, options.workspace)]
    return records


def measure_mnist(options: Options) -> list[Record]:
    size = Size(1024, 8, 4, 250)
    records = []
    for seed in options.seeds:
        images = k_sparse.mnist(seed)
        x, test_x = (rows.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196) for rows in
                     (images.x, images.test_x))  # fmt: skip
        chosen = permutation(len(test_x), seed, "test images with labels")[:MNIST_ROWS]
        labelled = labelled_images(x, images.y, (test_x[chosen], images.test_y[chosen]), 3, seed)
        records += [r for _, r in measure_labelled(f"mnist-{seed}", labelled, size, seed, options.workspace)]
    return records


# --- tables -----------------------------------------------------------------------------------------------------------

PLANTED = {
    "L0": ("l0", 1),
    "FVU": ("fvu", 3),
    "mean cosine": ("cosine", 3),
    "MCC": ("mcc", 3),
    "(chance)": ("mcc_floor", 3),
    "dead, %": ("dead", 1),
    "resets": ("resets", 0),
    "closest two, cosine": ("closest", 2),
}
SELECTIVITY = {
    "latents above 0.5 for a label": ("label0.5", 1),
    "(permuted)": ("label0.5_null", 1),
    "above 0.2": ("label0.2", 1),
    "(permuted) ": ("label0.2_null", 1),
    "best of each label, mean": ("label_best", 2),
    "latents above 0.5 for a batch": ("batch0.5", 1),
    "(permuted)  ": ("batch0.5_null", 1),
}
PROBED = {
    "FVU": ("fvu", 3),
    "dead, %": ("dead", 1),
    "probe of the reconstruction, %": ("probe", 1),
    "of the rows, %": ("probe_x", 1),
    "(chance)": ("chance", 1),
    "reconstruction minus rows": ("probe_less", 1),
}


def tables(records: Sequence[Record]) -> dict[str, Table]:
    of = {part: [r for r in records if r["part"] == part] for part in PARTS}
    made = {}
    if of["easy"]:
        made["icfl easy"] = tabulate(of["easy"], {"": "dictionary"}, PLANTED)
    if of["hard"]:
        made["icfl hard"] = tabulate(
            sorted(of["hard"], key=lambda r: r["whitened"]), {"whitened": "whitened", "": "dictionary"}, PLANTED
        )
    if of["easy"] or of["hard"]:
        made["icfl over TopK"] = over_topk([*of["easy"], *of["hard"]])
    if of["variants"]:
        made["icfl variants"] = tabulate(of["variants"], {"": "dictionary"}, PLANTED)
    for part in ("nuisance", "images", "mnist"):
        if of[part]:
            label = {"": "dictionary", "whitened": "whitened"}
            made[f"icfl {part} selectivity"] = tabulate(of[part], label, SELECTIVITY)
            recovery = {"MCC": ("mcc", 3), "(chance) ": ("mcc_floor", 3)} if part == "nuisance" else {}
            made[f"icfl {part} probe"] = tabulate([r for r in of[part] if "probe" in r], label, PROBED | recovery)
    return made


def over_topk(records: Sequence[Record]) -> Table:
    """FVU of ICFL over TopK's, and what else differs, seed by seed."""
    rows = []
    for part, whitened in dict.fromkeys((r["part"], r.get("whitened")) for r in records):
        these = [r for r in records if (r["part"], r.get("whitened")) == (part, whitened)]
        icfl, topk = {"dictionary": ICFL}, {"dictionary": TOPK}
        logs = [{**r, "fvu": np.log(r["fvu"])} for r in these]
        ratios = [float(np.exp(difference)) for difference in differences(logs, "fvu", icfl, topk)]
        others = [figure(differences(these, key, icfl, topk), digits) for key, digits in (("mcc", 3), ("dead", 1))]
        rows.append([part + {None: "", "yes": ", whitened", "no": ""}[whitened], figure(ratios, 2), *others])
    return Table(["ICFL and TopK, seed by seed", "FVU, ratio", "MCC, difference", "dead, difference, %"], rows)


PARTS = {
    "easy": measure_easy,
    "hard": measure_hard,
    "nuisance": measure_nuisance,
    "variants": measure_variants,
    "images": measure_images,
    "mnist": measure_mnist,
}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("icfl", __doc__, PARTS, tables, argv, if_asked=["mnist"])


if __name__ == "__main__":
    main()
