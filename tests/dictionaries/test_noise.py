"""Noise by hashing: normal, uncorrelated along every axis, and a function of the row alone."""

from __future__ import annotations

import pytest
import torch

from dictlearn.dictionaries import noise
from dictlearn.dictionaries.noise import row_noise

SEEDS = (0, 1, 2**61 + 5)


def rows(seed: int, kind: str) -> torch.Tensor:
    """300 rows that differ by much, or by one coordinate's last bit or sign."""
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed % 2**32))
    if kind == "near":
        x[:] = x[0]
        x[:, 3] = torch.arange(300).float() + 2**20  # the mantissa's low bits
    return x


@pytest.mark.parametrize("kind", ["far", "near"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_standard_normal_and_uncorrelated_over_latents_rows_and_steps(seed, kind):
    x = rows(seed, kind)
    found = torch.stack([row_noise(x, 80, seed, step) for step in range(6)])  # 144,000 numbers
    flat = found.flatten().double()
    bound = 5 / len(flat) ** 0.5  # five standard errors of a mean
    assert abs(flat.mean()) < bound
    assert abs(flat.square().mean() - 1) < bound * 2**0.5
    assert abs((flat**4).mean() - 3) < bound * 96**0.5
    grid = torch.linspace(-2, 2, 9, dtype=torch.float64)
    below = (flat < grid[:, None]).double().mean(dim=1)
    assert (below - torch.special.ndtr(grid)).abs().max() < bound
    for axis in range(3):  # steps, rows, latents
        seen = found.movedim(axis, 0).flatten(1).double()
        products = (seen @ seen.T / seen.shape[1]).fill_diagonal_(0)
        assert products.abs().max() < 6 / seen.shape[1] ** 0.5  # 45,000 pairs: six standard errors
        neighbours = (seen[1:] * seen[:-1]).mean()
        assert abs(neighbours) < bound * 1.1


def test_keys_and_their_order_matter():
    x = rows(0, "far")
    found = [row_noise(x, 8, *key) for key in ((), (1,), (0, 1), (1, 0), (2, 0))]
    for number, one in enumerate(found):
        for other in found[:number]:
            assert (one - other).abs().min(dim=1).values.max() > 0.1 and not (one == other).all(dim=1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_gets_the_same_whatever_stands_beside_it(monkeypatch, dtype):
    x = rows(0, "far").to(dtype)
    whole = row_noise(x, 20, 3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_noise(x[order], 20, 3), whole[order])
    assert torch.equal(torch.cat([row_noise(part, 20, 3) for part in x.split(7)]), whole)
    assert torch.equal(row_noise(x.T.contiguous().T, 20, 3), whole)
    monkeypatch.setattr(noise, "AT_ONCE", 20 * 9)
    assert torch.equal(row_noise(x, 20, 3), whole)
    assert torch.equal(row_noise(x, 33, 3)[:, :20], whole)
    assert row_noise(x[:0], 20, 3).shape == (0, 20)


def test_every_coordinate_of_a_row_and_its_place_matter():
    x = rows(0, "far")
    before = row_noise(x, 8, 0)
    for place in range(16):
        changed = x.clone()
        changed[:, place] = torch.nextafter(changed[:, place], torch.tensor(torch.inf))
        assert not (row_noise(changed, 8, 0) == before).any(dim=1).any()
    assert not (row_noise(x.roll(1, dims=1), 8, 0) == before).any(dim=1).any()


def test_it_is_always_the_same():
    """A changed hash would continue runs with another noise."""
    found = row_noise(torch.tensor([[1.0, -2.0, 0.5]]), 3, 7, 1)
    torch.testing.assert_close(found, torch.tensor([[1.466658, 0.481425, -0.446406]]), rtol=1e-5, atol=1e-6)
