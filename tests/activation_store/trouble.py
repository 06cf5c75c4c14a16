"""Trouble that comes while something is being done: a network that is cut, a server that is killed, again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tests.activation_store.cut_proxy import CutProxy
from tests.activation_store.object_servers import ObjectServer


class Trouble(threading.Thread):
    """While the block runs, and for each of ``waits``: ``begin(wait, over)``, and ``seconds`` later ``end()``.

    ``begin`` waits and makes the trouble; it returns False, and makes none, if the event ``over`` is set before.

    Attributes:
        times: how often there was trouble.
    """

    def __init__(
        self,
        begin: Callable[[float, threading.Event], bool],
        end: Callable[[], None],
        waits: Sequence[float],
        seconds: float,
    ):
        super().__init__()
        self.times = 0
        self._begin, self._end, self._waits, self._seconds = begin, end, waits, seconds
        self._over = threading.Event()

    def run(self) -> None:
        for wait in self._waits:
            if self._begin(wait, self._over):
                self.times += 1
                time.sleep(self._seconds)
                self._end()

    def __enter__(self) -> Trouble:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self.join()


def cuts(network: CutProxy, amounts: Sequence[int], seconds: float) -> Trouble:
    """The network is cut each time that so many bytes more have gone out (negative: have come back)."""

    def cut(amount: float, over: threading.Event) -> bool:
        network.cut_after(**({"sent": int(amount)} if amount > 0 else {"received": -int(amount)}))
        while not network.was_cut.wait(0.02):
            if over.is_set():
                network.restore()
                return False
        return True

    return Trouble(cut, network.restore, amounts, seconds)


def kills(server: ObjectServer, pauses: Sequence[float], seconds: float) -> Trouble:
    """The server is killed each time after a pause, and started again ``seconds`` later."""

    def kill(pause: float, over: threading.Event) -> bool:
        if over.wait(pause):
            return False
        server.kill()
        return True

    return Trouble(kill, server.start, pauses, seconds)
