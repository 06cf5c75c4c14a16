"""Runs as points over their L0, one panel a metric, one line a kind; drawn by assets/tradeoffs.js."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dictlearn_app import links
from dictlearn_app.run_comparison import Curve, numbers, usable
from dictlearn_app.run_history import RunHistory
from dictlearn_app.views.component import mount

ACROSS = "l0"


@dataclass(frozen=True)
class Panel:
    """A metric, what it is called, what it is, whether its axis is logarithmic where its values allow it, its most."""

    metric: str
    title: str
    note: str
    log: bool = False
    most: float | None = None


PANELS = (
    Panel("fvu", "FVU", "fraction of variance unexplained", log=True),
    Panel("alive_share", "alive", "share of latents that fired", most=1),
    Panel("loss_recovered", "loss recovered", "1 as the model, 0 as zeros in its place", most=1),
    Panel("ce_increase", "CE increase", "nats per token, spliced in", log=True),
    Panel("kl_spliced", "KL", "nats per token, from the model's own", log=True),
)
"""The first is drawn large."""


def tradeoffs_payload(curves: Sequence[Curve]) -> dict[str, Any]:
    """One panel for each metric that any run has, with every run in it that has both numbers."""
    panels = []
    for panel in PANELS:
        series = [
            {"line": i, "points": points}
            for i, curve in enumerate(curves)
            if (points := [drawn for point in curve.points if (drawn := point_of(point, panel.metric))])
        ]
        if series:
            runs = sum(len(point["seeds"]) for one in series for point in one["points"])
            panels.append(
                {
                    "title": panel.title,
                    "note": panel.note,
                    "log": panel.log,
                    "most": panel.most,
                    "label": f"{panel.title} against L0 of {runs} runs",
                    "series": series,
                }
            )
    return {"lines": [curve.label for curve in curves], "panels": panels}


def point_of(point: Sequence[RunHistory], metric: str) -> dict[str, Any] | None:
    """The runs of one setting: each of them, their mean, and how far they lie apart."""
    seeds = [seed for run in point if (seed := seed_of(run, metric))]
    if not seeds:
        return None
    x, y = [seed["x"] for seed in seeds], [seed["y"] for seed in seeds]
    return {
        "x": sum(x) / len(x),
        "y": sum(y) / len(y),
        "spread": [min(x), max(x), min(y), max(y)] if len(seeds) > 1 else None,
        "seeds": seeds,
    }


def seed_of(run: RunHistory, metric: str) -> dict[str, Any] | None:
    found = numbers(run)
    x, y = found.get(ACROSS), found.get(metric)
    if not (usable(x) and usable(y)):
        return None
    return {"x": x, "y": y, "name": run.name, "href": links.address(links.RunsLink(runs=run.name))}


def draw_tradeoffs(curves: Sequence[Curve], key: str) -> None:
    mount("tradeoffs", tradeoffs_payload(curves), key)
