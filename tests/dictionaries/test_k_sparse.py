"""The k-sparse autoencoder: the contract, and what only this kind promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.configs import KSparseConfig
from dictlearn.dictionaries.falling_k import falling_k
from dictlearn.dictionaries.files import load, save
from dictlearn.dictionaries.k_sparse import KSparse
from dictlearn.testing.dictionary import DictionaryTests


class TestKSparse(DictionaryTests):
    transcodes = False

    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> KSparse:
        return KSparse(KSparseConfig(**{"d_sae": 24, "k": 4} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {
            "scaled": {},
            "raw": {"scaling": "none"},
            "every latent active": {"k": 24},
            "more positive and negative than positive": {"k": 20},
            "falling k": {"k_start": 12, "k_anneal_share": 0.4},
        }
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: KSparse, x: Tensor, target: Tensor | None) -> Tensor:
        """Makhzani and Frey 2013, algorithm 1, dense: x' = W^T z + b' with z = a on the support of the k largest."""
        p, k = dict(dictionary.named_parameters()), dictionary.config.k
        u = x / dictionary.input_scaling.scale if dictionary.config.scaling == "mean_square" else x
        a = u @ p["W"].T + p["b_enc"]
        support = torch.zeros_like(a).scatter(1, a.topk(k, dim=1).indices, 1.0)
        return (u - (a * support) @ p["W"] - p["b_dec"]).square().mean()

    def test_where_fewer_than_k_are_positive_codes_are_negative(self):
        dictionary = self.trained(False, make=partial(self.make, k=20))
        codes = dictionary.encode(self.data(False)[0])
        assert (codes.values < 0).any() and (codes.l0() == 20).all()

    def test_after_training_the_alpha_k_largest_are_kept(self, tmp_path):
        plain, richer = (self.trained(False, make=partial(self.make, alpha=alpha)) for alpha in (1.0, 2.5))
        x = self.data(False)[0]
        assert torch.equal(plain.loss(x).total, richer.loss(x).total)  # it changes no step of training
        for dictionary in (richer, richer.fold(), load(save(richer, tmp_path / "richer"))):
            codes = dictionary.encode(x)
            assert (codes.l0() == 10).all()
            least = codes.values.sort(dim=1, descending=True).values[:, :4]
            of_plain = (plain if dictionary is richer else plain.fold()).encode(x).values
            torch.testing.assert_close(least, of_plain.sort(dim=1, descending=True).values, rtol=1e-4, atol=1e-4)

    def test_folding_leaves_the_weights_tied_and_as_they_are(self):
        dictionary = self.trained(False)
        folded = dictionary.fold()
        assert torch.equal(folded.W, dictionary.W) and folded.W_enc is folded.W_dec
        assert not torch.equal(folded.b_enc, dictionary.b_enc)

    def test_training_begins_with_more_active_and_ends_with_k(self):
        dictionary = self.trained(False, updates=0, make=partial(self.make, k_start=20))
        x = self.data(False)[0]
        slots = []
        for step in (0, 4, 8, 17):
            dictionary.schedule(step, 18)
            slots.append(dictionary.loss(x).codes.values.shape[1])
        assert slots == [20, 12, 4, 4]
        dictionary.schedule(0, 18)
        assert dictionary.fold().encode(x).values.shape[1] == 4

    def test_a_target_is_refused(self):
        for width in (self.d_in, self.d_out):
            with pytest.raises(UserError, match="has no target hook; leave target_hook out"):
                self.make(self.d_in, width)


def test_k_falls_linearly_to_its_end():
    assert [falling_k(20, 4, 0.5, step, 18) for step in range(12)] == [20, 18, 16, 14, 12, 10, 8, 6, 4, 4, 4, 4]
    assert falling_k(None, 4, 0.5, 0, 18) == 4
    assert falling_k(20, 4, 0.5, 1, 2) == 4


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"d_sae": 8, "k": 9}, "k is 9, more than the 8 latents"),
        ({"d_sae": 8, "k": 4, "alpha": 3.0}, "alpha \\* k is 12, more than the 8 latents"),
        ({"alpha": 0.5}, "alpha is 0.5; it must be at least 1"),
        ({"k": 8, "k_start": 4}, "k_start is 4; it must lie between k \\(8\\)"),
        ({"k_anneal_share": 2.0}, "k_anneal_share is 2.0"),
        ({"scaling": "whiten"}, "scaling is 'whiten'; choose one of mean_square, none"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        KSparse(KSparseConfig(**numbers), 16)
