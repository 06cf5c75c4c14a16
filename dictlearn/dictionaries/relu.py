"""ReLU with an L1 penalty: the plain sparse autoencoder, and its transcoder.

Bricken et al. 2023, "Towards monosemanticity" (the autoencoder with a pre-bias, unit decoder rows, redrawn dead
latents); Cunningham et al. 2023 (arXiv 2309.08600); Conerly et al. 2024, "Update on how we train SAEs" (the penalty's
warm-up over the first 5 % of the run).

    codes = ReLU(W_enc (u - b_pre) + b_enc)        output = codes W_dec + b_dec        u: the scaled input
    loss  = mse + l1_weight * warm-up * l1         l1 = mean over rows of sum(codes) / sqrt(O)

The penalty is on the codes alone, and decoder rows are kept at unit norm (Bricken et al.; the other form, in Conerly et
al., lets rows grow and multiplies each code by its row's norm). With rows of mean squared length d, as in Conerly et
al., their lambda is l1_weight * sqrt(d): 5 is 0.1 at a width of 2500.

Axes: B rows, D input width, O output width, S latents.
"""

from __future__ import annotations

from torch import Tensor

from dictlearn.dictionaries.base import Loss
from dictlearn.dictionaries.configs import ReLUConfig
from dictlearn.dictionaries.penalised import Penalised


class ReLU(Penalised):
    kind = "relu"
    Config = ReLUConfig
    config: ReLUConfig

    def activate(self, product_BS: Tensor) -> Tensor:
        return (product_BS + self.b_enc).relu()

    def loss(self, x: Tensor, target: Tensor | None = None) -> Loss:
        x_BD, target_BO = self._scaled(x, target)
        codes_BS = self.activate(self._product(x_BD))
        output_BO = codes_BS @ self.W_dec + self.b_dec
        mse = (target_BO - output_BO).square().mean()
        l1 = self._sizes(codes_BS).sum(dim=1).mean() / self.length
        total = mse + self.config.l1_weight * self.warmed * l1
        return self._reported(x, total, {"mse": mse, "l1": l1}, codes_BS, output_BO)

    def _sizes(self, codes_BS: Tensor) -> Tensor:
        """(B, S) what the penalty sums up: the codes themselves, since decoder rows have unit norm."""
        return codes_BS
