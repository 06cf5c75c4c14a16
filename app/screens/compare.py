"""Compare: runs of one input and target side by side, and two of them latent by latent."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from activation_store.errors import UserError
from dictlearn.comparison.decoders import SIGNED_CODES, Agreement
from dictlearn.feature_index.index import FeatureIndex
from dictlearn_app import indexes, links, loading, router
from dictlearn_app.contents import in_workspace
from dictlearn_app.matched_latents import SHOWN, Listed, Sides, chance_table, histogram_of, listed
from dictlearn_app.run_comparison import (
    Curve,
    Group,
    as_csv,
    at_hook,
    curves,
    groups,
    hooks_measured,
    measured,
    metric_names,
    numbers,
    ordered,
    other_target,
    told_apart,
    two,
    unlike,
)
from dictlearn_app.run_history import RunHistory
from dictlearn_app.screens.runs import SIDE_BY_SIDE, opened, side_by_side, written
from dictlearn_app.views import controls
from dictlearn_app.views.notices import refuse
from dictlearn_app.views.numbers import percent, short
from dictlearn_app.views.sheet import (
    Block,
    Cell,
    column,
    command,
    grid,
    heading,
    hint,
    histogram,
    problem,
    row,
    section,
    sheet,
    table,
)
from dictlearn_app.views.tradeoffs import draw_tradeoffs

COMMANDS = 6
"""As many runs have a command each; more are evaluated by one line."""

WITHOUT_SIGNS = "Cosines are without their signs: codes of either sign make a latent of a direction and its opposite."

ABBREVIATIONS = frozenset({"fvu", "l0", "ce", "kl"})

EXPLAINED = {
    "fvu": "fraction of variance unexplained, pooled over rows and coordinates",
    "l0": "latents active per row",
    "alive_share": "share of latents that fired in these rows",
    "ce_increase": "cross-entropy with the dictionary spliced in less that of the model, nats per token",
    "loss_recovered": "1 as the model itself, 0 as zeros in place of the activation",
    "loss_recovered_from_mean": "1 as the model itself, 0 as the mean in place of the activation",
    "kl_spliced": "KL from the model's next-token distribution, nats per token",
}


def draw() -> None:
    link = router.asked(links.CompareLink)
    names = loading.workspace().runs()
    runs, refused = opened(names)
    found = groups(runs)
    note = "Runs of the same input and target, measured on the same rows of one store, are comparable."
    sheet([heading("Compare", note=note), *nothing_yet(names, found), *map(problem, refused)], "compare.head")
    if not found:
        return
    group = choose(found, link)
    if group is None:
        return
    link = replace(link, store=group.store, hooks=group.hooks)
    shown = chosen(group, link)
    sheet([*lost(group, link, names), *to_evaluate(group), *cautions(group, shown)], "compare.notices")
    if shown:
        at = choose_hook(shown, link)
        shown = [at_hook(run, at) for run in shown] if at else shown
        made = curves(shown)
        draw_tradeoffs(made, "compare.curves")
        in_order = ordered(shown, link.sort, bool(link.ascending))
        sheet(every_metric(in_order, made, link), "compare.table")
        st.download_button(
            "Download as CSV",
            as_csv(in_order, at),
            file_name="comparison.csv",
            mime="text/csv",
            key="compare.csv",
            on_click="ignore",
        )
        sheet(differences(in_order, made), "compare.settings")
    draw_latents(group, shown, [run for run in runs if run.finished], link)


# --- which runs -------------------------------------------------------------------------------------------------------


def nothing_yet(names: Sequence[str], found: Sequence[Group]) -> list[Block]:
    """What there is to do before anything can be compared."""
    if found:
        return []
    said = "No run of this workspace has finished training." if names else "This workspace holds no run yet."
    return [hint(said), command("dictlearn train --help", "fits a dictionary, or many at once, to a store")]


def choose(found: Sequence[Group], link: links.CompareLink) -> Group | None:
    """The group that the address asks for, the largest where it asks for none; None after saying that there is none."""
    stores = list(dict.fromkeys(group.store for group in found))
    of_store = [group for group in found if group.store == (link.store or stores[0])]
    fitting = [group for group in of_store if not link.hooks or group.hooks == link.hooks]
    group = fitting[0] if fitting else None
    if group is None:
        sheet([problem(not_there(link, bool(of_store)))], "compare.unknown")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        store = group.store if group else (link.store or stores[0]) if of_store else ""
        controls.choice(
            "Store",
            stores if of_store else ["", *stores],
            store,
            lambda store: links.CompareLink(store=store),
            "compare.store",
        )
        hooks = [one.hooks for one in of_store]
        if hooks:
            controls.choice(
                "Input and target",
                hooks if group else ["", *hooks],
                group.hooks if group else "",
                lambda hooks: links.CompareLink(store=store, hooks=hooks),
                "compare.hooks",
                width=360,
                written={one.hooks: f"{one.hooks} ({counted(one)})" for one in of_store},
            )
        if group and group.evaluated:
            among = [run.name for run in group.evaluated]
            controls.several(
                "Runs",
                among,
                [name for name in link.runs.split(",") if name in among],
                lambda some: replace(link, store=store, hooks=group.hooks, runs=",".join(some)),
                "compare.runs",
                placeholder=f"all {len(among)} evaluated runs",
            )
    return group


def choose_hook(shown: Sequence[RunHistory], link: links.CompareLink) -> str:
    """Of dictionaries that rebuild several hooks, the one to show the numbers of; "" for all together."""
    hooks = hooks_measured(shown)
    if hooks:
        at = link.at if link.at in hooks else ""
        controls.choice(
            "Measured at",
            ["", *hooks],
            at,
            lambda hook: replace(link, at=hook),
            "compare.at",
            width=360,
            written={"": f"all {len(hooks)} hooks together"},
        )
        if at != link.at:
            sheet(
                [problem(f"These runs rebuild no hook {link.at!r}; all hooks are shown together.")], "compare.no_hook"
            )
        return at
    return ""


def counted(group: Group) -> str:
    return f"{len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"


def not_there(link: links.CompareLink, store_is_there: bool) -> str:
    if not store_is_there:
        return (
            f"No finished run of this workspace is on a store {link.store!r}; choose one of those below, or train on "
            "it with `dictlearn train`."
        )
    return (
        f"No finished run on the store is of {link.hooks!r}; choose among those below, or train one with "
        "`dictlearn train`."
    )


def chosen(group: Group, link: links.CompareLink) -> list[RunHistory]:
    """The evaluated runs that the address names; all of them where it names none that is there."""
    asked = link.runs.split(",")
    return [run for run in group.evaluated if run.name in asked] or group.evaluated


def lost(group: Group, link: links.CompareLink, names: Sequence[str]) -> list[Block]:
    """What the address names and cannot be shown here, a sentence for each reason."""
    asked = [name for name in link.runs.split(",") if name]
    there = {run.name: run for run in group.runs}
    reasons = {
        "There is no run {} in this workspace; it was renamed or deleted, or has to be trained.": [
            name for name in asked if name not in names
        ],
        "{} cannot be compared with these: another input, target or store, or not trained to its end.": [
            name for name in asked if name in names and name not in there
        ],
        "{} is not evaluated yet.": [name for name in asked if name in there and not there[name].final],
    }
    return [problem(said.format(", ".join(map(repr, some)))) for said, some in reasons.items() if some]


def to_evaluate(group: Group) -> list[Block]:
    """The commands that measure the runs that are not measured yet."""
    waiting = [run.name for run in group.waiting]
    if not waiting:
        return []
    suffix = in_workspace(loading.workspace())
    said = ", ".join(waiting)
    page: list[Block] = []
    if not group.evaluated:
        page.append(hint("No run of this input and target is evaluated yet, so there is nothing to draw."))
    else:
        page.append(hint(f"Not evaluated yet, and not shown: {said}."))
    if len(waiting) <= COMMANDS:
        return page + [command(f"dictlearn evaluate {shlex.quote(name)}{suffix}") for name in waiting]
    each = " ".join(map(shlex.quote, waiting))
    return [*page, command(f'for run in {each}; do dictlearn evaluate "$run"{suffix}; done')]


def cautions(group: Group, shown: Sequence[RunHistory]) -> list[Block]:
    """Which of the runs were measured on something else than most, and how to measure them alike."""
    suffix = in_workspace(loading.workspace())
    most, others = unlike(shown)
    page: list[Block] = []
    for on, some in others.items():
        said = ", ".join(run.name for run in some)
        page.append(
            problem(
                f"Not comparable: {said} {'were' if len(some) > 1 else 'was'} measured on {on}, the others on {most}."
            )
        )
        asked = asked_by(shown, most)
        page += [command(f"dictlearn evaluate {shlex.quote(run.name)}{asked}{suffix}") for run in some[:COMMANDS]]
    try:
        now = loading.store(group.store).fingerprint
    except UserError as error:
        return [*page, hint(f"The store that these runs were measured on cannot be read: {error}")] if shown else page
    if most is not None and most.fingerprint and most.fingerprint != now:
        page.append(
            hint(f"The store {group.store} has changed since: evaluate the runs again to compare them with new ones.")
        )
    return page


def asked_by(shown: Sequence[RunHistory], most: object) -> str:
    """The options that make an evaluation like that of most of the runs."""
    alike = next((run for run in shown if measured(run) == most), None)
    asked = (alike.evaluation or {}).get("asked") if alike else None
    if not isinstance(asked, dict):
        return ""
    return "".join(f" --{name} {asked[name]}" for name in ("rows", "tokens") if isinstance(asked.get(name), int))


# --- their numbers ----------------------------------------------------------------------------------------------------


def every_metric(runs: Sequence[RunHistory], made: Sequence[Curve], link: links.CompareLink) -> list[Block]:
    """A line a run, a column a number; headings sort."""
    indexed = indexes.by_run(loading.workspace())
    label = {run.name: curve.label for curve in made for point in curve.points for run in point}
    names = metric_names(runs)
    columns = [
        sortable(column("run"), "run", link),
        sortable(column("kind", "narrow"), "kind", link),
        column("latents", "right"),
        column("features"),
        *(sortable(column(said(name), "right", EXPLAINED.get(name, "")), name, link) for name in names),
    ]
    lines = []
    for run in runs:
        found, made_from = numbers(run), indexed.get(run.name, [])
        features: Cell = ""
        if made_from:
            features = {"text": made_from[0], "href": links.address(links.FeaturesLink(index=made_from[0]))}
        cells: list[Cell] = [
            {"text": run.name, "href": links.address(links.RunsLink(runs=run.name))},
            label[run.name],
            short(run.d_sae),
            features,
            *(short(found.get(name)) for name in names),
        ]
        lines.append(row(cells))
    return [
        section("Every metric", "on held-out documents; cross-entropies and KL in nats per token"),
        table(columns, lines, dense=True, pinned=True),
    ]


def sortable(head: dict[str, object], name: str, link: links.CompareLink) -> dict[str, object]:
    now = link.sort == name
    head["sorted"] = ("ascending" if link.ascending else "descending") if now else None
    head["href"] = links.address(replace(link, sort=name, ascending=int(now and not link.ascending)))
    return head


def said(metric: str) -> str:
    return " ".join(word.upper() if word in ABBREVIATIONS else word for word in metric.split("_"))


def differences(runs: Sequence[RunHistory], made: Sequence[Curve]) -> list[Block]:
    """The settings in which the runs differ, alone; of many runs, a column for each curve."""
    if len(runs) < 2:
        return []
    settings = told_apart(runs)
    if not settings:
        return [section("Where the configurations differ"), hint("These runs differ in their names alone.")]
    title = section("Where the configurations differ", "what only some kinds have is left out where it is the same")
    if len(runs) <= SIDE_BY_SIDE:
        return [title, side_by_side([run.name for run in runs], written(settings))]
    place = {run.name: i for i, run in enumerate(runs)}
    members = [[place[run.name] for point in curve.points for run in point] for curve in made]
    rows = {
        key.replace("_", " "): [", ".join(dict.fromkeys(short(values[i]) for i in some)) for some in members]
        for key, values in settings.items()
    }
    return [title, side_by_side([curve.label for curve in made], rows, of="kind")]


# --- two of them, latent by latent ------------------------------------------------------------------------------------


def draw_latents(
    group: Group, shown: Sequence[RunHistory], finished: Sequence[RunHistory], link: links.CompareLink
) -> None:
    """Which latents of two runs write alike, beside what chance would find."""
    by_name = {run.name: run for run in finished}
    indexed = frozenset(indexes.by_run(loading.workspace()))
    pair = two(shown, indexed) or two(group.runs, indexed)
    sheet([section("Latents of two runs", "matched by the cosine of their decoder rows")], "compare.latents")
    if pair is None and len(finished) < 2:
        sheet([hint("A second run has to finish training before the latents of two can be matched.")], "compare.alone")
        return
    a, b = pair or (finished[0].name, finished[1].name)
    a, b = link.a or a, link.b or b
    gone = [name for name in (a, b) if name not in by_name]
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        for label, name, change, key in (
            ("Run A", a, lambda name: replace(link, a=name, b=b, page=1), "compare.a"),
            ("Run B", b, lambda name: replace(link, a=a, b=name, page=1), "compare.b"),
        ):
            controls.choice(
                label, list(by_name) if name in by_name else ["", *by_name], "" if name in gone else name, change, key
            )
        show = link.show if link.show in SHOWN else ""
        controls.choice(
            "List", list(SHOWN), show, lambda show: replace(link, show=show, page=1), "compare.show", 300, written=SHOWN
        )
    if gone:
        lacking = f"There is no finished run {', '.join(map(repr, gone))} in this workspace"
        sheet([problem(f"{lacking}; choose among those above, or train it with `dictlearn train`.")], "compare.gone")
        return
    if a == b:
        sheet([hint("Every latent of a run is its own match; choose two runs.")], "compare.same")
        return
    try:
        found = loading.decoders_agree(a, b)
        caution = other_target(by_name[a], by_name[b])
        opened_, lacking = sides(a, b)
        page, why = listed(found, opened_, show, link.page)
        sheet(
            [
                *([hint(caution)] if caution else []),
                *([hint(WITHOUT_SIGNS)] if SIGNED_CODES & {by_name[a].kind, by_name[b].kind} else []),
                grid([[chance_block(found, a, b)], [histogram_block(found, a, b)]], least="420px"),
                *pairs(page, opened_, a, b, replace(link, a=a, b=b, show=show)),
                *map(hint, [*lacking, why] if why else lacking),
            ],
            "compare.pairs",
        )
    except UserError as error:
        refuse(error, "compare.error")


def sides(a: str, b: str) -> tuple[Sides, list[str]]:
    """The feature indexes of two runs, and a sentence for each that is not there or is of another dictionary."""
    by_run, suffix = indexes.by_run(loading.workspace()), in_workspace(loading.workspace())
    found: list[FeatureIndex | None] = []
    lacking: list[str] = []
    for run in (a, b):
        found.append(None)
        made = by_run.get(run, [])
        if not made:
            lacking.append(
                f"The run {run!r} has no feature index, so its latents have no pages; make one with "
                f"`dictlearn index {run}{suffix}`."
            )
            continue
        try:
            index = loading.index(made[0])
            if index.manifest.made_from.dictionary_fingerprint != loading.dictionary_fingerprint(run):
                lacking.append(
                    f"The run {run!r} has been trained again since it was indexed; make the index again with "
                    f"`dictlearn index {run}{suffix}`."
                )
                continue
            found[-1] = index
        except UserError as error:
            lacking.append(str(error))
    return Sides(*found), lacking


def chance_block(found: Agreement, a: str, b: str) -> Block:
    heads = [
        column("cosine of at least"),
        column("partners", "right", "pairs of latents that are each other's nearest"),
        column("of A", "right", f"share of the latents of {a} whose nearest in {b} is so near"),
        column("chance", "right", "with B's rows drawn from a Gaussian of their mean and covariance"),
        column("of B", "right", f"share of the latents of {b} whose nearest in {a} is so near"),
        column("chance", "right", "with A's rows drawn from a Gaussian of their mean and covariance"),
    ]
    return table(heads, [row(line) for line in chance_table(found)], dense=True)


def histogram_block(found: Agreement, a: str, b: str) -> Block:
    edges, counts, beside = histogram_of(found)
    return histogram(
        edges,
        counts,
        unit="latents",
        label=f"Histogram of the cosines of the latents of {a} with their nearest in {b}",
        note="latents of A by the cosine of their nearest in B",
        beside=beside,
    )


def pairs(page: Listed, opened_: Sides, a: str, b: str, link: links.CompareLink) -> list[Block]:
    """The pairs on this page, with the way to the others."""
    columns = [
        column("latent of A", "", a),
        column("fires on"),
        column("cosine", "right"),
        column("latent of B", "", b),
        column("fires on"),
    ]
    if page.shared:
        columns += [column("Jaccard", "right", "rows in which both fire, of those in which either does")]
    lines = []
    for i, (one, other) in enumerate(page.pairs):
        cells: list[Cell] = [
            latent(opened_.a, one),
            fires_on(opened_.a, one),
            {"text": f"{page.cosines[i]:.3f}", "bar": float(page.cosines[i])},
            latent(opened_.b, other),
            fires_on(opened_.b, other),
        ]
        if page.shared:
            both = page.shared[i]
            cells.append(
                {
                    "text": f"{both.jaccard:.2f}",
                    "bar": both.jaccard,
                    "title": f"{both.both:,} rows; {percent(both.by_chance)} by chance",
                }
            )
        lines.append(row(cells))
    counted_ = f"{page.found:,} in all" + (f", {page.first:,} to {page.first + len(lines) - 1:,} here" if lines else "")
    return [
        section(SHOWN[link.show][0].upper() + SHOWN[link.show][1:], counted_),
        table(columns, lines, empty="None.", dense=True),
        {
            "kind": "pager",
            "pages": [
                {"text": text, "href": links.address(replace(link, page=number)), "current": number == page.page}
                for text, number in page.pager
            ],
        },
    ]


def latent(index: FeatureIndex | None, number: int) -> Cell:
    href = links.address(links.FeatureLink(index=index.name, latent=number)) if index else None
    return {"text": str(number), "href": href}


def fires_on(index: FeatureIndex | None, number: int) -> Cell:
    token = index.token_text(int(index.array("latents/top_token")[number])) if index else ""
    return {"tokens": [token]} if token else ""
