"""What a person sees while several things are under way."""

from __future__ import annotations

import io

from rich.console import Console

from dictlearn import terminal


def test_the_numbers_of_several_runs_stand_in_a_table_below_the_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=True, width=100))
    with terminal.TerminalProgress().task("training 2 runs of w", total=100, unit="tokens") as task:
        task.tabulate({"w-k2": {"loss": 0.51234, "FVU": 0.6}, "w-k4": {"loss": "stopped at step 17"}})
        task.advance(10, runs="1/2")
    shown = screen.getvalue()
    lines = [line for line in shown.splitlines() if "│" in line]
    assert any("w-k2" in line and "0.5123" in line and "0.6" in line for line in lines)
    assert any("w-k4" in line and "stopped at step 17" in line for line in lines)
    assert "training 2 runs of w: 10 tokens" in shown


def test_where_there_is_no_terminal_only_the_last_line_is_printed(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=log, width=100))
    with terminal.TerminalProgress().task("training", total=10, unit="tokens") as task:
        task.tabulate({"a": {"loss": 0.5}})
        task.advance(10, loss=0.5)
    assert log.getvalue().startswith("training: 10 tokens in ") and log.getvalue().count("\n") == 1
