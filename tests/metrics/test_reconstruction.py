"""Reconstruction metrics against their definitions in float64, pooled over unequal batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.metrics.reconstruction import measure_reconstruction


def dictionary_and_rows(seed: int, rows: int, offset: float = 50.0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = TopK(TopKConfig(d_sae=30, k=3), 8, 6)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(rows, 8, generator=generator).double()  # float32 products differ with the size of the batch
    target = 2 * torch.randn(rows, 6, generator=generator).double() + offset
    return dictionary.double().requires_grad_(False), x, target


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_equals_the_definitions_whatever_the_batches(seed, sizes):
    dictionary, x, target = dictionary_and_rows(seed, sum(sizes) + 1)
    sizes[0] += 1
    batches = list(zip(x.split(sizes), target.split(sizes), strict=True))
    measured = measure_reconstruction(dictionary, batches)
    codes = dictionary.encode(x).dense().numpy()
    y, out = target.double().numpy(), dictionary(x).double().numpy()
    error = y - out
    assert measured.rows == len(x)
    assert measured.fvu == pytest.approx((error**2).sum() / ((y - y.mean(0)) ** 2).sum(), rel=1e-9)
    assert measured.explained_variance == pytest.approx(1 - measured.fvu)
    assert measured.explained_variance_about_zero == pytest.approx(1 - (error**2).sum() / (y**2).sum(), rel=1e-9)
    per_coordinate = 1 - error.var(axis=0) / y.var(axis=0)
    assert measured.explained_variance_per_coordinate == pytest.approx(per_coordinate.mean(), rel=1e-6)
    assert measured.l0 == pytest.approx((codes != 0).sum(axis=1).mean())
    np.testing.assert_allclose(measured.density, (codes != 0).mean(axis=0))
    assert measured.dead_share == pytest.approx(((codes != 0).sum(axis=0) == 0).mean())
    lengths = np.linalg.norm(y, axis=1), np.linalg.norm(out, axis=1)
    assert measured.cosine == pytest.approx(((y * out).sum(axis=1) / lengths[0] / lengths[1]).mean(), rel=1e-5)
    assert measured.l2_ratio == pytest.approx((lengths[1] / lengths[0]).mean(), rel=1e-5)


def test_a_large_mean_costs_no_digits_and_inflates_only_the_metric_about_zero():
    """One quantity under one name: a peer's explained variance about zero read 0.98 where the centred one was 0.78."""
    near = measure_reconstruction(*_as_batches(dictionary_and_rows(0, 200, offset=0.0)))
    dictionary, x, target = dictionary_and_rows(0, 200, offset=1000.0)
    with torch.no_grad():
        dictionary.b_dec += 1000
    far = measure_reconstruction(*_as_batches((dictionary, x, target)))
    assert far.fvu == pytest.approx(near.fvu, rel=1e-9)
    assert far.explained_variance_about_zero > 0.99 > near.explained_variance_about_zero


def _as_batches(parts):
    dictionary, x, target = parts
    return dictionary, [(x, target)]


def test_perfect_and_mean_predictions_score_one_and_zero():
    dictionary, x, target = dictionary_and_rows(1, 100)
    with torch.no_grad():
        dictionary.W_dec.zero_()
        dictionary.b_dec.copy_(target.mean(dim=0))
    assert measure_reconstruction(dictionary, [(x, target)]).explained_variance == pytest.approx(0, abs=1e-6)
    exact = dictionary(x)
    assert measure_reconstruction(dictionary, [(x, exact + 0 * x[:, :6])]).cosine == pytest.approx(1, abs=1e-6)


def test_no_rows_is_refused_in_a_sentence():
    dictionary, _, _ = dictionary_and_rows(2, 3)
    with pytest.raises(UserError, match="not a single row"):
        measure_reconstruction(dictionary, [])
