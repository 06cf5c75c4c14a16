"""What every kind with an encoder and a decoder matrix of unit rows promises, whatever its selection or penalty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.dictionaries.base import Dictionary, Update
from dictlearn.testing.dictionary import DictionaryTests

SCALINGS = ("mean_square", "none", "per_token", "layer_norm", "whiten")
LATENTS = 24


def scaled_slowly(dictionary: Dictionary, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(input, target)``: the formulas at the top of scaling.py, with the constants that were fitted."""
    name, of_input, of_target = dictionary.config.scaling, dictionary.input_scaling, dictionary.target_scaling
    u = {
        "none": lambda: x,
        "mean_square": lambda: x / of_input.scale,
        "per_token": lambda: x * x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True),
        "layer_norm": lambda: F.layer_norm(x, x.shape[1:], eps=0.0),
        "whiten": lambda: (x - of_input.mean) @ of_input.whiten,
    }[name]()
    return u, u if target is None else target if name == "none" else target / of_target.scale


def topk_loss_slowly(dictionary: Dictionary, pre: Tensor, y: Tensor) -> Tensor:
    """Of pre-activations (B, S): Gao et al. 2024, equations of section 2.3 and appendix A, dense."""
    p, config = dict(dictionary.named_parameters()), dictionary.config

    def decoded(k: int, among: Tensor) -> Tensor:
        kept = torch.zeros_like(pre).scatter(1, among.topk(k, dim=1).indices, 1.0)
        return (pre.relu() * kept) @ p["W_dec"]

    output = decoded(config.k, pre) + p["b_dec"]
    total = (y - output).square().mean()
    if config.multi_topk_weight:
        wide = decoded(min(4 * config.k, LATENTS), pre) + p["b_dec"]
        total = total + config.multi_topk_weight * (y - wide).square().mean()
    dead = dictionary.rows_since_fired > 1000
    if dead.any():
        error = (y - output).detach()
        miss = error - decoded(min(6, int(dead.sum())), pre.masked_fill(~dead, -torch.inf))
        total = total + (1 / 32) * miss.square().sum() / error.square().sum()
    return total


class TwoMatricesTests(DictionaryTests):
    """Dictionaries of 24 latents."""

    several_hooks = True

    def redrawn(
        self, transcoder: bool, dead: list[int], **update: Any
    ) -> tuple[Dictionary, Dictionary, Update, dict[str, float]]:
        """``(before, after, update, what was said)`` of one redrawing."""
        dictionary = self.trained(transcoder)
        dictionary.config = replace(dictionary.config, resample_every=5)
        x, target = self.data(transcoder)
        optimiser = torch.optim.Adam(dictionary.parameters(), lr=0.0)
        loss = dictionary.loss(x, target)
        for parameter in dictionary.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        dictionary.rows_since_fired.zero_()
        dictionary.rows_since_fired[dead] = 10**12
        before = dictionary.copy()
        values = {"step": 4, "steps": 100, "generator": torch.Generator().manual_seed(1), "x": x} | update
        made = Update(optimiser=optimiser, target=target, loss=loss, **values)
        return before, dictionary, made, dictionary.after_update(made)

    def test_autoencoder_subtracts_its_decoder_bias_and_transcoder_does_not(self):
        assert self.trained(False).subtracts_b_dec and not self.trained(False).fold().subtracts_b_dec
        assert not self.trained(True).subtracts_b_dec

    def test_a_transcoder_cannot_begin_as_an_autoencoder(self):
        with pytest.raises(ValueError, match="begins without a target"):
            self.make(self.d_in, self.d_out).initialise(self.data(False)[0], None, torch.Generator(), self.control())

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

    def test_redrawing_forgets_the_past_of_dead_latents_and_leaves_the_others_alone(self):
        for transcoder in self.modes():
            before, after, update, _ = self.redrawn(transcoder, [3, 17])
            live = torch.ones(LATENTS, dtype=torch.bool)
            live[[3, 17]] = False
            for name in ("W_enc", "b_enc", "W_dec"):
                a, b = getattr(before, name), getattr(after, name)
                torch.testing.assert_close(a[live], b[live])
                assert ((a - b)[~live].abs().flatten(1).amax(dim=1) if a.ndim == 2 else (a - b)[~live].abs()).min() > 0
                for moment in ("exp_avg", "exp_avg_sq"):
                    kept = update.optimiser.state[b][moment]
                    assert not kept[~live].any() and (kept[live] != 0).all(), name
            norms = after.W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_latents_are_redrawn_when_asked_and_not_at_the_end(self):
        assert self.redrawn(False, [3], step=3)[3] == {}
        assert self.redrawn(False, [3], step=4)[3] == {"resampled": 1.0}
        assert self.redrawn(False, [], step=4)[3] == {"resampled": 0.0}
        assert self.redrawn(False, [3], step=79)[3] == {"resampled": 1.0}
        assert self.redrawn(False, [3], step=84)[3] == {}
        dictionary = self.trained(False)  # resample_every is 0
        dictionary.rows_since_fired.fill_(10**12)
        before = dictionary.W_enc.detach().clone()
        x = self.data(False)[0]
        assert dictionary.after_update(Update(None, 4, 100, torch.Generator(), x, None, None)) == {}
        assert torch.equal(dictionary.W_enc, before)

    def test_no_more_latents_are_redrawn_than_there_are_rows(self):
        x = self.data(False, rows=5)[0]
        assert self.redrawn(False, list(range(LATENTS)), x=x)[3] == {"resampled": 5.0}

    def test_the_same_generator_redraws_the_same(self):
        first, second = (self.redrawn(False, [3, 17])[1] for _ in range(2))
        other = self.redrawn(False, [3, 17], generator=torch.Generator().manual_seed(2))[1]
        assert torch.equal(first.W_dec, second.W_dec) and not torch.equal(first.W_dec, other.W_dec)
