"""Training curves as data, drawn by assets/curves.js."""

from __future__ import annotations

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


def curves_payload(runs: Sequence[RunHistory], x: str) -> dict[str, Any]:
    """One panel per metric that any run logged, each with the runs that have it."""
    logged = dict.fromkeys(name for run in runs for name in run.curves if name not in X_AXES)
    ordered = [*(name for name in FIRST if name in logged), *(name for name in logged if name not in FIRST)]
    return {
        "x_label": X_AXES[x],
        "runs": [
            {"name": run.name, "live": not run.finished, "href": links.address(links.RunsLink(runs=run.name))}
            for run in runs
        ],
        "panels": [panel for name in ordered if (panel := panel_of(name, runs, x))["series"]],
    }


def panel_of(name: str, runs: Sequence[RunHistory], x: str) -> dict[str, Any]:
    title = TITLES.get(name, name.replace("_", " "))
    series = [
        {"run": i, "x": run.curves[x], "y": run.curves[name]}
        for i, run in enumerate(runs)
        if name in run.curves and x in run.curves and None not in run.curves[x]
    ]
    return {"title": title, "label": f"{title} of {len(series)} runs", "log": name not in LINEAR, "series": series}


def draw_curves(runs: Sequence[RunHistory], x: str, key: str) -> None:
    mount("curves", curves_payload(runs, x), key)
