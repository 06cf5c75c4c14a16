"""ReLU with L1: the contract, and what all kinds with a penalty share."""

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
from dictlearn.codes import Codes
from dictlearn.dictionaries.base import Dictionary, Update, Width
from dictlearn.dictionaries.configs import ReLUConfig
from dictlearn.dictionaries.penalised import packed
from dictlearn.dictionaries.relu import ReLU
from tests.dictionaries.two_matrices import SCALINGS, TwoMatricesTests, scaled_slowly


class TestReLU(TwoMatricesTests):
    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> ReLU:
        return ReLU(ReLUConfig(**{"d_sae": 24, "l1_weight": 0.03, "dead_after_rows": 1000} | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in SCALINGS}
        versions["no penalty"] = {"l1_weight": 0.0}
        versions["resampled, still warming up"] = {"resample_every": 2, "warm_up_share": 1.0}
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: ReLU, x: Tensor, target: Tensor | None) -> Tensor:
        """Squared error and L1 row by row, with the papers' lambda; after five steps 4/5 of a warm-up."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        u, y = scaled_slowly(dictionary, x, target)
        lam = config.l1_weight * (0.8 if config.warm_up_share == 1.0 else 1.0)
        total = x.new_zeros(())
        for row, wanted in zip(u, y, strict=True):
            pre = p["W_enc"] @ (row - p["b_dec"] if target is None else row) + p["b_enc"]
            f = torch.where(pre > 0, pre, 0 * pre)
            error = wanted - p["W_dec"].T @ f - p["b_dec"]
            d = len(wanted)
            total = total + (error @ error + lam * d**0.5 * f.sum()) / d
        return total / len(u)

    # --- the activation and the penalty --------------------------------------------------------------------------

    def test_codes_are_positive_and_fill_the_slots_of_the_busiest_row(self):
        dictionary = self.trained(False)
        x = self.data(False)[0]
        codes = dictionary.encode(x)
        assert (codes.values >= 0).all()
        assert codes.indices.shape[1] == codes.l0().max() > codes.l0().min()

    def test_nothing_fires_where_every_pre_activation_is_negative(self):
        for words, transcoder, dictionary in self.cases():
            with torch.no_grad():
                dictionary.b_enc.fill_(-1e4)
            x, target = self.data(transcoder)
            assert dictionary.encode(x).indices.shape == (len(x), 1), words
            dictionary.zero_grad()
            loss = dictionary.loss(x, target)
            loss.total.backward()
            assert loss.terms["l1"] == 0 and not loss.codes.active().any(), words
            assert not dictionary.W_enc.grad.any() and dictionary.b_dec.grad.any(), words

    def test_more_penalty_means_fewer_and_smaller_codes(self):
        x, l0, size = self.data(False, rows=256)[0], [], []
        for weight in (0.0, 0.03, 0.1, 0.3):
            codes = self.trained(False, updates=200, make=partial(self.make, l1_weight=weight)).encode(x)
            l0.append(float(codes.l0().float().mean()))
            size.append(float(codes.values.detach().sum()))
        assert l0 == sorted(l0, reverse=True) and size == sorted(size, reverse=True)
        assert l0[0] > 1.5 * l0[-1] and size[0] > 1.5 * size[-1]

    def test_the_penalty_rises_linearly_and_stays(self):
        dictionary = self.trained(False, updates=0, make=partial(self.make, warm_up_share=0.5))
        x = self.data(False)[0]
        shares = []
        for step in range(16):
            dictionary.schedule(step, 16)
            loss = dictionary.loss(x)
            shares.append(float((loss.total.detach() - loss.terms["mse"]) / (0.03 * loss.terms["l1"])))
        assert shares == pytest.approx([n / 8 for n in range(8)] + 8 * [1.0], abs=1e-4)
        none = self.trained(False, updates=0, make=partial(self.make, warm_up_share=0.0))
        none.schedule(0, 16)
        assert none.warmed == 1.0

    def test_folded_decoder_rows_have_unit_norm_and_codes_are_raw(self):
        for words, transcoder, dictionary in self.cases():
            if "whiten" not in words and "two hooks" not in words:
                folded, x = dictionary.double().fold(), self.data(transcoder)[0].double()
                torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(24).double(), rtol=1e-6, atol=0)
                scaled, raw = dictionary.encode(x).dense(), folded.encode(x).dense()
                torch.testing.assert_close(raw, scaled * dictionary.target_scaling.unit(), rtol=1e-9, atol=1e-9)

    # --- redrawing dead latents ------------------------------------------------------------------------------------

    def test_a_redrawn_latent_lies_along_its_row_and_fires_on_it(self):
        for transcoder in self.modes():
            before, after, update, said = self.redrawn(transcoder, [3, 17])
            assert said == {"resampled": 2.0}
            u, y = scaled_slowly(before, update.x, update.target)
            centre = u.mean(dim=0) if transcoder else before.b_dec
            live = [latent for latent in range(24) if latent not in (3, 17)]
            for latent in (3, 17):
                read, written = after.W_enc[latent], after.W_dec[latent]
                row = int(F.cosine_similarity(u - centre, read[None]).argmax())
                torch.testing.assert_close(F.normalize(u[row] - centre, dim=0), F.normalize(read, dim=0))
                torch.testing.assert_close(F.normalize(y[row] - before.b_dec, dim=0), written)
                assert float(read.detach().norm()) == pytest.approx(
                    0.2 * float(before.W_enc.detach()[live].norm(dim=1).mean()), rel=1e-5
                )
                assert latent in after.encode(update.x[row : row + 1]).indices[0]
                assert after.rows_since_fired[latent] == 0

    def test_rows_are_drawn_by_the_square_of_their_loss(self):
        """1000 latents drawn one at a time: the share of each row is its share of the squared losses."""
        dictionary = self.trained(False)
        x = self.data(False, rows=6)[0]
        u = dictionary.input_scaling(x)
        loss = (u - dictionary.input_scaling(dictionary(x))).square().sum(dim=1).detach()
        counts, generator = torch.zeros(6), torch.Generator().manual_seed(0)
        dictionary.config = replace(dictionary.config, resample_every=1)
        dictionary.rows_since_fired.zero_()
        for _ in range(1000):
            dictionary.rows_since_fired[5] = 10**12
            attempt = dictionary.copy()
            attempt.after_update(Update(torch.optim.SGD(attempt.parameters()), 0, 9, generator, x, None, None))
            counts[F.cosine_similarity(u - dictionary.b_dec, attempt.W_enc[5][None]).argmax()] += 1
        share, linear = (part / part.sum() for part in (loss.square(), loss))
        deviation = (1000 * share * (1 - share)).sqrt().clamp_min(1)
        assert ((counts - 1000 * share).abs() < 4 * deviation).all()
        assert ((counts - 1000 * linear).abs() > 4 * deviation).any()  # and not by the loss itself

    def test_the_first_squared_error_is_below_that_of_no_latents(self):
        for seed in range(5):
            for transcoder in self.modes():
                dictionary = self.trained(transcoder, seed=seed, updates=0)
                x, target = self.data(transcoder, rows=256)
                y = scaled_slowly(dictionary, x, target)[1]
                assert dictionary.loss(x, target).terms["mse"] < (y - dictionary.b_dec).square().mean()


def test_packing_keeps_every_activation():
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.1, 0.9):
        dense = torch.rand(7, 11, generator=generator) * (torch.rand(7, 11, generator=generator) < share)
        codes = packed(dense)
        assert torch.equal(codes.dense(), dense)
        assert codes.indices.shape[1] == max(1, int((dense > 0).sum(dim=1).max()))
    assert isinstance(packed(dense[:0]), Codes) and len(packed(dense[:0])) == 0


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"d_sae": 0}, "d_sae is 0; it must be at least 1"),
        ({"dead_after_rows": 0}, "dead_after_rows is 0"),
        ({"l1_weight": -1.0}, "l1_weight is -1.0; it must be 0 \\(off\\) or positive"),
        ({"l1_weight": float("nan")}, "l1_weight is nan"),
        ({"warm_up_share": 1.5}, "warm_up_share is 1.5"),
        ({"resample_every": -1}, "resample_every is -1"),
        ({"scaling": "zscore"}, "scaling is 'zscore'; choose one of mean_square, none, per_token, layer_norm, whiten"),
        ({"shrinkage": -0.5}, "shrinkage is -0.5"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        ReLU(ReLUConfig(**numbers), 16)
