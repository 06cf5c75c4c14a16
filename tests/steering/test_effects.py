"""Tokens are told apart by how much their probability moved, up and down."""

from __future__ import annotations

import pytest
import torch

from dictlearn.steering.effects import token_changes


def test_what_rose_and_what_fell_most_first():
    base = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]], dtype=torch.float64)
    steered = torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.2, 0.3, 0.3, 0.2]], dtype=torch.float64)
    found = token_changes(base.log(), steered.log(), "abcd".__getitem__, watched=[1], listed=3)
    assert [change.token for change in found.raised] in (["c", "d"], ["d", "c"])  # each by 0.1
    (lowered,) = found.lowered
    assert lowered.token == "a" and lowered.token_id == 0
    assert (lowered.probability_before, lowered.probability_after) == pytest.approx((0.4, 0.2))
    (watched,) = found.watched
    assert watched.token == "b" and watched.log_probability_before == pytest.approx(-1.2040, abs=1e-4)


def test_nothing_rose_where_nothing_moved():
    base = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    found = token_changes(base, base, "ab".__getitem__)
    assert found.raised == found.lowered == found.watched == []
