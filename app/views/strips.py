"""Token strips as data, drawn by assets/strips.js."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dictlearn_app import links
from dictlearn_app.token_text import visible
from dictlearn_app.views.component import mount

Strip = dict[str, Any]


def strip(
    tokens: Sequence[str],
    values: Sequence[float] | None = None,
    peak: int | None = None,
    head: str = "",
    source: str = "",
    link: links.Link | None = None,
    first_row: int | None = None,
    positions: Sequence[int] | None = None,
    token_ids: Sequence[int] | None = None,
    seen_from: int = 0,
) -> Strip:
    """One run of tokens.

    Args:
        tokens: their texts, in order, as `shown` writes them.
        values: an activation for each token.
        peak: the token that the strip is about: strips shown as lines are aligned at it.
        head: what stands before the strip, such as the activation at the peak.
        source: the document; opens ``link``.
        first_row, positions, token_ids: for the tooltip.
        seen_from: tokens before this one are faint: the language model did not have them before it.
    """
    return {
        "tokens": list(tokens),
        "values": None if values is None else [round(float(value), 4) for value in values],
        "peak": peak,
        "head": head,
        "source": visible(source),
        "href": links.address(link) if link else None,
        "first_row": first_row,
        "positions": None if positions is None else [int(position) for position in positions],
        "token_ids": None if token_ids is None else [int(identity) for identity in token_ids],
        "seen_from": seen_from,
    }


def group(strips: Sequence[Strip], title: str = "", note: str = "") -> dict[str, Any]:
    return {"title": visible(title), "note": visible(note), "strips": list(strips)}


def draw_strips(
    groups: Sequence[dict[str, Any]],
    key: str,
    scale: float = 0.0,
    lines: bool = False,
    label: str = "text",
) -> None:
    """Draw groups of strips; colours are relative to ``scale``, the largest magnitude."""
    mount("strips", {"groups": list(groups), "scale": scale, "lines": lines, "label": label}, key)
