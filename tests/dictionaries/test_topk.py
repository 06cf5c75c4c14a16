"""TopK, as an autoencoder and as a transcoder: the contract, and what only this kind promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK, geometric_median
from dictlearn.testing.dictionary import DictionaryTests


class TestTopK(DictionaryTests):
    def make(self, d_in: int, d_out: int | None) -> TopK:
        return TopK(TopKConfig(d_sae=24, k=4, dead_after_rows=1000), d_in, d_out)

    def reference_loss(self, dictionary: TopK, x: Tensor, target: Tensor | None) -> Tensor:
        """Gao et al. 2024, equations of section 2.3 and appendix A, dense."""
        p = dict(dictionary.named_parameters())
        x = x / dictionary.input_scale
        y = x if target is None else target / dictionary.target_scale
        centred = x - p["b_dec"] if dictionary.subtracts_b_dec else x
        pre = centred @ p["W_enc"].T + p["b_enc"]
        kept = torch.zeros_like(pre).scatter(1, pre.topk(4, dim=1).indices, 1.0)
        output = (pre.relu() * kept) @ p["W_dec"] + p["b_dec"]
        total = (y - output).square().mean()
        dead = dictionary.rows_since_fired > 1000
        if dead.any():
            error = (y - output).detach()
            among = pre.masked_fill(~dead, -torch.inf)
            kept = torch.zeros_like(pre).scatter(1, among.topk(min(6, int(dead.sum())), dim=1).indices, 1.0)
            miss = error - (pre.relu() * kept) @ p["W_dec"]
            total = total + (1 / 32) * miss.square().sum() / error.square().sum()
        return total

    def test_autoencoder_subtracts_its_decoder_bias_and_transcoder_does_not(self):
        assert self.trained(False).subtracts_b_dec
        assert not self.trained(True).subtracts_b_dec

    def test_exactly_k_slots_and_no_negative_values(self):
        codes = self.trained(False).encode(self.data(False)[0])
        assert codes.indices.shape[1] == 4
        assert (codes.values >= 0).all()

    def test_decoder_rows_keep_unit_norm(self):
        norms = self.trained(True, updates=20).W_dec.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-6, rtol=0)

    def test_the_gradient_left_by_projection_is_orthogonal_to_each_row(self):
        dictionary = self.trained(False)
        dictionary.zero_grad()
        dictionary.loss(*self.data(False)).total.backward()
        assert (dictionary.W_dec.grad * dictionary.W_dec).sum(dim=1).abs().max() > 1e-3
        dictionary.project_gradients()
        assert (dictionary.W_dec.grad * dictionary.W_dec).sum(dim=1).abs().max() < 1e-6

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

    def test_everything_dead_and_all_pre_activations_negative_stay_finite(self):
        dictionary = self.trained(False)
        with torch.no_grad():
            dictionary.b_enc.fill_(-1e4)
        dictionary.rows_since_fired.fill_(10**12)
        dictionary.zero_grad()
        loss = dictionary.loss(self.data(False)[0])
        loss.total.backward()
        assert torch.isfinite(loss.total)
        assert all(torch.isfinite(p.grad).all() for p in dictionary.parameters())
        assert float(dictionary.W_enc.grad.abs().max()) == 0.0  # ReLU's mask holds in the backward pass too


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
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, sentence):
    with pytest.raises(UserError, match=sentence):
        TopK(TopKConfig(**numbers), 16)
