"""How long work says how far it is, without knowing who listens.

Library code opens a task and advances it; a terminal, an app or nobody shows it::

    with progress.task("Harvesting", total=rows, unit="rows") as task:
        task.advance(1024, loss="0.31")

``Progress`` and ``Task`` are protocols, so a listener only has to have the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way; it ends when its ``with`` block does."""

    def advance(self, n: float = 1, **shown: object) -> None:
        """Count ``n`` more units done, and show ``shown`` (short values by name) until the next call."""

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        """Show numbers (by name) of several parts of the work (by name) until the next call."""


class Progress(Protocol):
    """Somebody who shows tasks."""

    def task(self, title: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]:
        """Begin a task of ``total`` ``unit`` (None when the end is not known)."""


class NoProgress:
    """Nobody listens: the default everywhere. It is its own task and its own context manager."""

    def task(self, title: str, total: float | None = None, unit: str = "") -> NoProgress:
        return self

    def advance(self, n: float = 1, **shown: object) -> None:
        pass

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        pass

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None
