"""Training with Triton's kernels, whose weight gradients nobody writes down, is training with dense autograd.

In float64, in Triton's interpreter: weights, moments, norms and losses of several steps in a row.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dictlearn import ops
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.configs import (
    AbsTopKConfig,
    BatchTopKConfig,
    CrossLayerConfig,
    ICFLConfig,
    KSparseConfig,
    MatryoshkaConfig,
    SkipConfig,
    TopKConfig,
)
from dictlearn.ops import row_gradients
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Optimiser
from dictlearn.training.step import Member, NotFinite, take_step

pytestmark = [pytest.mark.needs("interpreter"), pytest.mark.usefixtures("interpreter")]

STEPS = 2
COMMON = dict(d_sae=9, k=2)
KINDS = {
    "topk": (TopKConfig(**COMMON, dead_after_rows=30), None),
    "transcoder": (TopKConfig(**COMMON, dead_after_rows=30), 3),
    "multi-topk": (TopKConfig(**COMMON, multi_topk_weight=0.125), None),
    "abstopk": (AbsTopKConfig(**COMMON, dead_after_rows=30), None),
    "batchtopk": (BatchTopKConfig(**COMMON, dead_after_rows=30), None),
    "matryoshka": (MatryoshkaConfig(**COMMON), None),
    "skip": (SkipConfig(**COMMON), 3),
    "ksparse": (KSparseConfig(**COMMON), None),
    "icfl": (ICFLConfig(d_sae=9, rounds=2, width=2, whiten=False), None),
    "clt": (CrossLayerConfig(d_sae=12, k=2, dead_after_rows=30), (2, 2)),
}
QUICK = ("topk", "transcoder", "multi-topk", "matryoshka", "ksparse", "icfl", "clt")
"""Kinds that reach the kernels each in its own way; the others only with the heavy tests."""


@pytest.fixture(autouse=True)
def _leave_ops_as_they_were():
    yield
    ops.set_backend("auto")
    ops.run_ahead(None)


def width(d_out):
    return d_out if isinstance(d_out, int) else sum(d_out)


def batch(step, d_out, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(6, 4, generator=generator, dtype=dtype) + 1
    return x, None if d_out is None else torch.randn(6, width(d_out), generator=generator, dtype=dtype)


def trained(
    backend, config, d_out, clip=0.0, steps=STEPS, dead=False, precision="float32", dtype=torch.float64, parts=1
):
    """A member after some steps, and what each step found."""
    ops.set_backend("reference")
    dictionary = dictionary_class(config.kind)(config, d_out if isinstance(d_out, tuple) else 4, d_out)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 4, generator=generator) + 1
    target = None if d_out is None else torch.randn(64, width(d_out), generator=generator)
    dictionary.initialise(first, target, generator, SimpleNamespace(mean=first.mean(dim=0).numpy()))
    dictionary.to(dtype)
    if dead:
        dictionary.rows_since_fired[::4] = 1000
    ops.set_backend(backend)
    rate = OptimiserConfig(learning_rate=0.02, gradient_clip=clip)
    member = Member("m", dictionary, Optimiser(rate, dictionary), generator, clip, parts, precision)
    found = [take_step(member, *batch(step, d_out, dtype), step, steps) for step in range(steps)]
    member.unread.settle()
    return member, found


def compare(ours, theirs, rtol=1e-7, atol=1e-8):
    (one, found), (other, expected) = ours, theirs
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.loss.total, b.loss.total, rtol=rtol, atol=atol)
        torch.testing.assert_close(a.gradient_norm, b.gradient_norm, rtol=rtol, atol=atol)
    for (name, p), q in zip(one.dictionary.named_parameters(), other.dictionary.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    moments = other.optimiser.tensors()
    assert one.optimiser.tensors().keys() == moments.keys()
    for name, value in one.optimiser.tensors().items():
        torch.testing.assert_close(value, moments[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.heavy) for kind in KINDS]
)
def test_steps_of_every_kind_are_those_of_dense_autograd(kind):
    config, d_out = KINDS[kind]
    dead = hasattr(config, "dead_after_rows")
    compare(*(trained(backend, config, d_out, dead=dead) for backend in ("triton", "reference")))


@pytest.mark.parametrize("ahead", [False, True])
def test_clipping_needs_no_gradient_to_be_written(ahead):
    config, d_out = KINDS["topk"]
    ops.run_ahead(ahead)
    ours = trained("triton", config, d_out, clip=0.05, dead=True)
    assert all(float(step.gradient_norm) > 0.05 for step in ours[1])  # and so it was clipped
    for name in ("W_enc", "W_dec"):
        parameter = getattr(ours[0].dictionary, name)
        assert parameter.grad is None and row_gradients.of(parameter) is not None
    compare(ours, trained("reference", config, d_out, clip=0.05, dead=True))


def test_a_batch_in_parts_writes_its_gradients_and_gives_the_same():
    config, d_out = KINDS["topk"]
    ours = trained("triton", config, d_out, parts=2)
    assert ours[0].dictionary.W_enc.grad is not None
    compare(ours, trained("reference", config, d_out, parts=2))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_what_is_not_finite_changes_nothing(ahead, clip):
    config, d_out = KINDS["topk"]
    ops.run_ahead(ahead)
    member, _ = trained("triton", config, d_out, clip=clip)
    before = {name: p.detach().clone() for name, p in member.dictionary.named_parameters()}
    moments = {name: t.clone() for name, t in member.optimiser.tensors().items()}
    x, _ = batch(9, None)
    x[3, 2] = torch.nan

    def two_steps():
        take_step(member, x, None, STEPS, 10)
        take_step(member, batch(10, None)[0], None, STEPS + 1, 10)  # when it may not be known yet
        member.unread.settle()

    with pytest.raises(NotFinite, match="the input is not finite") as found:
        two_steps()
    assert found.value.rows.tolist() == [3] and found.value.step == STEPS
    for name, parameter in member.dictionary.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, tensor in member.optimiser.tensors().items():
        assert torch.equal(tensor, moments[name]), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_gradient_that_overflows_with_a_finite_loss_changes_nothing():
    """Its norm is what shows it, whether or not anything is clipped."""
    config, d_out = KINDS["topk"]
    member, _ = trained("triton", config, d_out, dtype=torch.float32)
    before = member.dictionary.W_enc.detach().clone()
    of_loss = member.dictionary.loss

    def steep(x, target=None):
        loss = of_loss(x, target)
        return replace(loss, total=loss.total.detach() + 3e38 * (loss.total - loss.total.detach()))

    member.dictionary.loss = steep
    with pytest.raises(NotFinite, match="gradient norm"):
        take_step(member, 100 * batch(9, None, torch.float32)[0], None, STEPS, 10)
    assert torch.equal(member.dictionary.W_enc, before)


def test_in_bfloat16_the_copies_follow_the_weights_and_the_loss_falls_as_in_float32():
    config = TopKConfig(**COMMON)
    low = trained("triton", config, None, precision="bfloat16", dtype=torch.float32, steps=4)
    full = trained("reference", config, None, dtype=torch.float32, steps=4)
    for name in ("W_enc", "W_dec"):
        weight = getattr(low[0].dictionary, name)
        made_of, copy = weight.__dict__["copy_in_bfloat16"]
        assert made_of == row_gradients.state_of(weight)
        torch.testing.assert_close(copy.float(), weight.detach(), rtol=2**-7, atol=1e-6)
    for a, b in zip(low[1], full[1], strict=True):
        # four series of batches: at most 0.004 apart
        torch.testing.assert_close(a.loss.total, b.loss.total, rtol=0.02, atol=0)


def test_other_optimisers_get_ordinary_gradients():
    dictionary = dictionary_class("topk")(TopKConfig(**COMMON), 4)
    assert Optimiser(OptimiserConfig(rule="muon"), dictionary).updates_rows_of == []
    of_adam = Optimiser(OptimiserConfig(), dictionary).updates_rows_of
    assert {id(p) for p in of_adam} == {id(dictionary.W_enc), id(dictionary.W_dec)}


def test_a_run_that_goes_on_on_other_operations_finds_its_moments():
    """The state is torch's, whoever updates: two steps by row and one dense are three dense ones."""
    config, d_out = KINDS["topk"]
    member, _ = trained("triton", config, d_out, steps=2)
    ops.set_backend("reference")
    take_step(member, *batch(2, d_out), 2, 2)
    expected, _ = trained("reference", config, d_out, steps=2)
    take_step(expected, *batch(2, d_out), 2, 2)
    compare((member, []), (expected, []))
