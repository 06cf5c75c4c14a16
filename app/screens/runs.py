"""Runs: curves over one another, how each run stands, final numbers, and where the configurations differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from dictlearn_app import indexes, links, loading, router
from dictlearn_app.contents import continuing, in_workspace
from dictlearn_app.run_history import RunHistory, differing, flattened
from dictlearn_app.views import controls
from dictlearn_app.views.curves import X_AXES, draw_curves, in_order
from dictlearn_app.views.numbers import duration, short
from dictlearn_app.views.sheet import Block, Cell, column, command, heading, hint, problem, row, section, sheet, table

LIVE_SECONDS = 3
"""How often the page looks again while a run may go on: a log line comes every few seconds at most."""

SIDE_BY_SIDE = 6
"""As many runs have a column each; of more, each has a line, which ends with these numbers of its last batch."""
ENDED = ("fvu", "l0", "dead_share")

AT_EACH_HOOK = ("fvu", "loss_recovered")
"""Numbers that are listed of each hook, where a dictionary rebuilds several."""


def draw() -> None:
    link = router.asked(links.RunsLink)
    names = loading.workspace().runs()
    sheet([heading("Runs"), *missing(names, link)], "runs.head")
    if not names:
        return
    members = by_sweep(opened(names)[0])
    among = members.get(link.sweep, names)
    chosen = [name for name in link.runs.split(",") if name in among] or among
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if members:
            controls.choice(
                "Sweep",
                ["", *members],
                link.sweep if link.sweep in members else "",
                lambda sweep: replace(link, sweep=sweep, runs=""),
                "runs.sweep",
                written={"": "any"},
            )
        controls.several(
            "Runs",
            among,
            chosen if link.runs else [],
            lambda some: replace(link, runs=",".join(some)),
            "runs.names",
            placeholder=f"all {len(among)} runs",
        )
        x = link.x if link.x in X_AXES else next(iter(X_AXES))
        controls.choice(
            "Over",
            list(X_AXES),
            x,
            lambda x: replace(link, x="" if x == next(iter(X_AXES)) else x),
            "runs.x",
            written=X_AXES,
        )
    live = any(run.state not in ("finished", "stopped") for run in opened(chosen)[0])
    st.fragment(body, run_every=LIVE_SECONDS if live else None)(chosen, x)


def body(names: Sequence[str], x: str) -> None:
    """What changes while a run trains."""
    runs, refused = opened(names)
    sheet([problem(sentence) for sentence in refused], "runs.problems")
    runs = in_order(runs)
    if any(run.curves for run in runs):
        draw_curves([run for run in runs if run.curves], x, "runs.curves")
    sheet([*overview(runs), *going_on(runs), *final_numbers(runs), *configurations(runs)], "runs.tables")


def by_sweep(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    """The names of the runs of each sweep."""
    members: dict[str, list[str]] = {}
    for run in runs:
        if run.sweep:
            members.setdefault(run.sweep, []).append(run.name)
    return members


def opened(names: Sequence[str]) -> tuple[list[RunHistory], list[str]]:
    """The runs that can be read, and a sentence for everything that cannot."""
    runs: list[RunHistory] = []
    refused: list[str] = []
    for name in names:
        try:
            run = loading.run(name)
            runs.append(run)
            refused += run.problems
        except UserError as error:
            refused.append(str(error))
    return runs, refused


def missing(names: Sequence[str], link: links.RunsLink) -> list[Block]:
    """What the address names and the workspace has not; or that there is no run at all."""
    if not names:
        return [
            hint("This workspace holds no run yet."),
            command("dictlearn train --help", "fits a dictionary to a store"),
        ]
    page: list[Block] = []
    if link.sweep and link.sweep not in by_sweep(opened(names)[0]):
        page.append(problem(f"No run of this workspace belongs to a sweep {link.sweep!r}; all runs are shown."))
    unknown = [name for name in link.runs.split(",") if name and name not in names]
    if unknown:
        said = ", ".join(repr(name) for name in unknown)
        page.append(
            problem(
                f"There is no run {said} in this workspace; choose among those below, or train it with "
                "`dictlearn train`."
            )
        )
    return page


def overview(runs: Sequence[RunHistory]) -> list[Block]:
    """A line a run: what it is, how far it is, where to go from it."""
    workspace = loading.workspace()
    indexed, suffix = indexes.by_run(workspace), in_workspace(workspace)
    lines = []
    for run in runs:
        made = indexed.get(run.name, [])
        lines.append(
            row(
                [
                    {"text": run.name, "href": links.address(links.RunsLink(runs=run.name))},
                    run.kind,
                    {"text": run.hooks, "mono": True},
                    {"text": run.store, "href": links.address(links.StoreLink(store=run.store)) if run.store else None},
                    short(run.d_sae),
                    standing(run),
                    {"text": made[0], "href": links.address(links.FeaturesLink(index=made[0]))}
                    if made
                    else {"code": f"dictlearn index {run.name}{suffix}"}
                    if run.finished and len(runs) <= SIDE_BY_SIDE
                    else "",
                ]
            )
        )
    columns = [
        column("run"),
        column("kind"),
        column("hook"),
        column("store"),
        column("latents", "right"),
        column("state"),
        column("features"),
    ]
    return [section("Runs"), table(columns, lines)]


def standing(run: RunHistory) -> Cell:
    """How a run stands: its state, and of one that has not ended where it is and when it will."""
    if run.state == "finished":
        return "finished"
    steps, step = loading.planned_steps(run), int(run.last.get("step", 0))
    of = f" of {steps:,}" if steps else ""
    if run.state == "stopped":
        return {"text": f"stopped after step {step:,}{of}", "tone": "error-text"}
    if run.state == "not begun":
        return "no step logged yet"
    if run.state == "interrupted":
        return f"interrupted, at step {step:,}{of}"
    rate = run.last.get("wall_tokens_per_second", 0)
    left = (steps - step) * run.last.get("rows", 0) / step / rate if steps and step and rate else None
    pace = f"{short(round(rate))} tokens/s" + ("" if left is None else f", {duration(left)} left")
    return {"text": f"training, at step {step:,}{of}", "sub": pace if step else ""}


def going_on(runs: Sequence[RunHistory]) -> list[Block]:
    """Why runs have stopped, and the commands that continue those that were interrupted."""
    page: list[Block] = [problem(run.stopped) for run in runs if run.state == "stopped"]
    workspace = loading.workspace()
    interrupted = [run for run in runs if run.state == "interrupted" and run.config]
    commands = dict.fromkeys(continuing(run, workspace) + in_workspace(workspace) for run in interrupted)
    return page + [command(line, "goes on from the last checkpoint") for line in commands]


def final_numbers(runs: Sequence[RunHistory]) -> list[Block]:
    """evaluation.json of each run, a column each; bold marks nothing: which is better depends on the question."""
    evaluated = [run for run in runs if run.final]
    found = [
        {name.replace("_", " "): value for name, value in run.final.items()} | at_each_hook(run) for run in evaluated
    ]
    names = dict.fromkeys(name for numbers in found for name in numbers)
    waiting = [run.name for run in runs if run.finished and not run.final]
    page: list[Block] = []
    if evaluated:
        lines = {name: [short(numbers.get(name)) for numbers in found] for name in names}
        page = [
            section("Measured on held-out documents", "cross-entropies in nats per token"),
            side_by_side([run.name for run in evaluated], lines),
        ]
    if waiting:
        others = f"; {len(waiting) - 1} more are not measured yet" if len(waiting) > 1 else ""
        line = f"dictlearn evaluate {waiting[0]}{in_workspace(loading.workspace())}"
        page.append(command(line, f"measures this run on held-out documents{others}"))
    return page


def at_each_hook(run: RunHistory) -> dict[str, float]:
    """Of a dictionary that rebuilds several hooks, how well it does at each; Compare has the rest."""
    return {
        f"{name.replace('_', ' ')} at {hook}": found[name]
        for name in AT_EACH_HOOK
        for hook, found in run.by_hook.items()
        if name in found
    }


def configurations(runs: Sequence[RunHistory]) -> list[Block]:
    """The settings that differ; of a single run, all of them."""
    configured = [run for run in runs if run.config]
    runs_by_name = [run.name for run in configured]
    if not configured:
        return []
    if len(configured) == 1:
        settings: dict[str, list[Any]] = {key: [value] for key, value in flattened(configured[0].config).items()}
        return [section("Configuration"), side_by_side(runs_by_name, written(settings))]
    settings = differing(configured)
    if not settings:
        return [section("Configuration"), hint("These runs differ in their names alone.")]
    if len(configured) > SIDE_BY_SIDE:
        settings |= {f"last {name}": [run.last.get(name) for run in configured] for name in ENDED}
    return [section("Where the configurations differ"), side_by_side(runs_by_name, written(settings))]


def written(settings: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {key.replace("_", " "): [short(value) for value in values] for key, values in settings.items()}


def side_by_side(columns: Sequence[str], rows: dict[str, list[str]], of: str = "run") -> Block:
    """Names down the side and a column for each run (or whatever they are ``of``); of many, a line for each."""
    if len(columns) > SIDE_BY_SIDE:
        return table(
            [column(of), *(column(name, "right") for name in rows)],
            [row([run, *(values[i] for values in rows.values())]) for i, run in enumerate(columns)],
            dense=True,
            pinned=True,
        )
    return table(
        [column("", muted=True), *(column(name, "right") for name in columns)],
        [row([name, *values]) for name, values in rows.items()],
        dense=True,
    )
