"""How well batches are mixed is measured against a shuffle of everything, and a buffer that would do is named."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from activation_store.loader import Loader
from activation_store.mixing import Mixing
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter
from tests.activation_store.small_store import HOOKS, append, open_writer

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """8192 rows of 64 documents of 128 rows each, in chunks of 32. Row i of ``number`` holds i; rows of ``direction``
    are alike within a document."""
    path = tmp_path_factory.mktemp("long") / "store"
    documents = [DocumentRows(str(i), "train", i * 128, 128) for i in range(64)]
    hooks = [HookSpec("number", (1,), "float32"), HookSpec("direction", (16,), "float32")]
    rows = np.arange(8192)
    noise = np.random.default_rng(0).standard_normal((64 + 8192, 16)).astype(np.float32)
    with StoreWriter(path, StorePlan(8192, documents), hooks, Geometry(32, 4096), {}, disk=UnsyncedDisk()) as writer:
        values = {"number": rows[:, None].astype(np.float32), "direction": noise[rows // 128] + noise[64:]}
        writer.append(values, rows, rows % 128, rows // 128)
        writer.finish()
    return open_store(path)


def test_a_large_buffer_mixes_like_a_shuffle_of_everything(long_store):
    mixing = Loader(long_store, ["direction"], 256, buffer_rows=8192).mixing()
    assert mixing.well_mixed
    assert mixing.missing_entropy < 0.05 and mixing.excess_neighbours < 0.01
    assert "too small" not in str(mixing)


def test_a_small_buffer_is_called_out_with_numbers(long_store):
    mixing = Loader(long_store, ["direction"], 256, buffer_rows=256).mixing()
    assert not mixing.well_mixed
    assert mixing.documents < 9 < 60 < mixing.documents_of_global_shuffle
    assert mixing.neighbour_cosine > 0.02 > 0.01 > abs(mixing.neighbour_cosine_of_global_shuffle)
    said = re.search(r"A buffer of 256 rows is too small to mix them: use buffer_rows=([\d,]+)\.", str(mixing))
    assert said and int(said[1].replace(",", "")) == mixing.buffer_rows_enough


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("follow", [False, True])
def test_the_buffer_that_is_named_is_enough(long_store, seed, follow):
    """Also for another seed; and an eighth of it is not: we do not name a large number to be safe."""

    def mixing(buffer_rows, seed):
        return Loader(long_store, ["direction"], 256, buffer_rows=buffer_rows, seed=seed, follow=follow).mixing()

    enough = mixing(128, seed).buffer_rows_enough
    for other in (seed, seed + 100):
        assert mixing(enough, other).well_mixed and mixing(enough, other).buffer_rows_enough is None
    assert not mixing(enough // 8, seed).well_mixed


def test_like_rows_of_different_documents_are_seen_by_their_cosine(tmp_path):
    """A corpus in which like follows like: every document is new, its rows are not."""
    path, directions = tmp_path / "store", np.random.default_rng(0).standard_normal((16, 32))
    documents = [DocumentRows(str(i), "train", i * 2, 2) for i in range(4096)]
    rows = np.repeat(directions, 512, axis=0) + np.random.default_rng(1).standard_normal((8192, 32))
    with StoreWriter(
        path, StorePlan(8192, documents), [HookSpec("x", (32,), "float32")], Geometry(32, 4096), {}, disk=UnsyncedDisk()
    ) as writer:
        writer.append({"x": rows.astype(np.float32)}, np.zeros(8192), np.zeros(8192), np.arange(8192) // 2)
        writer.finish()

    def mixing(buffer_rows):  # following, because chunks drawn from everywhere would help
        return Loader(open_store(path), ["x"], 128, buffer_rows=buffer_rows, follow=True).mixing()

    small = mixing(512)
    assert small.excess_neighbours < 0.05 and small.missing_entropy < 0.5
    assert small.neighbour_cosine > 0.2 > 0.02 > abs(small.neighbour_cosine_of_global_shuffle)
    assert not small.well_mixed and small.buffer_rows_enough > 512
    assert mixing(small.buffer_rows_enough).well_mixed


@pytest.mark.parametrize(
    "worse", [dict(entropy=3.4), dict(same_document_neighbours=0.08), dict(neighbour_cosine=0.08)], ids=str
)
def test_each_measure_counts(worse):
    perfect = Mixing(
        entropy=4.0,
        entropy_of_global_shuffle=4.0,
        documents=60,
        documents_of_global_shuffle=60,
        same_document_neighbours=0.02,
        same_document_neighbours_of_global_shuffle=0.02,
        neighbour_cosine=0.01,
        neighbour_cosine_of_global_shuffle=0.01,
        buffer_rows=100,
        rows=1000,
    )
    assert perfect.well_mixed and not replace(perfect, **worse).well_mixed


def test_a_shuffle_of_everything_is_not_told_to_use_a_larger_buffer(small):
    """Few rows scatter: whatever is measured, no buffer can do better."""
    for batch_size in (1, 16, 200):
        assert Loader(small, [HOOKS[0].name], batch_size, buffer_rows=10_000).mixing().buffer_rows_enough is None


def test_rows_that_are_not_there_yet_are_not_asked_for(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 200)
        mixing = Loader(open_store(fast_folder / "store"), [HOOKS[0].name], 16, follow=True).mixing()
        assert mixing.neighbour_cosine is None and mixing.entropy > 1 and mixing.rows > 200


@pytest.mark.parametrize("broken", ["nothing", "chunks only", "rows only"])
def test_a_loader_that_does_not_shuffle_is_caught(long_store, monkeypatch, broken):
    """The measure sees each half of the shuffle missing, or both."""
    import activation_store.order as order
    from activation_store.seeds import permutation

    kept = {"nothing": (), "chunks only": ("chunk order",), "rows only": ("rows of a window",)}[broken]

    def partly(n, seed, purpose, *indices):
        return permutation(n, seed, purpose, *indices) if purpose in kept else np.arange(n)

    monkeypatch.setattr(order, "permutation", partly)
    assert not Loader(long_store, ["direction"], 256, buffer_rows=2048).mixing().well_mixed
    monkeypatch.undo()
    assert Loader(long_store, ["direction"], 256, buffer_rows=2048).mixing().well_mixed


def test_the_measure_is_of_what_is_delivered(long_store):
    """Neighbouring rows in delivered batches are unrelated: the correlation of row numbers is that of chance."""
    delivered = torch.cat([batch["number"][:, 0] for batch in Loader(long_store, ["number"], 256, epochs=1)]).numpy()
    correlation = np.corrcoef(delivered[1:], delivered[:-1])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(delivered))
