"""Ctrl-C and SIGTERM during training: never in the middle of a step, so that what is saved is a state of the run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during training; the text says what is saved and how to go on."""


class Interruption:
    """A context in which both signals raise KeyboardInterrupt, at once or where `put_off` ends; twice is at once.

    Args:
        only_asked: never raise of itself, only remember: processes that train together have to stop at the same step.
    """

    def __init__(self, only_asked: bool) -> None:
        self.asked = False
        self._only_asked = only_asked
        self._busy = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others may not ask for signals
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not (self._busy or self._only_asked or _in_finaliser(frame)):
            raise KeyboardInterrupt

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """What is done here is done whole."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self.asked and not self._only_asked:
            raise KeyboardInterrupt


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether Python would print what is raised here, and go on."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_globals.get("__name__") == "weakref":
            return True
        frame = frame.f_back
    return False
