"""What a workspace holds, by kind, with what each thing was made from and the command that makes the next one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from activation_store.errors import UserError
from dictlearn.workspace import Workspace
from dictlearn_app.run_history import RunHistory

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Item:
    """One store, run, index or graph.

    Attributes:
        detail: a line that says what it is.
        bytes: what it takes on disk.
        problem: why it cannot be used, a sentence; empty when it can.
        next: the command that makes the next thing out of it; empty when that is there already.
        todo: what has to be done first, a sentence.
    """

    name: str
    detail: str
    bytes: int
    problem: str = ""
    next: str = ""
    todo: str = ""


def item(name: str, path: Path, open_: Callable[[str], Opened], describe: Callable[[Opened], tuple[str, str]]) -> Item:
    """Open one thing and describe it as (detail, next command or sentence); a refusal becomes its problem."""
    size = bytes_on_disk(path)
    try:
        detail, command = describe(open_(name))
    except UserError as error:
        return Item(name, "", size, problem=str(error))
    if command and not command.startswith("dictlearn "):
        return Item(name, detail, size, todo=command)
    return Item(name, detail, size, next=command)


def in_workspace(workspace: Workspace) -> str:
    """What a command says so that it finds the workspace; nothing where it is the one commands look in anyway."""
    return "" if str(workspace.root) == "workspace" else f" --workspace {shlex.quote(str(workspace.root))}"


def continuing(run: RunHistory, workspace: Workspace) -> str:
    """The command that continues an interrupted run, with the others of its sweep."""
    config = workspace.sweep(run.sweep).config if run.sweep else workspace.run(run.name).config
    return f"dictlearn train {shlex.quote(str(config))}"


def bytes_on_disk(path: Path) -> int:
    """Of a file, or of every file below a folder. What vanishes meanwhile counts nothing."""
    total = 0
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            if not folder.is_dir():
                return folder.stat().st_size
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total
