"""Sheets: headings, facts, notices, commands, tables and histograms as data, drawn by assets/sheet.js.

Every builder returns plain JSON. Strings in it may come from anywhere: the component sets them as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dictlearn_app import links
from dictlearn_app.views.component import mount

Block = dict[str, Any]
Cell = str | Mapping[str, Any]
"""A cell's text, or a mapping of text, sub, href, title, aside, bar (-1 to 1), tone, mono, code, parts or tokens."""


def sheet(blocks: Sequence[Block], key: str) -> None:
    """Draw blocks one under the other."""
    mount("sheet", {"blocks": list(blocks)}, key)


def heading(
    title: str, note: str = "", crumbs: Sequence[tuple[str, links.Link | None]] = (), mono: bool = False
) -> Block:
    """The page's title under the path that leads to it."""
    return {
        "kind": "heading",
        "title": title,
        "note": note,
        "mono": mono,
        "crumbs": [{"text": text, "href": links.address(link) if link else None} for text, link in crumbs],
    }


def section(title: str, note: str = "") -> Block:
    return {"kind": "section", "title": title, "note": note}


def prose(text: str) -> Block:
    """A sentence; what stands between backticks is set as code."""
    return {"kind": "prose", "parts": parts(text)}


def prose_note(text: str) -> Block:
    """A sentence in small type, without any code in it."""
    return {"kind": "prose", "small": True, "parts": [{"text": text}]}


def facts(items: Sequence[tuple[str, str] | tuple[str, str, str]]) -> Block:
    """(label, value) or (label, value, explanation on hover)."""
    return {
        "kind": "facts",
        "items": [{"label": item[0], "value": item[1], "title": item[2] if len(item) == 3 else None} for item in items],
    }


def problem(sentence: str) -> Block:
    """Something is wrong; the sentence says what mends it."""
    return {"kind": "notice", "tone": "error", "parts": parts(sentence)}


def hint(sentence: str) -> Block:
    """Nothing is wrong."""
    return {"kind": "notice", "tone": "quiet", "parts": parts(sentence)}


def command(text: str, why: str = "") -> Block:
    """A command to copy."""
    return {"kind": "command", "text": text, "why": why}


def grid(cells: Sequence[Sequence[Block]], least: str = "320px") -> Block:
    """Blocks side by side, as many columns as fit at ``least`` CSS width."""
    return {"kind": "grid", "least": least, "cells": [list(cell) for cell in cells]}


def column(
    label: str, align: str = "", title: str = "", mono: bool = False, muted: bool = False, width: str = ""
) -> dict[str, Any]:
    """``align`` is "", "right" (numbers), "narrow", "wide" or "rest"; ``width`` is a CSS width.

    "rest" is for tokens: it has what the other columns leave, and cuts what is longer.
    """
    return {
        "label": label,
        "align": align,
        "title": title or None,
        "mono": mono,
        "muted": muted,
        "width": width or None,
    }


def row(cells: Sequence[Cell], link: links.Link | None = None, current: bool = False) -> dict[str, Any]:
    """A line of a table; the whole line opens ``link``."""
    return {"cells": list(cells), "href": links.address(link) if link else None, "current": current}


def table(
    columns: Sequence[dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    empty: str = "Nothing here.",
    caption: str = "",
    dense: bool = False,
    pinned: bool = False,
) -> Block:
    """``pinned``: the first column stays where a table wider than the window is scrolled."""
    return {
        "kind": "table",
        "columns": list(columns),
        "rows": list(rows),
        "empty": parts(empty),
        "caption": caption,
        "dense": dense,
        "pinned": pinned,
    }


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    unit: str,
    label: str,
    note: str = "",
    height: int = 120,
    beside: Mapping[str, Sequence[int]] | None = None,
) -> Block:
    """Counts (n) between edges (n + 1), on a logarithmic scale; ``beside`` are others, drawn as outlines, by name."""
    return {
        "kind": "histogram",
        "edges": [float(edge) for edge in edges],
        "counts": [int(count) for count in counts],
        "unit": unit,
        "label": label,
        "note": note,
        "height": height,
        "beside": [{"name": name, "counts": [int(count) for count in other]} for name, other in (beside or {}).items()],
    }


def parts(sentence: str) -> list[dict[str, str]]:
    """Split at backticks: every second part is code. An unpaired backtick stays text."""
    pieces = sentence.split("`")
    if len(pieces) % 2 == 0:
        pieces[-2:] = ["`".join(pieces[-2:])]
    return [{"code" if i % 2 else "text": piece} for i, piece in enumerate(pieces) if piece]
