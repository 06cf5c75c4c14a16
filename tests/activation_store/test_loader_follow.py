"""A loader follows a store that is still being written; its batches do not depend on when the rows came.

How a harvest commits is not looked at here: rows are appended by hand, as far as each test wants them.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time

import numpy as np
import pytest

import activation_store.loader as loader_module
from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.loader import Loader
from activation_store.ownership import Ownership, is_owned
from activation_store.read_ahead import THREAD_NAME
from activation_store.spec import OWNER_FILE
from activation_store.store import Store, open_store
from activation_store.testing import UnsyncedDisk, assert_resumes_everywhere
from tests.activation_store.small_store import HOOKS, ROWS, append, open_writer, plan

torch = pytest.importorskip("torch")
NAMES = [hook.name for hook in HOOKS]
ASKED = dict(hooks=NAMES, batch_size=8, split="all", seed=3, buffer_rows=64, epochs=2, follow=True)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.002)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(one[name], other[name]) for one, other in zip(batches, others, strict=True) for name in NAMES
    )


@pytest.fixture
def growing(fast_folder):
    """A store without rows; ``grow(to)`` appends as far as row ``to``, and finishes it at the last one."""
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:

        def grow(to: int) -> None:
            append(writer, writer.next_row, to)
            if to == ROWS:
                writer.finish()

        yield fast_folder / "store", grow


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("steps", [(1, 430), (130, 200, 300, 430), tuple(range(10, 431, 20))], ids=str)
def test_batches_are_those_of_the_finished_store_whatever_the_timing(small, growing, steps, threads):
    path, grow = growing
    grow(steps[0])

    def keep_growing():
        for to in steps[1:]:
            time.sleep(0.01)
            grow(to)

    writer = threading.Thread(target=keep_growing)
    loader = Loader(open_store(path), threads=threads, **ASKED)
    writer.start()
    found = list(loader)
    writer.join()
    assert len(found) == 2 * (ROWS // 8)
    assert same(found, list(Loader(small, **ASKED)))


def test_batches_are_delivered_as_soon_as_their_rows_are_there(growing):
    """128 rows are a shard: 8 of 64 rows each can be had from the first window and the next, and no more."""
    path, grow = growing
    grow(200)
    loader = iter(Loader(open_store(path), prefetch=1, threads=1, **ASKED))
    early = [next(loader) for _ in range(14)]
    assert max(batch[NAMES[2]][:, 0].max() for batch in early) < 128
    grow(ROWS)
    assert len(list(loader)) == 2 * (ROWS // 8) - 14


def test_the_first_epoch_is_in_row_order_and_later_ones_are_drawn_from_everywhere(small):
    loader = Loader(small, **ASKED)
    first = [loader.epoch(0).batch(b) for b in range(6)]
    assert np.ptp(np.concatenate(first)) < 64 and first[0].tolist() != sorted(first[0])
    assert np.ptp(np.concatenate([loader.epoch(1).batch(b) for b in range(6)])) > 100
    plain = Loader(small, **(ASKED | dict(follow=False)))
    assert np.array_equal(loader.epoch(1).batch(0), plain.epoch(1).batch(0))


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_splits_are_those_of_the_planned_rows(growing, split):
    path, grow = growing
    grow(130)
    loader = Loader(open_store(path), **(ASKED | dict(split=split, batch_size=1, epochs=1)))
    wanted = sorted(
        row
        for document in plan().documents
        if document.split == split
        for row in range(document.first_row, document.first_row + document.rows)
    )
    assert sorted(row for _, _, rows in loader.rows_from(0, 0) for row in rows.tolist()) == wanted
    assert loader.rows == len(wanted) > 130 // 2


def test_ranks_share_out_the_planned_rows(growing):
    path, grow = growing
    grow(130)
    asked = ASKED | dict(epochs=1, world_size=2)
    loaders = [Loader(open_store(path), rank=rank, **asked) for rank in (0, 1)]
    seen = [{row for _, _, rows in loader.rows_from(0, 0) for row in rows.tolist()} for loader in loaders]
    assert not seen[0] & seen[1] and len(seen[0]) == len(seen[1]) > 150


# --- position ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, dict(split="train", batch_size=30, prefetch=0), dict(rank=1, world_size=2)])
def test_resumes_at_the_exact_next_batch_from_every_position(small, changed):
    assert_resumes_everywhere(lambda: Loader(small, **(ASKED | changed)))


def test_a_position_taken_while_the_store_grew_is_continued_when_it_is_finished(small, growing):
    path, grow = growing
    grow(200)
    loader = Loader(open_store(path), **ASKED)
    early = list(itertools.islice(loader, 7))
    state = loader.state_dict()
    grow(ROWS)
    resumed = Loader(open_store(path), **ASKED)
    resumed.load_state_dict(state)
    assert same(early + list(resumed), list(Loader(small, **ASKED)))


def test_a_position_of_a_loader_that_does_not_follow_is_another(small):
    state = Loader(small, **(ASKED | dict(follow=False))).state_dict()
    with pytest.raises(UserError, match="row_order was None and is 'in the first epoch'"):
        Loader(small, **ASKED).load_state_dict(state)


# --- a store that stops growing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_writer_that_stopped_is_reported_with_what_is_there(fast_folder, prefetch):
    path = fast_folder / "store"
    with open_writer(path, UnsyncedDisk()) as writer:
        append(writer, 0, 200)
    loader = Loader(open_store(path), patience=0.05, prefetch=prefetch, **ASKED)
    found = []
    with pytest.raises(UserError, match="has stopped growing: 128 of 430 rows are there, none came in 0 s") as caught:
        found.extend(loader)
    assert "nobody writes it. Run its harvest again, which continues it, and continue here" in str(caught.value)
    assert loader.state_dict()["batch"] >= 8 and not [t for t in threading.enumerate() if t.name == THREAD_NAME]


def test_a_slow_writer_is_waited_for(growing):
    """Nothing grows for longer than the patience, but the writer lives."""
    path, grow = growing
    grow(130)
    loader = Loader(open_store(path), patience=0.02, **ASKED)
    threading.Timer(0.3, grow, [ROWS]).start()
    assert len(list(loader)) == 2 * (ROWS // 8)


def test_patience_begins_anew_with_each_commit(fast_folder, monkeypatch):
    """A store without a lock, as a remote one, and a window for which it has to grow three times: each time within the
    patience, all in all not."""
    monkeypatch.setattr(loader_module, "is_owned", lambda path: False)
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 130)
        loader = Loader(
            open_store(fast_folder / "store"), patience=1.0, **(ASKED | dict(buffer_rows=1000, batch_size=64))
        )

        def grow():
            for to in (257, 385, 430):
                time.sleep(0.5)
                append(writer, writer.next_row, to)
            writer.finish()

        thread = threading.Thread(target=grow)
        thread.start()
        assert len(list(loader)) == 2 * (ROWS // 64)
        thread.join()


def test_decoded_chunks_are_asked_for_again_when_the_store_has_grown(fast_folder, monkeypatch):
    """What was decoded for the store as it was is not there for the store as it is."""
    asked = []
    prefetch = Store.prefetch
    monkeypatch.setattr(
        Store, "prefetch", lambda self, hook, chunks: asked.append((self.rows, *chunks)) or prefetch(self, hook, chunks)
    )
    with open_writer(fast_folder / "store", UnsyncedDisk(), compression="zstd") as writer:
        append(writer, 0, 130)
        store = open_store(fast_folder / "store")
        batches = iter(Loader(store, **(ASKED | dict(hooks=NAMES[:1], buffer_rows=128, prefetch=0))))
        next(batches)
        append(writer, 130, ROWS)
        writer.finish()
    list(itertools.islice(batches, 16))
    assert asked[:3] == [(128, *range(6)), (128, 6, 7), (430, *range(6, 13))]


def test_closing_an_iteration_ends_the_waiting(growing):
    path, grow = growing
    grow(130)
    iterator = iter(Loader(open_store(path), **ASKED))
    next(iterator)
    started = time.monotonic()
    iterator.close()
    assert time.monotonic() - started < 10 and not [t for t in threading.enumerate() if t.name == THREAD_NAME]


def test_another_store_in_its_place_is_refused(fast_folder):
    path = fast_folder / "store"
    with open_writer(path, UnsyncedDisk()) as writer:
        append(writer, 0, 130)
    loader = iter(Loader(open_store(path), **ASKED))
    next(loader)
    shutil.rmtree(path)
    with open_writer(path, UnsyncedDisk(), provenance={}) as writer:
        append(writer, 0, 300)
        with pytest.raises(UserError, match="was replaced by another one while it was followed; start again"):
            list(loader)


def test_whether_a_process_writes_is_seen(tmp_path):
    path = tmp_path / OWNER_FILE
    assert not is_owned(path)
    owner = Ownership.take(path, tmp_path)
    assert is_owned(path)
    owner.release()
    path.write_text("1\n")  # as a killed process leaves it
    assert not is_owned(path)


# --- what else a trainer asks -----------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_first_rows_whether_the_store_is_finished_or_not(small, growing, monkeypatch):
    monkeypatch.setattr(loader_module, "CALIBRATION_ROWS", 100)
    path, grow = growing
    grow(260)
    for hook in HOOKS:
        found, finished = (
            Loader(store, **(ASKED | dict(split="train"))).statistics(hook.name) for store in (open_store(path), small)
        )
        rows = Loader(small, **(ASKED | dict(split="train"))).first_rows(100)
        values = small.tensor(hook.name, 0, ROWS).double().reshape(ROWS, -1)[rows].numpy()
        assert found.count == 100 and np.allclose(found.mean, values.mean(axis=0), rtol=1e-12)
        assert np.allclose(found.second_moment, values.T @ values / 100, rtol=1e-12)
        assert np.allclose(found.mean_square, (values**2).mean(axis=0), rtol=1e-12)
        assert np.isclose(found.median_norm, np.sort(np.linalg.norm(values, axis=1))[49], rtol=1e-6)
        assert found.second_moment_rows == 100 and found.excluded == {"bos": len(plan().documents)}
        assert np.array_equal(found.mean, finished.mean)


def test_documents_can_be_filtered_and_what_is_not_known_yet_cannot(small, growing):
    path, grow = growing
    grow(130)
    asked = ASKED | dict(row_filter=RowFilter(documents=("*1*",)), batch_size=1)
    assert Loader(open_store(path), **asked).rows == Loader(small, **asked).rows > 0
    for unknown in (RowFilter(positions=(0, 9)), RowFilter(max_norm_ratio=10)):
        for store in (open_store(path), small):
            with pytest.raises(UserError, match="cannot be filtered by position or norm"):
                Loader(store, **(ASKED | dict(row_filter=unknown)))
