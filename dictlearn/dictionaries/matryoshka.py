"""Matryoshka BatchTopK: the first latents must rebuild alone what all of them rebuild together. SAE and transcoder.

Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning multi-level features with Matryoshka sparse autoencoders"
(arXiv 2503.17547). Latents are cut into groups; the squared error is taken of each nested prefix, the first group, the
first two and so on, and, as in the authors' code, of the bias alone:

    output_j = b_dec + sum of the codes of groups 1 to j times their rows of W_dec        loss = mean_j |y - output_j|^2

so that general features settle in early groups, where specific ones cannot absorb them. Which latents are active, and
the threshold after training, are those of `dictlearn.dictionaries.batch_topk`, over all groups together; so is AuxK,
which sees what all of them leave over.
"""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor

from dictlearn import ops
from dictlearn.dictionaries.batch_topk import BatchTopK, in_slots, slots_needed
from dictlearn.dictionaries.configs import MatryoshkaConfig


class Matryoshka(BatchTopK):
    kind = "matryoshka"
    Config = MatryoshkaConfig
    config: MatryoshkaConfig

    def _fit(
        self, mse: Tensor, target_BO: Tensor, values_BK: Tensor, indices_BK: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over all prefixes. "prefixes" is the mean over those that lack something."""
        ends = list(accumulate(self.config.groups()[:-1]))
        groups = [
            values_BK * ((indices_BK >= first) & (indices_BK < end))
            for first, end in zip([0, *ends], ends, strict=False)
        ]
        errors, output_BO = [(target_BO - self.b_dec).square().mean()], self.b_dec
        for slots, of_group_BK in zip(slots_needed(groups), groups, strict=True):
            of_group = in_slots(slots, of_group_BK, indices_BK)
            output_BO = output_BO + ops.decode(of_group.values, of_group.indices, self.W_dec)
            errors.append((target_BO - output_BO).square().mean())
        shorter = sum(errors[1:], errors[0]) / len(errors)
        total = (mse + len(errors) * shorter) / (len(errors) + 1)
        return total, {"mse": mse.detach(), "prefixes": shorter.detach()}
