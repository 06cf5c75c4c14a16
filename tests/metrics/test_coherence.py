"""The Babel function and the effective rank, beside values worked out by hand and a search over all sets."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from dictlearn.codes import Codes
from dictlearn.metrics import coherence
from dictlearn.metrics.coherence import babel, babel_of_active, effective_rank

# e1, e2 and their diagonal: cosines 0, and 1/sqrt(2) twice; lengths do not matter
THREE = torch.tensor([[1.0, 0.0], [0.0, -3.0], [2.0, 2.0]])
HALF = math.sqrt(0.5)


def searched(directions: torch.Tensor, size: int) -> float:
    """By the definition: every set, every atom beyond it."""
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    cosines = (unit @ unit.T).abs()
    atoms = range(len(unit))
    return max(
        float(cosines[j, list(chosen)].sum()) for chosen in combinations(atoms, size) for j in set(atoms) - set(chosen)
    )


def test_the_babel_function_of_three_atoms():
    assert babel(THREE, [1, 2]) == pytest.approx([HALF, 2 * HALF])
    assert babel(torch.eye(5), [1, 4]) == pytest.approx([0.0, 0.0])
    assert babel(torch.ones(5, 3), [1, 4]) == pytest.approx([1.0, 4.0])


@pytest.mark.parametrize("at_once", [7, 2**24])
def test_the_babel_function_is_what_a_search_over_all_sets_finds(monkeypatch, at_once):
    monkeypatch.setattr(coherence, "AT_ONCE", at_once)
    for seed in range(5):
        directions = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
        assert babel(directions, [1, 2, 5, 6]) == pytest.approx([searched(directions, r) for r in (1, 2, 5, 6)])


@pytest.mark.parametrize("size", [0, 3])
def test_a_set_beside_an_atom_cannot_be_empty_or_hold_them_all(size):
    with pytest.raises(ValueError, match="Of 3 atoms a set beside one of them has 1 to 2"):
        babel(THREE, [size])


def test_of_active_atoms_only_those_of_the_row_count():
    codes = Codes(
        torch.tensor([[0, 1, 2], [0, 1, 2], [2, 0, 1], [1, 1, 1]]),
        torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [1.0, 0.0, 0.0]]),
        3,
    )
    one, two, three = babel_of_active(THREE, codes, [1, 2, 3])
    assert one == pytest.approx((HALF + 0 + HALF) / 3)  # the last row has a single atom, which overlaps with nothing
    assert two == pytest.approx(2 * HALF)  # the first alone has three
    assert math.isnan(three)


def test_an_atom_in_two_slots_does_not_overlap_with_itself():
    codes = Codes(torch.tensor([[0, 0, 1]]), torch.ones(1, 3), 3)
    assert babel_of_active(THREE, codes, [1]) == pytest.approx([0.0])


@pytest.mark.parametrize("at_once", [40, 2**24])
def test_of_random_rows_it_is_the_mean_of_the_search(monkeypatch, at_once):
    monkeypatch.setattr(coherence, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 4, generator=generator)
    indices = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(9)])
    codes = Codes(indices, torch.rand(9, 5, generator=generator) + 0.1, 12)
    for size in (1, 3, 4):
        mean = sum(searched(directions[row], size) for row in indices) / 9
        assert babel_of_active(directions, codes, [size]) == pytest.approx([mean])


def test_the_effective_rank_counts_directions_of_codes():
    def of(dense: list[list[float]]) -> Codes:
        return Codes.from_dense(torch.tensor(dense))

    assert effective_rank([of([[2.0, 0.0], [5.0, 0.0]])]) == pytest.approx(1)
    assert effective_rank([of([[3.0, 0.0, 0.0]]), of([[0.0, 3.0, 0.0]])]) == pytest.approx(2)
    # eigenvalues 9 and 1 of 10, in whatever direction: exp(-0.9 ln 0.9 - 0.1 ln 0.1)
    expected = math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert effective_rank([of([[3.0, 0.0], [0.0, 1.0]])]) == pytest.approx(expected)
    assert effective_rank([of([[2.0, 1.0], [1.0, 2.0]])]) == pytest.approx(expected)
    assert math.isnan(effective_rank([of([[0.0, 0.0]])])) and math.isnan(effective_rank([]))
