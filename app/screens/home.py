"""Home: what the workspace holds, and for each thing the command that makes the next."""

from __future__ import annotations

from collections.abc import Sequence

from activation_store.store import Store
from dictlearn.circuits.graph import AttributionGraph
from dictlearn.workspace import Workspace
from dictlearn_app import indexes, links, loading
from dictlearn_app.contents import Item, continuing, in_workspace, item
from dictlearn_app.run_history import RunHistory
from dictlearn_app.views.numbers import short, size
from dictlearn_app.views.sheet import Block, column, command, heading, hint, parts, row, section, sheet, table


def draw() -> None:
    workspace = loading.workspace()
    sheet(blocks(workspace), "home")


def blocks(workspace: Workspace) -> list[Block]:
    """The page as data."""
    suffix = in_workspace(workspace)
    indexed = indexes.by_run(workspace)
    stores = [
        item(name, workspace.store(name), loading.store, lambda store: (about_store(store), train(store)))
        for name in workspace.stores()
    ]
    runs = [
        item(
            name,
            workspace.root / "runs" / name,
            loading.run,
            lambda run: (about_run(run), after_run(run, workspace, indexed)),
        )
        for name in workspace.runs()
    ]
    made = [
        item(name, workspace.index(name), loading.index, lambda index: (indexes.describe(index.manifest), ""))
        for name in workspace.indexes()
    ]
    graphs = [
        item(name, workspace.graph(name), loading.graph, lambda graph: (about_graph(graph), ""))
        for name in workspace.graphs()
    ]
    page: list[Block] = [heading(workspace.root.resolve().name, note=str(workspace.root.resolve()))]
    if not (stores or runs or made or graphs):
        page += [
            hint("This workspace is empty."),
            command(f"dictlearn demo{suffix}", "the whole line on the bundled language model"),
            command(
                f"dictlearn harvest --store acts --hooks blocks.2.hook_resid_post{suffix}",
                "a store of activations, to begin with",
            ),
        ]
        return page
    page += kind("Stores", stores, [links.StoreLink(store=i.name) for i in stores], suffix, "harvest")
    page += kind("Runs", runs, [links.RunsLink(runs=i.name) for i in runs], suffix, "train")
    page += kind("Feature indexes", made, [links.FeaturesLink(index=i.name) for i in made], suffix, "index")
    page += kind("Circuits", graphs, [links.CircuitLink(graph=i.name) for i in graphs], suffix, "circuit")
    return page


def kind(title: str, items: Sequence[Item], targets: Sequence[links.Link], suffix: str, verb: str) -> list[Block]:
    """The table of one kind of thing."""
    total = size(sum(i.bytes for i in items)) if items else ""
    rows = [
        row(
            [
                i.name,
                {"text": i.problem, "tone": "error-text"} if i.problem else i.detail,
                size(i.bytes),
                {"code": i.next + suffix} if i.next else {"parts": parts(i.todo)},
            ],
            link=target,
        )
        for i, target in zip(items, targets, strict=True)
    ]
    columns = [
        column("name", width="15%"),
        column("what it is", muted=True, width="40%"),
        column("on disk", "right", width="8%"),
        column("next"),
    ]
    return [section(title, total), table(columns, rows, empty=f"None yet: `dictlearn {verb} --help{suffix}`.")]


def about_store(store: Store) -> str:
    rows = f"{store.rows:,} rows" if store.complete else f"{store.rows:,} of {store.manifest.rows_planned:,} rows"
    hooks = ", ".join(store.hooks) if len(store.hooks) <= 2 else f"{len(store.hooks)} hooks"
    made_from = store.manifest.provenance
    return f"{rows} of {hooks}; {named(made_from, 'model')} on {named(made_from, 'corpus')}"


def train(store: Store) -> str:
    if not store.complete:
        return "run its `dictlearn harvest` again to finish it"
    return f"dictlearn train --name sae --store {store.name} --hook {next(iter(store.hooks))}"


def about_run(run: RunHistory) -> str:
    latents = f", {run.d_sae:,} latents" if isinstance(run.d_sae, int) else ""
    state = "" if run.finished else f"; {run.state}" + (f", at step {short(run.last['step'])}" if run.last else "")
    if run.problems:
        state += f"; {len(run.problems)} damaged part{'s' if len(run.problems) > 1 else ''}"
    return f"{run.kind or 'dictionary'} of {run.hooks or 'an unknown hook'}{latents}{state}"


def after_run(run: RunHistory, workspace: Workspace, indexed: dict[str, list[str]]) -> str:
    """Finish, evaluate, index, trace: the first that is missing."""
    if not run.finished:
        return continuing(run, workspace) if run.config and not run.training else ""
    if run.evaluation is None:
        return f"dictlearn evaluate {run.name}"
    if run.name not in indexed:
        return f"dictlearn index {run.name}"
    return f'dictlearn circuit --prompt "…" --transcoder {run.name}' if run.is_transcoder else ""


def about_graph(graph: AttributionGraph) -> str:
    best = graph.logits[0] if graph.logits else None
    after = f"; next {best.token!r} at {best.probability or 0:.0%}" if best else ""
    return f"{graph.prompt!r}{after}; {len(graph.kept):,} of {len(graph.nodes):,} nodes kept"


def named(provenance: dict[str, object], key: str) -> str:
    value = provenance.get(key)
    return str(value.get("name", "?")) if isinstance(value, dict) else str(value or "?")
