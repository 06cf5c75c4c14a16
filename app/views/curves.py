"""Training curves as data, drawn by assets/curves.js."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dictlearn_app import links
from dictlearn_app.run_history import RunHistory
from dictlearn_app.views.component import mount

X_AXES = {"rows": "tokens", "step": "steps", "wall_seconds": "seconds"}
"""What curves can be drawn over -> its unit; the first is the default."""

FIRST = ("loss", "fvu", "l0", "dead_share", "mse", "auxk", "gradient_norm", "learning_rate", "wall_tokens_per_second")
"""Panels in this order, whatever else a dictionary logs after them."""

TITLES = {"fvu": "FVU", "l0": "L0", "wall_tokens_per_second": "tokens per second"}
LINEAR = frozenset({"l0", "dead_share", "learning_rate", "wall_tokens_per_second"})

RANKED = ("fvu", "loss")
"""What many runs are ordered by: the first of these that there is. Losses of different kinds do not compare."""

FEW = 8
"""As many runs keep their order and have a colour each; more are ordered and coloured by how they ended."""

POINTS_IN_ALL = 4800
"""Points of a panel, over all of its runs."""


def in_order(runs: Sequence[RunHistory]) -> list[RunHistory]:
    """Few runs as they come; many by how they ended, the best first, those without a number yet last."""
    rank = ranked_by(runs)
    return sorted(runs, key=lambda run: run.last.get(rank, math.inf)) if rank else list(runs)


def ranked_by(runs: Sequence[RunHistory]) -> str | None:
    """The metric that orders these runs; None where they are few."""
    logged = [name for name in RANKED if any(name in run.last for run in runs)]
    return logged[0] if logged and len(runs) > FEW else None


def curves_payload(runs: Sequence[RunHistory], x: str) -> dict[str, Any]:
    """One panel per metric that any run logged, each with the runs that have it. ``runs`` are `in_order`."""
    rank = ranked_by(runs)
    logged = dict.fromkeys(name for run in runs for name in run.curves if name not in X_AXES)
    ordered = [*(name for name in FIRST if name in logged), *(name for name in logged if name not in FIRST)]
    shared = common_beginning([run.name for run in runs]) if len(runs) > FEW else ""
    return {
        "x_label": X_AXES[x],
        "ranked_by": title_of(rank) if rank else None,
        "runs": [
            {
                "name": run.name,
                "short": run.name.removeprefix(shared) or run.name,
                "state": "" if run.state == "finished" else run.state,
                "last": run.last.get(rank) if rank else None,
                "href": links.address(links.RunsLink(runs=run.name)),
            }
            for run in runs
        ],
        "panels": [panel for name in ordered if (panel := panel_of(name, runs, x))["series"]],
    }


def panel_of(name: str, runs: Sequence[RunHistory], x: str) -> dict[str, Any]:
    title = title_of(name)
    series = [
        {"run": i, "x": [place for place, _ in points], "y": [value for _, value in points]}
        for i, run in enumerate(runs)
        if (points := points_of(run, name, x, POINTS_IN_ALL // len(runs)))
    ]
    return {"title": title, "label": f"{title} of {len(series)} runs", "log": name not in LINEAR, "series": series}


def points_of(run: RunHistory, name: str, x: str, most: int) -> list[tuple[float, float | None]]:
    """About ``most`` points of a curve, evenly spaced, the last among them; a None where the value was not finite."""
    points = [
        (place, value if value is None else float(f"{value:.6g}"))
        for place, value in zip(run.curves.get(x, []), run.curves.get(name, []), strict=False)
        if place is not None
    ]
    if all(value is None for _, value in points):
        return []
    return points[:: -max(1, -(-len(points) // most))][::-1]


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric.removeprefix("wall_").replace("_", " "))


def common_beginning(names: Sequence[str]) -> str:
    """What all names begin with, up to a hyphen: that of a sweep, usually."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("-", 0, same) + 1]


def draw_curves(runs: Sequence[RunHistory], x: str, key: str) -> None:
    mount("curves", curves_payload(runs, x), key)
