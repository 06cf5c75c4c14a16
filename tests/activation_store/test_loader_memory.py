"""A loader over a store several times larger than its buffer takes less memory of its own than the buffer.

The rows of an uncompressed local store stay in the system's page cache; what is counted here is what Python, numpy and
torch allocate.
"""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

from activation_store.loader import Loader
from activation_store.local_folder import LocalFolder
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter

torch = pytest.importorskip("torch")
ROWS, WIDTH, BUFFER_ROWS, BATCH = 65_536, 64, 8192, 256
ROW_BYTES = 4 * WIDTH


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    """16 MiB of rows; row i begins with i."""
    return make(tmp_path_factory.mktemp("large") / "store")


def make(path, **asked):
    documents = [DocumentRows(str(i), "train", i * 512, 512) for i in range(ROWS // 512)]
    hook = HookSpec("x", (WIDTH,), "float32")
    with StoreWriter(path, StorePlan(ROWS, documents), [hook], Geometry(), {}, disk=UnsyncedDisk(), **asked) as writer:
        for start in range(0, ROWS, 4096):
            rows = np.arange(start, start + 4096)
            writer.append({"x": np.repeat(rows[:, None], WIDTH, axis=1).astype(np.float32)}, rows, rows, rows // 512)
        writer.finish()
    return path


def resident_private_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.parametrize("asked", [dict(threads=1, prefetch=2), dict(threads=3), dict(follow=True)], ids=str)
def test_the_loader_takes_less_than_the_buffer_it_mixes(large_store, asked):
    store = open_store(large_store)
    list(Loader(store, ["x"], BATCH, epochs=1, buffer_rows=BUFFER_ROWS, **asked))  # imports, caches
    tracemalloc.start()
    seen = torch.zeros(ROWS, dtype=torch.bool)
    for batch in Loader(store, ["x"], BATCH, epochs=1, buffer_rows=BUFFER_ROWS, **asked):
        seen[batch["x"][:, 0].long()] = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.all()
    batches = (asked.get("prefetch", 4) + 4) * BATCH * ROW_BYTES
    assert peak < batches + 6 * 8 * BUFFER_ROWS < BUFFER_ROWS * ROW_BYTES < ROWS * ROW_BYTES / 7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_does_not_grow_by_the_store(large_store):
    """Also what torch and the C library allocate, which tracemalloc does not see."""
    store = open_store(large_store)
    loader = Loader(store, ["x"], BATCH, buffer_rows=BUFFER_ROWS)
    batches = iter(loader)
    for _ in range(50):
        next(batches)
    before = resident_private_bytes()
    for _ in range(2 * ROWS // BATCH):
        next(batches)
    assert resident_private_bytes() - before < BUFFER_ROWS * ROW_BYTES


def test_of_chunks_that_are_decoded_two_windows_are_kept(tmp_path, large_store, monkeypatch):
    """Enough that each chunk is decoded once in an epoch, and no more."""
    path = make(tmp_path / "compressed", compression="zstd")
    asked = dict(batch_size=BATCH, epochs=1, buffer_rows=BUFFER_ROWS, seed=2)
    decoded = []
    read_ranges = LocalFolder.read_ranges
    monkeypatch.setattr(
        LocalFolder,
        "read_ranges",
        lambda self, key, starts, stops: decoded.extend(starts) or read_ranges(self, key, starts, stops),
    )
    tracemalloc.start()
    plain = Loader(open_store(large_store), ["x"], **asked)
    for batch, other in zip(Loader(open_store(path), ["x"], **asked), plain, strict=True):
        assert torch.equal(batch["x"], other["x"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(decoded) == ROWS // 256
    two_windows = 2 * BUFFER_ROWS * ROW_BYTES
    assert two_windows < peak < 2 * two_windows <= ROWS * ROW_BYTES / 2, "what is fetched and decoded takes room, too"
