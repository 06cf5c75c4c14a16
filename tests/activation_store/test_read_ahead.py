"""Threads that read ahead: in order, in parallel, not too far; what goes wrong is raised where it is taken."""

from __future__ import annotations

import threading
import time

import pytest

from activation_store.read_ahead import THREAD_NAME, ReadAhead


def numbers(stop):
    return lambda stopping: iter(range(stop))


def running():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (1, 4), (4, 4), (4, 1), (3, 20)])
def test_items_come_in_order_whatever_takes_longest(threads, ahead):
    def make(number):
        time.sleep((number * 7 % 5) / 1000)
        return number * number

    reader = ReadAhead(numbers(40), make, threads, ahead)
    assert list(reader) == [number * number for number in range(40)]
    reader.stop()
    assert not running()


def test_items_are_made_in_parallel():
    """Each of three waits for the two others."""
    together = threading.Barrier(3, timeout=20)
    reader = ReadAhead(numbers(9), lambda number: (together.wait(), number)[1], threads=3, ahead=3)
    assert list(reader) == list(range(9))
    reader.stop()


def test_no_more_are_made_than_asked_for():
    made = []
    reader = ReadAhead(numbers(100), lambda number: made.append(number), threads=4, ahead=3)
    items = iter(reader)
    for taken in range(1, 6):
        next(items)
        deadline = time.monotonic() + 20
        while len(made) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == taken + 3
    reader.stop()


@pytest.mark.parametrize("where", ["making", "planning"])
def test_what_goes_wrong_is_raised_after_all_that_came_before(where):
    def plan(stopping):
        for number in range(30):
            if where == "planning" and number == 11:
                raise OSError("the eleventh")
            yield number

    def make(number):
        if where == "making" and number == 11:
            raise OSError("the eleventh")
        time.sleep((11 - number) % 3 / 1000)
        return number

    reader = ReadAhead(plan, make, threads=3, ahead=5)
    items = iter(reader)
    assert [next(items) for _ in range(11)] == list(range(11))
    with pytest.raises(OSError, match="the eleventh"):
        next(items)
    reader.stop()
    assert not running()


def test_stopping_ends_a_plan_that_waits():
    def plan(stopping):
        yield 0
        stopping.wait(60)

    reader = ReadAhead(plan, lambda number: number, threads=2, ahead=2)
    assert next(iter(reader)) == 0
    started = time.monotonic()
    reader.stop()
    assert time.monotonic() - started < 20 and not running()
