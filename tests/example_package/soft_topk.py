"""Soft top-k: of the k largest activations of a row, what each exceeds the next one by.

    u = x / c      a = relu(W (u - b))      codes = relu(a - t), t the (k+1)-th largest of a      y = c (codes W + b)

A small shift of x can make TopK drop a latent of any strength; here a latent is at zero before another takes its place,
so codes are continuous. Weights are tied and rows of W keep whatever norm they learn, which makes up for the shrinkage.
An example of a dictionary in a package of its own; no paper stands behind it.

Axes: B rows, D width, S latents, K active per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activation_store import UserError
from dictlearn import Codes, Dictionary
from dictlearn.dictionaries.base import Loss
from dictlearn.dictionaries.scaling import ControlStatistics, scalings


@dataclass(frozen=True)
class SoftTopKConfig:
    """k active latents per row with tied weights, each lowered by the largest activation that is left out."""

    kind: ClassVar[str] = "softtopk"
    transcodes: ClassVar[bool] = False
    several_hooks: ClassVar[bool] = False

    d_sae: int = 4096
    """Number of latents."""
    k: int = 32
    """Most latents active per row."""

    def check(self, d_in: int, d_out: int) -> None:
        if not 1 <= self.k < self.d_sae:
            raise UserError(f"k is {self.k}; it must be from 1 to d_sae - 1 ({self.d_sae - 1}).")


class SoftTopK(Dictionary):
    kind = "softtopk"
    Config = SoftTopKConfig
    config: SoftTopKConfig

    def __init__(self, config: SoftTopKConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.input_scaling, self.target_scaling = scalings("mean_square", self.input_parts, None)

    @property
    def W_enc(self) -> Tensor:  # what circuits and indexes read; trained is W
        return self.W

    @property
    def W_dec(self) -> Tensor:
        return self.W

    @property
    def b_enc(self) -> Tensor:
        return -self.W @ self.b_dec

    def encode(self, x: Tensor) -> Codes:
        return self._active(self.input_scaling(x))

    def decode(self, codes: Codes) -> Tensor:
        return self.target_scaling.undo(self._rebuilt(codes))

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        u_BD = self.input_scaling(x)
        codes = self._active(u_BD)
        output_BD = self._rebuilt(codes)
        mse = (u_BD - output_BD).square().mean()
        raw = self.target_scaling.undo(output_BD.detach())
        return Loss(total=mse, terms={"mse": mse.detach()}, codes=codes.detach(), output=raw)

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        self.input_scaling.fit(x, control)
        self.b_dec.copy_(self.input_scaling(x).mean(dim=0))
        self.W.copy_(F.normalize(torch.randn(self.W.shape, generator=generator), dim=1))

    @torch.no_grad()
    def fold(self) -> Self:
        """Codes grow by c, as b does; W is used to read and to write, by inverse factors, and stays."""
        folded = self.copy()
        folded.b_dec.mul_(self.target_scaling.unit())
        folded.drop_scaling()
        return folded

    def _active(self, u_BD: Tensor) -> Codes:
        largest = F.relu((u_BD - self.b_dec) @ self.W.T).topk(self.config.k + 1, dim=1)
        values_BK = largest.values[:, :-1] - largest.values[:, -1:]
        return Codes(largest.indices[:, :-1], values_BK, self.d_sae)

    def _rebuilt(self, codes: Codes) -> Tensor:
        """(B, D) in scaled units."""
        written_BKD = F.embedding(codes.indices, self.W)
        return (codes.values.unsqueeze(1) @ written_BKD).squeeze(1) + self.b_dec
