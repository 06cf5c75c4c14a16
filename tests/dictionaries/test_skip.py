"""Skip transcoder: the contract as a transcoder alone, and what the linear path promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.configs import SkipConfig, TopKConfig, check_hooks
from dictlearn.dictionaries.skip import Skip
from dictlearn.dictionaries.topk import TopK
from dictlearn.testing.dictionary import DictionaryTests
from tests.dictionaries.two_matrices import SCALINGS, scaled_slowly


class TestSkip(DictionaryTests):
    autoencodes = False
    several_hooks = True

    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> Skip:
        return Skip(SkipConfig(**{"d_sae": 24, "k": 4, "dead_after_rows": 1000} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in SCALINGS}
        versions["Multi-TopK, resampled"] = {"multi_topk_weight": 1 / 8, "resample_every": 2}
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: Skip, x: Tensor, target: Tensor | None) -> Tensor:
        """The dense formula, with what is linear taken off the target first."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        u, y = scaled_slowly(dictionary, x, target)
        left = y - torch.einsum("bd,do->bo", u, p["W_skip"]) - p["b_dec"]
        pre = u @ p["W_enc"].T + p["b_enc"]

        def decoded(k: int, among: Tensor) -> Tensor:
            kept = torch.zeros_like(pre).scatter(1, among.topk(k, dim=1).indices, 1.0)
            return (pre.relu() * kept) @ p["W_dec"]

        error = left - decoded(4, pre)
        total = error.square().mean()
        if config.multi_topk_weight:
            total = total + config.multi_topk_weight * (left - decoded(16, pre)).square().mean()
        dead = dictionary.rows_since_fired > 1000
        if dead.any():
            miss = error.detach() - decoded(min(6, int(dead.sum())), pre.masked_fill(~dead, -torch.inf))
            total = total + (1 / 32) * miss.square().sum() / error.detach().square().sum()
        return total

    def test_codes_hold_what_the_linear_path_gave(self):
        for words, _, dictionary in self.cases():
            x = self.data(True, seed=2)[0]
            for made in (dictionary, dictionary.fold()):
                codes = made.encode(x)
                none = Codes(codes.indices, torch.zeros_like(codes.values), codes.d_sae, codes.offset)
                u = made.input_scaling(x)
                linear = made.target_scaling.undo(u @ made.W_skip + made.b_dec)
                torch.testing.assert_close(made.decode(none), linear, msg=words)
                with pytest.raises(ValueError, match="needs the input.*decode what encode returned"):
                    made.decode(Codes(codes.indices, codes.values, codes.d_sae))

    def test_the_linear_path_learns_what_is_linear(self):
        """A target that is linear in the input: the latents of a plain transcoder cannot follow it everywhere."""
        for seed in range(3):
            left = {}
            for kind, config in ((Skip, SkipConfig), (TopK, TopKConfig)):
                generator = torch.Generator().manual_seed(seed)
                x = torch.randn(512, 12, generator=generator)
                y = x @ torch.randn(12, 10, generator=generator)
                dictionary = kind(config(d_sae=24, k=2), 12, 10)
                dictionary.initialise(x, y, generator, self.control())
                optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
                for _ in range(300):
                    optimiser.zero_grad()
                    dictionary.loss(x, y).total.backward()
                    optimiser.step()
                    dictionary.constrain()
                left[kind] = float(dictionary.loss(x, y).terms["mse"])
            assert left[Skip] < 0.1 * left[TopK], (seed, left)


def test_the_plan_of_a_run_counts_the_linear_path():
    config = SkipConfig(d_sae=24, k=4)
    assert config.parameters((5, 7), (10,)) == sum(p.numel() for p in Skip(config, (5, 7), 10).parameters())


def test_an_autoencoder_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="kind 'skip' predicts one hook from another, and there is no target hook"):
        check_hooks(SkipConfig(), (8,), None)
    with pytest.raises(UserError, match="name one in target_hook, or use topk"):
        Skip(SkipConfig(), 8)
    with pytest.raises(UserError, match="k is 9, more than the 8 latents"):
        Skip(SkipConfig(d_sae=8, k=9), 8, 8)
