"""AbsTopK, as an autoencoder and as a transcoder: the contract, and what only this kind promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.abs_topk import AbsTopK
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.configs import AbsTopKConfig
from dictlearn.testing.dictionary import DictionaryTests


class TestAbsTopK(DictionaryTests):
    several_hooks = True

    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> AbsTopK:
        return AbsTopK(AbsTopKConfig(**{"d_sae": 24, "k": 4, "dead_after_rows": 1000} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {
            name: {"scaling": name} for name in ("mean_square", "none", "per_token", "layer_norm", "whiten")
        }
        versions["every latent active"] = {"k": 24}
        versions["Multi-TopK, resampled, falling k"] = {
            "multi_topk_weight": 1 / 8,
            "k_start": 12,
            "k_anneal_share": 0.4,
            "resample_every": 2,
        }
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: AbsTopK, x: Tensor, target: Tensor | None) -> Tensor:
        """Hard thresholding, dense; AuxK as in Gao et al. 2024, appendix A, without its ReLU."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        u = dictionary.input_scaling(x)
        y = u if target is None else dictionary.target_scaling(target)
        pre = (u - p["b_dec"] if dictionary.subtracts_b_dec else u) @ p["W_enc"].T + p["b_enc"]

        def decoded(k: int, among: Tensor) -> Tensor:
            least = among.abs().sort(dim=1, descending=True).values[:, k - 1, None]
            return torch.where((pre.abs() >= least) & (among != 0), pre, 0.0) @ p["W_dec"]

        output = decoded(config.k, pre) + p["b_dec"]
        total = (y - output).square().mean()
        if config.multi_topk_weight:
            wide = decoded(min(4 * config.k, 24), pre) + p["b_dec"]
            total = total + config.multi_topk_weight * (y - wide).square().mean()
        dead = dictionary.rows_since_fired > 1000
        if dead.any():
            error = (y - output).detach()
            miss = error - decoded(min(6, int(dead.sum())), pre * dead)
            total = total + (1 / 32) * miss.square().sum() / error.square().sum()
        return total

    def test_k_slots_with_codes_of_both_signs(self):
        for _, transcoder, dictionary in self.cases():
            codes = dictionary.encode(self.data(transcoder)[0])
            assert codes.indices.shape[1] == dictionary.config.k
            assert (codes.values < 0).any() and (codes.values > 0).any()

    def test_what_lies_on_the_other_side_of_the_decoder_bias_has_the_opposite_codes(self):
        dictionary = self.trained(False, make=partial(self.make, scaling="none")).double()
        with torch.no_grad():
            dictionary.b_enc.zero_()
        x = self.data(False)[0].double()
        opposite = dictionary.encode(2 * dictionary.b_dec - x).dense()
        torch.testing.assert_close(opposite, -dictionary.encode(x).dense(), rtol=1e-9, atol=1e-9)

    def test_a_dead_latent_learns_from_rows_that_it_is_negative_on(self):
        """Where a ReLU would leave it no gradient."""
        dictionary = self.trained(False)
        x = self.data(False)[0]
        dictionary.rows_since_fired.zero_()
        dictionary.rows_since_fired[5] = 10**12
        with torch.no_grad():
            dictionary.W_enc[5].mul_(1e-3)
            dictionary.b_enc[5] = -1.0
        latent = torch.autograd.grad(dictionary.loss(x).total, dictionary.W_enc)[0][5]
        dictionary.rows_since_fired.zero_()
        without = torch.autograd.grad(dictionary.loss(x).total, dictionary.W_enc)[0][5]
        assert (latent - without).abs().max() > 1e-6


def test_impossible_numbers_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="k is 9, more than the 8 latents"):
        AbsTopK(AbsTopKConfig(d_sae=8, k=9), 16)
