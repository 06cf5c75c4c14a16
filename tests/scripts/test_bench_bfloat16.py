"""The roundings that are measured are those of the kernels, and the measurement runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dictlearn import ops
from tests.training.planted import IN, make_store


@pytest.mark.heavy
def test_it_prints_a_table_of_all_ways(tmp_path):
    make_store(tmp_path / "s.zarr", rows=3000)
    settings = ["--d-sae", "32", "--k", "4", "--batch", "128", "--steps", "3", "--seeds", "2", "--rows", "200"]
    found = subprocess.run(
        [sys.executable, "scripts/bench/bfloat16.py", "--store", str(tmp_path / "s.zarr"), "--hook", IN, *settings],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert [line.split("|")[1].strip() for line in found.stdout.splitlines()[-6:]] == [
        "training",
        "---",
        "float32",
        "encoder's product in bfloat16",
        "all that the kernels keep in bfloat16",
        "float32, another seed",
    ]


@pytest.mark.needs("interpreter")
def test_the_roundings_are_those_of_the_kernels(interpreter):
    """The interpreter truncates the error's gradient where a GPU rounds it; everything else is the same number."""
    import bfloat16

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((7, 16), (24, 16), (24,), (24, 16), (16,))]
    found = []
    for module in (ops.load("triton"), bfloat16.ops.load("rounding")):
        x, W_enc, b_enc, W_dec, b_pre = (tensor.clone().requires_grad_() for tensor in tensors)
        with torch.autocast("cpu", torch.bfloat16):
            values, indices, also = module.encode_topk(x, W_enc, b_enc, 4, b_pre, torch.tensor([2, 5, 9]), "relu")
            rebuilt = module.rebuild(values, indices, W_dec, b_pre, x.detach(), also, torch.tensor([2, 5, 9]))
        dense = torch.zeros(7, 24).scatter_add(1, indices, values)
        total = rebuilt.mse + rebuilt.also.square().mean()
        gradients = torch.autograd.grad(total, (W_enc, b_enc, W_dec, b_pre))
        found.append([tensor.detach() for tensor in (dense, also, rebuilt.output, rebuilt.also, *gradients)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))
    for ours, theirs in zip(*(each[:4] for each in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
