"""How much the latents of a dictionary overlap: all of them, and those that are active together.

The Babel function (Tropp 2004, "Greed is good"; for dictionaries of activations Costa et al. 2025, arXiv 2506.03093) is
the largest sum of absolute cosines between one atom and r others:

    mu_1(r) = max over sets of r atoms, and over atoms j beyond the set, of sum over i in the set of |<d_i, d_j>|

The effective rank of codes Z is exp(H(p)), where p are the eigenvalues of Z^T Z divided by their sum and H is Shannon's
entropy: in how many directions of the space of latents the codes spread.

Axes: B rows, D width, K slots, S latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.codes import Codes

AT_ONCE = 2**24
"""Cosines in memory at a time: 128 MiB."""


@torch.no_grad()
def babel(directions: Tensor, sizes: Sequence[int]) -> list[float]:
    """mu_1 of all directions (S, D), of any length but 0, for each size r below S. ValueError for another size."""
    if not all(1 <= size < len(directions) for size in sizes):
        raise ValueError(f"Of {len(directions)} atoms a set beside one of them has 1 to {len(directions) - 1}.")
    unit_SD = F.normalize(directions.double(), dim=1)
    most = torch.zeros(max(sizes), dtype=torch.float64)
    first = 0
    for block in unit_SD.split(max(1, AT_ONCE // len(unit_SD))):
        cosines = (block @ unit_SD.T).abs()
        cosines[torch.arange(len(block)), first + torch.arange(len(block))] = 0
        sums = cosines.topk(max(sizes), dim=1).values.cumsum(dim=1)
        most = torch.maximum(most, sums.amax(dim=0).cpu())
        first += len(block)
    return [float(most[size - 1]) for size in sizes]


@torch.no_grad()
def babel_of_active(directions: Tensor, codes: Codes, sizes: Sequence[int]) -> list[float]:
    """mu_1 of the atoms that are active in a row, for each size r: the mean over rows with more than r active.

    NaN where there is no such row. Latents of unequal number in a row are compared among themselves alone; an atom that
    stands in two slots counts once.
    """
    unit_SD = F.normalize(directions.double(), dim=1)
    slots = codes.indices.shape[1]
    sums = torch.zeros(len(sizes), dtype=torch.float64)
    rows = torch.zeros(len(sizes), dtype=torch.float64)
    block = max(1, AT_ONCE // (slots * max(slots, unit_SD.shape[1])))
    for indices_bK, active_bK in zip(codes.indices.split(block), codes.active().split(block), strict=True):
        atoms_bKD = unit_SD[indices_bK] * active_bK[:, :, None]
        cosines_bKK = (atoms_bKD @ atoms_bKD.mT).abs()
        cosines_bKK = cosines_bKK.masked_fill(indices_bK[:, :, None] == indices_bK[:, None, :], 0.0)
        largest_bK = cosines_bKK.sort(dim=2, descending=True).values.cumsum(dim=2).amax(dim=1)
        active_b = active_bK.sum(dim=1)
        for place, size in enumerate(sizes):
            if size < slots:
                enough_b = active_b > size
                sums[place] += largest_bK[enough_b, size - 1].sum().cpu()
                rows[place] += enough_b.sum().cpu()
    return (sums / rows).tolist()


@torch.no_grad()
def effective_rank(codes: Iterable[Codes]) -> float:
    """exp of the entropy of the normalised eigenvalues of Z^T Z, between 1 and S, over all rows of all codes; NaN of
    codes that are all empty."""
    gram_SS: Tensor | None = None
    for part in codes:
        dense_BS = part.dense().double()
        gram_SS = dense_BS.T @ dense_BS if gram_SS is None else gram_SS.addmm_(dense_BS.T, dense_BS)
    if gram_SS is None or not gram_SS.any():
        return float("nan")
    shares_S = torch.linalg.eigvalsh(gram_SS).clamp_min(0)
    return float(torch.special.entr(shares_S / shares_S.sum()).sum().exp())
