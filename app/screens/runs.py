"""Runs: curves over one another, final numbers side by side, and where the configurations differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from dictlearn_app import indexes, links, loading, router
from dictlearn_app.run_history import RunHistory, differing, flattened
from dictlearn_app.views import controls
from dictlearn_app.views.curves import X_AXES, draw_curves
from dictlearn_app.views.numbers import short
from dictlearn_app.views.sheet import Block, column, command, heading, hint, problem, row, section, sheet, table

LIVE_SECONDS = 3
"""How often the page looks again while a run trains: a log line comes every few seconds at most."""


def draw() -> None:
    link = router.asked(links.RunsLink)
    names = loading.workspace().runs()
    sheet([heading("Runs"), *missing(names, link)], "runs.head")
    if not names:
        return
    chosen = [name for name in link.runs.split(",") if name in names] or names
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        controls.several(
            "Runs",
            names,
            chosen if link.runs else [],
            lambda some: replace(link, runs=",".join(some)),
            "runs.names",
            placeholder="all runs",
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
    live = any(not run.finished for run in opened(chosen)[0])
    st.fragment(body, run_every=LIVE_SECONDS if live else None)(chosen, x)


def body(names: Sequence[str], x: str) -> None:
    """What changes while a run trains."""
    runs, refused = opened(names)
    sheet([problem(sentence) for sentence in refused], "runs.problems")
    if any(run.curves for run in runs):
        draw_curves([run for run in runs if run.curves], x, "runs.curves")
    sheet([*overview(runs), *final_numbers(runs), *configurations(runs)], "runs.tables")


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
    unknown = [name for name in link.runs.split(",") if name and name not in names]
    if not unknown:
        return []
    said = ", ".join(repr(name) for name in unknown)
    return [
        problem(
            f"There is no run {said} in this workspace; choose among those below, or train it with `dictlearn train`."
        )
    ]


def overview(runs: Sequence[RunHistory]) -> list[Block]:
    """A line a run: what it is, how far it is, where to go from it."""
    indexed = indexes.by_run(loading.workspace())
    lines = []
    for run in runs:
        hooks = run.hook_in if not run.is_transcoder else f"{run.hook_in} → {run.hook_out}"
        made = indexed.get(run.name, [])
        lines.append(
            row(
                [
                    {"text": run.name, "href": links.address(links.RunsLink(runs=run.name))},
                    run.kind,
                    {"text": hooks, "mono": True},
                    {"text": run.store, "href": links.address(links.StoreLink(store=run.store)) if run.store else None},
                    short(run.d_sae),
                    "finished" if run.finished else f"at step {short(run.last.get('step', 0))}",
                    {"text": made[0], "href": links.address(links.FeaturesLink(index=made[0]))}
                    if made
                    else {"code": f"dictlearn index {run.name}"}
                    if run.finished
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


def final_numbers(runs: Sequence[RunHistory]) -> list[Block]:
    """evaluation.json of each run, a column each; bold marks nothing: which is better depends on the question."""
    evaluated = [run for run in runs if run.final]
    names = dict.fromkeys(name for run in evaluated for name in run.final)
    waiting = [run.name for run in runs if run.finished and not run.final]
    page: list[Block] = []
    if evaluated:
        page = [
            section("Measured on held-out documents", "cross-entropies in nats per token"),
            side_by_side(evaluated, {name: [short(run.final.get(name)) for run in evaluated] for name in names}),
        ]
    return page + [command(f"dictlearn evaluate {name}", "measures this run on held-out documents") for name in waiting]


def configurations(runs: Sequence[RunHistory]) -> list[Block]:
    """The settings that differ; of a single run, all of them."""
    configured = [run for run in runs if run.config]
    if not configured:
        return []
    if len(configured) == 1:
        settings: dict[str, list[Any]] = {key: [value] for key, value in flattened(configured[0].config).items()}
        return [section("Configuration"), side_by_side(configured, written(settings))]
    settings = differing(configured)
    if not settings:
        return [section("Configuration"), hint("These runs differ in their names alone.")]
    return [section("Where the configurations differ"), side_by_side(configured, written(settings))]


def written(settings: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {key: [short(value) for value in values] for key, values in settings.items()}


def side_by_side(runs: Sequence[RunHistory], rows: dict[str, list[str]]) -> Block:
    """Names down the side, a column per run."""
    return table(
        [column("", muted=True), *(column(run.name, "right") for run in runs)],
        [row([name.replace("_", " "), *values]) for name, values in rows.items()],
        dense=True,
    )
