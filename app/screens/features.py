"""Features: all latents of one index as a table, sorted and filtered by the address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from dictlearn import hook_names
from dictlearn.feature_index.index import FeatureIndex
from dictlearn.feature_index.strips import TokenStrip
from dictlearn_app import links, loading, router
from dictlearn_app.feature_list import (
    MOST_ACTIVATIONS,
    OF_SEVERAL_HOOKS,
    RECOGNISABLE,
    SHOWN,
    FeatureList,
    columns_of,
    feature_list,
    strongest_examples,
)
from dictlearn_app.token_text import visible
from dictlearn_app.views import controls
from dictlearn_app.views.notices import choose_one, refuse
from dictlearn_app.views.numbers import percent, short
from dictlearn_app.views.sheet import Block, Cell, column, facts, heading, hint, row, section, sheet, table
from dictlearn_app.views.strips import strip

PLACES = {0: "", -1: "after", -2: "two after"}
"""How a pattern's place is written."""


def draw() -> None:
    link = router.asked(links.FeaturesLink)
    names = loading.workspace().indexes()
    name = choose_one("Index", names, link.index, lambda name: links.FeaturesLink(index=name), "features", "index")
    if name is None:
        return
    link = replace(link, index=name)
    try:
        index = loading.index(name)
        made = index.manifest.made_from
        notes = loading.notes().of_run(made.run, made.dictionary_fingerprint)
        sheet([about(index), numbers(index), *map(hint, loading.stale(index))], "features.about")
        shown = [one for one in SHOWN if one != RECOGNISABLE or index.manifest.sizes.N <= MOST_ACTIVATIONS]
        controls_of(link, names, shown)
        patterns = loading.recognisable(name) if link.show == RECOGNISABLE and RECOGNISABLE in shown else None
        listed = feature_list(index.table(), link, notes, patterns)
        sheet(blocks(listed, strongest_examples(index, listed.table), link, notes), "features.table")
    except UserError as error:
        controls.choice("Index", names, name, lambda name: links.FeaturesLink(index=name), "features.other")
        refuse(error, "features.error")


def controls_of(link: links.FeaturesLink, names: list[str], shown: list[str]) -> None:
    """The widgets that rewrite the address."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if len(names) > 1:
            controls.choice(
                "Index", names, link.index, lambda name: links.FeaturesLink(index=name), "features.name", width=200
            )
        controls.words(
            "Search",
            link.search,
            lambda text: replace(link, search=text, page=1),
            "features.search",
            placeholder="token, logit, note or number",
        )
        controls.choice(
            "Show",
            shown,
            link.show if link.show in shown else shown[0],
            lambda show: replace(link, show="" if show == shown[0] else show, sort="", page=1),
            "features.show",
            width=170,
        )
        for label, value, change, key in (
            ("Density from, %", link.least, lambda v: replace(link, least=v, page=1), "features.least"),
            ("to, %", link.most, lambda v: replace(link, most=v, page=1), "features.most"),
        ):
            controls.share(label, value, change, key)


def about(index: FeatureIndex) -> Block:
    made = index.manifest.made_from
    hooks = hook_names.in_words(made.hook_in, made.hook_out)
    return heading(
        index.name,
        note=f"{made.kind} of {hooks} in {made.model}, run {made.run}, over the store {made.store}",
    )


def numbers(index: FeatureIndex) -> Block:
    manifest = index.manifest
    return facts(
        [
            ("latents", f"{index.d_sae:,}"),
            ("rows", f"{index.rows:,}"),
            ("activations", f"{manifest.sizes.N:,}", "every one is kept: all numbers here are exact"),
            ("held-out rows", f"{manifest.rows_held_out:,}"),
        ]
    )


def blocks(
    listed: FeatureList, examples: Sequence[TokenStrip | None], link: links.FeaturesLink, notes: Mapping[int, str]
) -> list[Block]:
    """The table of one page of latents, with the way to the others."""
    columns = []
    for name, label, align, title in columns_of(listed.table):
        head = column(label, align, title)
        if name is not None:
            now = listed.sort == name
            head["sorted"] = ("descending" if listed.descending else "ascending") if now else None
            head["href"] = links.address(replace(link, sort=name, ascending=int(now and listed.descending), page=1))
        columns.append(head)
    lines = [
        row(
            cells(listed, i, examples[i], notes),
            link=links.FeatureLink(index=link.index, latent=int(listed.table.latent[i])),
        )
        for i in range(len(listed.table))
    ]
    found = f"{listed.found:,} of {listed.of:,} latents"
    shown = f"; {listed.first:,} to {listed.first + len(lines) - 1:,} are listed" if listed.pages > 1 else ""
    return [
        section("Latents", found + shown),
        table(columns, lines, empty="No latent fits; widen the search or the densities.", dense=True),
        {
            "kind": "pager",
            "pages": [
                {"text": text, "href": links.address(replace(link, page=page)), "current": page == listed.page}
                for text, page in listed.pager
            ],
        },
    ]


def cells(listed: FeatureList, i: int, example: TokenStrip | None, notes: Mapping[int, str]) -> list[Cell]:
    table = listed.table
    columns = columns_of(table)
    if example is None:
        return [str(table.latent[i]), {"text": "never fired", "tone": "muted"}, *[""] * (len(columns) - 2)]
    latent = int(table.latent[i])
    writes_to: list[Cell] = []
    if any(name == OF_SEVERAL_HOOKS for name, *_ in columns):
        share = percent(float(table.writes_to_share[i]))
        writes_to = [{"text": str(table.writes_to[i]), "mono": True, "aside": share}]
    note = notes.get(latent, "")
    return [
        str(latent),
        fires_on(listed, i),
        {"strip": compact(example)},
        {"text": percent(float(table.density[i])), "bar": float(listed.density_bar[i])},
        {"text": short(float(table.maximum[i])), "bar": float(listed.maximum_bar[i])},
        short(float(table.median[i])),
        *writes_to,
        {"tokens": [table.top_logit[i]] if table.top_logit[i] else []},
        {"tokens": [table.bottom_logit[i]] if table.bottom_logit[i] else []},
        other(int(table.neighbour[i]), float(table.neighbour_cosine[i]), link_index=listed.index),
        other(int(table.coactive[i]), float(table.coactive_jaccard[i]), link_index=listed.index),
        {"text": visible(note), "tone": "note-cell"},
    ]


def fires_on(listed: FeatureList, i: int) -> Cell:
    """The token with most of its activation; among recognisable latents, the pattern that explains it."""
    pattern = listed.patterns.get(int(listed.table.latent[i]))
    if pattern is None:
        share = percent(float(listed.table.top_token_share[i]))
        return {"tokens": [listed.table.top_token[i]], "title": f"{share} of its activation"}
    measured = f"precision {pattern.precision:.2f}, recall {pattern.recall:.2f} on held-out rows"
    return {"before": PLACES[pattern.offset], "tokens": [pattern.token], "title": measured}


def compact(example: TokenStrip) -> dict[str, Any]:
    """A strip within a cell: colours are relative to its own peak, which is the latent's largest activation."""
    drawn = strip(
        example.tokens,
        values=example.activations,
        peak=example.peak,
        source=example.document,
        seen_from=example.seen_from,
    )
    return {**drawn, "scale": abs(example.value)}


def other(latent: int, value: float, link_index: str) -> dict[str, Any] | str:
    """Another latent and how near it is."""
    if latent < 0:
        return ""
    return {
        "text": str(latent),
        "href": links.address(links.FeatureLink(index=link_index, latent=latent)),
        "aside": f"{value:.2f}",
    }
