"""How well a dictionary rebuilds activations: one pass over rows, pooled in float64.

The project's explained variance is ``1 - sum |e|^2 / sum |y - mean(y)|^2`` over the whole set of rows (FVU is the
fraction). Other tools print other quantities under the same name; they are reported here under names of their own.

Axes: B rows, O output width, S latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary


@dataclass(frozen=True)
class Reconstruction:
    """Numbers about one dictionary over one set of rows.

    Attributes:
        rows: how many rows were read.
        fvu: fraction of variance unexplained, pooled over rows and coordinates.
        explained_variance: 1 - fvu.
        explained_variance_about_zero: 1 - sum |e|^2 / sum |y|^2 (inflated by a large mean; printed by others as
            "explained variance").
        explained_variance_per_coordinate: mean over coordinates of 1 - var(e_o) / var(y_o), about each one's own mean
            error (so a constant offset is free; printed by others as "variance explained").
        l0: mean latents active per row.
        cosine: mean cosine between reconstruction and target.
        l2_ratio: mean of |reconstruction| / |target|.
        dead_share: share of latents that fired in none of the rows.
        rare_share: share that fired in fewer than one row in 100,000, where `rows` is large enough to tell.
        density: (S,) share of rows in which each latent fired.
        fvu_of_parts: fvu of each hook, where the output is several side by side: pooled, the largest hook decides.
    """

    rows: int
    fvu: float
    explained_variance: float
    explained_variance_about_zero: float
    explained_variance_per_coordinate: float
    l0: float
    cosine: float
    l2_ratio: float
    dead_share: float
    rare_share: float
    density: np.ndarray
    fvu_of_parts: tuple[float, ...]


@torch.no_grad()
def measure_reconstruction(
    dictionary: Dictionary, batches: Iterable[tuple[Tensor, Tensor | None]], shift: Tensor | None = None
) -> Reconstruction:
    """Pool the metrics over ``batches`` of raw ``(x (B, D), target (B, O) or None)``.

    Args:
        dictionary: takes raw activations.
        batches: rows; a target of None means x.
        shift: (O,) a constant near the mean, subtracted before squares are summed, so that a large mean does not cost
            digits. Any value gives the same result in exact arithmetic; the first batch's mean when not given.

    Raises:
        UserError: when there is not a single row.
    """
    rows = 0
    fired_S = torch.zeros(dictionary.d_sae, dtype=torch.int64)
    l0 = cosine = l2_ratio = 0.0
    sums: dict[str, Tensor] = {}
    for x, target in batches:
        y_BO = x if target is None else target
        codes = dictionary.encode(x)
        output_BO = dictionary.decode(codes)
        if shift is None:
            shift = y_BO.double().mean(dim=0)
        error_BO = y_BO.double() - output_BO.double()
        shifted_BO = y_BO.double() - shift
        for name, value in (
            ("error", error_BO.sum(dim=0)),
            ("error squared", error_BO.square().sum(dim=0)),
            ("target", shifted_BO.sum(dim=0)),
            ("target squared", shifted_BO.square().sum(dim=0)),
            ("raw squared", y_BO.double().square().sum(dim=0)),
        ):
            sums[name] = sums[name] + value if name in sums else value
        norms_B, output_norms_B = y_BO.norm(dim=1), output_BO.norm(dim=1)
        cosine += float(torch.nn.functional.cosine_similarity(output_BO, y_BO, dim=1).double().sum())
        l2_ratio += float((output_norms_B / norms_B.clamp_min(1e-12)).double().sum())
        l0 += float(codes.l0().sum())
        fired_S += codes.fired().cpu()
        rows += len(y_BO)
    if rows == 0:
        raise UserError("There is not a single row to evaluate on; harvest more tokens, or choose another split.")
    deviation = sums["target squared"] - sums["target"].square() / rows
    error_deviation = sums["error squared"] - sums["error"].square() / rows
    fvu = float(sums["error squared"].sum() / deviation.sum())
    return Reconstruction(
        rows=rows,
        fvu=fvu,
        explained_variance=1 - fvu,
        explained_variance_about_zero=float(1 - sums["error squared"].sum() / sums["raw squared"].sum()),
        explained_variance_per_coordinate=float((1 - error_deviation / deviation.clamp_min(1e-30)).mean()),
        l0=l0 / rows,
        cosine=cosine / rows,
        l2_ratio=l2_ratio / rows,
        dead_share=float((fired_S == 0).double().mean()),
        rare_share=float((fired_S < rows * 1e-5).double().mean()),
        density=(fired_S.double() / rows).numpy(),
        fvu_of_parts=tuple(
            float(error.sum() / spread.sum())
            for error, spread in zip(
                sums["error squared"].split(dictionary.output_parts),
                deviation.split(dictionary.output_parts),
                strict=True,
            )
        ),
    )
