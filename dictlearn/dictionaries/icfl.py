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

The residual itself is never formed. With the Gram matrix G = W W^T the inner products of the next residual are those of
this one minus c G[I], and the small systems are G[I, I]: B L M multiplications a round instead of B D M.

Axes: B rows, D width, S atoms, L atoms per round, J rounds, K = J L slots.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Update, Width, forget_moments
from dictlearn.dictionaries.configs import ICFLConfig
from dictlearn.dictionaries.scaling import whitening

if TYPE_CHECKING:
    from dictlearn.dictionaries.base import ControlStatistics

RIDGE = 1e-6
"""Added to the diagonal of each L x L system: two nearly equal atoms in one round would otherwise explode."""


class ICFL(Dictionary):
    kind = "icfl"
    Config = ICFLConfig
    config: ICFLConfig
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
        unit_BD, length_B1 = self._unit_rows(x)
        codes = self._pursue(unit_BD)
        return replace(codes, values=codes.values * length_B1)

    def decode(self, codes: Codes) -> Tensor:
        return ops.decode(codes.values, codes.indices, self.atoms) @ self.unwhiten + self.mean

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
            output_BD = (rebuilt_BD.detach() * length_B1) @ self.unwhiten + self.mean
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
        unit_SD = F.normalize(self.atoms, dim=1)
        close_SS = (unit_SD @ unit_SD.T).triu(diagonal=1) > self.config.reset_cosine
        repeated = close_SS.any(dim=0).nonzero().squeeze(1)  # of each pair the later one
        if len(repeated):
            fresh = F.normalize(torch.randn(len(repeated), self.d_in, generator=update.generator), dim=1)
            self.atoms[repeated] = fresh.to(self.atoms)
            forget_moments(update.optimiser, self.atoms, repeated)
        return {"resets": float(len(repeated))}

    def fold(self) -> Self:
        """Nothing to fold: mean and whitening are part of the encoder."""
        return self.copy()

    def _unit_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u_BD = (x - self.mean) @ self.whiten
        length_B1 = u_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return u_BD / length_B1, length_B1

    @torch.no_grad()
    def _pursue(self, unit_BD: Tensor) -> Codes:
        """Algorithm 1; an atom chosen in two rounds has one slot."""
        gram_SS = self.atoms @ self.atoms.T
        norms_S = gram_SS.diagonal().clamp_min(1e-12).sqrt()
        products_BS = unit_BD @ self.atoms.T
        ridge_LL = RIDGE * torch.eye(self.config.width, dtype=unit_BD.dtype, device=unit_BD.device)
        values, indices = [], []
        for round_ in range(self.config.rounds):
            score_BS = products_BS / norms_S if self.config.select_by_cosine else products_BS
            chosen_BL = score_BS.topk(self.config.width, dim=1, sorted=False).indices
            system_BLL = gram_SS[chosen_BL[:, :, None], chosen_BL[:, None, :]] + ridge_LL
            factor_BLL, failed_B = torch.linalg.cholesky_ex(system_BLL)
            right_BL1 = products_BS.gather(1, chosen_BL)[:, :, None]
            c_BL = torch.cholesky_solve(right_BL1, factor_BLL).squeeze(2)
            c_BL = torch.where((failed_B == 0)[:, None], c_BL, torch.zeros_like(c_BL))
            values.append(c_BL)
            indices.append(chosen_BL)
            if round_ + 1 < self.config.rounds:
                products_BS -= F.embedding_bag(chosen_BL, gram_SS, mode="sum", per_sample_weights=c_BL)
        return Codes.merged(torch.cat(indices, dim=1), torch.cat(values, dim=1), self.d_sae)
