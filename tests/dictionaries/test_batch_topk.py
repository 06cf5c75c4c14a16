"""BatchTopK, as an autoencoder and as a transcoder: the contract, and what only this kind promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Update, Width
from dictlearn.dictionaries.batch_topk import BatchTopK
from dictlearn.dictionaries.configs import BatchTopKConfig
from dictlearn.dictionaries.files import load, save
from dictlearn.testing.dictionary import DictionaryTests, saying

SCALINGS = ("mean_square", "none", "per_token", "layer_norm", "whiten")


class TestBatchTopK(DictionaryTests):
    several_hooks = True

    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> BatchTopK:
        return BatchTopK(BatchTopKConfig(**{"d_sae": 24, "k": 4, "dead_after_rows": 1000} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in SCALINGS}
        versions["every latent active"] = {"k": 24}
        versions["one per row"] = {"k": 1}
        versions["Multi-TopK, resampled, falling k"] = {
            "k": 2,
            "multi_topk_weight": 1 / 8,
            "k_start": 12,
            "k_anneal_share": 0.4,
            "resample_every": 2,
        }
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def pre_activations(self, dictionary: BatchTopK, x: Tensor) -> Tensor:
        """(B, S), densely. Scalings have a test of their own."""
        p = dict(dictionary.named_parameters())
        u = dictionary.input_scaling(x)
        return (u - p["b_dec"] if dictionary.subtracts_b_dec else u) @ p["W_enc"].T + p["b_enc"]

    def reference_loss(self, dictionary: BatchTopK, x: Tensor, target: Tensor | None) -> Tensor:
        """Bussmann et al. 2024, equations 4 and 5, dense; AuxK as in Gao et al. 2024, appendix A."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        y = dictionary.input_scaling(x) if target is None else dictionary.target_scaling(target)
        pre = self.pre_activations(dictionary, x)

        def decoded(k: int) -> Tensor:
            chosen = pre.flatten().topk(min(k, 24) * len(x)).indices
            kept = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, chosen, 1.0).view_as(pre)
            return (pre.relu() * kept) @ p["W_dec"] + p["b_dec"]

        output = decoded(config.k)
        total = (y - output).square().mean()
        if config.multi_topk_weight:
            total = total + config.multi_topk_weight * (y - decoded(4 * config.k)).square().mean()
        dead = dictionary.rows_since_fired > 1000
        if dead.any():
            among = pre.masked_fill(~dead, -torch.inf)
            kept = torch.zeros_like(pre).scatter(1, among.topk(min(6, int(dead.sum())), dim=1).indices, 1.0)
            error = (y - output).detach()
            miss = error - (pre.relu() * kept) @ p["W_dec"]
            total = total + (1 / 32) * miss.square().sum() / error.square().sum()
        return total

    def test_the_loss_reports_what_encode_and_decode_give(self):
        """Where the threshold is what this very batch selects; elsewhere the two differ, and are meant to."""
        for words, transcoder, dictionary in self.cases():
            x, target = self.data(transcoder, seed=1)
            dictionary, x, target = dictionary.double(), x.double(), None if target is None else target.double()
            loss = dictionary.loss(x, target)
            least = loss.codes.values[loss.codes.values > 0].min()
            dictionary.threshold.copy_(least * (1 - 1e-12))
            torch.testing.assert_close(loss.output, dictionary(x), rtol=1e-10, atol=1e-10, msg=saying(words))
            assert torch.equal(loss.codes.fired(), dictionary.encode(x).fired()), words
            assert not loss.output.requires_grad and not loss.codes.values.requires_grad, words

    def test_gradients_of_two_halves_average_to_those_of_the_batch(self):
        """Only of halves that select alike, since rows share what is active: here the same rows in another order."""
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            dictionary.rows_since_fired.zero_()
            x, target = self.data(transcoder, seed=1)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
            halves = [
                (rows.double(), None if target is None else of.double())
                for rows, of in ((x, target), (x[order], None if target is None else target[order]))
            ]
            both = torch.cat([h[0] for h in halves]), None if target is None else torch.cat([h[1] for h in halves])
            parameters = [p for p in dictionary.parameters() if p.requires_grad]
            whole, *parts = (
                torch.autograd.grad(dictionary.loss(rows, of).total, parameters) for rows, of in (both, *halves)
            )
            for a, first, second in zip(whole, *parts, strict=True):
                torch.testing.assert_close((first + second) / 2, a, rtol=1e-9, atol=1e-12, msg=saying(words))

    def test_a_batch_has_k_per_row_and_rows_have_more_and_fewer(self):
        for _, transcoder, dictionary in self.cases():
            if dictionary.k not in (1, 24):
                codes = dictionary.loss(*self.data(transcoder)).codes
                assert int(codes.l0().sum()) == dictionary.k * len(codes)
                assert codes.l0().min() < dictionary.k < codes.l0().max()

    def test_one_row_may_take_all_that_there_is(self):
        """Its candidates must not run out at the number that rows are asked for at first."""
        for transcoder in self.modes():
            dictionary = self.trained(transcoder, make=partial(self.make, k=2, scaling="none")).double()
            with torch.no_grad():
                dictionary.b_enc.zero_()
                dictionary.W_enc.abs_()
            x, target = (t if t is None else t.double() for t in self.data(transcoder))
            x[0] = 1e4
            assert int(dictionary.loss(x, target).codes.l0()[0]) == 24
            self.assert_equals_reference(dictionary, x, target, "one row has all")
            dictionary.threshold.fill_(5e3)
            assert int(dictionary.encode(x).l0()[0]) == int((self.pre_activations(dictionary, x)[0] >= 5e3).sum()) > 8

    # --- the threshold ---------------------------------------------------------------------------------------------

    def test_what_a_row_is_encoded_to_depends_on_no_other_row(self):
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            x = self.data(transcoder, seed=4)[0].double()
            alone = torch.cat([dictionary(row[None]) for row in x])
            torch.testing.assert_close(dictionary(x), alone, rtol=1e-10, atol=1e-10, msg=saying(words))

    def test_encoding_keeps_what_is_positive_and_reaches_the_threshold(self):
        for words, transcoder, dictionary in self.cases():
            if not dictionary.target_scaling.row_wise:
                dictionary = dictionary.double()
                x = self.data(transcoder, seed=4)[0].double()
                pre = self.pre_activations(dictionary, x)
                expected = pre * ((pre >= dictionary.threshold) & (pre > 0))
                torch.testing.assert_close(dictionary.encode(x).dense(), expected, msg=saying(words))

    def test_the_threshold_begins_at_the_first_batch_and_follows_the_least_selected_value(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder, updates=0, make=partial(self.make, threshold_rate=0.25)).double()
            x, target = (t if t is None else t.double() for t in self.data(transcoder, rows=256))

            def least(dictionary: BatchTopK, x: Tensor) -> float:
                values = self.pre_activations(dictionary, x).flatten().topk(4 * len(x)).values
                return float(values[values > 0].min().detach())

            assert float(dictionary.threshold) == pytest.approx(least(dictionary, x), rel=1e-5)
            dictionary.threshold.fill_(7.0)
            update = Update(None, 0, 9, torch.Generator(), x, target, dictionary.loss(x, target))
            expected = 0.75 * 7 + 0.25 * least(dictionary, x)
            assert dictionary.after_update(update) == {"threshold": pytest.approx(expected)}
            assert float(dictionary.threshold) == pytest.approx(expected)

    def test_a_batch_in_which_nothing_fires_leaves_the_threshold_alone(self):
        dictionary = self.trained(False)
        with torch.no_grad():
            dictionary.b_enc.fill_(-1e4)
        x, before = self.data(False)[0], float(dictionary.threshold)
        dictionary.after_update(Update(None, 0, 9, torch.Generator(), x, None, dictionary.loss(x)))
        assert float(dictionary.threshold) == before > 0

    @pytest.mark.parametrize("seed", range(5))
    def test_after_training_new_rows_have_about_k_active(self, seed: int):
        """4.2 to 4.5 of 4 over these seeds, as autoencoder and as transcoder."""
        for transcoder in self.modes():
            dictionary = self.trained(transcoder, seed=seed, updates=300, make=partial(self.make, threshold_rate=0.05))
            x = self.data(transcoder, seed=0, rows=1024)[0]
            for which in (dictionary, dictionary.fold()):
                assert 3 < float(which.encode(x).l0().float().mean()) < 5, transcoder

    def test_the_threshold_is_saved_in_the_units_of_what_is_saved(self, tmp_path: Path):
        """A peer's was off by the factor its activations were normalised with."""
        units = set()
        for words, transcoder, dictionary in self.cases():
            x = self.data(transcoder, seed=3)[0]
            loaded = load(save(dictionary, tmp_path / words))
            unit = dictionary.target_scaling.unit()
            units.add(unit)
            assert float(loaded.threshold) == pytest.approx(float(dictionary.threshold) * unit, rel=1e-6)
            assert torch.equal(loaded.encode(x).l0(), dictionary.encode(x).l0()), words
        assert len(units) > 1


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"d_sae": 8, "k": 9}, "k is 9, more than the 8 latents"),
        ({"threshold_rate": 0.0}, "threshold_rate is 0.0; it must lie above 0"),
        ({"threshold_rate": 1.5}, "threshold_rate is 1.5"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        BatchTopK(BatchTopKConfig(**numbers), 16)
