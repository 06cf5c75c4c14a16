"""Kernels that sum over selected pairs, in float64 against dense products: shapes and latents that are not usual.

`test_parity` has the operations made of them; here are widths of one column and of several blocks, one row, repeated
latents, and latents hot enough to be split.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is not None:  # where it is, or else the fixture skips
    from dictlearn.ops import triton_pairs

pytestmark = [pytest.mark.needs("interpreter"), pytest.mark.usefixtures("interpreter")]

CASES = {
    "one of everything": (1, 1, 1, 1),
    "one column": (7, 3, 5, 1),
    "a block of columns and a bit": (5, 3, 9, 300),
    "more slots than one program multiplies": (3, 21, 30, 8),
    "every latent in every row": (6, 5, 5, 3),
    "latents that no row selects": (3, 2, 40, 4),
}


def pairs(B, K, S, D, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(S, generator=generator)[:K] for _ in range(B)])
    values = torch.randn(B, K, generator=generator, dtype=dtype).relu()
    return (
        values,
        indices,
        torch.randn(S, D, generator=generator, dtype=dtype),
        torch.randn(B, D, generator=generator, dtype=dtype),
    )


def dense(values, indices, S):
    return values.new_zeros(len(values), S).scatter_add(1, indices, values)


def hot_pairs(seed):
    """40 rows; one latent is in all of them, others in fewer."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(40, 12, generator=generator) < 0.9 ** torch.arange(12) ** 2
    wanted[:, 5] = True
    indices = wanted.float().topk(4, dim=1).indices
    indices[:, 0] = torch.where((indices == 5).any(dim=1), indices[:, 0], 5)
    values = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    return values, indices, torch.randn(40, 20, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_sums_and_products_are_those_of_dense_matrices(case, seed):
    B, K, S, D = CASES[case]
    values, indices, W, rows = pairs(B, K, S, D, seed)
    codes = dense(values, indices, S)
    exactly = dict(rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(triton_pairs.decode(values, indices, W), codes @ W, **exactly)
    summed = triton_pairs.sum_by_latent(triton_pairs.bags(indices, S), values, rows)
    torch.testing.assert_close(summed, codes.T @ rows, **exactly)
    products = triton_pairs.pair_products(rows, W, indices)
    torch.testing.assert_close(products, (rows @ W.T).gather(1, indices), **exactly)


@pytest.mark.parametrize("piece", [1, 3, 8, 64])
def test_latents_that_are_split_sum_to_the_same(piece, monkeypatch):
    monkeypatch.setattr(triton_pairs, "HOT", piece)
    for seed in (0, 1):
        values, indices, rows = hot_pairs(seed)
        bags = triton_pairs.bags(indices, 12)
        counts = torch.bincount(indices.flatten(), minlength=12)
        expected = torch.where(counts > piece, -(-counts // piece), 0)
        if piece < 40:  # fewer rows than that: nothing can be split
            assert torch.equal(bags.pieces.diff().long(), expected) and expected.max() >= 40 // piece
        else:
            assert not bags.pieces.any() and not len(bags.latent_of_piece)
        summed = triton_pairs.sum_by_latent(bags, values, rows)
        torch.testing.assert_close(summed, dense(values, indices, 12).T @ rows, rtol=1e-13, atol=1e-13)


def test_there_is_room_for_the_most_pieces_that_there_can_be(monkeypatch):
    """Every latent one pair over the limit: as many pieces for as few pairs as possible."""
    monkeypatch.setattr(triton_pairs, "HOT", 3)
    indices = torch.arange(4).repeat(4, 1)
    bags = triton_pairs.bags(indices, 4)
    assert int(bags.pieces[-1]) == 8 <= len(bags.latent_of_piece)
    assert bags.latent_of_piece[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_latent_that_a_row_selects_twice_counts_twice():
    indices, values = torch.tensor([[2, 2, 0]]), torch.tensor([[1.0, 2.0, 4.0]])
    W, rows = torch.eye(3), torch.tensor([[1.0, 10.0]])
    assert triton_pairs.decode(values, indices, W).tolist() == [[4.0, 0.0, 3.0]]
    summed = triton_pairs.sum_by_latent(triton_pairs.bags(indices, 3), values, rows)
    assert summed.tolist() == [[4.0, 40.0], [0.0, 0.0], [3.0, 30.0]]


def test_vectors_in_bfloat16_are_summed_in_float32():
    values, indices, W, rows = pairs(6, 4, 10, 40, 3, torch.float32)
    W, rows = W.bfloat16(), rows.bfloat16()
    codes = dense(values.double(), indices, 10)
    decoded = triton_pairs.decode(values, indices, W)
    summed = triton_pairs.sum_by_latent(triton_pairs.bags(indices, 10), values, rows)
    products = triton_pairs.pair_products(rows, W, indices)
    assert decoded.dtype == summed.dtype == products.dtype == torch.float32
    exact = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(decoded, codes @ W.double(), **exact)
    torch.testing.assert_close(summed, codes.T @ rows.double(), **exact)
    torch.testing.assert_close(products, (rows.double() @ W.double().T).gather(1, indices), **exact)


def test_the_same_bits_whatever_the_order_of_slots():
    """Sums by latent run over the rows of the batch, wherever in a row a latent stands."""
    values, indices, rows = hot_pairs(4)
    shuffled = torch.stack([torch.randperm(4) for _ in range(40)])
    first = triton_pairs.sum_by_latent(triton_pairs.bags(indices, 12), values.float(), rows.float())
    again = triton_pairs.sum_by_latent(
        triton_pairs.bags(indices.gather(1, shuffled), 12), values.float().gather(1, shuffled), rows.float()
    )
    assert torch.equal(first, again)


def test_no_rows_give_no_sums():
    values, indices = torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64)
    assert triton_pairs.decode(values, indices, torch.ones(4, 5)).shape == (0, 5)
    assert triton_pairs.pair_products(torch.empty(0, 5), torch.ones(4, 5), indices).shape == (0, 3)
    summed = triton_pairs.sum_by_latent(triton_pairs.bags(indices, 4), values, torch.empty(0, 5))
    assert torch.equal(summed, torch.zeros(4, 5))
