"""Every backend equals the float64 reference: each output, and the gradient of every input from each output.

Random shapes include k = 1, k = d_sae, one row, no latent or every latent looked at besides. Where several
pre-activations tie at the k-th place the choice among them is free, so ties are compared through what they decode to.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dictlearn import ops
from dictlearn.ops import portable, reference

BACKENDS = ["portable", pytest.param("triton", marks=pytest.mark.needs("interpreter"))]
INPUTS = ("x", "W_enc", "b_enc", "W_dec", "b_pre")
RULES = ("relu", "magnitude", "linear")
OUTPUTS = (
    "activations",
    "decoded",
    "error",
    "error with a bias for each row",
    "pre-activations besides",
    "kept of them",
    "decoded besides",
    "error besides",
    "rebuilt besides",
)

shapes = st.tuples(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31)
).flatmap(
    lambda s: st.tuples(
        st.just(s),
        st.integers(1, s[3]),
        st.one_of(st.none(), st.sets(st.integers(0, s[3] - 1))),
        st.integers(1, 4),
        st.booleans(),
        st.sampled_from(RULES),
    )
)


@pytest.fixture(autouse=True)
def _interpreted(request):
    if request.node.get_closest_marker("needs"):
        request.getfixturevalue("interpreter")


def tensors(B, D, O, S, seed, dtype=torch.float64):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)

    def make(*size):
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    return make(B, D), make(S, D), make(S), make(S, O), make(D)


def run(module, inputs, k, also=None, k_also=1, pre_bias=True, rule="relu"):
    """All outputs, those that need not be there as zeros; activations densely, since slots may stand in any order."""
    x, W_enc, b_enc, W_dec, b_pre = inputs
    codes = module.encode_topk(x, W_enc, b_enc, k, b_pre if pre_bias else None, also, rule)
    dense = codes.values.new_zeros(len(x), len(W_enc)).scatter_add(1, codes.indices, codes.values)
    if also is None:
        assert codes.also is None
        return [dense, module.decode(codes.values, codes.indices, W_dec), *rebuilt(module, codes, W_dec, x)]
    kept = module.keep_topk(codes.also, k_also, rule)
    decoded, decoded_also = module.decode_also(codes.values, codes.indices, W_dec, kept, also)
    of_row = rebuilt(module, codes, W_dec, x)
    besides = module.rebuild(codes.values, codes.indices, W_dec, W_dec[0], target(x, W_dec), kept, also)
    return [dense, decoded, *of_row, codes.also, kept, decoded_also, besides.mse, besides.also]


def rebuilt(module, codes, W_dec, x):
    """The error with one bias for all rows, and with one for each; both biases have gradients of their own."""
    found = [
        module.rebuild(codes.values, codes.indices, W_dec, bias, target(x, W_dec))
        for bias in (W_dec[0], x[:, :1] * W_dec[-1])
    ]
    for bias, one in zip((W_dec[0], x[:, :1] * W_dec[-1]), found, strict=True):
        with torch.no_grad():
            output = reference.decode(codes.values, codes.indices, W_dec) + bias
        torch.testing.assert_close(one.output, output)
        assert one.also is None and not one.output.requires_grad
    return [one.mse for one in found]


def target(x, W_dec):
    return torch.arange(len(x) * W_dec.shape[1], dtype=x.dtype).view(len(x), -1).cos()


def gradients(output, weight, inputs):
    """Of every input; zeros where the output does not depend on it."""
    found = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


@settings(max_examples=80, deadline=None)
@given(drawn=shapes)
def test_outputs_and_gradients_equal_the_reference(drawn):
    equal_the_reference("portable", drawn)


@pytest.mark.needs("interpreter")
@settings(max_examples=6, deadline=None)
@given(drawn=shapes)
def test_outputs_and_gradients_of_the_kernels_equal_the_reference(drawn):
    """As above, of fewer shapes: the interpreter is slow. `test_triton` has the cases that random shapes may miss."""
    equal_the_reference("triton", drawn)


def equal_the_reference(backend, drawn):
    (B, D, O, S, seed), k, chosen, k_also, pre_bias, rule = drawn  # noqa: E741
    inputs = tensors(B, D, O, S, seed)
    also = None if chosen is None else torch.tensor(sorted(chosen), dtype=torch.int64)
    ours, theirs = (run(module, inputs, k, also, k_also, pre_bias, rule) for module in (ops.load(backend), reference))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, a, b in zip(OUTPUTS, ours, theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        weight = torch.randn(a.shape, generator=generator, dtype=a.dtype)
        found, expected = gradients(a, weight, inputs), gradients(b, weight, inputs)
        for of, g, h in zip(INPUTS, found, expected, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-11, msg=lambda m, n=name, o=of: f"{n} by {o}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_outputs_together_give_the_reference_gradients(backend):
    """The gradients of several outputs share buffers; one alone does not show whether they add up."""
    inputs, also = tensors(9, 5, 4, 12, 7), torch.tensor([0, 3, 4, 11])
    sums = []
    for module in (ops.load(backend), reference):
        outputs = run(module, inputs, 3, also, 2)
        sums.append(torch.autograd.grad(sum((o.square()).sum() for o in outputs), inputs))
    for of, g, h in zip(INPUTS, *sums, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-11, msg=lambda m, o=of: f"{o}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_negative_pre_activations_give_nothing_and_pass_no_gradient(backend):
    x, W_enc, _, W_dec, b_pre = tensors(4, 3, 3, 6, 0)
    b_enc = torch.full((6,), -100.0, dtype=torch.float64, requires_grad=True)
    outputs = run(ops.load(backend), (x, W_enc, b_enc, W_dec, b_pre), 3, torch.tensor([1, 5]), 1)
    named = dict(zip(OUTPUTS, outputs, strict=True))
    silent = [named[name] for name in ("activations", "decoded", "kept of them", "decoded besides")]
    assert not any(output.any() for output in silent) and named["pre-activations besides"].all()
    total = sum(output.sum() for output in silent)
    for gradient in torch.autograd.grad(total, [x, W_enc, b_enc, W_dec, b_pre]):
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_rows_and_ties_decode_to_the_reference(backend):
    """With equal encoder rows and equal decoder rows it does not matter which of the tied latents wins."""
    x, W_enc, b_enc, W_dec, b_pre = tensors(5, 3, 3, 4, 1)
    W_enc, W_dec, b_enc = (t.detach().repeat(2, *[1] * (t.ndim - 1)).requires_grad_() for t in (W_enc, W_dec, b_enc))
    repeated = x.detach()[[0, 0, 1, 1, 2]].requires_grad_()
    inputs = (repeated, W_enc, b_enc, W_dec, b_pre)
    ours, theirs = (run(module, inputs, 3)[1] for module in (ops.load(backend), reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(o.square().sum(), [repeated, b_pre]) for o in (ours, theirs))
    for g, h in zip(found, expected, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_pre_activations_no_more_than_k_are_kept(backend):
    pre = torch.tensor([[1.0, 2, 2, 2, 0], [3, 3, 3, 3, 3], [-1, -1, -1, -1, -1], [0, 0, 1, 0, 0]], requires_grad=True)
    kept = ops.load(backend).keep_topk(pre, 2)
    assert kept.count_nonzero(dim=1).tolist() == [2, 2, 0, 1]
    assert kept.sum(dim=1).tolist() == [4, 6, 0, 1]
    (gradient,) = torch.autograd.grad(kept.sum(), pre)
    assert torch.equal(gradient, (kept > 0).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("relu", [[0.0, 0, 3, 0.5], [0, 0, 0, 0]]),
        ("magnitude", [[-4.0, 0, 3, 0], [-4, -3, 0, 0]]),
        ("linear", [[0.0, 0, 3, 0.5], [0, 0, -2, -1]]),
    ],
)
def test_each_rule_selects_what_it_says(backend, rule, kept):
    rows, kept = torch.tensor([[-4.0, -1, 3, 0.5], [-4, -3, -2, -1]]), torch.tensor(kept)
    codes = ops.load(backend).encode_topk(rows, torch.eye(4), torch.zeros(4), 2, None, torch.arange(4), rule)
    assert torch.equal(torch.zeros(2, 4).scatter_add(1, codes.indices, codes.values), kept)
    assert torch.equal(ops.load(backend).keep_topk(codes.also, 2, rule), kept)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_of_several_blocks_equals_the_reference(rule, monkeypatch):
    """A CPU encodes in blocks of rows over one buffer; here the last block is not full."""
    monkeypatch.setattr(portable, "BUFFER_ELEMENTS", 256 * 24)
    inputs, also = tensors(600, 6, 5, 24, 3), torch.tensor([2, 3, 20])
    ours, theirs = (run(module, inputs, 4, also, 2, rule=rule) for module in (portable, reference))
    for name, a, b in zip(OUTPUTS, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "backend", ["portable", pytest.param("triton", marks=(pytest.mark.needs("interpreter"), pytest.mark.heavy))]
)
def test_gradcheck_by_finite_differences(backend, rule):
    """Guards against a reference that is wrong in the same way."""
    inputs, also = tensors(3, 4, 5, 7, 2), torch.tensor([0, 6])
    assert torch.autograd.gradcheck(lambda *t: tuple(run(ops.load(backend), t, 3, also, rule=rule)), inputs)


def test_the_same_bits_every_time():
    inputs, also = tensors(256, 16, 16, 64, 3, torch.float32), torch.arange(0, 64, 4)

    def found():
        outputs = run(portable, inputs, 8, also, 4)
        return torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)

    for first, second in zip(found(), found(), strict=True):
        assert torch.equal(first, second)


def test_autocast_lowers_the_encoder_alone():
    """Selected values come from a bfloat16 product, in the type of the input; decoding stays in full precision."""
    x, W_enc, b_enc, W_dec, _ = tensors(32, 16, 16, 64, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices, _ = portable.encode_topk(x, W_enc, b_enc, 4)
        decoded = portable.decode(values, indices, W_dec)
    assert values.dtype == decoded.dtype == torch.float32
    assert torch.equal(values, values.bfloat16().float())
    exact = (x @ W_enc.T + b_enc).gather(1, indices).relu()
    torch.testing.assert_close(values, exact, rtol=2e-2, atol=2e-2)
    assert torch.equal(decoded, portable.decode(values, indices, W_dec))


@pytest.mark.needs("interpreter")
def test_autocast_lowers_what_the_kernels_read_and_not_what_they_sum():
    """Vectors, rows and output gradients in bfloat16, everything else in float32: close to float64 by as much."""
    inputs, also = tensors(7, 16, 16, 24, 4, torch.float32), torch.tensor([1, 5, 20])
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        codes = ops.load("triton").encode_topk(*inputs[:3], 4, inputs[4], also)
        decoded, besides = ops.load("triton").decode_also(codes.values, codes.indices, inputs[3], codes.also, also)
    assert all(t.dtype == torch.float32 for t in (codes.values, codes.also, decoded, besides))
    assert torch.equal(codes.values, codes.values.bfloat16().float())
    # the same selection in float64: a near tie may fall the other way
    x, W_enc, b_enc, W_dec, b_pre = exact
    pre = (x - b_pre) @ W_enc.T + b_enc
    values = pre.gather(1, codes.indices).relu()
    dense = torch.zeros_like(pre).scatter_add(1, codes.indices, values)
    expected = dense @ W_dec, pre[:, also] @ W_dec[also]
    # twelve seeds: outputs at most 0.007 apart, gradients 0.006
    for a, b in ((decoded, expected[0]), (besides, expected[1])):
        assert (a - b).norm() < 0.01 * b.norm()
    found = torch.autograd.grad(decoded.square().sum() + besides.square().sum(), inputs)
    wanted = torch.autograd.grad(expected[0].square().sum() + expected[1].square().sum(), exact)
    for name, g, h in zip(INPUTS, found, wanted, strict=True):
        assert g.dtype == torch.float32 and 0 < (g - h).norm() < 0.02 * h.norm(), name


def test_no_matrix_of_all_pre_activations_is_kept_for_backward():
    x, W_enc, b_enc, W_dec, b_pre = tensors(64, 8, 8, 512, 5, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        run(portable, (x, W_enc, b_enc, W_dec, b_pre), 4)
    # the dense activations that `run` itself makes keep their indices; nothing else is larger than a weight
    assert max(saved) <= W_enc.numel()


class LargestMade(TorchDispatchMode):
    """Elements of the largest tensor that operations return within the block, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        found = operation(*arguments, **(keywords or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if (
                isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8
            ):  # of which the interpreter's copies are
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_as_large_as_all_pairs_vectors_is_ever_made(backend):
    """Neither [B, K, D] nor a dense gradient of the codes: weights and pre-activations are the largest."""
    B, D, S, K = 12, 40, 16, 4
    x, W_enc, b_enc, W_dec, b_pre = tensors(B, D, D, S, 5, torch.float32)
    module = ops.load(backend)
    with LargestMade() as made:
        values, indices, _ = module.encode_topk(x, W_enc, b_enc, K, b_pre)
        module.rebuild(values, indices, W_dec, b_pre, x.detach()).mse.backward()
        module.decode(module.encode_topk(x, W_enc, b_enc, K)[0], indices, W_dec).sum().backward()
    assert made.elements == max(B * S, S * D, B * D) < B * K * D


def test_what_was_encoded_in_inference_mode_does_not_disturb_what_comes_after():
    x, W_enc, b_enc, _, _ = tensors(32, 8, 8, 64, 6, torch.float32)
    portable._reused.__dict__.clear()
    with torch.inference_mode():
        first = portable.encode_topk(x, W_enc, b_enc, 4).values.clone()
    assert torch.equal(portable.encode_topk(x, W_enc, b_enc, 4).values, first)


def test_forcing_a_backend_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"'warp'; choose one of auto, portable, triton, reference"):
        ops.set_backend("warp")


def test_without_triton_its_backend_is_refused_and_never_chosen(monkeypatch):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'triton' needs the package triton"):
        ops.set_backend("triton")
    assert ops.backend("cpu") == "portable"


@pytest.mark.needs("interpreter")
@pytest.mark.usefixtures("interpreter")
def test_kernels_for_a_gpu_leave_what_is_in_host_memory_to_others(monkeypatch):
    """A dictionary begins there, wherever it is trained; only the interpreter can take it."""
    try:
        ops.set_backend("triton")
        assert ops.backend("cpu") == ops.backend("cuda:1") == "triton"
        assert [ops.padded_slots(slots, "cpu") for slots in (1, 16, 17)] == [16, 16, 32]
        monkeypatch.delenv("TRITON_INTERPRET")
        assert (ops.backend("cpu"), ops.backend("cuda:1")) == ("portable", "triton")
        assert ops.padded_slots(17, "cpu") == 17
    finally:
        ops.set_backend("auto")


def test_a_forced_backend_is_used_until_the_device_decides_again(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "decode", lambda *arguments: called.append(1) or portable.decode(*arguments))
    values, indices, W_dec = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), torch.ones(3, 4)
    try:
        ops.set_backend("reference")
        assert ops.backend() == "reference"
        ops.decode(values, indices, W_dec)
    finally:
        ops.set_backend("auto")
    assert called == [1] and ops.backend() == "portable"
    ops.decode(values, indices, W_dec)
    assert called == [1]
