"""MP-SAE: the dictionary contract, and what matching pursuit promises of its residuals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries import matching_pursuit
from dictlearn.dictionaries.configs import MatchingPursuitConfig
from dictlearn.dictionaries.matching_pursuit import MatchingPursuit, pursue
from dictlearn.testing.dictionary import DictionaryTests

NEVER = torch.zeros(())


class TestMatchingPursuit(DictionaryTests):
    transcodes = False

    def make(self, d_in, d_out, **options):
        return MatchingPursuit(MatchingPursuitConfig(**{"d_sae": 20, "k": 5} | options), d_in, d_out)

    def variants(self):
        changes = {
            "as made": {},
            "raw": {"scaling": "none"},
            "stopping early": {"tolerance": 0.5},
            "stopping on a repeat": {"k": 20, "stops_on_repeat": True},
            "from data points": {"initial_decoder": "data"},
            "without a bias": {"bias": "none"},
            "one step": {"k": 1},
            "reviving dead atoms": {"revive_weight": 0.3, "dead_after_rows": 1000},
        }
        return {
            name: lambda d_in, d_out, options=options: self.make(d_in, d_out, **options)
            for name, options in changes.items()
        }

    def reference_loss(self, dictionary, x, target):
        """Row by row, step by step, in autograd."""
        left_over = []
        for row in dictionary.input_scaling(x):
            residual, chosen = row - dictionary.b_dec, set()
            for _ in range(dictionary.k):
                products = dictionary.W @ residual
                atom = int(products.argmax())
                short = residual.norm() <= dictionary.tolerance
                if short or products[atom] <= 0 or (dictionary.config.stops_on_repeat and atom in chosen):
                    break
                chosen.add(atom)
                residual = residual - products[atom] * dictionary.W[atom]
            left_over.append(residual)
        error = torch.stack(left_over)
        total = error.square().mean()
        dead = dictionary.rows_since_fired > dictionary.config.dead_after_rows
        if dictionary.config.revive_weight and dead.any():
            least = []
            for row in error.detach():  # of one more step with each dead atom, the shortest residual
                taken = [float((w @ row).detach()) for w in dictionary.W[dead]]
                atom = dictionary.W[dead][max(range(len(taken)), key=taken.__getitem__)]
                least.append(row.square().sum() - (atom @ row).relu().square())
            total = total + 0.3 * torch.stack(least).sum() / error.detach().square().sum()
        return total

    def test_error_falls_with_every_step_and_k_may_be_another_after_training(self):
        for seed in range(3):
            dictionary = self.trained(False, seed).double().fold()
            x = self.data(False, seed=9)[0].double()
            errors = []
            for k in range(1, 15):
                dictionary.k = k
                codes = dictionary.encode(x)
                assert codes.l0().max() <= k
                errors.append((dictionary.decode(codes) - x).square().sum(dim=1))
            steps = torch.stack(errors).diff(dim=0)
            assert (steps <= 1e-9).all() and (steps < -1e-6).any(dim=1).all()

    def test_without_a_bias_there_is_none(self):
        dictionary = self.trained(False, make=lambda d_in, d_out: self.make(d_in, d_out, bias="none"))
        assert not dictionary.b_dec.any() and self.trained(False).b_dec.any()

    def test_atoms_keep_unit_norm(self):
        for seed in range(3):
            norms = self.trained(False, seed).W.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_a_row_that_is_short_enough_stops(self):
        dictionary = self.trained(False, make=lambda d_in, d_out: self.make(d_in, d_out, k=20, tolerance=0.4))
        x = self.data(False)[0]
        codes = dictionary.encode(x)
        left_over = (dictionary.input_scaling(x) - dictionary.input_scaling(dictionary.decode(codes))).norm(dim=1)
        stopped = codes.l0() < 20
        assert stopped.any() and len(codes.l0().unique()) > 2
        longest = 0.4 * dictionary.d_in**0.5
        nothing_points_there = (left_over[:, None] > longest).squeeze(1) & stopped
        assert (left_over[stopped & ~nothing_points_there] <= longest * (1 + 1e-5)).all()
        assert nothing_points_there.float().mean() < 0.5

    def test_dead_atoms_come_back_where_the_residuals_are(self):
        """Three of twenty atoms lie all but across the plane of the rows, where no row would choose them."""
        for seed in range(3):
            fired = {}
            for weight in (0.0, 1.0):
                dictionary = self.make(self.d_in, None, k=3, revive_weight=weight, dead_after_rows=500)
                generator = torch.Generator().manual_seed(seed)
                x = self.data(False, seed, rows=256)[0]
                x[:, 10:] = 0
                dictionary.initialise(x, None, generator, self.control())
                with torch.no_grad():
                    dictionary.W[:, 10:] = 0
                    dictionary.W[:3] = torch.eye(12)[11] + 0.01 * torch.randn(3, 12, generator=generator)
                dictionary.constrain()
                dictionary.rows_since_fired[:3] = 10**6
                optimiser = torch.optim.Adam(dictionary.parameters(), lr=3e-2)
                for _ in range(60):
                    optimiser.zero_grad()
                    loss = dictionary.loss(x)
                    dead = bool((dictionary.rows_since_fired > 500).any())
                    assert ("revive" in loss.terms) == (dead and weight > 0)
                    loss.total.backward()
                    dictionary.project_gradients()
                    optimiser.step()
                    dictionary.constrain()
                    dictionary.observe(loss.codes)
                fired[weight] = int((dictionary.encode(x).fired()[:3] > 0).sum())
            assert fired == {0.0: 0, 1.0: 3}, seed

    def test_memory_does_not_grow_with_the_steps(self):
        """What autograd keeps: the last residual, and two numbers for each step."""
        kept = []
        for k in (4, 8):
            dictionary = self.make(12, None, k=k)
            dictionary.initialise(*self.data(False), torch.Generator().manual_seed(0), self.control())
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
            ):
                dictionary.loss(self.data(False)[0])
            kept.append(sum(sizes))
        assert kept[1] - kept[0] == 4 * 2 * self.rows

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"k": 0}, "k is 0"),
            ({"k": 21}, "k is 21, more than the 20 atoms"),
            ({"tolerance": -0.1}, "tolerance is -0.1"),
            ({"tolerance": 1.0}, "tolerance is 1.0"),
            ({"scaling": "whiten"}, "scaling is 'whiten'"),
            ({"revive_weight": -1.0}, "revive_weight is -1.0; it must be 0"),
        ],
    )
    def test_refuses_what_cannot_be(self, options, sentence):
        with pytest.raises(UserError, match=sentence):
            self.make(12, None, **options)

    def test_refuses_a_target_and_several_hooks(self):
        with pytest.raises(UserError, match="rebuilds its own input"):
            self.make(12, 10)
        with pytest.raises(UserError, match="of one hook alone"):
            self.make([6, 6], None)


def atoms_and_rows(seed: int, rows: int, d: int, atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(atoms, d, generator=generator, dtype=torch.float64), dim=1)
    return torch.randn(rows, d, generator=generator, dtype=torch.float64), W


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.integers(1, 12))
def test_every_residual_is_orthogonal_to_the_atom_just_taken_and_the_sum_is_exact(seed, rows, d, atoms, steps):
    x, W = atoms_and_rows(seed, rows, d, atoms)
    found = pursue(x, W, steps, NEVER, False)
    torch.testing.assert_close(
        Codes.merged(found.indices, found.coefficients, atoms).dense() @ W + found.residual, x, rtol=1e-9, atol=1e-9
    )
    residual, lengths = x, [x.norm(dim=1)]
    for c, j in zip(found.coefficients.T, found.indices.T, strict=True):
        best = (residual @ W.T).amax(dim=1)
        torch.testing.assert_close(c, best.clamp_min(0), rtol=1e-7, atol=1e-9)
        residual = residual - c[:, None] * W[j]
        assert ((residual * W[j]).sum(dim=1)[c > 0].abs() < 1e-9).all()
        lengths.append(residual.norm(dim=1))
    assert (torch.stack(lengths).diff(dim=0) <= 1e-12).all()


@pytest.mark.parametrize("stops_on_repeat", [False, True])
def test_the_gram_matrix_and_blocks_of_rows_change_nothing(monkeypatch, stops_on_repeat):
    x, W = atoms_and_rows(0, 60, 8, 40)
    whole = pursue(x, W, 6, NEVER, stops_on_repeat)  # 40 atoms, 5 * 60 products: through the Gram matrix
    row_by_row = [pursue(row[None], W, 6, NEVER, stops_on_repeat) for row in x]  # 5 * 1: without
    monkeypatch.setattr(matching_pursuit, "PRODUCTS", 40 * 7)
    in_blocks = pursue(x, W, 6, NEVER, stops_on_repeat)
    for other in (in_blocks, [torch.cat(parts) for parts in zip(*row_by_row, strict=True)]):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
