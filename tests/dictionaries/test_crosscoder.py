"""Crosscoder: the contract with two hooks and with three, and what tells shared latents from exclusive ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.configs import CrosscoderConfig, TopKConfig, check_hooks
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.files import load, save
from dictlearn.dictionaries.parts import relative_norms
from dictlearn.dictionaries.topk import TopK
from dictlearn.testing.dictionary import DictionaryTests


class TestCrosscoder(DictionaryTests):
    transcodes = False
    several_hooks = True

    def make(self, d_in: Width, d_out: Width | None, parts: tuple[int, ...] = (5, 7), **numbers: Any) -> Crosscoder:
        config = CrosscoderConfig(**{"d_sae": 24, "l1_weight": 0.02, "dead_after_rows": 1000} | numbers)
        return Crosscoder(config, parts if isinstance(d_in, int) else d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in ("mean_square", "none", "whiten")}
        versions["three hooks, no penalty"] = {"parts": (2, 6, 4), "l1_weight": 0.0}
        versions["resampled, still warming up"] = {"resample_every": 2, "warm_up_share": 1.0}
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: Crosscoder, x: Tensor, target: Tensor | None) -> Tensor:
        """The loss of the paper, row by row and hook by hook, with its lambda; after five steps 4/5 of a warm-up."""
        p, config, parts = dict(dictionary.named_parameters()), dictionary.config, dictionary.input_parts
        if config.scaling == "mean_square":
            x = x / dictionary.input_scaling.scale
        elif config.scaling == "whiten":
            x = (x - dictionary.input_scaling.mean) @ dictionary.input_scaling.whiten
        lam = config.l1_weight * (0.8 if config.warm_up_share == 1.0 else 1.0)
        of_hooks = [(p["W_enc"][:, i : i + d], p["W_dec"][:, i : i + d], p["b_dec"][i : i + d], slice(i, i + d))
                    for i, d in zip((0, *torch.tensor(parts).cumsum(0).tolist()), parts, strict=False)]  # fmt: skip
        total = x.new_zeros(())
        for row in x:
            pre = sum((W @ row[hook] for W, _, _, hook in of_hooks), p["b_enc"])
            f = torch.where(pre > 0, pre, 0 * pre)
            for _, W, b, hook in of_hooks:
                error = row[hook] - W.T @ f - b
                size = (f * W.square().sum(dim=1).sqrt()).sum()
                total = total + error @ error + lam * len(row) ** 0.5 * size
        return total / x.numel()

    def test_there_is_no_pre_bias_and_rows_keep_their_norms(self):
        for words, _, dictionary in self.cases(updates=20):
            assert not dictionary.subtracts_b_dec, words
            norms = dictionary.W_dec.norm(dim=1)
            assert (norms - 1).abs().max() > 0.01, words

    def test_it_begins_as_an_autoencoder_with_a_pre_bias_does(self):
        dictionary = self.trained(False, updates=0)
        x = dictionary.input_scaling(self.data(False)[0])
        codes = ((x - dictionary.b_dec) @ dictionary.W_enc.T).relu()
        torch.testing.assert_close(dictionary.encode(self.data(False)[0]).dense(), codes, rtol=1e-4, atol=1e-4)

    def test_the_penalty_shrinks_the_decoders_of_latents_that_fire(self):
        dictionary = self.trained(False)
        x = self.data(False)[0]
        dictionary.b_dec.requires_grad_(False)
        loss = dictionary.loss(x)
        shrinks = torch.autograd.grad(loss.total, dictionary.W_dec, retain_graph=True)[0]
        dictionary.config = CrosscoderConfig(d_sae=24, l1_weight=0.0)
        without = torch.autograd.grad(dictionary.loss(x).total, dictionary.W_dec)[0]
        fired = loss.codes.fired() > 0
        for part in (shrinks - without).split((5, 7), dim=1):
            assert (part[fired].norm(dim=1) > 0).all() and not part[~fired].any()


def planted(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """``(rows of two hooks (B, 32), features (12, 32))``: four shared, four of the first hook, four of the second."""
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(2, 12, 16, generator=generator), dim=2)
    features[1, 4:8] = features[0, 8:] = 0.0
    features = torch.cat([features[0], features[1]], dim=1)
    active = torch.rand(rows, 12, generator=generator) < 0.15
    return (active * (1 + torch.rand(rows, 12, generator=generator))) @ features, features


def trained_on(x: Tensor, seed: int) -> Crosscoder:
    dictionary = Crosscoder(CrosscoderConfig(d_sae=16, l1_weight=0.03, warm_up_share=0.2), (16, 16))
    generator = torch.Generator().manual_seed(seed)
    dictionary.initialise(x, None, generator, SimpleNamespace())
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
    for step in range(400):
        dictionary.schedule(step, 400)
        optimiser.zero_grad()
        dictionary.loss(x[torch.randint(len(x), (256,), generator=generator)]).total.backward()
        optimiser.step()
    return dictionary


def test_relative_norms_tell_shared_latents_from_exclusive_ones_whatever_the_size_of_a_hook(tmp_path):
    for seed in range(3):
        x, features = planted(seed, 2048)
        shares = []
        for size in (1.0, 100.0):
            dictionary = trained_on(torch.cat([x[:, :16], size * x[:, 16:]], dim=1), seed)
            share = relative_norms(dictionary)
            assert torch.equal(relative_norms(load(save(dictionary, tmp_path / f"{seed} {size}"))), share)
            raw = dictionary.fold().W_dec / torch.tensor([1.0, size]).repeat_interleave(16)
            found = F.cosine_similarity(raw[:, None], features[None], dim=2).argmax(dim=0)
            shares.append(share[found, 1])
        assert (shares[0][:4] > 0.3).all() and (shares[0][:4] < 0.7).all(), shares[0]
        assert (shares[0][4:8] < 0.1).all() and (shares[0][8:] > 0.9).all(), shares[0]
        torch.testing.assert_close(*shares, rtol=0, atol=0.01)


def test_relative_norms_are_of_any_kind_with_two_matrices_and_several_hooks():
    dictionary = TopK(TopKConfig(d_sae=4, k=2), (2, 3))
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.tensor([[3, 4, 0, 0, 0], [0, 0, 0, 2, 0], [0, 1, 0, 0, 3], [0, 0, 0, 0, 0.0]]))
    dictionary.spread_of_parts[:] = torch.tensor([1.0, 3.0])
    expected = torch.tensor([[1, 0], [0, 1], [0.5, 0.5], [0, 0]])
    torch.testing.assert_close(relative_norms(dictionary), expected)
    with pytest.raises(ValueError, match="of one hook"):
        relative_norms(TopK(TopKConfig(d_sae=4, k=2), 5))


@pytest.mark.parametrize(
    ("numbers", "parts", "target", "sentence"),
    [
        ({}, (8,), None, "A crosscoder relates several hooks, and hook names one; name two or more"),
        ({}, (8, 8), (8,), "kind 'crosscoder' rebuilds its own input and has no target hook"),
        ({"l1_weight": -1.0}, (8, 8), None, "l1_weight is -1.0"),
        ({"scaling": "layer_norm"}, (8, 8), None, "scaling is 'layer_norm'.*there are 2 hooks"),
        ({"d_sae": 0}, (8, 8), None, "d_sae is 0"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(numbers, parts, target, sentence):
    with pytest.raises(UserError, match=sentence):
        check_hooks(CrosscoderConfig(**numbers), parts, target)
    with pytest.raises(UserError, match=sentence):
        Crosscoder(CrosscoderConfig(**numbers), parts, target)
