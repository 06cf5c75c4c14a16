"""Soft top-k keeps the contract of every dictionary, and the promise that is its own."""

from __future__ import annotations

import pytest
import torch
from soft_topk import SoftTopK, SoftTopKConfig
from torch import Tensor

from activation_store import UserError
from dictlearn.testing.dictionary import DictionaryTests


class TestSoftTopK(DictionaryTests):
    transcodes = False

    def make(self, d_in: int, d_out: int | None) -> SoftTopK:
        return SoftTopK(SoftTopKConfig(d_sae=20, k=4), d_in, d_out)

    def reference_loss(self, dictionary: SoftTopK, x: Tensor, target: Tensor | None) -> Tensor:
        """Dense, by sorting whole rows."""
        u = x / dictionary.input_scaling.scale
        a = torch.clamp(torch.einsum("sd,bd->bs", dictionary.W, u - dictionary.b_dec), min=0)
        threshold = a.sort(dim=1, descending=True).values[:, dictionary.config.k]
        codes = torch.clamp(a - threshold[:, None], min=0)
        return (u - torch.einsum("bs,sd->bd", codes, dictionary.W) - dictionary.b_dec).square().mean()

    def test_codes_do_not_jump(self):
        """Between two rows every small step changes them little, though other latents become active on the way."""
        dictionary = self.trained(False).double()
        start, end = self.data(False)[0][:2].double()
        codes = dictionary.encode(torch.lerp(start, end, torch.linspace(0, 1, 1001).double()[:, None])).dense()
        assert not torch.equal(codes[0] > 0, codes[-1] > 0)
        step = (end - start).norm() / 1000 / dictionary.input_scaling.scale
        steepest = (1 + (2 * dictionary.config.k) ** 0.5) * torch.linalg.matrix_norm(dictionary.W, 2)
        assert (codes[1:] - codes[:-1]).norm(dim=1).max() <= steepest * step

    @pytest.mark.parametrize("k", [0, 20])
    def test_a_k_that_leaves_nothing_out_is_refused(self, k: int):
        with pytest.raises(UserError, match=rf"k is {k}; it must be from 1 to d_sae - 1 \(19\)."):
            SoftTopK(SoftTopKConfig(d_sae=20, k=k), 12)
