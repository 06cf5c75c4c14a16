"""ICFL: iterative codebook feature learning. No learned encoder: batched orthogonal matching pursuit finds the codes.

Donhauser, Ulicna, Moran, Ravuri, Kenyon-Dean, Eastwood, Hartford 2024, "Towards scientific discovery with dictionary
learning" (arXiv 2412.16247, ICML 2025): algorithm 1 (encoder), section 3 (whitening on controls, resets).

    u = T (x - mu)          mu, T from control rows: their mean and, when asked, their PCA whitening
    r = u / |u|             every row has unit norm
    repeat J times:         I = the L atoms with the largest signed inner product with r
                            c = argmin |r - sum c_i W_i|^2,  r = r - sum c_i W_i,  z[I] += c
    output = |u| (z W) T^-1 + mu

Codes are |u| z, so that decoding needs the codes alone. The paper also learns a bias inside the unit sphere; a row's
length is not known to a decoder that sees codes, so ours stays at the control mean (the same place for centred rows).

The residual itself is not formed. With the Gram matrix G = W W^T the inner products of the next residual are those of
this one minus c G[I], and the small systems are G[I, I]: B L S multiplications a round instead of B D S. Where G itself
would take more, or too much memory, residuals are formed after all.

Axes: B rows, b rows of a block, D width, S atoms, L atoms per round, J rounds, K = J L slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Update, Width, forget_moments
from dictlearn.dictionaries.configs import ICFLConfig
from dictlearn.dictionaries.scaling import LEAST, whitening

if TYPE_CHECKING:
    from dictlearn.dictionaries.scaling import ControlStatistics

RIDGE = 1e-6
"""Added to the diagonal of each L x L system: two nearly equal atoms in one round would otherwise explode."""
PRODUCTS = 2**19
"""Inner products of rows and atoms there are at once on a thread: 2 MiB of float32, which stay in its cache."""
SHARED_PRODUCTS = 2**22
"""The same of several threads (16 MiB): they wait for each other at every operation, so fewer and larger ones."""
LEAST_ROWS = 64
"""Of a block, however many atoms there are: the operations of a round have a cost of their own."""
STRIP = 512
"""Rows of the Gram matrix computed at once; what mirrors an earlier strip is copied."""
MOST_ATOMS = 2**14
"""With more, the Gram matrix would take over 1 GiB, and residuals are formed instead."""
FEW = 16
"""Most atoms of a round for which looking for one after the other is faster than torch.topk."""


class ICFL(Dictionary):
    kind = "icfl"
    Config = ICFLConfig
    config: ICFLConfig
    updated_by_row = ("atoms",)
    mean: Tensor
    whiten: Tensor
    unwhiten: Tensor

    def __init__(self, config: ICFLConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.atoms = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.register_buffer("mean", torch.zeros(self.d_in))
        self.register_buffer("whiten", torch.eye(self.d_in))
        self.register_buffer("unwhiten", torch.eye(self.d_in))

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        """(S, D) what each atom adds to a raw activation."""
        return self.atoms @ self.unwhiten

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        return self.mean

    def encode(self, x: Tensor) -> Codes:
        with torch.autocast(x.device.type, enabled=False):
            unit_BD, length_B1 = self._unit_rows(x)
            codes = self._pursue(unit_BD)
        return replace(codes, values=codes.values * length_B1)

    def decode(self, codes: Codes) -> Tensor:
        return self._raw(ops.decode(codes.values, codes.indices, self.atoms))

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        """Squared error of the unit rows; the codes are constants, only the atoms learn.

        Autocast is off: residuals are differences of inner products, and bfloat16 has no digits left for them.
        """
        with torch.autocast(x.device.type, enabled=False):
            unit_BD, length_B1 = self._unit_rows(x)
            codes = self._pursue(unit_BD)
            rebuilt_BD = ops.decode(codes.values, codes.indices, self.atoms)
            mse = (unit_BD - rebuilt_BD).square().sum(dim=1).mean()
            codes = replace(codes, values=codes.values * length_B1)
            output_BD = self._raw(rebuilt_BD.detach() * length_B1)
        return Loss(mse, {"mse": mse.detach()}, codes, output_BD)

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """Mean and whitening from the control rows; atoms uniform as in a torch Linear, which the paper uses."""
        mean = torch.tensor(control.mean).flatten()
        self.mean.copy_(mean)
        if self.config.whiten:
            whiten, unwhiten = whitening(mean, torch.tensor(control.second_moment), self.config.shrinkage)
            self.whiten.copy_(whiten)
            self.unwhiten.copy_(unwhiten)
        bound = self.d_in**-0.5
        self.atoms.copy_((2 * torch.rand(self.atoms.shape, generator=generator) - 1) * bound)

    @torch.no_grad()
    def after_update(self, update: Update) -> dict[str, float]:
        """Every ``reset_every`` steps, redraw one of each pair of atoms closer than ``reset_cosine`` on the sphere."""
        if (update.step + 1) % self.config.reset_every:
            return {}
        repeated = _repeated(F.normalize(self.atoms, dim=1), self.config.reset_cosine)
        if len(repeated):
            fresh = F.normalize(torch.randn(len(repeated), self.d_in, generator=update.generator), dim=1)
            self.atoms[repeated] = fresh.to(self.atoms)
            forget_moments(update.optimiser, self.atoms, repeated)
        return {"resets": float(len(repeated))}

    def fold(self) -> Self:
        """Nothing to fold: mean and whitening are part of the encoder."""
        return self.copy()

    def _unit_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u_BD = x - self.mean
        if self.config.whiten:
            u_BD = u_BD @ self.whiten
        length_B1 = u_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return u_BD / length_B1, length_B1

    def _raw(self, u_BD: Tensor) -> Tensor:
        return (u_BD @ self.unwhiten if self.config.whiten else u_BD) + self.mean

    @torch.no_grad()
    def _pursue(self, unit_BD: Tensor) -> Codes:
        """Algorithm 1; an atom chosen in two rounds has one slot."""
        rounds, width = self.config.rounds, self.config.width
        if self.config.select_by_cosine:  # with atoms of unit norm the inner products are the cosines
            norms_S = torch.linalg.vector_norm(self.atoms, dim=1).clamp_min(LEAST)
            W_SD = self.atoms / norms_S[:, None]
            values_BK, indices_BK = pursue(unit_BD, W_SD, RIDGE / norms_S.square(), rounds, width)
            values_BK = values_BK / norms_S[indices_BK]
        else:
            ridge_S = torch.full_like(self.atoms[:, 0], RIDGE)
            values_BK, indices_BK = pursue(unit_BD, self.atoms, ridge_S, rounds, width)
        return Codes.merged(indices_BK, values_BK, self.d_sae)


@torch.no_grad()
def pursue(rows_BD: Tensor, W_SD: Tensor, ridge_S: Tensor, rounds: int, width: int) -> tuple[Tensor, Tensor]:
    """``(coefficients, atoms)``, each (B, K): those of one round after those of the other, block by block of rows.

    Args:
        ridge_S: what is added to the squared norm of each atom in the small systems.
    """
    atoms = len(W_SD)
    gram_SS = _gram(W_SD) if atoms <= min((rounds - 1) * len(rows_BD), MOST_ATOMS) else None
    diagonal_S = W_SD.square().sum(dim=1) + ridge_S
    block = max(1, len(rows_BD))
    if rows_BD.device.type == "cpu":
        block = max(LEAST_ROWS, (PRODUCTS if torch.get_num_threads() == 1 else SHARED_PRODUCTS) // atoms)
    found = [_pursue_block(rows_bD, W_SD, gram_SS, diagonal_S, rounds, width) for rows_bD in rows_BD.split(block)]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def _repeated(unit_SD: Tensor, cosine: float) -> Tensor:
    """Numbers of the atoms that are closer than ``cosine`` to an earlier one."""
    found = []
    for first in range(0, len(unit_SD), STRIP):
        last = first + STRIP
        close = unit_SD[first:last] @ unit_SD[:last].T > cosine
        found.append(close.tril(diagonal=first - 1).any(dim=1))
    return torch.cat(found).nonzero().squeeze(1)


def _gram(W_SD: Tensor) -> Tensor:
    """(S, S) inner products of the atoms, each computed once."""
    gram_SS = W_SD.new_empty(len(W_SD), len(W_SD))
    for first in range(0, len(W_SD), STRIP):
        last = first + STRIP
        torch.mm(W_SD[first:last], W_SD[first:].T, out=gram_SS[first:last, first:])
        gram_SS[last:, first:last] = gram_SS[first:last, last:].T
    return gram_SS


def _pursue_block(
    residual_bD: Tensor, W_SD: Tensor, gram_SS: Tensor | None, diagonal_S: Tensor, rounds: int, width: int
) -> tuple[Tensor, Tensor]:
    values, indices = [], []
    products_bS = residual_bD @ W_SD.T
    i_P, j_P = torch.tril_indices(width, width, offset=-1, device=W_SD.device)
    for round_ in range(rounds):
        right_bL, chosen_bL = _largest(products_bS, width)
        system_bLL = torch.diag_embed(diagonal_S[chosen_bL])  # above the diagonal nothing is read
        if gram_SS is None:
            atoms_bLD = W_SD[chosen_bL]
            system_bLL[:, i_P, j_P] = (atoms_bLD @ atoms_bLD.mT)[:, i_P, j_P]
        else:
            system_bLL[:, i_P, j_P] = gram_SS.take(chosen_bL[:, i_P] * len(gram_SS) + chosen_bL[:, j_P])
        factor_bLL, failed_b = torch.linalg.cholesky_ex(system_bLL)
        c_bL = torch.cholesky_solve(right_bL[:, :, None], factor_bLL).squeeze(2)
        c_bL = torch.where((failed_b == 0)[:, None], c_bL, torch.zeros_like(c_bL))
        values.append(c_bL)
        indices.append(chosen_bL)
        if round_ + 1 == rounds:
            break
        if gram_SS is None:
            residual_bD = residual_bD - (c_bL[:, None, :] @ atoms_bLD).squeeze(1)
            torch.mm(residual_bD, W_SD.T, out=products_bS)
        else:
            products_bS -= F.embedding_bag(chosen_bL, gram_SS, mode="sum", per_sample_weights=c_bL)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def _largest(products_bS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``(values, places)``, each (b, width), of the largest of each row, in any order."""
    if products_bS.device.type != "cpu" or width > FEW or products_bS.dtype not in (torch.float32, torch.float64):
        found = products_bS.topk(width, dim=1, sorted=False)
        return found.values, found.indices
    # numpy's argmax again and again, over what was found before, takes half the time of torch.topk
    products, rows = products_bS.numpy(), np.arange(len(products_bS))
    values, places = np.empty((len(rows), width), products.dtype), np.empty((len(rows), width), np.int64)
    for number in range(width):
        places[:, number] = products.argmax(axis=1)
        values[:, number] = products[rows, places[:, number]]
        products[rows, places[:, number]] = -np.inf
    np.put_along_axis(products, places, values, axis=1)
    return torch.from_numpy(values), torch.from_numpy(places)
