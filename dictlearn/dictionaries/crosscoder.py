"""Crosscoder: latents that read several hooks together and write to each of them, with an L1 penalty by decoder norms.

Lindsey, Templeton, Marcus, Conerly, Batson, Olah 2024, "Sparse crosscoders for cross-layer features and model diffing"
(Transformer Circuits Thread). The hooks p are layers of one model, or the same layer of several:

    codes = ReLU(sum_p W_enc^p u^p + b_enc)        output^p = codes W_dec^p + b_dec^p        u: the scaled inputs
    loss = sum_p |u^p - output^p|^2 + lambda * sum_s codes_s * sum_p |W_dec,s^p|

The sum of norms, and not the norm of all parts together, is what lets a latent drop the hooks it is of little use for:
`dictlearn.dictionaries.parts` tells the shared latents from the exclusive ones. Decoder rows keep whatever norms they
learn, since the penalty counts them, and there is no pre-bias.

In our units the squared error is a mean over coordinates, and l1 is divided by sqrt(O), as for the other kinds with a
penalty. Every hook has unit variance in scaled units. Dead latents are redrawn when asked for, as for those kinds.

An L1 penalty makes some latents look exclusive that are not: it shrinks the smaller of two parts to nothing (Minder et
al. 2025, arXiv 2504.02922, who find fewer of them with BatchTopK; here that is kind batchtopk with several hooks).

Axes: B rows, D input width, O output width, S latents, P hooks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dictlearn.dictionaries.configs import CrosscoderConfig
from dictlearn.dictionaries.parts import norms_of_parts
from dictlearn.dictionaries.relu import ReLU
from dictlearn.dictionaries.scaling import ControlStatistics


class Crosscoder(ReLU):
    kind = "crosscoder"
    Config = CrosscoderConfig
    config: CrosscoderConfig

    @torch.no_grad()
    def initialise(
        self, x: Tensor, target: Tensor | None, generator: torch.Generator, control: ControlStatistics
    ) -> None:
        """As an autoencoder of all hooks together, whose pre-bias becomes a part of b_enc and is learned there."""
        super().initialise(x, target, generator, control)
        self.b_enc.sub_(self.W_enc @ self.b_dec)
        self.subtracts_b_dec = False

    def project_gradients(self) -> None:
        """Nothing: the penalty counts the norms of decoder rows."""

    def constrain(self) -> None:
        """Nothing, for the same reason."""

    def _sizes(self, codes_BS: Tensor) -> Tensor:
        return codes_BS * norms_of_parts(self.W_dec, self.output_parts).sum(dim=1)
