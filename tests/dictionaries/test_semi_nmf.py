"""SNMF: the dictionary contract, codes against scipy's, and what the factorisation promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from activation_store.errors import UserError
from dictlearn.dictionaries import semi_nmf
from dictlearn.dictionaries.configs import SemiNMFConfig
from dictlearn.dictionaries.semi_nmf import (
    RIDGE,
    SemiNMF,
    alternation,
    factorise,
    non_negative_codes,
    random_codes,
    svd_codes,
    winner_take_all,
)
from dictlearn.metrics.recovery import matched_cosine
from dictlearn.testing.dictionary import DictionaryTests

EXACT = {"sweeps": 1000, "tolerance": 1e-13}


class TestSemiNMF(DictionaryTests):
    transcodes = False
    solver = EXACT

    def make(self, d_in, d_out, **options):
        few = {"d_sae": 7, "winners": 0.5, "iterations": 2, **self.solver}
        return SemiNMF(SemiNMFConfig(**few | options), d_in, d_out)

    def variants(self):
        changes = {
            "as made": {},
            "all neurons": {"winners": 1.0},
            "two neurons": {"winners": 0.1},
            "from principal axes": {"start": "svd"},
        }
        return {
            name: lambda d_in, d_out, options=options: self.make(d_in, d_out, **options)
            for name, options in changes.items()
        }

    def reference_loss(self, dictionary, x, target):
        """Row by row with scipy's solver; the gradient of what the winners leave over goes to all coordinates."""
        rows, features = dictionary.input_scaling(x), dictionary.features
        kept = math.ceil(dictionary.config.winners * rows.shape[1])
        mask = torch.zeros_like(features)
        for row, feature in zip(mask, features.detach(), strict=True):
            row[feature.abs().argsort(descending=True)[:kept]] = 1
        winners = (features * mask).detach()
        codes = torch.from_numpy(np.stack([nnls(winners.numpy().T, row.numpy())[0] for row in rows]))
        # forward the winners, backward as if nothing were masked
        left_over = rows - codes @ winners
        through = -2 * (codes.T @ left_over) / rows.numel()
        losers = codes.square().sum(dim=0)[:, None] * (features * (1 - mask)).square() / rows.numel()
        return left_over.square().mean() + (through * (features - features.detach())).sum() + losers.sum()

    def test_training_lowers_the_error(self):
        """With codes no more exact than training needs: those of the other tests take a minute."""
        self.solver = {"sweeps": 20}
        super().test_training_lowers_the_error()

    def test_features_keep_unit_norm_and_exactly_as_many_neurons(self):
        for name, make in self.variants().items():
            dictionary = self.trained(False, make=make)
            norms = dictionary.W_dec.norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms), msg=name)
            kept = math.ceil(dictionary.config.winners * self.d_in)
            assert ((dictionary.W_dec != 0).sum(dim=1) == kept).all(), name
            assert (dictionary.fold().features != 0).sum() == kept * dictionary.d_sae, name

    def test_training_may_change_which_neurons_a_feature_has(self):
        self.solver = {"sweeps": 20}
        before, after = (self.trained(False, updates=updates).W_dec != 0 for updates in (0, 60))
        assert (before != after).any()

    def test_it_begins_with_the_papers_factorisation_of_its_first_rows(self):
        dictionary, (x, _) = self.trained(False, updates=0), self.data(False, rows=256)
        start = random_codes(x, 7, torch.Generator().manual_seed(0))
        found = factorise(x, start, winners=0.5, iterations=2, patience=100)
        cosines = torch.cosine_similarity(dictionary.W_dec, found.features, dim=1)
        torch.testing.assert_close(cosines, torch.ones(7), rtol=0, atol=1e-4)

    def test_what_a_row_is_given_does_not_depend_on_the_rows_beside_it(self):
        dictionary = self.trained(False, make=lambda *widths: self.make(*widths, sweeps=30, tolerance=1e-2))
        dictionary, x = dictionary.double(), self.data(False, seed=1)[0].double()
        together = dictionary.encode(x).dense()
        alone = torch.cat([dictionary.encode(row[None]).dense() for row in x])
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)

    def test_non_negative_features_stay_so_and_refuse_negative_activations(self):
        def make(d_in, d_out):
            return self.make(d_in, d_out, features="non_negative")

        x = self.data(False, rows=256)[0]
        dictionary = make(12, None)
        with pytest.raises(UserError, match="Non-negative features rebuild no negative activation"):
            dictionary.initialise(x, None, torch.Generator(), self.control())
        dictionary.initialise(x.abs(), None, torch.Generator().manual_seed(0), self.control())
        optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
        errors = []
        for _ in range(50):
            optimiser.zero_grad()
            loss = dictionary.loss(x.abs())
            loss.total.backward()
            errors.append(float(loss.total.detach()))
            optimiser.step()
            dictionary.constrain()
            assert (dictionary.features >= 0).all()
        assert errors[-1] < errors[0]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"winners": 0.0}, "winners is 0.0"),
            ({"winners": 1.1}, "winners is 1.1"),
            ({"d_sae": 0}, "d_sae is 0"),
            ({"iterations": 0}, "iterations is 0"),
            ({"tolerance": 0.0}, "tolerance is 0.0"),
            ({"start": "kmeans"}, "start is 'kmeans'"),
            ({"features": "positive"}, "features is 'positive'"),
            ({"d_sae": 8, "rows": 7}, "rows is 7, fewer than the 8 features"),
        ],
    )
    def test_refuses_what_cannot_be(self, options, sentence):
        with pytest.raises(UserError, match=sentence):
            self.make(12, None, **options)

    def test_refuses_a_target_several_hooks_and_too_few_rows(self):
        with pytest.raises(UserError, match="rebuilds its own input"):
            self.make(12, 10)
        with pytest.raises(UserError, match="of one hook alone"):
            self.make([6, 6], None)
        with pytest.raises(UserError, match="There are 6 rows for 7 features"):
            self.make(12, None).initialise(self.data(False, rows=6)[0], None, torch.Generator(), self.control())


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "d", "features"), [(40, 12, 7), (25, 10, 10), (10, 6, 12), (3, 1, 1)])
def test_codes_are_those_of_scipy(rows, d, features):
    """Where there are more features than coordinates codes need not be unique; what they rebuild is."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        F = torch.randn(features, d, generator=generator, dtype=torch.float64)
        x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
        codes = non_negative_codes(x @ F.T, F @ F.T, sweeps=20_000, tolerance=1e-13)
        expected = np.stack([nnls(F.numpy().T, row.numpy())[0] for row in x])
        np.testing.assert_allclose(codes @ F, expected @ F.numpy(), rtol=0, atol=1e-7)
        if features <= d:
            np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-7)
            np.testing.assert_array_equal(codes > 0, expected > 1e-9)


def test_blocks_of_rows_change_nothing_and_neither_does_a_feature_of_zeros(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    F[3] = 0
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    whole = non_negative_codes(x @ F.T, F @ F.T, 50, 1e-3)
    monkeypatch.setattr(semi_nmf, "PRODUCTS", 8 * 7)
    torch.testing.assert_close(non_negative_codes(x @ F.T, F @ F.T, 50, 1e-3), whole, rtol=1e-12, atol=1e-12)
    assert not whole[:, 3].any() and torch.isfinite(whole).all()


# --- the factorisation ------------------------------------------------------------------------------------------------


def signed_rows(seed: int, rows: int = 60, d: int = 20) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("start", [random_codes, svd_codes])
def test_the_error_falls_in_every_iteration_without_winner_take_all(start, non_negative):
    """But for what the ridge may add: its size times the squared length of the features."""
    for seed in range(4):
        rows = signed_rows(seed)
        rows = rows.abs() if non_negative else rows
        codes = start(rows, 6, torch.Generator().manual_seed(seed))
        errors, allowed = [], []
        for _ in range(100):
            features, codes = alternation(rows, codes, 1.0, non_negative)
            assert (codes >= 0).all() and (not non_negative or (features >= 0).all())
            errors.append(float((rows - codes @ features).square().sum()))
            allowed.append(RIDGE * float(features.square().sum()))
        steps = np.diff(errors)
        assert (steps <= (1e-3 if non_negative else 1) * np.array(allowed[:-1])).all()
        assert errors[-1] < 0.99 * errors[0]


def test_winner_take_all_keeps_exactly_its_share_of_ties_too():
    generator = torch.Generator().manual_seed(0)
    for width, share, kept in ((100, 0.05, 5), (30, 0.1, 3), (704, 0.01, 8), (7, 0.01, 1), (10, 1.0, 10)):
        ties = torch.ones(4, width) * torch.where(torch.rand(4, width, generator=generator) < 0.5, -1, 1)
        assert ((winner_take_all(ties, share) != 0).sum(dim=1) == kept).all()
    rows = torch.tensor([[0.5, -3.0, 0.1, 2.0]])
    assert winner_take_all(rows, 0.5).tolist() == [[0, -3, 0, 2]]


def planted(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """400 rows of 8 features, 5 of 100 neurons each, non-negative codes: ``(rows, features)``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(8, 100, dtype=torch.float64)
    for feature in features:
        places = torch.randperm(100, generator=generator)[:5]
        feature[places] = torch.randn(5, generator=generator, dtype=torch.float64)
    codes = torch.rand(400, 8, generator=generator, dtype=torch.float64)
    return codes @ features, features


def test_winner_take_all_finds_planted_features_and_without_it_they_are_mixed():
    found: dict[float, list[float]] = {0.05: [], 1.0: []}
    for seed in range(6):
        rows, features = planted(seed)
        for winners, scores in found.items():
            start = random_codes(rows, 8, torch.Generator().manual_seed(seed))
            learned = factorise(rows, start, winners=winners, iterations=400, patience=100)
            assert (learned.codes >= 0).all()
            scores.append(matched_cosine(learned.features.numpy(), features.numpy(), draws=0).value)
    assert np.mean(found[0.05]) >= 0.85
    assert (np.array(found[0.05]) > np.array(found[1.0])).all()


def test_the_best_iterate_is_kept_and_the_rest_is_not_waited_for():
    rows, _ = planted(0)
    start = random_codes(rows, 8, torch.Generator().manual_seed(0))
    found = factorise(rows, start, winners=0.05, iterations=400, patience=10)
    error = float((rows - found.codes @ found.features).square().sum() / rows.square().sum())
    assert error == pytest.approx(min(found.errors)) and found.errors[found.best] == min(found.errors)
    assert len(found.errors) <= found.best + 11


def test_the_size_of_the_data_is_the_size_of_the_features_alone():
    rows = signed_rows(0)
    start = random_codes(rows, 6, torch.Generator().manual_seed(0))
    small, large = (factorise(s * rows, start, winners=0.3, iterations=50, patience=50) for s in (1e-4, 1e4))
    torch.testing.assert_close(small.codes, large.codes, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(small.features * 1e8, large.features, rtol=1e-6, atol=1e-6)
    lengths = small.codes.norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_rows_and_coordinates_of_zeros_and_repeated_features_stay_finite():
    rows = signed_rows(0)
    rows[:, 3:9] = 0
    rows[5:20] = 0
    start = random_codes(rows, 6, torch.Generator().manual_seed(0))
    start[:, 2] = start[:, 4]
    start[:, 0] = 0
    for winners in (0.2, 1.0):
        found = factorise(rows, start, winners=winners, iterations=50, patience=50)
        assert torch.isfinite(found.features).all() and torch.isfinite(found.codes).all()
    nothing = factorise(rows * 0, start, winners=0.2, iterations=5, patience=5)
    assert not nothing.features.any() and torch.isfinite(nothing.codes).all()
