"""Gated: the contract, which gradient reaches what, and that the two paths fold into one linear encoder and a gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.base import Dictionary, Update, Width
from dictlearn.dictionaries.configs import GatedConfig
from dictlearn.dictionaries.gated import Gated
from dictlearn.testing.dictionary import DictionaryTests
from tests.dictionaries.two_matrices import SCALINGS, scaled_slowly


class TestGated(DictionaryTests):
    several_hooks = True

    def make(self, d_in: Width, d_out: Width | None, **numbers: Any) -> Gated:
        defaults = {"d_sae": 24, "l1_weight": 0.03, "dead_after_rows": 1000}
        return Gated(GatedConfig(**defaults | numbers), d_in, d_out)

    def variants(self) -> dict[str, Callable[[Width, Width | None], Dictionary]]:
        versions: dict[str, dict[str, Any]] = {name: {"scaling": name} for name in SCALINGS}
        versions["no penalty, half the auxiliary weight"] = {"l1_weight": 0.0, "auxiliary_weight": 0.5}
        versions["resampled, still warming up"] = {"resample_every": 2, "warm_up_share": 1.0}
        return {name: partial(self.make, **numbers) for name, numbers in versions.items()}

    def trained(self, *arguments: Any, **options: Any) -> Gated:
        """Five updates from r_mag 0 leave it near 0, where a forgotten exponential would hide."""
        dictionary = super().trained(*arguments, **options)
        assert isinstance(dictionary, Gated)
        if options.get("updates", 5):
            with torch.no_grad():
                generator = torch.Generator().manual_seed(7)
                dictionary.r_mag.add_(torch.randn(24, generator=generator) * 0.3)
                dictionary.b_gate.add_(torch.randn(24, generator=generator) * 0.1)
        return dictionary

    def reference_loss(self, dictionary: Gated, x: Tensor, target: Tensor | None) -> Tensor:
        """Section 3 of the paper, row by row, with a W_mag of its own and its lambda in its units."""
        p, config = dict(dictionary.named_parameters()), dictionary.config
        u, y = scaled_slowly(dictionary, x, target)
        lam = config.l1_weight * (0.8 if config.warm_up_share == 1.0 else 1.0)
        W_mag = torch.diag(torch.exp(p["r_mag"])) @ p["W_enc"]
        frozen_W, frozen_b = p["W_dec"].detach(), p["b_dec"].detach()
        total = x.new_zeros(())
        for row, wanted in zip(u, y, strict=True):
            centred = row - p["b_dec"] if target is None else row
            gate, magnitude = p["W_enc"] @ centred + p["b_gate"], W_mag @ centred + p["b_enc"]
            open_, positive = gate.gt(0).double(), magnitude.gt(0).double()
            error = wanted - p["W_dec"].T @ (open_ * positive * magnitude) - p["b_dec"]
            missed = wanted - frozen_W.T @ (open_ * gate) - frozen_b
            d = len(wanted)
            total = total + (error @ error + config.auxiliary_weight * (missed @ missed)) / d
            total = total + lam * (open_ * gate).sum() / d**0.5
        return total / len(u)

    # --- which gradient reaches what -------------------------------------------------------------------------------

    def test_the_gate_learns_from_the_penalty_and_the_auxiliary_term_alone(self):
        """b_gate has no gradient from the reconstruction, and W_dec, b_enc and r_mag have none from the others."""
        for transcoder in self.modes():
            x, target = self.data(transcoder)
            found = {}
            for l1, auxiliary in ((0.03, 1.0), (0.3, 1.0), (0.03, 3.0)):
                make = partial(self.make, l1_weight=l1, auxiliary_weight=auxiliary)
                dictionary = self.trained(transcoder, updates=0, make=make)
                dictionary.loss(x, target).total.backward()
                found[l1, auxiliary] = {name: p.grad for name, p in dictionary.named_parameters()}
            plain, penalised, rebuilt = found.values()
            for other in (penalised, rebuilt):
                for name in ("W_dec", "b_enc", "r_mag"):
                    torch.testing.assert_close(other[name], plain[name], rtol=1e-6, atol=1e-9)
                for name in ("W_enc", "b_gate"):
                    assert (other[name] - plain[name]).abs().max() > 1e-4, name
            # b_gate's gradient is linear in the two weights without a constant: the reconstruction adds nothing
            from_l1 = (penalised["b_gate"] - plain["b_gate"]) / 0.27
            from_auxiliary = (rebuilt["b_gate"] - plain["b_gate"]) / 2
            torch.testing.assert_close(plain["b_gate"], 0.03 * from_l1 + from_auxiliary, rtol=1e-3, atol=1e-6)

    # --- what fires ------------------------------------------------------------------------------------------------

    def test_a_latent_fires_where_its_gate_is_open_and_its_magnitude_positive(self):
        dictionary = self.trained(False)
        x = self.data(False)[0]
        with torch.no_grad():
            product = (dictionary.input_scaling(x) - dictionary.b_dec) @ dictionary.W_enc.T
            gate, magnitude = product + dictionary.b_gate, product * dictionary.r_mag.exp() + dictionary.b_enc
            dense = dictionary.encode(x).dense()
        fires = (gate > 0) & (magnitude > 0)
        assert torch.equal(dense != 0, fires)
        torch.testing.assert_close(dense[fires], magnitude[fires])
        assert ((gate > 0) & ~fires).any() and ((magnitude > 0) & ~fires).any()

    def test_folded_codes_are_linear_in_the_raw_input_where_they_fire(self):
        """What circuits rest on: W_enc x + b_enc, with the factor of the magnitude path inside."""
        for words, transcoder, dictionary in self.cases():
            dictionary = dictionary.double()
            folded, x = dictionary.fold(), self.data(transcoder, seed=4)[0].double()
            assert not folded.r_mag.any() and dictionary.r_mag.any()
            dense = folded.encode(x).dense()
            rows = folded.input_scaling(x)
            linear = rows @ folded.W_enc.T + folded.b_enc
            if folded.target_scaling.row_wise:
                linear = linear * folded.target_scaling.of_rows(x)[1]
            torch.testing.assert_close(dense[dense != 0], linear[dense != 0], rtol=1e-9, atol=1e-9, msg=words)
            torch.testing.assert_close(
                dense, dictionary.encode(x).dense() * dictionary.target_scaling.unit(), rtol=1e-9, atol=1e-9, msg=words
            )

    def test_the_penalty_shrinks_gates_and_not_magnitudes(self):
        """What the paper undoes: after training the codes rebuild ten times better than the gate's activations."""
        for seed in range(5):
            make = partial(self.make, l1_weight=0.15)
            dictionary = DictionaryTests.trained(self, False, seed=seed, updates=400, make=make)
            terms = dictionary.loss(self.data(False)[0]).terms
            assert terms["mse"] < 0.3 * terms["auxiliary"], seed

    def test_a_redrawn_latent_begins_with_equal_paths(self):
        for transcoder in self.modes():
            dictionary = self.trained(transcoder, make=partial(self.make, resample_every=1))
            optimiser = torch.optim.Adam(dictionary.parameters(), lr=0.0)
            x, target = self.data(transcoder)
            loss = dictionary.loss(x, target)
            for parameter in dictionary.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimiser.step()
            dictionary.rows_since_fired.zero_()[3] = 10**12
            before = dictionary.copy()
            dictionary.after_update(Update(optimiser, 0, 9, torch.Generator().manual_seed(0), x, target, loss))
            assert dictionary.r_mag[3] == 0 and dictionary.b_gate[3] == dictionary.b_enc[3]
            live = torch.arange(24) != 3
            for name in ("r_mag", "b_gate", "b_enc"):
                assert torch.equal(getattr(dictionary, name)[live], getattr(before, name)[live])
                kept = optimiser.state[getattr(dictionary, name)]["exp_avg"]
                assert kept[3] == 0 and (kept[live] != 0).all(), name


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"l1_weight": -1.0}, "l1_weight is -1.0"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight is -1.0"),
        ({"auxiliary_weight": 0.0}, "auxiliary_weight is 0; the gate would learn from the penalty alone"),
        ({"d_sae": 0}, "d_sae is 0"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        Gated(GatedConfig(**numbers), 16)
