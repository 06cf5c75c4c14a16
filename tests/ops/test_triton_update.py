"""A row's gradient and its Adam step in one kernel: what torch's Adam makes of the dense gradient."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from dictlearn.ops import row_gradients
from dictlearn.ops.row_gradients import AdamStep

if find_spec("triton") is not None:  # where it is, or else the fixture skips
    from dictlearn.ops import triton_pairs
    from dictlearn.ops.triton_update import PairGradient, lowered, two_blocks

pytestmark = [pytest.mark.needs("interpreter"), pytest.mark.usefixtures("interpreter")]

RATE, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
S, B, K = 11, 9, 3


def gradient_of(seed, width, besides, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(S - 2, generator=generator)[:K] for _ in range(B)])  # two latents stay silent
    indices[:, 0] = torch.where((indices == 4).any(dim=1), indices[:, 0], 4)
    values = torch.randn(B, K, generator=generator, dtype=dtype)
    rows = torch.randn(B, width, generator=generator, dtype=dtype)
    latents = torch.tensor([10, 0, 4]) if besides else None
    dense_rows = torch.randn(3, width, generator=generator, dtype=dtype) if besides else None
    return PairGradient(triton_pairs.bags(indices, S), values, rows, latents, dense_rows)


def unit(weight):
    return F.normalize(weight, dim=1)


@pytest.mark.parametrize("width", [1, 6, 37])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize(("besides", "clipped", "piece"), [(False, True, 256), (True, False, 2)])
def test_three_steps_are_those_of_adam_on_the_dense_gradient(width, unit_rows, besides, clipped, piece, monkeypatch):
    monkeypatch.setattr(triton_pairs, "HOT", piece)
    start = torch.randn(S, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    start = unit(start) if unit_rows else start
    ours, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    theirs = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([theirs], lr=RATE, betas=BETAS, eps=EPS, fused=True)
    for step in range(3):
        gradient = gradient_of(step, width, besides)
        gradient.unit_rows = unit_rows
        dense = gradient.dense()
        if unit_rows:
            dense = dense - (dense * theirs).sum(dim=1, keepdim=True).detach() * theirs.detach()
        torch.testing.assert_close(gradient.squares(ours), dense.square().sum(dim=1), rtol=1e-12, atol=1e-12)
        factor = torch.tensor(0.3, dtype=torch.float64) if clipped else None
        gradient.factor = factor
        gradient.update(ours, mean, square, AdamStep(RATE, BETAS, EPS, torch.tensor(step + 1.0)))
        theirs.grad = dense if factor is None else dense * factor
        adam.step()
        if unit_rows:
            theirs.data = unit(theirs.data)
        # the rate reaches the kernel in float32
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(mean, adam.state[theirs]["exp_avg"], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(square, adam.state[theirs]["exp_avg_sq"], rtol=1e-12, atol=1e-14)


def test_latents_that_nothing_selected_move_as_in_dense_adam():
    """Their gradient is zero, their moments are not."""
    weight, mean, square = torch.ones(S, 4), torch.full((S, 4), 0.5), torch.ones(S, 4)
    gradient_of(0, 4, False, torch.float32).update(weight, mean, square, AdamStep(RATE, BETAS, EPS, torch.tensor(2.0)))
    for silent in (S - 1, S - 2):
        assert torch.equal(mean[silent], torch.full((4,), 0.45)) and (weight[silent] < 1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_step_that_is_not_finite_changes_nothing():
    weight, mean, square = torch.randn(S, 4), torch.randn(S, 4), torch.rand(S, 4)
    before = [tensor.clone() for tensor in (weight, mean, square)]
    gradient = gradient_of(0, 4, True, torch.float32)
    gradient.rows[2, 1] = torch.nan
    assert not torch.isfinite(gradient.trace())
    finite = torch.tensor(False)
    gradient.update(weight, mean, square, AdamStep(RATE, BETAS, EPS, torch.tensor(0.0), finite))
    assert all(torch.equal(a, b) for a, b in zip((weight, mean, square), before, strict=True))
    finite.fill_(True)
    gradient.update(weight, mean, square, AdamStep(RATE, BETAS, EPS, torch.tensor(1.0), finite))
    assert weight.isnan().any()  # and so it was this that kept them


@pytest.mark.parametrize("where", ["weights", "rows", "besides"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_the_trace_of_a_gradient_shows_what_is_not_finite(where, what):
    gradient = gradient_of(0, 4, True, torch.float32)
    assert torch.isfinite(gradient.trace())
    getattr(gradient, where)[1, 2] = what
    assert not torch.isfinite(gradient.trace())


def test_the_copy_in_bfloat16_follows_the_weights():
    weight = torch.nn.Parameter(unit(torch.randn(S, 6)))
    mean, square = torch.zeros(S, 6), torch.zeros(S, 6)
    with torch.no_grad():
        copy = lowered(weight)
        assert torch.equal(copy, weight.bfloat16())
        gradient = gradient_of(1, 6, False, torch.float32)
        gradient.unit_rows = True
        gradient.update(weight, mean, square, AdamStep(0.5, BETAS, EPS, torch.tensor(1.0)))
        assert lowered(weight) is copy
        # the interpreter truncates where a GPU rounds
        torch.testing.assert_close(copy.float(), weight.detach(), rtol=2**-7, atol=1e-6)
        assert row_gradients.has_unit_rows(weight)
        weight.mul_(2)  # by anybody else
        assert lowered(weight) is not copy and torch.equal(lowered(weight), weight.bfloat16())
        assert not row_gradients.has_unit_rows(weight)
        copy = lowered(weight)
        assert lowered(weight) is copy
        weight.data = -weight.data.clone()  # as moving it elsewhere does, which no version shows
        assert torch.equal(lowered(weight), weight.bfloat16())


def test_a_copy_made_in_inference_mode_is_not_kept_for_training():
    weight = torch.nn.Parameter(torch.randn(S, 6))
    with torch.inference_mode():
        made = lowered(weight)
    assert made.is_inference() and not lowered(weight).is_inference()


@pytest.mark.parametrize("width", [1, 2, 3, 17, 64, 768, 1000, 2304, 3584, 4096])
def test_two_blocks_cover_a_row(width):
    first, second = two_blocks(width)
    assert first + second >= width and first < max(width, 2) and (first & (first - 1)) == (second & (second - 1)) == 0


def test_common_widths_are_covered_without_a_rest():
    assert [two_blocks(width) for width in (768, 2304, 4096)] == [(512, 256), (2048, 256), (2048, 2048)]


def test_a_gradient_from_several_sources_becomes_an_ordinary_one():
    weight = torch.nn.Parameter(torch.zeros(S, 4, dtype=torch.float64))
    first, second = gradient_of(0, 4, False), gradient_of(1, 4, True)
    row_gradients.leave(weight, first)
    row_gradients.settle([weight])
    assert row_gradients.of(weight) is first and weight.grad is None
    row_gradients.leave(weight, second)
    row_gradients.settle([weight])
    assert row_gradients.of(weight) is None
    torch.testing.assert_close(weight.grad, first.dense() + second.dense())
    row_gradients.leave(weight, first)
    row_gradients.settle([weight])
    torch.testing.assert_close(weight.grad, 2 * first.dense() + second.dense())
