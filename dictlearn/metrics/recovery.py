"""How much of a planted dictionary another one has found, each number beside what chance scores.

Directions: every true one is matched with one latent by the Hungarian method, so that the sum of cosines is largest.
Two choices of cosine, `signed` (the default: where activations are never negative, a latent that points the other way
has not found the feature) and absolute (for dictionaries whose codes have signs).

- `matched_cosine`: the mean cosine over all true directions, called MCC in the literature; one left without a latent,
  where there are fewer latents than directions, counts 0. Chance: random directions, as many as there are latents.
- `absorption`: the mean cosine between the latent matched with a child and the child's true parent (Costa et al. 2025,
  arXiv 2506.03093): their true cosine when each has a latent of its own, 0.71 when the latent holds child and parent
  in equal parts and they are orthogonal. Chance: random directions, which score about 0 as those that absorb nothing
  do: read it only where the matched cosine is high.
- `purity`: of the rows in which a latent fires, the share in which its best feature is on, as a mean over latents.
  Chance: the true codes with their rows permuted, which a common feature can make high.
- `alive_share`: the share of latents that fire at least once. Chance: untrained dictionaries of the same kind and
  shape, of which most latents may well fire.

Axes: B rows, D input width, O output width, S latents, F true features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from torch import Tensor

from activation_store.errors import UserError
from activation_store.seeds import derive_seed, numpy_stream, permutation
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary

DRAWS = 10
"""Of what chance scores, unless another number is asked for."""


@dataclass(frozen=True)
class Score:
    """A number beside its random floor.

    Attributes:
        value: of the dictionary; NaN where there is nothing to measure, such as the purity of latents that never fire.
        floor: mean of the same number over `draws` draws of chance.
        floor_std: their standard deviation (of one draw, not of the mean); NaN for a single draw.
        draws: how many there were.
    """

    value: float
    floor: float
    floor_std: float
    draws: int

    def __str__(self) -> str:
        return f"{self.value:.3f} (chance {self.floor:.3f} ± {self.floor_std:.3f}, {self.draws} draws)"


@dataclass(frozen=True)
class Recovery:
    """All four; ``absorption`` is None where no feature has a parent."""

    matched_cosine: Score
    absorption: Score | None
    purity: Score
    alive_share: Score


def measure_recovery(
    dictionary: Dictionary,
    x: Tensor,
    true_codes: np.ndarray,
    directions: np.ndarray,
    parents: np.ndarray,
    *,
    target: Tensor | None = None,
    signed: bool = True,
    seed: int = 0,
    draws: int = DRAWS,
) -> Recovery:
    """Everything at once, from rows the dictionary was not trained on.

    Args:
        dictionary: takes raw activations.
        x: (B, D) planted rows.
        true_codes: (B, F) what they were made from.
        directions: (F, O) along which the features are written: what decoder rows should be.
        parents: (F,) the parent of each feature, or -1.
        target: (B, O) the targets of ``x``; None for an autoencoder.
        signed: whether cosines are signed, see above.

    Raises:
        UserError: shapes that do not fit together, or decoder rows that are not finite.
    """
    learned = dictionary.W_dec.detach().double().cpu().numpy()
    asked = dict(seed=seed, draws=draws)
    with torch.no_grad():
        codes = dictionary.encode(x)
    return Recovery(
        matched_cosine=matched_cosine(learned, directions, signed=signed, **asked),
        absorption=absorption(learned, directions, parents, signed=signed, **asked) if (parents >= 0).any() else None,
        purity=purity(codes, true_codes, **asked),
        alive_share=alive_share(dictionary, x, target, **asked),
    )


# --- directions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """One latent for each true direction, no latent twice.

    Attributes:
        features: (M,) int64, rising; all of them where there are enough latents.
        latents: (M,) int64, the latent of each.
        cosines: (M,) signed cosine of the two.
    """

    features: np.ndarray
    latents: np.ndarray
    cosines: np.ndarray


def match_directions(learned: np.ndarray, truth: np.ndarray, *, signed: bool = True) -> Matching:
    """Match the rows of ``truth`` (F, O) with rows of ``learned`` (S, O) so that the sum of cosines is largest.

    Args:
        signed: whether it is the sum of the cosines or of their absolute values.

    Raises:
        UserError: the widths differ, or a number is not finite.
    """
    cosines_FS = _cosines(truth, learned)
    features, latents = linear_sum_assignment(cosines_FS if signed else np.abs(cosines_FS), maximize=True)
    return Matching(features, latents, cosines_FS[features, latents])


def matched_cosine(
    learned: np.ndarray, truth: np.ndarray, *, signed: bool = True, seed: int = 0, draws: int = DRAWS
) -> Score:
    """The mean cosine of matched directions; see the top of the file. Arguments as of `match_directions`."""

    def mean(latents_SO: np.ndarray) -> float:
        cosines = match_directions(latents_SO, truth, signed=signed).cosines
        return float((cosines if signed else np.abs(cosines)).sum() / len(truth))

    return _beside(mean(learned), [mean(random) for random in _random_directions(learned, seed, draws)])


def absorption(
    learned: np.ndarray,
    truth: np.ndarray,
    parents: np.ndarray,
    *,
    signed: bool = True,
    seed: int = 0,
    draws: int = DRAWS,
) -> Score:
    """The mean cosine between a child's latent and the child's true parent; see the top of the file.

    Args:
        learned, truth, signed: as of `match_directions`. With absolute cosines a latent that points against its child
            is turned round first.
        parents: (F,) the parent of each feature, or -1. Children left without a latent do not count.

    Raises:
        UserError: as of `match_directions`; no feature has a parent.
    """
    parents = np.asarray(parents)
    if len(parents) != len(truth) or not (parents >= 0).any():
        raise UserError(
            f"Absorption needs features with parents; among {len(truth)} directions and {len(parents)} entries of "
            f"parents {int((parents >= 0).sum())} have one."
        )

    def mean(latents_SO: np.ndarray) -> float:
        matching = match_directions(latents_SO, truth, signed=signed)
        is_child = parents[matching.features] >= 0
        parents_FS = _cosines(truth[parents[matching.features[is_child]]], latents_SO[matching.latents[is_child]])
        turned = 1.0 if signed else np.sign(matching.cosines[is_child])
        return _mean(np.diag(parents_FS) * turned)

    return _beside(mean(learned), [mean(random) for random in _random_directions(learned, seed, draws)])


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(rows of first, rows of second) float64; 0 for a row without length."""
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"True directions have {first.shape[1]} coordinates and decoder rows {second.shape[1]}; compare a "
            "dictionary with the planted features that it was trained on."
        )
    units = []
    for rows in (first, second):
        rows = np.asarray(rows, dtype=np.float64)
        if not np.isfinite(rows).all():
            raise UserError("Directions with numbers that are not finite cannot be matched; the training diverged.")
        units.append(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300))
    return units[0] @ units[1].T


def _random_directions(learned: np.ndarray, seed: int, draws: int) -> list[np.ndarray]:
    return [numpy_stream(seed, "recovery floor: directions", draw).normal(size=learned.shape) for draw in range(draws)]


# --- codes ------------------------------------------------------------------------------------------------------------


def purity(codes: Codes, true_codes: np.ndarray, *, least_rows: int = 10, seed: int = 0, draws: int = DRAWS) -> Score:
    """The mean over latents of the share of their rows in which their best feature is on; see the top of the file.

    Args:
        codes: of B rows.
        true_codes: (B, F), 0 where a feature is off.
        least_rows: latents that fire in fewer rows are left out: a single row is always pure.

    Raises:
        UserError: the two are of different rows.
    """
    if len(codes) != len(true_codes):
        raise UserError(f"There are codes of {len(codes)} rows, true codes of {len(true_codes)}; give the same rows.")
    active = codes.active().cpu().numpy()
    rows, latents = np.nonzero(active)[0], codes.indices.cpu().numpy()[active]
    fired_SB = csr_array((np.ones(len(rows), np.float32), (latents, rows)), shape=(codes.d_sae, len(codes)))
    counts_S = np.bincount(latents, minlength=codes.d_sae)
    enough = counts_S >= max(1, least_rows)
    on_BF = (true_codes != 0).astype(np.float32)

    def mean(order: np.ndarray | slice) -> float:
        together_SF = fired_SB @ on_BF[order]
        return _mean(together_SF[enough].max(axis=1) / counts_S[enough])

    shuffled = [permutation(len(codes), seed, "recovery floor: rows", draw) for draw in range(draws)]
    return _beside(mean(slice(None)), [mean(order) for order in shuffled])


def alive_share(
    dictionary: Dictionary, x: Tensor, target: Tensor | None = None, *, seed: int = 0, draws: int = DRAWS
) -> Score:
    """The share of latents that fire in at least one row of ``x`` (B, D), beside that of untrained dictionaries.

    Those are what a training on these rows and ``target`` (B, O) would begin with: same kind, widths and config.
    """
    return _beside(_alive(dictionary, x), [_alive(_untrained(dictionary, x, target, seed, i), x) for i in range(draws)])


@torch.no_grad()
def _alive(dictionary: Dictionary, x: Tensor) -> float:
    return float((dictionary.encode(x).fired() > 0).double().mean())


@dataclass(frozen=True)
class _Moments:
    mean: np.ndarray
    second_moment: np.ndarray


def _untrained(dictionary: Dictionary, x: Tensor, target: Tensor | None, seed: int, draw: int) -> Dictionary:
    """As training would begin it from these rows."""
    output_parts = None if dictionary.autoencoder else dictionary.output_parts
    untrained = type(dictionary)(dictionary.config, dictionary.input_parts, output_parts).to(dictionary.W_dec)
    rows_BD = x.double().cpu().numpy()
    generator = torch.Generator().manual_seed(derive_seed(seed, "recovery floor: untrained", draw) >> 1)
    untrained.initialise(x, target, generator, _Moments(rows_BD.mean(axis=0), rows_BD.T @ rows_BD / len(rows_BD)))
    return untrained


def _beside(value: float, floor: Sequence[float]) -> Score:
    spread = float(np.std(floor, ddof=1)) if len(floor) > 1 else math.nan
    return Score(value, float(np.mean(floor)) if len(floor) else math.nan, spread, len(floor))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
