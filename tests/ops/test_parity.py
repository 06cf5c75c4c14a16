"""Every backend equals the float64 reference: each output, and the gradient of every input from each output.

Random shapes include k = 1, k = d_sae, one row, repeated rows, ties and all-negative pre-activations. Where several
pre-activations tie at the k-th place the choice among them is free, so ties are compared through what they decode to.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dictlearn import ops
from dictlearn.ops import portable, reference

BACKENDS = [name for name in ops.BACKENDS if name != "reference"]

shapes = st.tuples(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31)
).flatmap(lambda s: st.tuples(st.just(s), st.integers(1, s[3])))


def tensors(B, D, O, S, seed, dtype=torch.float64):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def make(*size):
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    return make(B, D), make(S, D), make(S), make(S, O)


def run(module, x, W_enc, b_enc, W_dec, k, among=None):
    if among is None:
        values, indices = module.encode_topk(x, W_enc, b_enc, k)
    else:
        values, indices = module.encode_topk_among(x, W_enc, b_enc, k, among)
    return values, indices, module.decode(values, indices, W_dec)


def dense(values, indices, latents):
    return values.new_zeros(len(values), latents).scatter_add(1, indices, values)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(shape=shapes, restrict=st.booleans())
def test_outputs_and_gradients_equal_the_reference(backend, shape, restrict):
    (B, D, O, S, seed), k = shape  # noqa: E741
    inputs = tensors(B, D, O, S, seed)
    among = None
    if restrict:
        among = torch.arange(S) % 2 == 0
    results = [run(module, *inputs, k, among) for module in (ops.BACKENDS[backend], reference)]
    activations = [dense(values, indices, S) for values, indices, _ in results]
    torch.testing.assert_close(activations[0], activations[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = (
        torch.randn(B, S, generator=generator, dtype=torch.float64),
        torch.randn(B, O, generator=generator, dtype=torch.float64),
    )
    for output, weight in ((0, weights[0]), (1, weights[1])):
        gradients = []
        for (_, _, decoded), activation in zip(results, activations, strict=True):
            scalar = ((activation, decoded)[output] * weight).sum()
            gradients.append(torch.autograd.grad(scalar, inputs, allow_unused=True, retain_graph=True))
        for name, ours, theirs in zip(("x", "W_enc", "b_enc", "W_dec"), *gradients, strict=True):
            ours = torch.zeros(1) if ours is None else ours
            theirs = torch.zeros(1) if theirs is None else theirs
            assert ours.shape == theirs.shape or float(ours.abs().max()) == float(theirs.abs().max()) == 0, name
            if ours.shape == theirs.shape:
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_negative_pre_activations_give_nothing_and_pass_no_gradient(backend):
    x, W_enc, _, W_dec = tensors(4, 3, 3, 6, 0)
    b_enc = torch.full((6,), -100.0, dtype=torch.float64, requires_grad=True)
    values, _, decoded = run(ops.BACKENDS[backend], x, W_enc, b_enc, W_dec, 3)
    assert not values.any() and not decoded.any()
    for gradient in torch.autograd.grad(decoded.sum() + values.sum(), [x, W_enc, b_enc]):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_rows_and_ties_decode_to_the_reference(backend):
    """With equal encoder rows and equal decoder rows it does not matter which of the tied latents wins."""
    x, W_enc, b_enc, W_dec = tensors(5, 3, 3, 4, 1)
    tied = [t.detach().repeat(2, 1).requires_grad_() for t in (W_enc, W_dec)]
    b_tied = b_enc.detach().repeat(2).requires_grad_()
    repeated = x.detach()[[0, 0, 1, 1, 2]]
    ours = run(ops.BACKENDS[backend], repeated, tied[0], b_tied, tied[1], 3)[2]
    theirs = run(reference, repeated, tied[0], b_tied, tied[1], 3)[2]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_by_finite_differences(backend):
    """Guards against a reference that is wrong in the same way."""
    module = ops.BACKENDS[backend]
    x, W_enc, b_enc, W_dec = tensors(3, 4, 5, 7, 2)
    assert torch.autograd.gradcheck(lambda *t: run(module, *t, 3)[2], (x, W_enc, b_enc, W_dec))


def test_the_same_bits_every_time():
    x, W_enc, b_enc, W_dec = tensors(256, 16, 16, 64, 3, torch.float32)

    def gradients():
        decoded = run(portable, x, W_enc, b_enc, W_dec, 8)[2]
        return torch.autograd.grad(decoded.square().sum(), [x, W_enc, b_enc, W_dec])

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


def test_forcing_a_backend_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"'warp'; choose one of portable, reference"):
        ops.set_backend("warp")
