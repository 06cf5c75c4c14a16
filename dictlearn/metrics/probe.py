"""What a linear probe reads from rows: whether a reconstruction still says what the activations said.

A logistic regression whose classes weigh the same however many rows they have, scored by balanced accuracy, the mean
over labels of the share of their rows that is recognised. Rows of one group (an experiment, a batch, a document) are
never on both sides of the split: a probe that recognises the batch would seem to recognise the label. This is the
protocol of Donhauser et al. 2024 (arXiv 2412.16247), who split by experiment.

Axes: B rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.seeds import derive_seed
from dictlearn.dictionaries.base import Dictionary


@dataclass(frozen=True)
class Probe:
    """How well a label is read from rows.

    Attributes:
        accuracy: balanced accuracy on the rows that were held out.
        chance: balanced accuracy of any rule that does not look at the row: one over the number of labels.
        training_rows, test_rows: how many there were.
    """

    accuracy: float
    chance: float
    training_rows: int
    test_rows: int

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} (chance {self.chance:.3f})"


def probe(
    rows: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    test_share: float = 0.3,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probe:
    """Balanced accuracy of a logistic regression, on groups it was not trained on.

    Args:
        rows: (B, D) what the probe sees; each coordinate is brought to variance 1 over the training rows.
        labels: (B,) what it is to say.
        groups: (B,) which rows stay on one side of the split.
        test_share: share of the groups that are held out.
        penalty: inverse strength of the L2 penalty (scikit-learn's C).
        seed: of the split.

    Raises:
        UserError: labels or groups of other rows; fewer than two labels or groups; a label that is on one side alone.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, groups = np.asarray(labels), np.asarray(groups)
    if not len(rows) == len(labels) == len(groups):
        raise UserError(f"There are {len(rows)} rows, {len(labels)} labels and {len(groups)} groups; give one of each.")
    train, test = split_by_group(groups, test_share, seed)
    names = np.unique(labels)
    if len(names) < 2:
        raise UserError(f"All {len(labels)} rows have the same label; a probe needs at least two different ones.")
    for part, side in ((train, "training"), (test, "test")):
        if missing := set(names.tolist()) - set(labels[part].tolist()):
            raise UserError(
                f"No row of the {side} part has the label {min(missing, key=str)!r}: with {len(np.unique(groups))} "
                "groups the split leaves it on the other side. Give smaller groups, another seed or another test_share."
            )
    regression = LogisticRegression(C=penalty, class_weight="balanced", max_iter=1000, tol=1e-3)
    fitted = make_pipeline(StandardScaler(), regression).fit(rows[train], labels[train])
    accuracy = balanced_accuracy_score(labels[test], fitted.predict(rows[test]))
    return Probe(float(accuracy), 1 / len(names), int(train.sum()), int(test.sum()))


def probe_reconstruction(
    dictionary: Dictionary,
    x: Tensor,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    test_share: float = 0.3,
    penalty: float = 1.0,
    seed: int = 0,
) -> tuple[Probe, Probe]:
    """``(of what an autoencoder makes of x, of x itself)``, (B, D) raw activations, on the same split; see `probe`."""
    with torch.no_grad():
        output = dictionary(x)
    of_output, of_x = (
        probe(rows.double().cpu().numpy(), labels, groups, test_share=test_share, penalty=penalty, seed=seed)
        for rows in (output, x)
    )
    return of_output, of_x


def split_by_group(groups: np.ndarray, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``(training, test)`` masks (B,): whole groups, at least one on each side.

    Raises:
        UserError: there is but one group, or ``test_share`` is no share.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    if len(names) < 2 or not 0 < test_share < 1:
        raise UserError(
            f"There are {len(names)} groups and test_share is {test_share}; a split needs two groups or more, and a "
            "share above 0 and below 1."
        )
    held_out = min(len(names) - 1, max(1, round(test_share * len(names))))
    order = np.random.default_rng(derive_seed(seed, "groups of a probe")).permutation(len(names))
    test = np.isin(numbers, order[:held_out])
    return ~test, test
