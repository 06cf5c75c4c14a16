"""What a workspace holds, by kind, with what each thing was made from and the command that makes the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from activation_store.errors import UserError

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
