"""ICFL: the contract, its pursuit against a per-row reference that forms the residual, whitening and resets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries import icfl
from dictlearn.dictionaries.base import Update, Width
from dictlearn.dictionaries.configs import ICFLConfig
from dictlearn.dictionaries.icfl import ICFL, RIDGE
from dictlearn.testing.dictionary import DictionaryTests


def pursue_slowly(row: Tensor, atoms: Tensor, config: ICFLConfig) -> Tensor:
    """Algorithm 1 of arXiv 2412.16247 for one row, with an explicit residual: (S,) dense codes."""
    z, residual = row.new_zeros(len(atoms)), row.clone()
    for _ in range(config.rounds):
        scores = atoms @ residual
        if config.select_by_cosine:
            scores = scores / atoms.norm(dim=1)
        chosen = scores.topk(config.width).indices
        W = atoms[chosen]
        c = torch.linalg.solve(W @ W.T + RIDGE * torch.eye(len(chosen), dtype=row.dtype), W @ residual)
        z[chosen] += c
        residual = residual - c @ W
    return z


class TestICFL(DictionaryTests):
    transcodes = False

    def make(self, d_in: Width, d_out: Width | None) -> ICFL:
        return ICFL(ICFLConfig(d_sae=20, rounds=3, width=2, reset_every=3), d_in, d_out)

    def reference_loss(self, dictionary: ICFL, x: Tensor, target: Tensor | None) -> Tensor:
        atoms = dictionary.atoms
        u = (x - dictionary.mean) @ dictionary.whiten
        unit = u / u.norm(dim=1, keepdim=True)
        with torch.no_grad():
            z = torch.stack([pursue_slowly(row, atoms, dictionary.config) for row in unit])
        return (unit - z @ atoms).square().sum(dim=1).mean()

    @pytest.mark.parametrize("by_cosine", [True, False])
    @pytest.mark.parametrize("way", ["at once", "block by block", "residuals formed", "by torch.topk"])
    def test_codes_equal_the_per_row_reference(self, by_cosine, way, monkeypatch):
        name = {"block by block": "PRODUCTS", "residuals formed": "MOST_ATOMS", "by torch.topk": "FEW"}.get(way)
        if name:
            monkeypatch.setattr(icfl, name, 1)
        if way == "block by block":
            monkeypatch.setattr(icfl, "SHARED_PRODUCTS", 1)
            monkeypatch.setattr(icfl, "LEAST_ROWS", 7)
            monkeypatch.setattr(icfl, "STRIP", 3)
        config = ICFLConfig(d_sae=20, rounds=4, width=3, select_by_cosine=by_cosine)
        dictionary = ICFL(config, 12).double()
        dictionary.initialise(self.data(False)[0], None, torch.Generator().manual_seed(0), self.control())
        x = self.data(False, seed=1)[0].double()
        u = (x - dictionary.mean) @ dictionary.whiten
        expected = torch.stack(
            [pursue_slowly(row / row.norm(), dictionary.atoms.detach(), config) * row.norm() for row in u]
        )
        torch.testing.assert_close(dictionary.encode(x).dense(), expected, rtol=1e-7, atol=1e-8)

    def test_more_rounds_never_reconstruct_worse(self):
        errors = []
        for rounds in (1, 2, 4):
            dictionary = ICFL(ICFLConfig(d_sae=20, rounds=rounds, width=2), 12).double()
            dictionary.initialise(self.data(False)[0], None, torch.Generator().manual_seed(0), self.control())
            x = self.data(False, seed=1)[0].double()
            errors.append((((x - dictionary(x)) @ dictionary.whiten).square().sum()).item())
        assert errors[0] > errors[1] > errors[2]

    def test_close_atoms_are_redrawn_and_their_moments_forgotten(self):
        dictionary = self.trained(False, updates=2)
        optimiser = torch.optim.Adam([dictionary.atoms], lr=0.0)
        x = self.data(False)[0]
        loss = dictionary.loss(x)
        loss.total.backward()
        optimiser.step()
        with torch.no_grad():
            dictionary.atoms[7] = 2 * dictionary.atoms[3]
        kept = dictionary.atoms[3].clone()
        update = Update(optimiser, 2, 3, torch.Generator().manual_seed(1), x, None, loss)
        said = dictionary.after_update(update)
        assert said["resets"] >= 1
        assert torch.equal(dictionary.atoms[3], kept)
        assert torch.cosine_similarity(dictionary.atoms[3], dictionary.atoms[7], dim=0) < 0.9
        assert dictionary.atoms[7].norm().item() == pytest.approx(1, abs=1e-6)
        assert not optimiser.state[dictionary.atoms]["exp_avg"][7].any()
        assert optimiser.state[dictionary.atoms]["exp_avg"][3].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("strip", [3, 512])
    def test_of_atoms_that_point_the_same_way_the_first_stays(self, dtype, strip, monkeypatch):
        monkeypatch.setattr(icfl, "STRIP", strip)
        dictionary = self.make(12, None).to(dtype)
        with torch.no_grad():
            dictionary.atoms[:12] = torch.eye(12)
            dictionary.atoms[12:] = -torch.eye(12)[:8]  # the other way is another atom
            dictionary.atoms[5], dictionary.atoms[9] = 3 * dictionary.atoms[1], 0.1 * dictionary.atoms[1]
            dictionary.atoms[19] = dictionary.atoms[12] + 0.1 * dictionary.atoms[2]
        before = dictionary.atoms.detach().clone()
        optimiser = torch.optim.Adam([dictionary.atoms])
        x = self.data(False)[0].to(dtype)
        said = dictionary.after_update(
            Update(optimiser, 2, 3, torch.Generator().manual_seed(1), x, None, dictionary.loss(x))
        )
        changed = (dictionary.atoms != before).any(dim=1).nonzero().flatten()
        assert changed.tolist() == [5, 9, 19] and said == {"resets": 3.0}
        torch.testing.assert_close(dictionary.atoms[changed].norm(dim=1), torch.ones(3, dtype=dtype))

    @pytest.mark.parametrize(("rounds", "width"), [(1, 1), (1, 12), (12, 1), (5, 2)])
    @pytest.mark.parametrize("shrinkage", [0.0, 0.5])
    def test_any_rounds_widths_and_shrinkage_rebuild_what_the_reference_rebuilds(self, rounds, width, shrinkage):
        config = ICFLConfig(d_sae=20, rounds=rounds, width=width, shrinkage=shrinkage)
        dictionary = ICFL(config, 12).double()
        control = self.control()
        dictionary.initialise(self.data(False)[0], None, torch.Generator().manual_seed(0), control)
        covariance = torch.tensor(control.second_moment - control.mean[:, None] * control.mean)
        s, U = torch.linalg.eigh(covariance)
        T = U / (s + shrinkage * s.mean()).sqrt()
        x = self.data(False, seed=1)[0].double()
        u = (x - torch.tensor(control.mean)) @ T
        z = torch.stack([pursue_slowly(row / row.norm(), dictionary.atoms.detach(), config) * row.norm() for row in u])
        expected = z @ dictionary.atoms @ torch.linalg.inv(T) + torch.tensor(control.mean)
        torch.testing.assert_close(dictionary(x), expected, rtol=1e-4, atol=1e-4)

    def test_equal_atoms_in_one_round_stay_finite(self):
        dictionary = self.trained(False)
        with torch.no_grad():
            dictionary.atoms[1:] = dictionary.atoms[0]
        assert torch.isfinite(dictionary(self.data(False)[0])).all()


@pytest.mark.parametrize(
    ("numbers", "d_out", "sentence"),
    [
        ({"rounds": 5, "width": 4}, None, "rounds \\* width is 20, more than the activation's width 16"),
        ({}, 8, "kind 'icfl' rebuilds its own input and has no target hook"),
        ({"rounds": 0}, None, "rounds is 0"),
        ({"rounds": 1, "width": 9, "d_sae": 8}, None, "width is 9, more than the 8 atoms"),
        ({"rounds": 1, "shrinkage": 2.0}, None, "shrinkage is 2.0"),
    ],
)
def test_impossible_numbers_are_refused_in_a_sentence(numbers, d_out, sentence):
    with pytest.raises(UserError, match=sentence):
        ICFL(ICFLConfig(**numbers), 16, d_out)
