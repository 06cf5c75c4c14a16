"""Feature: everything about one latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from dictlearn import hook_names
from dictlearn.feature_index.index import FeatureIndex
from dictlearn.feature_index.read import FeaturePage, feature_page
from dictlearn.feature_index.strips import Band, TokenStrip
from dictlearn_app import links, loading, router
from dictlearn_app.feature_list import first_latent
from dictlearn_app.feature_scales import logit_scale, strip_scale
from dictlearn_app.notes import Notes
from dictlearn_app.views import controls
from dictlearn_app.views.notices import choose_one, refuse
from dictlearn_app.views.numbers import percent, short
from dictlearn_app.views.sheet import (
    Block,
    column,
    facts,
    grid,
    heading,
    hint,
    histogram,
    problem,
    prose_note,
    row,
    section,
    sheet,
    table,
)
from dictlearn_app.views.strips import draw_strips, group, strip


def draw() -> None:
    link = router.asked(links.FeatureLink)
    names = loading.workspace().indexes()
    name = choose_one("Index", names, link.index, lambda name: links.FeatureLink(index=name), "feature", "index")
    if name is None:
        return
    try:
        index = loading.index(name)
        link = replace(link, index=name, latent=first_latent(index.table()) if link.latent == -1 else link.latent)
        if not 0 <= link.latent < index.d_sae:
            lost(index, link)
            return
        page = feature_page(index, link.latent)
        sheet([title(page, link), numbers(page)], "feature.head")
        steps(index, link, names, loading.notes())
        if not page.count:
            sheet([hint("This latent never fired in the rows of the index.")], "feature.dead")
            return
        store = None if loading.stale(index) else page.store
        left, right = st.columns([7, 3], gap="large")
        with right:
            sheet(side(page, link), "feature.side")
        with left:
            draw_strips(
                [examples(band, store) for band in page.bands],
                "feature.strips",
                scale=strip_scale(page),
                lines=not link.wrapped,
                label="activations",
            )
    except UserError as error:
        refuse(error, "feature.error")


def lost(index: FeatureIndex, link: links.FeatureLink) -> None:
    """The address asks for a latent that the index has not."""
    try:
        index.check_latent(link.latent)
    except UserError as error:
        refuse(error, "feature.lost")
    controls.whole(
        "Latent", 0, lambda latent: replace(link, latent=latent), "feature.other", least=0, most=index.d_sae - 1
    )


def steps(index: FeatureIndex, link: links.FeatureLink, names: Sequence[str], notes: Notes) -> None:
    """The row of controls: which latent, its note, and how its examples are set."""
    last = index.d_sae - 1
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        if len(names) > 1:
            controls.choice(
                "Index", names, link.index, lambda name: links.FeatureLink(index=name), "feature.name", width=170
            )
        before = replace(link, latent=link.latent - 1) if link.latent > 0 else None
        after = replace(link, latent=link.latent + 1) if link.latent < last else None
        controls.step("previous", before, "feature.previous", "left", "the latent before this one (left arrow)")
        controls.step("next", after, "feature.next", "right", "the next latent (right arrow)")
        controls.whole(
            "Latent", link.latent, lambda latent: replace(link, latent=latent), "feature.latent", 0, last, width=140
        )
        not_kept = note(index, link, notes)
        controls.switch(
            "Whole passages",
            bool(link.wrapped),
            lambda on: replace(link, wrapped=int(on)),
            "feature.wrapped",
            "with their line breaks, instead of one line each under one another's peaks",
        )
    if not_kept:
        sheet([problem(f"The note is not kept. {not_kept}")], "feature.note.refused")


def title(page: FeaturePage, link: links.FeatureLink) -> Block:
    made = page.provenance
    hooks = hook_names.in_words(made["hook_in"], made["hook_out"])
    return heading(
        f"Latent {page.latent}",
        note=f"of {page.d_sae:,} in {made['run']} ({made['kind']} of {hooks}), over the store {made['store']}",
        crumbs=[("Features", links.FeaturesLink()), (link.index, links.FeaturesLink(index=link.index))],
    )


def numbers(page: FeaturePage) -> Block:
    """The header: exact, over all rows of the index."""
    return facts(
        [
            ("fires in", f"{page.count:,} rows"),
            ("density", percent(page.density), "share of all rows in which it fires"),
            ("held out", shares(page.density_held_out), "share of held-out rows in which it fires"),
            ("max", short(page.maximum)),
            ("mean", short(page.mean), "of its non-zero activations"),
            ("median", short(page.quantiles.get("0.5")), "of its non-zero activations"),
            ("99th percentile", short(page.quantiles.get("0.99")), "of its non-zero activations"),
        ]
    )


def shares(value: float | None) -> str:
    return "–" if value is None else percent(value)


def note(index: FeatureIndex, link: links.FeatureLink, notes: Notes) -> str | None:
    """What a person calls this latent, kept in the workspace's notes.sqlite; gives why the last one was not."""
    made = index.manifest.made_from
    where = (made.run, made.dictionary_fingerprint, link.latent)
    return controls.note(
        "Note", lambda: notes.read(*where), lambda text: notes.write(*where, text), f"feature.note.{where}"
    )


def side(page: FeaturePage, link: links.FeatureLink) -> list[Block]:
    """Histogram, tokens, logits and relatives: the column beside the examples."""
    return [
        section("Activations"),
        histogram(
            page.histogram.edges,
            page.histogram.counts,
            unit="rows",
            label=f"Histogram of {page.count:,} activations from {short(page.minimum)} to {short(page.maximum)}",
            note="rows by activation, logarithmic counts",
        ),
        section("Fires on"),
        fires_on(page),
        *writes_to(page),
        *neurons(page),
        *logits(page),
        section("Nearest decoder rows"),
        table(
            [column("latent"), column("cosine", "right"), column("density", "right"), column("fires on")],
            [
                row(
                    [
                        str(n.latent),
                        {"text": f"{n.cosine:.2f}", "bar": n.cosine},
                        percent(n.density),
                        token(n.top_token),
                    ],
                    link=replace(link, latent=n.latent),
                )
                for n in page.neighbours
            ],
            empty="None.",
            dense=True,
        ),
        section("Fires together with"),
        table(
            [
                column("latent"),
                column("Jaccard", "right", "rows in which both fire, of those in which either does"),
                column("of its own", "right", "share of this latent's activations in which the other fires too"),
                column("fires on"),
            ],
            [
                row(
                    [
                        str(other.latent),
                        {"text": f"{other.jaccard:.2f}", "bar": other.jaccard},
                        {"text": percent(other.share), "title": f"{other.count:,} rows; PMI {short(other.pmi)} bits"},
                        token(other.top_token),
                    ],
                    link=replace(link, latent=other.latent),
                )
                for other in page.coactive
            ],
            empty="It fires with no other latent.",
            dense=True,
        ),
    ]


def fires_on(page: FeaturePage) -> Block:
    return table(
        [
            column("token"),
            column("of its activation", "right", "share of the summed activation that lies on this token"),
            column("of the token", "right", "share of this token's rows in which the latent fires"),
        ],
        [
            row(
                [
                    token(fired.token),
                    {"text": percent(fired.share_of_mass), "bar": fired.share_of_mass},
                    {"text": percent(fired.share_of_token), "title": f"{fired.count:,} rows, mean {short(fired.mean)}"},
                ]
            )
            for fired in page.fires_on
        ],
        dense=True,
    )


def writes_to(page: FeaturePage) -> list[Block]:
    """Of a dictionary that rebuilds several hooks: how much of the latent each of them gets."""
    if not page.writes_to:
        return []
    return [
        section("Writes to"),
        table(
            [
                column("hook", mono=True),
                column("share", "right", "of the lengths of its decoder row in all hooks"),
                column("length", "right", "of its decoder row there, in units of the hook's spread"),
            ],
            [
                row([one.hook, {"text": percent(one.share), "bar": one.share}, short(one.norm)])
                for one in page.writes_to
            ],
            dense=True,
        ),
    ]


def neurons(page: FeaturePage) -> list[Block]:
    """Of a dictionary that rebuilds an MLP's neurons: which of them a latent is."""
    if not page.neurons:
        return []
    listed = sum(one.weight**2 for one in page.neurons)
    return [
        section("Neurons"),
        prose_note(f"The largest weights of its decoder row, {percent(listed)} of the row's squared length."),
        table(
            [column("neuron"), column("weight", "right", "signed, of the decoder row at unit length")],
            [row([str(one.neuron), {"text": f"{one.weight:+.2f}", "bar": one.weight}]) for one in page.neurons],
            dense=True,
        ),
    ]


def logits(page: FeaturePage) -> list[Block]:
    """What it raises and lowers, side by side; or why that is not known."""
    if not page.top_logits:
        return [section("Logits"), prose_note(page.logits_are)]
    most = logit_scale(page)
    sides = [
        table(
            [column(label, "rest"), column("", "right")],
            [row([token(one.token), {"text": short(one.logit), "bar": one.logit / most}]) for one in end],
            dense=True,
        )
        for label, end in (("raises", page.top_logits), ("lowers", page.bottom_logits))
    ]
    return [section("Logits"), prose_note(page.logits_are), grid([[sides[0]], [sides[1]]], least="150px")]


def token(text: str) -> dict[str, Any]:
    return {"tokens": [text]}


def examples(band: Band, store: str | None) -> dict[str, Any]:
    """One band of examples as a group of strips."""
    left_out = [
        f"{count:,} passed over with {why}"
        for count, why in ((band.same_text, "the same text"), (band.overlapping, "overlapping text"))
        if count
    ]
    note = f"{short(band.low)} – {short(band.high)}, {band.count:,} activations"
    return group([example(one, store) for one in band.strips], band.title, "; ".join([note, *left_out]))


def example(one: TokenStrip, store: str | None) -> dict[str, Any]:
    """A strip that leads to its row in ``store``, where the store is still the one that was indexed."""
    return strip(
        one.tokens,
        values=one.activations,
        peak=one.peak,
        head=short(one.value),
        source=one.document + (" (held out)" if one.split == "held-out" else ""),
        link=links.StoreLink(store=store, row=one.row) if store else None,
        first_row=one.row - one.peak,
        token_ids=one.token_ids,
        seen_from=one.seen_from,
    )
