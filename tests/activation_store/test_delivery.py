"""Tensors of the type and device asked for, in memory that is used again, but never while anybody looks at it."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from activation_store.loader import Loader
from activation_store.spec import HookSpec
from tests.activation_store.small_store import HOOKS, stored

torch = pytest.importorskip("torch")
from activation_store.delivery import Delivery, ReusedMemory  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dtype)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_stored_type_becomes_every_type(hook: HookSpec, dtype):
    rows = stored(hook, 0, 40)

    def gather(out):
        out[:] = rows

    found = Delivery("cpu", dtype, kept=2).tensor(hook, 40, gather)
    bits = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16) if rows.dtype == np.uint16 else rows
    assert torch.equal(found, torch.as_tensor(bits).reshape(40, hook.d).to(dtype)) and found.dtype == dtype


def test_memory_is_used_again_when_the_tensor_is_gone():
    memory = ReusedMemory(kept=2)
    first = memory.empty((3, 4), torch.float32)
    place = first.data_ptr()
    assert memory.empty((3, 4), torch.float32).data_ptr() != place
    del first
    gc.collect()
    again = {memory.empty((6, 4), torch.bfloat16).data_ptr() for _ in range(4)}
    assert place in again, "48 bytes are 48 bytes, whatever their type"


@pytest.mark.parametrize("look", [lambda t: t[1:], lambda t: t.numpy(), lambda t: t.T, lambda t: t.view(torch.int32)])
def test_memory_is_not_used_again_while_anybody_looks_at_it(look):
    memory = ReusedMemory(kept=8)
    tensor = memory.empty((3, 4), torch.float32).fill_(1)
    seen = look(tensor)
    expected = seen.copy() if isinstance(seen, np.ndarray) else seen.clone()
    del tensor
    gc.collect()
    others = [memory.empty((3, 4), torch.float32).fill_(value) for value in range(2, 10)]
    assert len({other.data_ptr() for other in others}) == 8
    assert (np.asarray(seen) == np.asarray(expected)).all()


def test_memory_is_aligned_as_that_of_torch():
    """Matrix products round differently where their operands lie differently; a resumed run must not."""
    memory = ReusedMemory(kept=2)
    tensors = [memory.empty((1 + 7 * i, 5), torch.float32) for i in range(20)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_no_more_memory_is_kept_than_asked_for():
    memory = ReusedMemory(kept=2)
    tensors = [memory.empty((3, 4), torch.float32) for _ in range(5)]
    del tensors
    gc.collect()
    assert [len(free) for free in memory._free.values()] == [2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("prefetch", [0, 4])
def test_batches_on_a_gpu_are_those_on_the_cpu(small, prefetch):
    names = [hook.name for hook in HOOKS]
    here = Loader(small, names, 32, epochs=2)
    there = Loader(small, names, 32, epochs=2, device="cuda", threads=2, prefetch=prefetch)
    for one, other in zip(here, there, strict=True):
        for name in names:
            assert other[name].is_cuda and torch.equal(one[name], other[name].cpu())
