"""k-sparse autoencoders (Makhzani and Frey 2013, arXiv 1312.5663) on handwritten digits.

    python scripts/reproduce/k_sparse.py                  # scikit-learn's digits; minutes of one core
    python scripts/reproduce/k_sparse.py --part mnist     # MNIST, from $DICTLEARN_SHARED/data/mnist

What is measured: the test error of a logistic regression on the codes for several k, beside one on the pixels and one
on the codes of the same autoencoder without sparsity (k = d_sae); units that never fire, with a k that falls to its
value during training (k_start = half of the units) and without; and the error when the alpha k largest activations are
kept after training. Every seed has an autoencoder and an order of rows of its own, and of the digits another split. The
regression's penalty is chosen on a fifth of the training rows for each set of features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from reproduction import Options, Record, Table, differences, figure, reproduce, tabulate, train, write_rows
from scipy.sparse import csr_array

from activation_store.errors import UserError
from activation_store.seeds import permutation
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import KSparseConfig
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig

HOOK = "pixels"
PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Inverse strengths of the regression's penalty (scikit-learn's C) that are tried."""


@dataclass(frozen=True)
class Images:
    """Rows of pixels from 0 to 1, and what they show."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class Task:
    units: int
    ks: tuple[int, ...]
    """Of the U-shape; the last is every unit, the dense autoencoder."""
    falling: tuple[int, ...]
    """Those of ``ks`` also trained with a k that falls."""
    steps: int
    batch_size: int


DIGITS = Task(500, (2, 5, 10, 25, 50, 100, 200, 500), (2, 5, 10, 25, 50), steps=1500, batch_size=128)
MNIST = Task(500, (10, 25, 40, 100, 500), (10,), steps=600, batch_size=256)
MNIST_TRAINING_ROWS = 12_000
ALPHAS = (1, 2, 3)


# --- images -----------------------------------------------------------------------------------------------------------


def digits(seed: int, rows: int = 1797) -> Images:
    """scikit-learn's 8 x 8 digits in another split for each seed: 1297 to train on, 500 to test on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = permutation(len(x), seed, "split of the digits")[:rows]
    test, training = order[: rows * 500 // 1797], order[rows * 500 // 1797 :]
    return Images(x[training] / 16, y[training], x[test] / 16, y[test])


def mnist(seed: int) -> Images:
    """12,000 of the 60,000 training images, others for each seed, and all 10,000 test images."""
    folder = Path(os.environ.get("DICTLEARN_SHARED", "")) / "data" / "mnist"
    if not (folder / "mnist_train.npz").exists():
        raise UserError(
            "There is no MNIST: DICTLEARN_SHARED should name a folder with data/mnist/mnist_train.npz and "
            "mnist_test.npz, keys x (n, 28, 28) and y; scikit-learn's digits need nothing (--part digits)."
        )
    (x, y), (test_x, test_y) = ((f["x"].reshape(-1, 784) / 255, f["y"]) for f in _files(folder))
    chosen = permutation(len(x), seed, "training images")[:MNIST_TRAINING_ROWS]
    return Images(x[chosen], y[chosen], test_x, test_y)


def _files(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(folder / f"mnist_{split}.npz")) for split in ("train", "test")]


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_digits(options: Options) -> list[Record]:
    if options.quick:
        task = Task(64, (5, 10, 64), (5,), steps=20, batch_size=64)
        return [r for seed in options.seeds for r in measure(task, digits(seed, 400), options, seed, "digits")]
    return [r for seed in options.seeds for r in measure(DIGITS, digits(seed), options, seed, "digits")]


def measure_mnist(options: Options) -> list[Record]:
    return [r for seed in options.seeds for r in measure(MNIST, mnist(seed), options, seed, "mnist")]


def measure(task: Task, images: Images, options: Options, seed: int, name: str) -> list[Record]:
    """Every autoencoder of one seed; they read the same batches."""
    store = options.workspace.store(f"{name}-{seed}")
    write_rows(store, HOOK, images.x, images.test_x, name)
    plain = TrainConfig(
        name=f"{name}-{seed}",
        store=store.stem,
        hook=HOOK,
        dictionary=KSparseConfig(d_sae=task.units),
        optimiser=OptimiserConfig(learning_rate=2e-3),
        batch_size=task.batch_size,
        steps=task.steps,
        buffer_rows=len(images.x),
        seed=seed,
        checkpoint_every=task.steps,
    )
    starts = [(k, None) for k in task.ks] + [(k, task.units // 2) for k in task.falling]
    configs = [
        replace(
            plain,
            name=f"{plain.name}-k{k}-from-{k_start or k}",
            dictionary=replace(plain.dictionary, k=k, k_start=k_start),
        )
        for k, k_start in starts
    ]
    dictionaries = train(configs, options.workspace, plain.name)
    x, test_x = (torch.from_numpy(rows.astype(np.float32)) for rows in (images.x, images.test_x))
    records: list[Record] = [
        {"features": "pixels", "k": "", "seed": seed, "error": error(images.x, images.y, images.test_x, images.test_y)}
    ]
    for (k, k_start), dictionary in zip(starts, dictionaries, strict=True):
        features = "dense autoencoder" if k == task.units else "falling k" if k_start else "constant k"
        dead = dead_share(dictionary, x)
        for alpha in ALPHAS if 3 * k <= task.units and not k_start else (1,):
            dictionary.config = replace(dictionary.config, alpha=float(alpha))
            found = error(sparse(dictionary, x), images.y, sparse(dictionary, test_x), images.test_y)
            records.append(
                {"features": features, "k": k, "alpha": alpha, "seed": seed, "error": found, "dead": dead}
                | {"fvu": fvu(dictionary, test_x)}
            )
    return records


@torch.no_grad()
def sparse(dictionary: Dictionary, x: torch.Tensor) -> csr_array:
    """(B, S) codes."""
    codes = dictionary.encode(x)
    ends = np.arange(len(codes) + 1) * codes.indices.shape[1]
    return csr_array((codes.values.flatten().numpy(), codes.indices.flatten().numpy(), ends), (len(codes), codes.d_sae))


@torch.no_grad()
def dead_share(dictionary: Dictionary, x: torch.Tensor) -> float:
    """Percent of units that fire for no training image."""
    return 100 * float((dictionary.encode(x).fired() == 0).double().mean())


@torch.no_grad()
def fvu(dictionary: Dictionary, x: torch.Tensor) -> float:
    return float((x - dictionary(x)).square().sum() / (x - x.mean(dim=0)).square().sum())


def error(x: np.ndarray | csr_array, y: np.ndarray, test_x: np.ndarray | csr_array, test_y: np.ndarray) -> float:
    """Percent of test rows that a logistic regression on these features gets wrong.

    Features are divided by one number, the length of a typical row, so that the penalty means the same for all.
    """
    from sklearn.linear_model import LogisticRegression

    x, test_x = csr_array(x), csr_array(test_x)
    scale = np.sqrt(x.power(2).sum() / x.shape[0]) / 4
    x, test_x = x / scale, test_x / scale
    chosen, kept = np.arange(x.shape[0]) % 5 == 0, np.arange(x.shape[0]) % 5 != 0
    best = max(PENALTIES, key=lambda c: _fitted(LogisticRegression(C=c), x[kept], y[kept]).score(x[chosen], y[chosen]))
    return 100 * (1 - _fitted(LogisticRegression(C=best), x, y).score(test_x, test_y))


def _fitted(regression, x: csr_array, y: np.ndarray):  # type: ignore[no-untyped-def]  # scikit-learn has no types
    return regression.set_params(max_iter=300, tol=1e-3).fit(x, y)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> dict[str, Table]:
    made = {}
    for part in ("digits", "mnist"):
        of_part = [record for record in records if record["part"] == part]
        if not of_part:
            continue
        pixels = {record["seed"]: record["error"] for record in of_part if record["features"] == "pixels"}
        at_k = [r | {"over": r["error"] - pixels[r["seed"]]} for r in of_part if r.get("alpha", 1) == 1]
        columns = {
            "test error, %": ("error", 2),
            "minus that of pixels": ("over", 2),
            "units that never fire, %": ("dead", 1),
            "FVU": ("fvu", 3),
        }
        made[f"k-sparse {part}"] = tabulate(at_k, {"features": "features", "k": "k"}, columns)
        made[f"k-sparse {part} falling"] = falling(of_part)
        made[f"k-sparse {part} alpha"] = more_active(of_part)
    return made


def falling(records: Sequence[Record]) -> Table:
    """What a k that falls changes, seed by seed."""
    at_one = [record for record in records if record.get("alpha", 1) == 1]
    rows = []
    for k in sorted({record["k"] for record in records if record["features"] == "falling k"}):
        pair: list[Record] = [{"features": features, "k": k} for features in ("falling k", "constant k")]
        rows.append([str(k), *(figure(differences(at_one, key, *pair), 2) for key in ("dead", "error"))])
    return Table(
        ["k", "units that never fire, falling minus constant, %", "test error, falling minus constant, %"], rows
    )


def more_active(records: Sequence[Record]) -> Table:
    """What keeping alpha k activations changes, seed by seed."""
    constant = [record for record in records if record["features"] == "constant k"]
    rows = []
    for k in sorted({record["k"] for record in constant if record["alpha"] > 1}):
        one, *more = ({"k": k, "features": "constant k", "alpha": alpha} for alpha in ALPHAS)
        alone = figure([record["error"] for record in constant if record["k"] == k and record["alpha"] == 1], 2)
        rows.append([str(k), alone, *(figure(differences(constant, "error", words, one), 2) for words in more)])
    return Table(["k", "test error at alpha 1, %", *(f"alpha {alpha}, minus alpha 1" for alpha in ALPHAS[1:])], rows)


PARTS = {"digits": measure_digits, "mnist": measure_mnist}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("k_sparse", __doc__, PARTS, tables, argv, if_asked=["mnist"])


if __name__ == "__main__":
    main()
