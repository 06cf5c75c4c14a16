"""Batches as asked for: which rows, which type, in lockstep, mixed; and what is refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

import activation_store.loader as loader_module
from activation_store.errors import UserError
from activation_store.loader import Loader
from activation_store.read_ahead import THREAD_NAME
from activation_store.store import Store, open_store
from activation_store.testing import UnsyncedDisk
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
    plain = list(Loader(small, NAMES, 32, epochs=2, prefetch=0))
    assert len(plain) > 10
    for threads, ahead in [(1, 1), (1, 5), (3, 2), (4, 9)]:
        batches = list(Loader(small, NAMES, 32, epochs=2, threads=threads, prefetch=ahead))
        for one, other in zip(plain, batches, strict=True):
            assert list(one) == list(other) == NAMES and all(torch.equal(one[name], other[name]) for name in NAMES)


def test_batches_stay_as_they_were_when_later_ones_come(small):
    loader = Loader(small, NAMES[2:], 32, epochs=1)
    kept = [batch[NAMES[2]] for batch in loader]
    copies = [batch[NAMES[2]].clone() for batch in Loader(small, NAMES[2:], 32, epochs=1)]
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def test_without_an_end_epochs_follow_each_other(small):
    loader = iter(Loader(small, NAMES[2:], 100))
    firsts = [rows_in(next(loader)) for _ in range(7)]
    assert len({tuple(first) for first in firsts}) == 7


def test_the_rows_of_earlier_batches_can_be_told_across_epochs(small):
    loader = Loader(small, NAMES[2:], 100)
    delivered = []
    for batch, _ in zip(loader, range(7), strict=False):
        delivered.append(rows_in(batch))
        position = loader.state_dict()
        assert loader.rows_before(position).tolist() == loader.last_rows().tolist()
        for ago, expected in enumerate(reversed(delivered)):
            found = loader.rows_before(position, ago).tolist()
            assert [row for row, told in zip(found, expected, strict=True) if told] == [row for row in expected if row]
    assert position["epoch"] > 0


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


def test_chunks_are_asked_for_once_unless_the_disk_had_to_be_waited_for(small, monkeypatch):
    waits, asked = [0], []
    monkeypatch.setattr(
        loader_module.resource, "getrusage", lambda of: SimpleNamespace(ru_majflt=waits[0]), raising=False
    )
    monkeypatch.setattr(Store, "prefetch", lambda self, hook, chunks: asked.extend(chunks.tolist()))
    loader = Loader(small, NAMES[:1], 32, split="all", buffer_rows=64, prefetch=0)
    batches = iter(loader)
    for _ in range(13):
        next(batches)
    assert sorted(asked) == list(range(27)), "each of the first epoch, once"
    for _ in range(13):
        next(batches)
    assert len(asked) == 27, "and none of the second"
    waits[0] = 1
    for _ in range(13):
        next(batches)
    assert sorted(asked[27:]) == list(range(27))


def readers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_threads_end_with_their_iteration(small, threads):
    iterator = iter(Loader(small, NAMES, 4, threads=threads, prefetch=3))
    next(iterator)
    assert len(readers()) == threads
    iterator.close()
    assert not readers()
    for _ in Loader(small, NAMES, 4, epochs=1, threads=threads):
        pass
    assert not readers()


def test_what_goes_wrong_in_the_reading_thread_is_raised_to_the_reader(copied):
    loader = Loader(open_store(copied), NAMES, 16, split="all", epochs=1)
    key = HOOKS[1].array.shard_key(2)
    (copied / key).unlink()
    with pytest.raises(UserError, match=f"{key} is missing"):
        list(loader)
    assert not readers()


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
    with pytest.raises(ValueError, match="0 threads cannot read 4 batches ahead"):
        Loader(small, NAMES, 4, threads=0)


def test_a_batch_larger_than_the_split_is_refused_with_the_numbers(small):
    rows = sum(stop - start for start, stop in small.split_rows("held-out"))
    with pytest.raises(UserError, match=rf"has {rows} rows in split 'held-out': not enough for one batch of 4,096\."):
        Loader(small, NAMES, 4096, split="held-out")
    with pytest.raises(UserError, match="for each of 4 ranks"):
        Loader(small, NAMES, 128, world_size=4)
