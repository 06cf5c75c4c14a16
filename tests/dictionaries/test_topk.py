"""TopK, as an autoencoder and as a transcoder: the contract, and what only this kind promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Update, Width
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.start import geometric_median
from dictlearn.dictionaries.topk import TopK
from tests.dictionaries.two_matrices import SCALINGS, TwoMatricesTests, scaled_slowly, topk_loss_slowly


class TestTopK(TwoMatricesTests):
    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> TopK:
        return TopK(TopKConfig(**{"d_sae": 24, "k": 4, "dead_after_rows": 1000} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in SCALINGS}
        versions["every latent active"] = {"k": 24}
        versions["Multi-TopK, resampled, falling k"] = {
            "multi_topk_weight": 1 / 8,
            "k_start": 12,
            "k_anneal_share": 0.4,
            "resample_every": 2,
        }
        versions["from data, around the mean"] = {"initial_decoder": "data", "initial_b_dec": "mean"}
        versions["random, around zero"] = {"initial_decoder": "random", "initial_b_dec": "zero"}
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: TopK, x: Tensor, target: Tensor | None) -> Tensor:
        p = dict(dictionary.named_parameters())
        x, y = scaled_slowly(dictionary, x, target)
        centred = x - p["b_dec"] if dictionary.subtracts_b_dec else x
        pre = centred @ p["W_enc"].T + p["b_enc"]

        return topk_loss_slowly(dictionary, pre, y)

    def test_exactly_k_slots_and_no_negative_values(self):
        codes = self.trained(False).encode(self.data(False)[0])
        assert codes.indices.shape[1] == 4
        assert (codes.values >= 0).all()

    def test_auxk_trains_dead_encoders_and_decoders_and_only_those(self):
        """A peer's fused encoder gave the auxiliary loss no gradient in the encoder; another trained live latents."""
        dictionary = self.trained(False)
        x, _ = self.data(False)
        fired = dictionary.encode(x).fired() > 0
        dictionary.rows_since_fired.zero_()
        without = torch.autograd.grad(dictionary.loss(x).total, [dictionary.W_enc, dictionary.W_dec])
        dead = ~fired if (~fired).any() else torch.arange(24) == 0
        dictionary.rows_since_fired[dead] = 10**9
        with_auxk = torch.autograd.grad(dictionary.loss(x).total, [dictionary.W_enc, dictionary.W_dec])
        for name, a, b in zip(("W_enc", "W_dec"), without, with_auxk, strict=True):
            assert (b - a)[dead].abs().max() > 1e-6, f"{name} of dead latents gets no gradient from AuxK"
            assert (b - a)[~dead].abs().max() < 1e-7, f"{name} of live latents gets gradient from AuxK"

    def test_auxk_is_absent_when_nothing_is_dead_and_when_it_is_off(self):
        x, _ = self.data(False)
        dictionary = self.trained(False)
        dictionary.rows_since_fired.zero_()
        assert set(dictionary.loss(x).terms) == {"mse"}
        off = TopK(TopKConfig(d_sae=24, k=4, auxk_weight=0.0), self.d_in)
        off.rows_since_fired.fill_(10**12)
        assert set(off.loss(x).terms) == {"mse"}

    def test_all_pre_activations_negative_with_nothing_half_and_everything_dead(self):
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            with torch.no_grad():
                dictionary.b_enc.fill_(-1e4)
            x, target = self.data(transcoder)
            x, target = x.double(), None if target is None else target.double()
            for dead in (0, 12, 24):
                dictionary.rows_since_fired.zero_()[:dead] = 10**12
                self.assert_equals_reference(dictionary, x, target, f"{words}, {dead} dead, nothing fires")
                dictionary.zero_grad()
                dictionary.loss(x, target).total.backward()
                assert not dictionary.W_enc.grad.any()  # ReLU's mask holds in the backward pass too
                assert dictionary.b_dec.grad.any()

    def test_of_latents_that_tie_any_may_be_chosen(self):
        """Every latent has a twin, dead or alive with it. Which of two is taken at the k-th place is not defined, so
        what is compared is the loss, and the sums of the gradients over twins."""
        for transcoder in self.modes():
            dictionary = self.trained(transcoder, make=partial(self.make, k=3)).double()
            with torch.no_grad():
                for parameter in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec):
                    parameter[12:] = parameter[:12]
            x, target = self.data(transcoder, seed=1)
            x, target = x.double(), None if target is None else target.double()
            for dead in (0, 6, 12):
                dictionary.rows_since_fired.zero_().view(2, 12)[:, :dead] = 10**12
                loss, reference = dictionary.loss(x, target), self.reference_loss(dictionary, x, target)
                torch.testing.assert_close(loss.total, reference, rtol=1e-10, atol=1e-12)
                active = loss.codes.dense() != 0
                assert (active[:, :12] != active[:, 12:]).any()  # k is odd: one of two twins is left out
                latents = [dictionary.W_enc, dictionary.b_enc, dictionary.W_dec]
                ours = torch.autograd.grad(loss.total, [*latents, dictionary.b_dec])
                theirs = torch.autograd.grad(reference, [*latents, dictionary.b_dec])
                for a, b in zip(ours[:3], theirs[:3], strict=True):
                    torch.testing.assert_close(a[:12] + a[12:], b[:12] + b[12:], rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(ours[3], theirs[3], rtol=1e-8, atol=1e-10)

    # --- Multi-TopK and a falling k --------------------------------------------------------------------------------

    def test_multi_topk_trains_encoders_beyond_the_k_largest(self):
        """A peer's Multi-TopK term gives the encoder no gradient at all."""
        plain, wide = self.trained(False), self.trained(False)
        wide.config = replace(wide.config, multi_topk_weight=1 / 8)
        x = self.data(False, rows=1)[0]
        beyond = torch.ones(24, dtype=torch.bool)
        beyond[plain.encode(x).indices[0]] = False
        for name in ("W_enc", "b_enc", "W_dec"):
            for dictionary, trains in ((plain, False), (wide, True)):
                dictionary.rows_since_fired.zero_()
                dictionary.zero_grad()
                dictionary.loss(x).total.backward()
                assert bool(getattr(dictionary, name).grad[beyond].any()) == trains, name
        assert torch.equal(wide.encode(x).dense(), plain.encode(x).dense())
        terms = wide.loss(x).terms
        torch.testing.assert_close(terms["mse"], plain.loss(x).terms["mse"])
        assert terms["multi_topk"] != terms["mse"]

    def test_k_falls_linearly_and_stays(self):
        dictionary = self.trained(False, updates=0, make=partial(self.make, k_start=20, k_anneal_share=0.5))
        ks = []
        for step in range(18):
            dictionary.schedule(step, 18)
            ks.append(dictionary.k)
        assert ks == [20, 18, 16, 14, 12, 10, 8, 6, 4] + 9 * [4]
        dictionary.schedule(2, 18)
        x = self.data(False)[0]
        assert dictionary.encode(x).indices.shape[1] == 16 and dictionary.loss(x).codes.indices.shape[1] == 16
        assert dictionary.fold().encode(x).indices.shape[1] == 4

    # --- redrawing dead latents ------------------------------------------------------------------------------------

    def test_a_redrawn_latent_alone_repairs_the_row_it_was_drawn_for(self):
        for transcoder in self.modes():
            before, after, update, said = self.redrawn(transcoder, [3, 17])
            assert said == {"resampled": 2.0}
            u = after.input_scaling(update.x)
            y = u if update.target is None else after.target_scaling(update.target)
            error = y - after.target_scaling(before(update.x))
            pre = (u if transcoder else u - before.b_dec) @ after.W_enc.T + after.b_enc
            drawn = set()
            for latent in (3, 17):
                row = int((error @ after.W_dec[latent] / error.norm(dim=1)).argmax())
                drawn.add(row)
                torch.testing.assert_close(pre[row, latent] * after.W_dec[latent], error[row], rtol=1e-3, atol=1e-4)
                assert after.rows_since_fired[latent] == 0
            assert len(drawn) == 2

    def test_rows_are_drawn_by_their_squared_error(self):
        """1000 latents drawn one at a time: the share of each row is its share of the squared error."""
        dictionary = self.trained(False)
        x = self.data(False, rows=6)[0]
        error = dictionary.input_scaling(x) - dictionary.input_scaling(dictionary(x))
        counts, generator = torch.zeros(6), torch.Generator().manual_seed(0)
        dictionary.config = replace(dictionary.config, resample_every=1)
        dictionary.rows_since_fired.zero_()
        for _ in range(1000):
            dictionary.rows_since_fired[5] = 10**12
            attempt = dictionary.copy()
            attempt.after_update(Update(torch.optim.SGD(attempt.parameters()), 0, 9, generator, x, None, None))
            counts[(error @ attempt.W_dec[5] / error.norm(dim=1)).argmax()] += 1
        share = error.square().sum(dim=1) / error.square().sum()
        deviation = (1000 * share * (1 - share)).sqrt()
        assert ((counts - 1000 * share).abs() < 4 * deviation).all()
        assert ((counts - 1000 / 6).abs() > 4 * deviation).any()  # and not evenly

    # --- beginnings ------------------------------------------------------------------------------------------------

    def test_an_autoencoder_begins_tied(self):
        for begin in ("random", "data"):
            dictionary = self.trained(False, updates=0, make=partial(self.make, initial_decoder=begin))
            torch.testing.assert_close(torch.cosine_similarity(dictionary.W_enc, dictionary.W_dec), torch.ones(24))
            torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(24))
            assert not dictionary.b_enc.any()

    def test_no_factor_on_the_encoder_would_rebuild_the_first_rows_better(self):
        """Tied random directions at full strength would begin with more squared error than no latents at all."""
        for words, transcoder, dictionary in self.cases(updates=0):
            # the random directions of a transcoder, which read one thing and write another, fit nothing
            if dictionary.config.k_start is None and words != "random, around zero, transcoder":
                x, y = self.data(transcoder, rows=256)
                u = dictionary.input_scaling(x)
                y = u if y is None else dictionary.target_scaling(y)
                centred = u - dictionary.b_dec if dictionary.subtracts_b_dec else u
                pre = centred @ dictionary.W_enc.T + dictionary.b_enc
                kept = torch.zeros_like(pre).scatter(1, pre.topk(dictionary.k, dim=1).indices, 1.0)
                part = (pre.relu() * kept) @ dictionary.W_dec
                factor = (part * (y - dictionary.b_dec)).sum() / part.square().sum()
                assert float(factor.detach()) == pytest.approx(1, abs=1e-4), words

    def test_decoder_rows_begin_along_data_points_when_asked(self):
        """0.8 of a unit example and 0.2 of a random one have a cosine of 0.96 or more with the example."""
        for transcoder in self.modes():
            x, target = self.data(transcoder, rows=256)
            y = x if target is None else target
            centred = F.normalize(y - y.mean(dim=0), dim=1)
            for begin, near in (("data", True), ("random", False)):
                dictionary = self.trained(transcoder, updates=0, make=partial(self.make, initial_decoder=begin))
                closest = (dictionary.W_dec @ centred.T).amax(dim=1)
                assert bool(closest.min() > 0.95) == near, (begin, transcoder)

    def test_the_decoder_bias_begins_where_it_is_asked_to(self):
        x = self.data(False, rows=256)[0]
        begun = {
            begin: self.trained(False, updates=0, make=partial(self.make, initial_b_dec=begin))
            for begin in ("geometric_median", "mean", "zero")
        }
        scaled = begun["mean"].input_scaling(x)
        torch.testing.assert_close(begun["mean"].b_dec, scaled.mean(dim=0))
        torch.testing.assert_close(begun["geometric_median"].b_dec, geometric_median(scaled))
        assert not torch.allclose(geometric_median(scaled), scaled.mean(dim=0), rtol=1e-3)
        assert not begun["zero"].b_dec.any()


def test_geometric_median_minimises_the_sum_of_distances():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    rows[:40] += 30  # outliers drag the mean, not the median
    median = geometric_median(rows, iterations=1000, tolerance=1e-12)

    def total(point):
        return (rows - point).norm(dim=1).sum()

    assert total(median) < total(rows.mean(dim=0))
    for _ in range(20):
        assert total(median) <= total(median + 0.01 * torch.randn(5, generator=generator, dtype=torch.float64)) + 1e-9


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"d_sae": 8, "k": 9}, "k is 9, more than the 8 latents"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"auxk_weight": -1.0}, "auxk_weight is -1.0"),
        ({"k_aux": 0}, "k_aux is 0"),
        ({"multi_topk_weight": -0.1}, "multi_topk_weight is -0.1"),
        ({"k": 8, "k_start": 4}, "k_start is 4; it must lie between k \\(8\\)"),
        ({"d_sae": 64, "k_start": 65}, "k_start is 65; .* and d_sae \\(64\\)"),
        ({"k_anneal_share": 0.0}, "k_anneal_share is 0.0"),
        ({"resample_every": -1}, "resample_every is -1"),
        ({"scaling": "zscore"}, "scaling is 'zscore'; choose one of mean_square, none, per_token, layer_norm, whiten"),
        ({"initial_decoder": "pca"}, "initial_decoder is 'pca'; choose one of random, data"),
        ({"initial_b_dec": "median"}, "initial_b_dec is 'median'; choose one of geometric_median, mean, zero"),
        ({"shrinkage": -0.5}, "shrinkage is -0.5"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        TopK(TopKConfig(**numbers), 16)
