"""An order is a function of (seed, epoch, batch): each row once, differently each time, and mixed. Both kinds of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.order import ConsecutiveChunks, RandomChunks

KINDS = [RandomChunks, ConsecutiveChunks]


@st.composite
def orders(draw, world_size=1, kinds=KINDS):
    lengths = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12))
    ranges, row = [], 0
    for skipped, taken in lengths:
        row += skipped
        ranges.append((row, row + taken))
        row += taken
    return draw(st.sampled_from(kinds))(
        np.array(ranges),
        rows_per_chunk=draw(st.integers(1, 20)),
        batch_size=draw(st.integers(1, 16)),
        buffer_rows=draw(st.integers(1, 120)),
        seed=draw(st.integers(0, 3)),
        world_size=world_size,
        drop_last=draw(st.booleans()) if world_size == 1 else True,
    )


def rows_of(order):
    return {row for start, stop in order.ranges for row in range(start, stop)}


def walk(order, epoch=0):
    of_epoch = order.epoch(epoch)
    return [of_epoch.batch(number).tolist() for number in range(of_epoch.batches)]


@settings(max_examples=100)
@given(order=orders())
def test_an_epoch_holds_each_row_of_the_split_once(order):
    batches = walk(order)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows))
    if order.drop_last:
        assert all(len(batch) == order.batch_size for batch in batches)
        assert set(rows) <= rows_of(order) and len(rows_of(order)) - len(rows) < order.batch_size
    else:
        assert set(rows) == rows_of(order)
        assert all(len(batch) == order.batch_size for batch in batches[:-1])


@settings(max_examples=50)
@given(order=orders(), data=st.data())
def test_any_batch_can_be_asked_for_alone(order, data):
    batches = walk(order, 1)
    if batches:
        number = data.draw(st.integers(0, len(batches) - 1))
        fresh = type(order)(*[getattr(order, name) for name in ORDER_FIELDS])
        assert fresh.epoch(1).batch(number).tolist() == batches[number]


ORDER_FIELDS = ("ranges", "rows_per_chunk", "batch_size", "buffer_rows", "seed", "rank", "world_size", "drop_last")


@settings(max_examples=50)
@given(order=orders(world_size=3))
def test_ranks_share_no_row_and_have_equally_many_batches(order):
    arguments = [getattr(order, name) for name in ORDER_FIELDS]
    parts = []
    for rank in range(3):
        arguments[ORDER_FIELDS.index("rank")] = rank
        parts.append(walk(type(order)(*arguments)))
    assert len({len(part) for part in parts}) == 1
    rows = [row for part in parts for batch in part for row in batch]
    assert len(rows) == len(set(rows)) and set(rows) <= rows_of(order)


@settings(max_examples=50)
@given(order=orders())
def test_a_window_reads_no_more_chunks_than_the_buffer_holds(order):
    of_epoch = order.epoch(0)
    chunks = [of_epoch.chunks_of_window(window) for window in range(of_epoch.windows)]
    assert np.array_equal(np.sort(np.concatenate(chunks)), order.chunks)
    assert max(map(len, chunks)) <= max(1, order.buffer_rows // order.rows_per_chunk)
    # Windows are of equal size: a small last one would be a badly mixed end of every epoch.
    assert max(map(len, chunks)) - min(map(len, chunks)) <= 1
    for window in range(of_epoch.windows):
        assert set(of_epoch.rows_of_window(window) // order.rows_per_chunk) == set(chunks[window])


def plain(kind=RandomChunks, **changed):
    arguments = dict(ranges=np.array([[0, 60]]), rows_per_chunk=4, batch_size=10, buffer_rows=16, seed=5)
    return kind(**(arguments | changed))


def test_the_order_matches_the_pinned_list():
    """A change here silently changes everybody's data."""
    assert walk(plain()) == [
        [55, 52, 59, 12, 57, 56, 13, 53, 15, 14],
        [58, 54, 8, 29, 40, 31, 44, 43, 47, 11],
        [42, 30, 41, 9, 10, 28, 46, 45, 51, 2],
        [36, 0, 7, 6, 37, 1, 39, 49, 5, 50],
        [3, 4, 48, 38, 17, 26, 27, 22, 21, 33],
        [32, 25, 23, 20, 16, 24, 34, 35, 18, 19],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    seen = [tuple(map(tuple, walk(plain(kind, seed=seed), epoch))) for seed in range(4) for epoch in range(4)]
    assert len(set(seen)) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_row_numbers_beyond_32_bits_are_row_numbers(kind):
    far = 3 << 33
    batches = walk(plain(kind, ranges=np.array([[far, far + 60]])))
    assert {row for batch in batches for row in batch} == set(range(far, far + 60))


def test_a_batch_that_is_not_there_is_refused():
    with pytest.raises(IndexError, match="batch 6 of an epoch of 6"):
        plain().epoch(0).batch(6)
    with pytest.raises(IndexError, match="batch -1 of an epoch of 6"):
        plain().epoch(0).batch(-1)


def test_the_order_of_consecutive_chunks_matches_the_pinned_list():
    assert walk(plain(ConsecutiveChunks)) == [
        [11, 8, 3, 4, 1, 0, 5, 9, 7, 6],
        [2, 10, 16, 25, 12, 27, 20, 15, 23, 19],
        [14, 26, 13, 17, 18, 24, 22, 21, 43, 34],
        [28, 32, 39, 38, 29, 33, 31, 41, 37, 42],
        [35, 36, 40, 30, 57, 54, 55, 50, 49, 45],
        [44, 53, 51, 48, 56, 52, 46, 47, 58, 59],
    ]


@settings(max_examples=100)
@given(order=orders(kinds=[ConsecutiveChunks]))
def test_consecutive_windows_come_in_row_order(order):
    """What a growing store and a live model need: no batch waits for more rows than it must."""
    of_epoch = order.epoch(1)
    windows = [np.sort(of_epoch.rows_of_window(window)) for window in range(of_epoch.windows)]
    assert np.concatenate(windows).tolist() == sorted(rows_of(order))
    assert all(len(window) for window in windows)
    assert [window.tolist() for window in windows] == [
        of_epoch.sorted_rows_of_window(window).tolist() for window in range(of_epoch.windows)
    ]


def test_ranks_take_consecutive_windows_in_turn():
    """All ranks advance through the rows together, and each chunk is one rank's alone."""
    orders = [plain(ConsecutiveChunks, rank=rank, world_size=3) for rank in range(3)]
    windows = [[set(o.epoch(0).chunks_of_window(w)) for w in range(o.epoch(0).windows)] for o in orders]
    in_turn = [chunk for turn in zip(*windows, strict=True) for window in turn for chunk in sorted(window)]
    assert in_turn == list(range(15))
    assert sum(map(len, windows)) == 6, "no more windows than the buffer needs, as many for each rank"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(rank=2, world_size=2), "rank 2 of 2 with drop_last=True cannot be dealt rows"),
        (dict(world_size=2, drop_last=False), "rank 0 of 2 with drop_last=False"),
        (dict(batch_size=0), "batches of 0 rows from a buffer of 16: give at least 1"),
        (dict(buffer_rows=0), "batches of 10 rows from a buffer of 0"),
    ],
    ids=str,
)
def test_what_cannot_be_dealt_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        plain(**changed)


def test_every_row_comes_everywhere():
    """Mean place of each row over 400 epochs: within five standard errors of the middle of the epoch."""
    order = plain(batch_size=60)
    places = np.mean([np.argsort(order.epoch(epoch).batch(0)) for epoch in range(400)], axis=0)
    standard_error = np.sqrt((60**2 - 1) / 12 / 400)
    assert np.abs(places - 29.5).max() < 5 * standard_error
