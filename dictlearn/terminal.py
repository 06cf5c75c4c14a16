"""What a person sees in the terminal: progress bars with an ETA, and small tables. Nothing else prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console()
complaints = Console(stderr=True)


class TerminalProgress:
    """The `activation_store.progress.Progress` of a terminal: one bar per task, and one line when it is done.

    Where there is no terminal (a log file, CI) only the line is printed.
    """

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[_Bar]:
        with _WithTable(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[rate]} {task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress:
            bar = _Bar(progress, progress.add_task(title, total=total, unit=unit, rate="", shown=""), unit)
            yield bar
            elapsed = progress.tasks[0].elapsed or 0.0
            done = progress.tasks[0].completed
        rate = f", {done / elapsed:,.0f} {unit}/s" if elapsed > 0 and done else ""
        print_line(f"{title}: {done:,.0f} {unit} in {elapsed:.1f} s{rate}  {bar.shown}".rstrip())


class _WithTable(Progress):
    """A bar, and below it a table where there is one."""

    table: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class _Bar:
    def __init__(self, progress: _WithTable, task: TaskID, unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit
        self.shown = ""

    def advance(self, n: float = 1, **shown: object) -> None:
        if shown:
            self.shown = " ".join(f"{name} {_short(value)}" for name, value in shown.items())
        task = self._progress.tasks[0]
        rate = f"{task.speed:,.0f}/s" if task.speed else ""
        self._progress.update(self._task, advance=n, shown=self.shown, rate=rate)

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        self._progress.table = _table(
            ["", *columns], [[name, *(row.get(c, "") for c in columns)] for name, row in rows.items()]
        )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table whose first column is names and whose other columns are numbers."""
    if title:
        console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)  # a table would wrap it
    console.print(_table(columns, rows))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    table = Table(show_edge=False, show_header=any(columns))
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(_short(value) for value in row))
    return table


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Names and values, one to a line."""
    print_table(title, ["", ""], [[name, value] for name, value in facts.items()])


def print_line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_error(text: str) -> None:
    complaints.print(text, highlight=False, markup=False, soft_wrap=True)


def ask(question: str) -> bool:
    """Whether the person says yes; where nobody can be asked, no."""
    if not sys.stdin.isatty():
        return False
    try:
        return console.input(f"{question} [y/N] ", markup=False).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def bytes_in_words(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
