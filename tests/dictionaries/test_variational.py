"""vSAE, as an autoencoder and as a transcoder: the contract, and what only this kind promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Width
from dictlearn.dictionaries.configs import TopKConfig, VariationalConfig
from dictlearn.dictionaries.noise import row_noise
from dictlearn.dictionaries.topk import TopK
from dictlearn.dictionaries.variational import Variational
from tests.dictionaries.two_matrices import TwoMatricesTests, scaled_slowly, topk_loss_slowly

SIGMA = 0.3


class TestVariational(TwoMatricesTests):
    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> Variational:
        common = {"d_sae": 24, "k": 4, "dead_after_rows": 1000, "beta": 0.05, "sigma": SIGMA}
        return Variational(VariationalConfig(**common | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in ("mean_square", "layer_norm")}
        versions["learned, whitened"] = {"variance": "learned", "scaling": "whiten"}
        versions["learned, every latent active"] = {"variance": "learned", "k": 24}
        versions["nothing sampled"] = {"variance": "none"}
        versions["without its KL"] = {"beta": 0.0}
        versions["Multi-TopK, resampled, falling k, slow beta"] = {
            "variance": "learned",
            "multi_topk_weight": 1 / 8,
            "k_start": 12,
            "k_anneal_share": 0.4,
            "resample_every": 2,
            "kl_warm_up_share": 1.0,
        }
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def reference_loss(self, dictionary: Variational, x: Tensor, target: Tensor | None) -> Tensor:
        """The formulas at the top of the file, dense, around TopK's loss of sampled latents."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        u, y = scaled_slowly(dictionary, x, target)
        centred = u - p["b_dec"] if dictionary.subtracts_b_dec else u
        mean = centred @ p["W_enc"].T + p["b_enc"]
        variance = {
            "none": lambda: mean.new_zeros(()),
            "fixed": lambda: mean.new_tensor(SIGMA**2),
            "learned": lambda: (centred @ p["W_var"].T + p["b_var"]).exp(),
        }[config.variance]()
        pre = mean + variance.sqrt() * row_noise(x, 24, dictionary.noise_key, dictionary.step).to(mean)

        total = topk_loss_slowly(dictionary, pre, y)
        share = dictionary.step / 5 if config.kl_warm_up_share == 1 else 1.0  # of the five steps of `trained`
        if config.variance == "learned":
            prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
            kl = kl_divergence(Normal(mean, variance.sqrt()), prior)
        else:
            kl = mean.square() / 2
        return total + (config.beta * share * kl.sum(dim=1).mean() / y.shape[1] if config.beta else 0)

    def test_without_beta_and_variance_it_is_topk_bit_for_bit(self):
        for transcoder in self.modes():
            numbers = {"d_sae": 24, "k": 4, "dead_after_rows": 100, "resample_every": 4}
            plain = self.trained(transcoder, updates=30, make=partial(TopK, TopKConfig(**numbers)))
            ours = self.trained(
                transcoder,
                updates=30,
                make=partial(Variational, VariationalConfig(beta=0.0, variance="none", **numbers)),
            )
            for name, tensor in plain.state_dict().items():
                assert torch.equal(ours.state_dict()[name], tensor), name
            x, target = self.data(transcoder, seed=1)
            assert torch.equal(ours.loss(x, target).total, plain.loss(x, target).total)
            assert torch.equal(ours.fold()(x), plain.fold()(x))
            beside = self.trained(transcoder, updates=30, make=partial(self.make, **numbers))
            assert (beside.W_enc - plain.W_enc).abs().max() > 1e-3

    @pytest.mark.parametrize("variance", ["fixed", "learned"])
    def test_samples_have_the_mean_and_the_variance_of_the_posterior_folded_or_not(self, variance):
        make = partial(self.make, variance=variance, k=24)
        trained = self.trained(False, make=make)
        with torch.no_grad():
            trained.b_enc += 1e3  # so that the ReLU lets all noise through
        trained = trained.double()
        x = self.data(False, rows=20)[0].double()
        for dictionary in (trained, trained.fold()):
            drawn = []
            for step in range(400):
                dictionary.schedule(step, 10**6)
                drawn.append(dictionary.sample(x).dense())
            drawn = torch.stack(drawn) / dictionary.unit
            mean, log_variance = dictionary.posterior(x)
            sigma = (log_variance / 2).exp().expand_as(mean)
            torch.testing.assert_close(mean * dictionary.unit, dictionary.encode(x).dense(), rtol=1e-9, atol=1e-9)
            off = (drawn - mean) / sigma
            assert off.mean(dim=0).abs().max() < 5 / 400**0.5  # of 480 means
            assert (off.var(dim=0) - 1).abs().max() < 5 * (2 / 400) ** 0.5
            if variance == "fixed":
                torch.testing.assert_close(sigma, torch.full_like(sigma, SIGMA))
            else:
                assert sigma.std() > 1e-3
        for of_trained, of_folded in zip(trained.posterior(x), trained.fold().posterior(x), strict=True):
            torch.testing.assert_close(of_trained, of_folded, rtol=1e-8, atol=1e-8)
        assert float(trained.fold().unit) != pytest.approx(1.0)

    def test_the_noise_is_of_the_run_and_of_the_step(self):
        x = self.data(False)[0]
        dictionary, other = self.trained(False), self.trained(False, seed=1)
        assert dictionary.noise_key != other.noise_key and "noise_key" in dictionary.state_dict()
        keyed = copy.deepcopy(dictionary)
        keyed.noise_key.copy_(other.noise_key)
        later = copy.deepcopy(dictionary)
        later.schedule(7, 5)
        losses = {float(d.loss(x).total.detach()) for d in (dictionary, keyed, later)}
        assert len(losses) == 3
        # a run that was stopped: the same tensors, and told the step
        resumed = self.make(self.d_in, None)
        resumed.subtracts_b_dec = True
        resumed.load_state_dict(dictionary.state_dict())
        resumed.schedule(4, 5)
        assert torch.equal(resumed.loss(x).total, dictionary.loss(x).total)

    def test_what_is_logged_counts_the_posteriors_that_are_the_prior(self):
        for variance in ("none", "fixed", "learned"):
            dictionary = self.trained(False, make=partial(self.make, variance=variance))
            x = self.data(False)[0]
            with torch.no_grad():
                dictionary.W_enc[:9] = 0.0
                dictionary.b_enc[:9] = torch.tensor(0.0199).sqrt()  # a KL of 0.00995, and of 0.01005
                dictionary.b_enc[3] = torch.tensor(0.0201).sqrt()
                if variance == "learned":
                    dictionary.W_var[:9], dictionary.b_var[:9] = 0.0, 0.0
                    dictionary.b_var[5] = 1.0
            terms = dictionary.loss(x).terms
            collapsed = 7 if variance == "learned" else 8
            assert float(terms["collapsed"]) == pytest.approx(collapsed / 24), variance
            mean, log_variance = dictionary.posterior(x)
            if variance == "learned":
                kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
            else:
                kl = mean.square() / 2
            torch.testing.assert_close(terms["kl"], kl.sum(dim=1).mean(), rtol=1e-5, atol=1e-6)

    def test_a_redrawn_latent_begins_with_the_variance_of_the_start(self):
        made = self.make
        self.make = partial(made, variance="learned")
        before, after, update, _ = self.redrawn(False, [3, 17])
        live = torch.ones(24, dtype=torch.bool)
        live[[3, 17]] = False
        for name in ("W_var", "b_var"):
            a, b = getattr(before, name), getattr(after, name)
            begin = 0.0 if name == "W_var" else 2 * math.log(SIGMA)
            assert torch.equal(a[live], b[live]) and (b[~live] == begin).all() and (a[~live] != begin).any()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not update.optimiser.state[b][moment][~live].any()

    def test_more_beta_makes_shorter_codes(self):
        for seed in range(3):
            lengths = []
            for beta in (0.0, 0.1, 1.0):
                make = partial(self.make, beta=beta, variance="none")
                lengths.append(float(self.trained(False, seed, 30, make).loss(self.data(False)[0]).terms["kl"]))
            assert lengths[0] > 1.1 * lengths[1] > 1.2 * lengths[2]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"beta": -0.1}, "beta is -0.1; it must be 0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"sigma": 0.0}, "sigma is 0.0; it must be above 0"),
        ({"sigma": float("inf")}, "sigma is inf"),
        ({"kl_warm_up_share": 1.1}, "kl_warm_up_share is 1.1"),
        ({"kl_warm_up_share": -0.1}, "kl_warm_up_share is -0.1"),
        ({"variance": "some"}, "variance is 'some'; choose one of none, fixed, learned"),
        ({"k": 9}, "k is 9, more than the 8 latents"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        Variational(VariationalConfig(**{"d_sae": 8, "k": 4} | numbers), 16)
