"""The k-sparse autoencoder: tied weights, and of linear activations the k largest.

Makhzani and Frey 2013, "k-sparse autoencoders" (arXiv 1312.5663): algorithm 1, and the k that falls during training.

    a = W u + b_enc        codes = a where it is among the k largest of its row, else 0        output = codes W + b_dec

The selection is the only nonlinearity: a code is negative where fewer than k activations are positive. Encoding after
training keeps the alpha k largest instead; with an alpha above 1 codes are richer features and rebuild their input
worse, since the decoder learned with k. A falling k is all that there is against dead latents.

Ours: rows are scaled, b_dec begins at their mean and b_enc at minus what W makes of it, and W begins along random
directions at the strength that fits the first rows best. Rows of W keep whatever norm they learn.

Axes: B rows, D width, S latents, K active per row.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Loss, Width
from dictlearn.dictionaries.configs import KSparseConfig
from dictlearn.dictionaries.falling_k import falling_k
from dictlearn.dictionaries.scaling import LEAST, ControlStatistics, scalings


class KSparse(Dictionary):
    kind = "ksparse"
    Config = KSparseConfig
    config: KSparseConfig
    latent_tensors: ClassVar[tuple[str, ...]] = ("W", "b_enc", "rows_since_fired")

    def __init__(self, config: KSparseConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.W = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.input_scaling, self.target_scaling = scalings(config.scaling, self.input_parts, None)
        self.k = config.k
        """Latents active per row in training: the config's k, or more in the first steps of a run."""

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]
        return self.W

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override]
        return self.W

    def encode(self, x: Tensor) -> Codes:
        """Raw activations (B, D) to the alpha k largest; values times rows of W are raw once folded, scaled before."""
        values, indices, _ = self._largest(self.input_scaling(x), min(self.d_sae, round(self.config.alpha * self.k)))
        return Codes(indices, values, self.d_sae)

    def decode(self, codes: Codes) -> Tensor:
        return self.target_scaling.undo(ops.decode(codes.values, codes.indices, self.W) + self.b_dec)

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD = self.input_scaling(x)
        values_BK, indices_BK, _ = self._largest(x_BD, self.k)
        output_BD = ops.decode(values_BK, indices_BK, self.W) + self.b_dec
        mse = (x_BD - output_BD).square().mean()
        codes = Codes(indices_BK, values_BK.detach(), self.d_sae)
        return Loss(mse, {"mse": mse.detach()}, codes, self.target_scaling.undo(output_BD.detach()))

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        self.input_scaling.fit(x, control)
        x_BD = self.input_scaling(x)
        self.W.copy_(F.normalize(torch.randn(self.W.shape, generator=generator), dim=1))
        self.b_dec.copy_(x_BD.mean(dim=0))
        self.b_enc.copy_(-self.W @ self.b_dec)
        values_BK, indices_BK, _ = self._largest(x_BD, self.config.k_start or self.config.k)
        output_BD = ops.decode(values_BK, indices_BK, self.W)
        fit = (output_BD * (x_BD - self.b_dec)).sum() / output_BD.square().sum().clamp_min(LEAST)
        if fit > 0:  # what is decoded grows with the square of W
            self.W.mul_(fit.sqrt())
            self.b_enc.mul_(fit.sqrt())

    def schedule(self, step: int, steps: int) -> None:
        self.k = falling_k(self.config.k_start, self.config.k, self.config.k_anneal_share, step, steps)

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes raw activations. W stays what it is: its two uses are scaled by inverse factors."""
        folded = self.copy()
        unit = self.target_scaling.unit()
        folded.b_enc.copy_(self.b_enc.double() * unit)
        folded.b_dec.copy_(self.b_dec.double() * unit)
        folded.drop_scaling()
        folded.k = self.config.k
        return folded

    def _largest(self, x_BD: Tensor, k: int) -> ops.TopKCodes:
        return ops.encode_topk(x_BD, self.W, self.b_enc, k, rule="linear")
