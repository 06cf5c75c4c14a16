"""How selective each latent is for labels of the rows, beside what permuted labels give.

The labels are known from elsewhere: a cell type, a batch, a topic. (Latents that one token explains are another
question, of `dictlearn.feature_index.selectivity`.) Donhauser et al. 2024 (arXiv 2412.16247) score a latent m and a
label l by how much more often the latent is active with the label, in one of two ways, which they print times 100:

    average(m, l) = P(m active | l) - P(m active | not l)
    maximum(m, l) = P(m active | l) - max over l' other than l of P(m active | l')

A latent that is active with two labels of ten is selective by the first and not by the second. Of a label with few rows
any of many latents can be selective by chance: read the counts beside those of permuted labels.

Axes: B rows, S latents, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from activation_store.errors import UserError
from activation_store.seeds import permutation
from dictlearn.codes import Codes
from dictlearn.metrics.recovery import Score

Variant = Literal["average", "maximum"]


@dataclass(frozen=True)
class LabelSelectivity:
    """How selective each latent is for each label.

    Attributes:
        labels: (C,) the different labels, sorted.
        average, maximum: (S, C) float64, from -1 to 1; `maximum` is at most `average`.
    """

    labels: np.ndarray
    average: np.ndarray
    maximum: np.ndarray

    def count_above(self, threshold: float, variant: Variant = "average") -> int:
        """Latents whose selectivity for at least one label is above ``threshold``."""
        return int((getattr(self, variant) > threshold).any(axis=1).sum())

    def best(self, variant: Variant = "average") -> np.ndarray:
        """(C,) of each label the selectivity of the latent that is most selective for it."""
        return getattr(self, variant).max(axis=0)


def label_selectivity(codes: Codes, labels: np.ndarray) -> LabelSelectivity:
    """Selectivity of every latent for every label.

    Args:
        codes: of B rows; a latent is active where its value is not 0.
        labels: (B,) one label of each row, of any type that sorts.

    Raises:
        UserError: labels of other rows, or fewer than two different ones.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(codes),):
        raise UserError(f"There are codes of {len(codes)} rows and labels of shape {labels.shape}; give one of each.")
    names, numbers = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"All {len(labels)} rows have the same label; selectivity needs at least two different ones.")
    return _selectivity(_active(codes), names, numbers)


def selective_counts(
    codes: Codes,
    labels: np.ndarray,
    thresholds: tuple[float, ...] = (0.5, 0.2),
    variant: Variant = "average",
    *,
    seed: int = 0,
    draws: int = 3,
) -> dict[float, Score]:
    """Threshold -> how many latents are selective above it for some label, beside the same with permuted labels.

    Args and errors as of `label_selectivity`; ``draws`` permutations.
    """
    found = label_selectivity(codes, labels)
    active_SB, numbers = _active(codes), np.unique(labels, return_inverse=True)[1]
    permuted = [
        _selectivity(active_SB, found.labels, numbers[permutation(len(numbers), seed, "permuted labels", draw)])
        for draw in range(draws)
    ]
    counts = {}
    for threshold in thresholds:
        null = [one.count_above(threshold, variant) for one in permuted]
        spread = float(np.std(null, ddof=1)) if draws > 1 else float("nan")
        value = found.count_above(threshold, variant)
        counts[threshold] = Score(float(value), float(np.mean(null)) if null else float("nan"), spread, draws)
    return counts


def _active(codes: Codes) -> csr_array:
    """(S, B), 1 where a latent is active."""
    active = codes.active().cpu().numpy()
    rows, latents = np.nonzero(active)[0], codes.indices.cpu().numpy()[active]
    return csr_array((np.ones(len(rows)), (latents, rows)), shape=(codes.d_sae, len(codes)))


def _selectivity(active_SB: csr_array, names: np.ndarray, numbers: np.ndarray) -> LabelSelectivity:
    rows_C = np.bincount(numbers, minlength=len(names))
    together_SC = active_SB @ (numbers[:, None] == np.arange(len(names))).astype(np.float64)
    with_SC = together_SC / rows_C
    without_SC = (together_SC.sum(axis=1, keepdims=True) - together_SC) / (len(numbers) - rows_C)
    ordered_SC = np.sort(with_SC, axis=1)
    # of the most likely label the next one is the largest other, of all others it is the most likely itself
    first_S1, second_S1 = ordered_SC[:, -1:], ordered_SC[:, -2:-1]
    is_first_SC = np.arange(len(names)) == with_SC.argmax(axis=1)[:, None]
    return LabelSelectivity(names, with_SC - without_SC, with_SC - np.where(is_first_SC, second_S1, first_S1))
