"""Circuit: one attribution graph, its scores beside their nulls, and the node that is pinned."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from activation_store.errors import UserError
from dictlearn.circuits.graph import AttributionGraph, Node
from dictlearn.feature_index.read import feature_page
from dictlearn_app import indexes, links, loading, router
from dictlearn_app.contents import in_workspace
from dictlearn_app.feature_scales import strip_scale
from dictlearn_app.screens.feature import example
from dictlearn_app.token_text import visible
from dictlearn_app.views import controls
from dictlearn_app.views.graph import LayerIndex, draw_graph, graph_payload
from dictlearn_app.views.notices import choose_one, refuse
from dictlearn_app.views.numbers import short
from dictlearn_app.views.sheet import Block, column, facts, grid, heading, problem, row, section, sheet, table
from dictlearn_app.views.strips import draw_strips, group

EXAMPLES = 8
"""Strips shown of a pinned feature; its page has the rest."""

SCORES = {
    "replacement": "share of the paths to the logits that go through features, and not through errors",
    "completeness": "share of all nodes' inputs that are features and tokens, and not errors",
    "error_influence": "influence of the error nodes",
    "input_influence": "influence of tokens and positions",
}


def draw() -> None:
    link = router.asked(links.CircuitLink)
    names = loading.workspace().graphs()
    name = choose_one("Graph", names, link.graph, lambda name: links.CircuitLink(graph=name), "circuit", "circuit")
    if name is None:
        return
    link = replace(link, graph=name)
    head, choice = st.columns([5, 1.4], vertical_alignment="bottom")
    with choice:
        if len(names) > 1:
            controls.choice("Graph", names, name, lambda name: links.CircuitLink(graph=name), "circuit.name")
    try:
        graph = loading.graph(name)
        found, lacking = layer_indexes(graph)
        with head:
            sheet(about(graph, name), "circuit.about")
        draw_graph(graph_payload(graph, link, found), "circuit.graph")
        if link.node:
            draw_node(graph, link, found)
        sheet([*lacking, *tables(graph, link)], "circuit.tables")
    except UserError as error:
        refuse(error, "circuit.error")


def about(graph: AttributionGraph, name: str) -> list[Block]:
    best = graph.logits[0] if graph.logits else None
    likely = f"{visible(best.token or '')!r} at {best.probability or 0:.1%}" if best else "nothing"
    return [
        heading(visible(graph.prompt) or name, note=f"{name}: what made the model expect {likely} next", mono=True),
        facts(
            [
                ("model", str(graph.model.get("name", "?"))),
                ("nodes kept", f"{len(graph.kept):,} of {len(graph.nodes):,}"),
                ("edges", f"{len(graph.edges):,}"),
                ("replacement score", short(graph.scores.replacement), SCORES["replacement"]),
                ("completeness", short(graph.scores.completeness), SCORES["completeness"]),
            ]
        ),
    ]


def layer_indexes(graph: AttributionGraph) -> tuple[dict[int, LayerIndex], list[Block]]:
    """The feature index of each layer's transcoder, and a sentence for each that has none."""
    by_run, suffix = indexes.by_run(loading.workspace()), in_workspace(loading.workspace())
    found: dict[int, LayerIndex] = {}
    lacking: list[Block] = []
    for transcoder in graph.transcoders:
        run, layer = str(transcoder.get("run", "?")), int(transcoder.get("layer", -1))
        try:
            if not by_run.get(run):
                raise UserError(
                    f"The run {run!r} has no feature index, so the features of layer {layer} have no pages; "
                    f"make one with `dictlearn index {run}{suffix}`."
                )
            traced = transcoder.get("dictionary_fingerprint")  # graphs of before do not say
            opened = {name: loading.index(name) for name in by_run[run]}
            alike = [
                name
                for name, index in opened.items()
                if traced in (None, index.manifest.made_from.dictionary_fingerprint)
            ]
            if not alike:
                raise UserError(
                    f"The run {run!r} has been trained again since this graph was traced, so the features of layer "
                    f"{layer} have no pages; trace it again with `dictlearn circuit`."
                )
            found[layer] = LayerIndex(alike[0], dict(enumerate(opened[alike[0]].table().top_token.tolist())))
        except UserError as error:
            lacking.append(problem(str(error)))
    return found, lacking


def draw_node(graph: AttributionGraph, link: links.CircuitLink, found: dict[int, LayerIndex]) -> None:
    """The pinned node: of a feature, its strongest examples."""
    try:
        node = graph.node(link.node)
    except KeyError:
        sheet(
            [problem(f"The graph {link.graph!r} has no node {link.node!r}; click one to pin it.")],
            "circuit.gone",
        )
        return
    index = found.get(node.layer) if node.layer is not None else None
    if node.latent is None or index is None:
        return
    opened = loading.index(index.name)
    page = feature_page(opened, node.latent, examples=EXAMPLES, bins=0)
    store = None if loading.stale(opened) else page.store
    strips = [example(one, store) for band in page.bands[:1] for one in band.strips]
    draw_strips(
        [group(strips, f"What latent {node.latent} of layer {node.layer} fires on", index.name)],
        "circuit.strips",
        scale=strip_scale(page),
        lines=True,
    )


def tables(graph: AttributionGraph, link: links.CircuitLink) -> list[Block]:
    """Scores beside their nulls, what the logits' inputs leave over, and the heads."""
    return [
        grid(
            [
                [section("Scores", "beside transcoders that know nothing"), scores(graph)],
                [section("Heads"), heads(graph)],
            ]
        ),
        section("Residues", "what the edges into a node leave over, by name; edges and residue add up to the value"),
        residues(graph, link),
    ]


def scores(graph: AttributionGraph) -> Block:
    measured = {"this graph": graph.scores, **graph.nulls}
    return table(
        [column(""), *(column(name, "right") for name in measured)],
        [
            row(
                [
                    {"text": name.replace("_", " "), "title": why},
                    *(short(float(getattr(one, name))) for one in measured.values()),
                ]
            )
            for name, why in SCORES.items()
        ],
        dense=True,
    )


def heads(graph: AttributionGraph, listed: int = 8) -> Block:
    return table(
        [column("head"), column("influence", "right")],
        [
            row([f"{head.layer}.{head.head}", {"text": short(head.influence), "bar": head.influence}])
            for head in graph.heads[:listed]
        ],
        empty="No head was traced.",
        dense=True,
    )


def residues(graph: AttributionGraph, link: links.CircuitLink, listed: int = 12) -> Block:
    """The logits, then the explained features of largest influence."""
    explained = [node for node in graph.kept if node.explained]
    chosen = sorted(explained, key=lambda node: (node.kind != "logit", -node.influence))[:listed]
    names = list(dict.fromkeys(name for node in chosen for name in node.residue))
    return table(
        [
            column("node"),
            column("value", "right"),
            column("edges", "right"),
            *(column(name, "right") for name in names),
        ],
        [
            row(
                [
                    {"text": called(node), "href": links.address(replace(link, node=node.id))},
                    short(node.value),
                    f"{len(graph.into(node.id)):,}",
                    *(short(node.residue[name]) if name in node.residue else "" for name in names),
                ]
            )
            for node in chosen
        ],
        empty="No node's inputs were traced.",
        dense=True,
    )


def called(node: Node) -> str:
    if node.kind == "logit":
        return f"logit of {visible(node.token or '')!r}"
    return f"latent {node.latent} of layer {node.layer} at {node.position}"
