"""A loader continues at the exact next batch, from every position; or says why it cannot.

Position means delivered: what the reading thread has read ahead does not count.
"""

from __future__ import annotations

import itertools
import json
import threading

import pytest

from activation_store.errors import UserError
from activation_store.loader import Loader
from activation_store.read_ahead import THREAD_NAME
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk, assert_resumes_everywhere
from tests.activation_store.small_store import HOOKS, append, open_writer

torch = pytest.importorskip("torch")
NAMES = [hook.name for hook in HOOKS]


@pytest.mark.parametrize(
    "asked",
    [
        dict(batch_size=32, epochs=2),
        dict(batch_size=32, epochs=2, prefetch=0),
        dict(batch_size=50, epochs=3, buffer_rows=48, prefetch=5, threads=3),
        dict(batch_size=30, epochs=1, split="held-out", drop_last=False),
        dict(batch_size=16, epochs=2, rank=1, world_size=3, buffer_rows=64),
        dict(batch_size=1, epochs=1, split="held-out", buffer_rows=1),
    ],
    ids=str,
)
def test_resumes_at_the_exact_next_batch_from_every_position(small, asked):
    assert_resumes_everywhere(lambda: Loader(small, NAMES, **asked))


def test_resumes_in_a_run_without_an_end(small):
    assert_resumes_everywhere(lambda: Loader(small, NAMES[:1], 100, seed=4), batches=9)


def test_a_loader_that_forgets_its_place_is_caught(small):
    """The check above sees a state that is one batch off, and a resume that starts the epoch again."""

    class OneOff(Loader):
        def load_state_dict(self, state):
            super().load_state_dict(state | {"batch": state["batch"] + (state["batch"] > 2)})

    class StartsAgain(Loader):
        def __iter__(self):
            return (self.read(rows) for _, _, rows in self.rows_from(self._epoch, 0))

    for broken in (OneOff, StartsAgain):
        with pytest.raises(AssertionError):
            assert_resumes_everywhere(lambda broken=broken: broken(small, NAMES, 32, epochs=1))


def test_read_ahead_is_not_counted_as_delivered(small):
    loader = Loader(small, NAMES, 8, prefetch=6)
    iterator = iter(loader)
    for delivered in range(4):
        assert loader.state_dict()["batch"] == delivered
        next(iterator)


def test_a_position_is_continued_with_other_threads_and_another_prefetch(small):
    whole = list(Loader(small, NAMES, 32, epochs=2))
    for position, (threads, ahead) in enumerate([(1, 0), (1, 2), (4, 4), (2, 9), (1, 1)]):
        first = Loader(small, NAMES, 32, epochs=2, threads=3, prefetch=6)
        list(itertools.islice(first, 3 * position))
        second = Loader(small, NAMES, 32, epochs=2, threads=threads, prefetch=ahead)
        second.load_state_dict(first.state_dict())
        rest = list(second)
        assert len(rest) == len(whole) - 3 * position
        assert all(
            torch.equal(one[n], other[n]) for one, other in zip(rest, whole[3 * position :], strict=True) for n in NAMES
        )


def test_a_state_is_a_few_numbers_and_survives_json(small):
    loader = Loader(small, NAMES, 32)
    next(iter(loader))
    state = loader.state_dict()
    assert state["version"] == 1
    assert json.loads(json.dumps(state)) == state and len(json.dumps(state)) < 1000


def test_a_state_is_the_same_on_every_rank(small):
    states = []
    for rank in (0, 1):
        loader = Loader(small, NAMES, 16, rank=rank, world_size=2)
        list(itertools.islice(loader, 3))
        states.append(loader.state_dict())
    assert states[0] == states[1]


def test_a_new_for_loop_goes_on_where_the_last_one_was_left(small):
    whole = [batch[NAMES[0]] for batch in Loader(small, NAMES[:1], 32, epochs=1)]
    loader = Loader(small, NAMES[:1], 32, epochs=1)
    pieces = [batch[NAMES[0]] for batch in itertools.islice(loader, 3)]
    pieces += [batch[NAMES[0]] for batch in loader]
    assert len(pieces) == len(whole) and all(torch.equal(one, other) for one, other in zip(pieces, whole, strict=True))
    assert list(loader) == []
    loader.reset()
    assert len(list(loader)) == len(whole)


def test_two_iterations_at_once_are_refused(small):
    loader = Loader(small, NAMES, 32)
    first, second = iter(loader), iter(loader)
    next(first)
    second_has = len(threading.enumerate())
    next(second)
    second_has = len(threading.enumerate()) - second_has
    with pytest.raises(RuntimeError, match="iterated anew, while this iteration was running"):
        next(first)
    assert len([thread for thread in threading.enumerate() if thread.name == THREAD_NAME]) == second_has


def test_moving_a_loader_under_a_running_iteration_is_refused(small):
    loader = Loader(small, NAMES, 32)
    state = loader.state_dict()
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the loader was moved"):
        next(iterator)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(seed=1), "seed was 0 and is 1"),
        (dict(batch_size=16), "batch_size was 32 and is 16"),
        (dict(buffer_rows=64), "buffer_rows was 131072 and is 64"),
        (dict(split="all"), "split was 'train' and is 'all'"),
        (dict(hooks=NAMES[:1]), r"hooks was \["),
        (dict(world_size=2), "world_size was 1 and is 2"),
    ],
    ids=str,
)
def test_a_state_of_another_order_is_refused_and_what_differs_is_named(small, changed, said):
    asked = dict(hooks=NAMES, batch_size=32)
    state = Loader(small, **asked).state_dict()
    with pytest.raises(UserError, match=f"cannot continue where it was: {said}.*batches come in another order"):
        Loader(small, **(asked | changed)).load_state_dict(state)


def test_a_state_of_another_store_is_refused(small, fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk(), provenance={}) as writer:
        append(writer, 0, 430)
        writer.finish()
    with pytest.raises(UserError, match="store was 'sha256:"):
        Loader(open_store(fast_folder / "store"), NAMES, 32).load_state_dict(Loader(small, NAMES, 32).state_dict())


def test_a_state_of_a_store_that_has_grown_is_refused(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 200)
        early = Loader(open_store(fast_folder / "store"), NAMES, 32).state_dict()
        append(writer, 200, 300)
        with pytest.raises(UserError, match="rows was 128 and is 256"):
            Loader(open_store(fast_folder / "store"), NAMES, 32).load_state_dict(early)


@pytest.mark.parametrize("state", [{}, {"version": 2}, None, {"epoch": 1}])
def test_a_state_of_another_version_is_refused(small, state):
    with pytest.raises(UserError, match="this program continues version 1"):
        Loader(small, NAMES, 32).load_state_dict(state)
