"""Batches as asked for: which rows, which type, in lockstep, mixed; and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from activation_store.errors import UserError
from activation_store.loader import Loader
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter
from tests.activation_store.small_store import HOOKS, ROWS, append, document_of_row, open_writer, plan, values

torch = pytest.importorskip("torch")
NAMES = [hook.name for hook in HOOKS]


def rows_in(batch):
    """The first value of each row of float32 hook 2 is the row's number, except for the rows that are all zeros."""
    return batch[NAMES[2]][:, 0].round().long().tolist()


def test_rows_are_those_of_the_store_and_hooks_come_in_lockstep(small):
    loader = Loader(small, NAMES, 16, split="all", epochs=1)
    for (_, _, rows), batch in zip(loader.rows_from(0, 0), loader, strict=True):
        for hook in HOOKS:
            expected = np.stack([values(hook, row, row + 1)[0].reshape(-1) for row in rows])
            stored_as = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[hook.dtype]
            assert torch.equal(batch[hook.name], torch.from_numpy(expected).to(stored_as).float())
            assert batch[hook.name].shape == (16, hook.d)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_no_row_of_a_document_of_the_other_split_is_delivered(small, split):
    loader = Loader(small, NAMES[2:], 7, split=split, epochs=1, drop_last=False, buffer_rows=64)
    rows = [row for batch in loader for row in rows_in(batch) if row]
    wanted = [r for r in range(ROWS) if plan().documents[document_of_row()[r]].split == split]
    assert sorted(rows) == [r for r in wanted if r and not 48 <= r < 64]
    assert loader.rows == len(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_have_the_type_asked_for(small, dtype):
    assert next(iter(Loader(small, NAMES[:1], 4, dtype=dtype)))[NAMES[0]].dtype == dtype


def test_reading_ahead_changes_nothing_but_the_time(small):
    batches = [list(Loader(small, NAMES, 32, epochs=2, prefetch=ahead)) for ahead in (0, 1, 5)]
    assert len(batches[0]) == len(batches[1]) == len(batches[2]) > 10
    for one, two, three in zip(*batches, strict=True):
        assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in NAMES)


def test_batches_stay_as_they_were_when_later_ones_come(small):
    loader = Loader(small, NAMES[2:], 32, epochs=1)
    kept = [batch[NAMES[2]] for batch in loader]
    copies = [batch[NAMES[2]].clone() for batch in Loader(small, NAMES[2:], 32, epochs=1)]
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_without_an_end_epochs_follow_each_other(small):
    loader = iter(Loader(small, NAMES[2:], 100))
    firsts = [rows_in(next(loader)) for _ in range(7)]
    assert len({tuple(first) for first in firsts}) == 7


def test_ranks_see_different_rows(small):
    parts = [
        {
            row
            for batch in Loader(small, NAMES[2:], 16, epochs=1, rank=rank, world_size=2)
            for row in rows_in(batch)
            if row
        }
        for rank in (0, 1)
    ]
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_a_reading_thread_ends_with_its_iteration(small):
    def readers():
        return [thread for thread in threading.enumerate() if thread.name == "activation store reader"]

    for _ in Loader(small, NAMES, 4):
        assert len(readers()) == 1
        break
    iterator = iter(Loader(small, NAMES, 4))
    next(iterator)
    iterator.close()
    assert not readers()


def test_what_goes_wrong_in_the_reading_thread_is_raised_to_the_reader(copied):
    loader = Loader(open_store(copied), NAMES, 16, split="all", epochs=1)
    key = HOOKS[1].array.shard_key(2)
    (copied / key).unlink()
    with pytest.raises(UserError, match=f"{key} is missing"):
        list(loader)


def test_a_growing_store_is_read_as_far_as_it_was_when_opened(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 200)
        loader = Loader(open_store(fast_folder / "store"), NAMES[2:], 8, split="all", epochs=1)
        append(writer, 200, 300)
        assert sum(len(rows_in(batch)) for batch in loader) == 128


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_hook_that_is_not_there_is_refused(small):
    with pytest.raises(UserError, match="blocks.9.hook_resid_post is not among them"):
        Loader(small, ["blocks.9.hook_resid_post"], 4)
    with pytest.raises(ValueError, match="hooks is a list of names"):
        Loader(small, NAMES[0], 4)


def test_a_batch_larger_than_the_split_is_refused_with_the_numbers(small):
    rows = sum(stop - start for start, stop in small.split_rows("held-out"))
    with pytest.raises(UserError, match=rf"has {rows} rows in split 'held-out': not enough for one batch of 4,096\."):
        Loader(small, NAMES, 4096, split="held-out")
    with pytest.raises(UserError, match="for each of 4 ranks"):
        Loader(small, NAMES, 128, world_size=4)


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """8192 rows of 64 documents of 128 rows each, in chunks of 32."""
    path = tmp_path_factory.mktemp("long") / "store"
    documents = [DocumentRows(str(i), "train", i * 128, 128) for i in range(64)]
    rows = np.arange(8192, dtype=np.float32)[:, None]
    with StoreWriter(
        path, StorePlan(8192, documents), [HookSpec("x", (1,), "float32")], Geometry(32, 4096), {}, disk=UnsyncedDisk()
    ) as writer:
        writer.append({"x": rows}, np.zeros(8192), np.zeros(8192), np.arange(8192) // 128)
        writer.finish()
    return open_store(path)


def test_a_large_buffer_mixes_like_a_shuffle_of_everything(long_store):
    mixing = Loader(long_store, ["x"], 256, buffer_rows=8192).mixing()
    assert mixing.well_mixed
    assert mixing.missing_entropy < 0.05 and mixing.excess_neighbours < 0.01
    assert "too small" not in str(mixing)


def test_a_small_buffer_is_called_out_with_numbers(long_store):
    mixing = Loader(long_store, ["x"], 256, buffer_rows=256).mixing()
    assert not mixing.well_mixed
    assert mixing.documents < 9 < 60 < mixing.documents_of_global_shuffle
    assert "A buffer of 256 rows is too small to mix this store" in str(mixing)


@pytest.mark.parametrize("broken", ["nothing", "chunks only", "rows only"])
def test_a_loader_that_does_not_shuffle_is_caught(long_store, monkeypatch, broken):
    """The measure sees each half of the shuffle missing, or both."""
    import activation_store.order as order
    from activation_store.seeds import permutation

    kept = {"nothing": (), "chunks only": ("chunk order",), "rows only": ("rows of a window",)}[broken]

    def partly(n, seed, purpose, *indices):
        return permutation(n, seed, purpose, *indices) if purpose in kept else np.arange(n)

    monkeypatch.setattr(order, "permutation", partly)
    assert not Loader(long_store, ["x"], 256, buffer_rows=2048).mixing().well_mixed
    monkeypatch.undo()
    assert Loader(long_store, ["x"], 256, buffer_rows=2048).mixing().well_mixed


def test_the_measure_is_of_what_is_delivered(long_store):
    """Neighbouring rows in delivered batches are unrelated: the correlation of row numbers is that of chance."""
    delivered = torch.cat([batch["x"][:, 0] for batch in Loader(long_store, ["x"], 256, epochs=1)]).numpy()
    correlation = np.corrcoef(delivered[1:], delivered[:-1])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(delivered))
