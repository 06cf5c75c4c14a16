"""Does a direction see a concept? Cosines with activations, on texts that have the concept and texts that do not.

A text's score is the largest cosine of the unit direction with an activation of the hook, over all tokens but BOS.
Shafran, Geiger and Geva 2025 (arXiv 2506.10920) compare the means of the two kinds of text by S_CD = log(mean of
activating / mean of neutral). A cosine may be negative, and a mean of 0 or less has no such logarithm: S_CD is None
then, and AUROC, which only compares, says what there is to say. A ratio of two small means is large by chance, so read
both beside those of `random_directions`.

Axes: X texts, T tokens of a text without BOS, D width, N directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.metrics.splicing import activations_at
from dictlearn.steering.directions import Direction
from dictlearn.steering.edit import ROWS_AT_ONCE, device_of, padded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Detection:
    """How well a direction tells texts that have a concept from texts that do not.

    Attributes:
        mean_activating, mean_neutral: of the texts' largest cosines.
        s_cd: log of their ratio; None where either is not above 0.
        auroc: probability that an activating text scores above a neutral one.
    """

    mean_activating: float
    mean_neutral: float
    s_cd: float | None
    auroc: float


def detect(activating: np.ndarray, neutral: np.ndarray) -> Detection:
    """From the scores of the texts of each kind, (X,) each.

    Raises:
        UserError: no text of one kind.
    """
    from sklearn.metrics import roc_auc_score

    if not len(activating) or not len(neutral):
        raise UserError("Detection compares texts that have a concept with texts that do not; give some of each.")
    means = float(activating.mean()), float(neutral.mean())
    s_cd = math.log(means[0] / means[1]) if min(means) > 0 else None
    labels = np.repeat([1, 0], [len(activating), len(neutral)])
    return Detection(*means, s_cd, float(roc_auc_score(labels, np.concatenate([activating, neutral]))))


def text_activations(
    model: TransformerBridge, hook: str, texts: Sequence[Sequence[int]], skip_first: bool
) -> list[Tensor]:
    """(T, D) float32 activations at a hook of each text of token ids; without the first token's, which is BOS, or with.

    Raises:
        UserError: a hook the model does not have, or a text without a token to look at.
    """
    if short := [number for number, text in enumerate(texts) if len(text) <= skip_first]:
        raise UserError(f"Text {short[0] + 1} of {len(texts)} has no tokens; leave it out.")
    found = []
    for first in range(0, len(texts), ROWS_AT_ONCE):
        batch = padded(texts[first : first + ROWS_AT_ONCE])
        (rows,) = activations_at(model, batch.tokens.to(device_of(model)), [hook])
        kept = zip(rows.flatten(2).float().cpu(), batch.lengths.tolist(), strict=True)
        found += [of_text[int(skip_first) : length] for of_text, length in kept]
    return found


def concept_scores(activations: Sequence[Tensor], directions: Sequence[Direction]) -> np.ndarray:
    """(X, N) each text's largest cosine with each direction; a row of zeros has cosine 0 with all.

    Args:
        activations: (T, D) of each text, at the directions' hook.
    """
    units_ND = torch.stack([direction.unit for direction in directions])
    return np.stack([(F.normalize(rows, dim=1) @ units_ND.T).amax(dim=0).double().numpy() for rows in activations])
