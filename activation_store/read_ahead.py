"""Threads that make things in parallel, a few ahead, and hand them over in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

Task = TypeVar("Task")
Made = TypeVar("Made")

THREAD_NAME = "activation store reader"


class ReadAhead(Generic[Task, Made]):
    """Iterates ``make(task)`` for each task of a plan, in the order of the plan.

    The plan is advanced by one thread at a time; the making runs in parallel. What either raises is raised where the
    item is taken, after all that came before it. A plan that waits for something looks at ``stopping``, and ends when
    it is set.

    Args:
        plan: called once, with ``stopping``.
        ahead: how many items may be made, or in the making, before they are asked for.
    """

    def __init__(
        self, plan: Callable[[threading.Event], Iterator[Task]], make: Callable[[Task], Made], threads: int, ahead: int
    ):
        self.stopping = threading.Event()
        self._tasks = plan(self.stopping)
        self._make = make
        self._planning = threading.Lock()
        self._room = threading.Semaphore(ahead)
        self._in_order: queue.SimpleQueue[Future[Made] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=THREAD_NAME, daemon=True) for _ in range(min(threads, ahead))
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Made]:
        while (item := self._in_order.get()) is not None:
            made = item.result()
            self._room.release()
            yield made

    def stop(self) -> None:
        """End the threads. Returns when they are gone, so that nothing reads a store that is then removed."""
        self.stopping.set()
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            with self._planning:
                if self.stopping.is_set():
                    return
                item: Future[Made] = Future()
                try:
                    task = next(self._tasks)
                except StopIteration:
                    self._end(None)
                    return
                except BaseException as problem:  # handed to the thread that takes the items
                    item.set_exception(problem)
                    self._end(item)
                    return
                self._in_order.put(item)
            try:
                item.set_result(self._make(task))
            except BaseException as problem:
                item.set_exception(problem)

    def _end(self, last: Future[Made] | None) -> None:
        """No more tasks: let the other threads see it, too."""
        self._in_order.put(last)
        self.stopping.set()
        for _ in self._threads:
            self._room.release()
