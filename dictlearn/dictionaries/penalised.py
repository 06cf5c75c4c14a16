"""What the dictionaries with a sparsity penalty share (`relu`, `jumprelu`, `gated`): all but the activation and loss.

    codes = activation(W_enc (u - b_pre))        output = codes W_dec + b_dec        u: the scaled input

An autoencoder's b_pre is its b_dec, a transcoder has none. How many latents fire is not bounded, so the loss is dense
algebra in autograd; only what leaves the dictionary is packed into codes.

Decoder rows have unit norm in scaled units (see `dictlearn.dictionaries.scaling`), otherwise a penalty on the size of
codes would be evaded by long rows: their gradient loses its component along them, after each update the norm is
restored.

The papers scale rows so that their squared length has a mean of 1; here a coordinate's has. The squared error of the
papers is then our mean over coordinates, and lengths in their units are ours divided by sqrt(O), which `length` is.

Axes: B rows, D input width, O output width, S latents, K slots of the busiest row, A dead latents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Loss, Update, Width
from dictlearn.dictionaries.configs import PenalisedConfig
from dictlearn.dictionaries.two_matrices import TwoMatrices

REDRAWN_STRENGTH = 0.2
"""Length of a redrawn encoder row beside the mean length of the others (Bricken et al. 2023)."""


class Penalised(TwoMatrices):
    config: PenalisedConfig

    def __init__(self, config: PenalisedConfig, d_in: Width, d_out: Width | None = None) -> None:
        super().__init__(config, d_in, d_out)
        self.length = self.d_out**0.5
        """Length of a typical target row in scaled units; the papers' unit."""
        self.warmed = 1.0
        """Share of the penalty's weight that counts, by `schedule`."""

    def activate(self, product_BS: Tensor) -> Tensor:
        """(B, S) non-negative activations from W_enc's product with the centred input, before any bias."""
        raise NotImplementedError

    def schedule(self, step: int, steps: int) -> None:
        """The penalty's weight rises linearly from 0 over the first ``warm_up_share`` of the run."""
        last = self.config.warm_up_share * steps
        self.warmed = 1.0 if step >= last else step / last

    def _active(self, x_BD: Tensor) -> Codes:
        """In as many slots as the busiest row needs."""
        return packed(self.activate(self._product(x_BD)))

    def _first_output(self, x_BD: Tensor) -> Tensor:
        """At full length half of the latents would overshoot together, whatever else decides which fire later."""
        return (self._product(x_BD) + self.b_enc).relu() @ self.W_dec

    def _product(self, scaled_BD: Tensor) -> Tensor:
        """(B, S) W_enc's product with the centred input, in the input's own type.

        The pre-bias is a constant in the product, and its gradient comes through another that is 0: summed over rows
        before it is multiplied by W_enc, and not after, which would cost as much as the product itself.
        """
        if not self.subtracts_b_dec:
            return (scaled_BD @ self.W_enc.T).to(scaled_BD.dtype)
        b_pre_D = self.b_dec.detach()
        nothing_S = self.W_enc.detach() @ (b_pre_D - self.b_dec)
        return torch.addmm(nothing_S, scaled_BD - b_pre_D, self.W_enc.T).to(scaled_BD.dtype)

    def _reported(
        self, x: Tensor, total: Tensor, terms: dict[str, Tensor], codes_BS: Tensor, output_BO: Tensor
    ) -> Loss:
        """The loss with what is reported of it, detached, from dense codes and a scaled reconstruction."""
        detached = {name: term.detach() for name, term in terms.items()}
        # to pack them is to ask how many slots the busiest row needs
        pack = Codes.in_all_slots if ops.runs_ahead(codes_BS.device) else packed
        return Loss(total, detached, pack(codes_BS.detach()), self.target_scaling.undo(output_BO.detach(), x))

    def _redraw(self, update: Update) -> int:
        """Point dead latents at rows of the batch, drawn with probability proportional to their squared loss.

        Bricken et al. 2023, "Towards monosemanticity", appendix "Neuron resampling": decoder row along the centred
        row, encoder row the same at a fifth of the others' length, bias 0, moments forgotten. Theirs are autoencoders;
        a transcoder's latent reads the centred input and writes the centred target. Returns how many were redrawn.
        """
        x_BD, target_BO = self._scaled(update.x, update.target)
        codes_BS = self.activate(self._product(x_BD))
        output_BO = codes_BS @ self.W_dec + self.b_dec
        squared_loss_B = (target_BO - output_BO).square().sum(dim=1).square()
        dead_A, rows_A = self._draw_rows(squared_loss_B, update.generator)
        live_S = self.rows_since_fired <= self.config.dead_after_rows
        others_SD = self.W_enc[live_S] if live_S.any() else self.W_enc
        centre_D = self.b_dec if self.subtracts_b_dec else x_BD.mean(dim=0)
        read_AD = F.normalize(x_BD[rows_A] - centre_D, dim=1) * REDRAWN_STRENGTH * others_SD.norm(dim=1).mean()
        self._point(dead_A, read_AD, target_BO[rows_A] - self.b_dec, centre_D, update)
        return len(dead_A)


def packed(codes_BS: Tensor) -> Codes:
    """Dense non-negative activations in as few slots as the busiest row needs (at least one)."""
    slots = max(1, int((codes_BS > 0).sum(dim=1).max())) if len(codes_BS) else 1
    values_BK, indices_BK = codes_BS.topk(slots, dim=1, sorted=False)
    return Codes(indices_BK, values_BK, codes_BS.shape[1])
