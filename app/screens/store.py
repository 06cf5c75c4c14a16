"""Store: what one activation store holds, and its text, a page of tokens at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from activation_store.spec import NORM_OUTLIER_RATIO
from activation_store.store import Store
from dictlearn_app import links, loading, router
from dictlearn_app.screens.home import named
from dictlearn_app.store_text import TextPage, documents_by_name, hook_numbers, rows_in, text_page
from dictlearn_app.views import controls
from dictlearn_app.views.notices import choose_one, refuse
from dictlearn_app.views.numbers import short, size
from dictlearn_app.views.sheet import Block, column, facts, heading, hint, row, section, sheet, table
from dictlearn_app.views.strips import draw_strips, group, strip


def draw() -> None:
    link = router.asked(links.StoreLink)
    names = loading.workspace().stores()
    name = choose_one("Store", names, link.store, lambda name: links.StoreLink(store=name), "store", "harvest")
    if name is None:
        return
    head, choice = st.columns([5, 1.4])
    if len(names) > 1:
        with choice:
            controls.choice("Store", names, name, lambda name: links.StoreLink(store=name), "store.name")
    try:
        store = loading.store(name)
        with head:
            sheet(about(store), "store.about")
        sheet(hooks(store), "store.hooks")
        if store.rows:
            draw_text(store, replace(link, store=name))
    except UserError as error:
        refuse(error, "store.error")


def draw_text(store: Store, link: links.StoreLink) -> None:
    """The page of tokens that holds the row of the link, with the ways to other pages."""
    page = text_page(store, loading.token_texts(store.manifest.provenance["model"]["name"]), link.row)
    sheet([section("Text", f"rows {page.start:,} – {page.stop - 1:,}")], "store.text")
    documents = documents_by_name(store)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        earlier, later = (None if row is None else replace(link, row=row) for row in (page.earlier, page.later))
        controls.step("earlier", earlier, "store.earlier", "left", "the page of text before this one")
        controls.step("later", later, "store.later", "right", "the next page of text")
        controls.whole("Row", link.row, lambda row: replace(link, row=row), "store.row", 0, store.rows - 1)
        controls.choice(
            "Document",
            list(documents),
            page.passages[0].document,
            lambda document: replace(link, row=documents.get(document, 0)),
            "store.document",
            width=360,
        )
    draw_strips(passages(page), "store.passages", label="text of the store")


def passages(page: TextPage) -> list[dict[str, Any]]:
    """A group for each document on the page."""
    return [
        group(
            [
                strip(
                    passage.tokens,
                    first_row=passage.first_row,
                    positions=passage.positions,
                    token_ids=passage.token_ids,
                )
            ],
            title=passage.document,
            note=f"from row {passage.first_row:,}, {'held out' if passage.held_out else 'training'}",
        )
        for passage in page.passages
    ]


def about(store: Store) -> list[Block]:
    """What it is, in numbers."""
    manifest, made_from = store.manifest, store.manifest.provenance
    page = [
        heading(store.name),
        facts(
            [
                ("rows", f"{store.rows:,}", "one row is one token position"),
                ("model", named(made_from, "model")),
                ("corpus", named(made_from, "corpus")),
                ("documents", f"{manifest.documents:,}"),
                ("training rows", f"{rows_in(store, 'train'):,}"),
                ("held-out rows", f"{rows_in(store, 'held-out'):,}"),
                ("rows in a shard", f"{manifest.geometry.rows_per_shard:,}", "a shard is one commit"),
                ("chunks", "as they are" if manifest.compression == "none" else f"compressed, {manifest.compression}"),
                ("left out", ", ".join(f"{n:,} {why}" for why, n in manifest.excluded.items()) or "nothing"),
            ]
        ),
    ]
    if not store.complete:
        page.append(
            hint(
                f"This store is growing or was interrupted: {store.rows:,} of {manifest.rows_planned:,} rows are "
                "there; run its `dictlearn harvest` again to continue; statistics come with the last row."
            )
        )
    return page


def hooks(store: Store) -> list[Block]:
    """The arrays, with the lengths of their rows."""
    columns = [
        column("hook", mono=True),
        column("row", "right"),
        column("type", "right"),
        column("on disk", "right"),
        column("mean norm", "right", "mean Euclidean length of a row"),
        column("median norm", "right"),
        column("rms norm", "right", "root of the mean squared length"),
        column("outliers", "right", f"rows longer than {NORM_OUTLIER_RATIO:.0f} times the median"),
        column("norm of the mean", "right", "length of the mean row: how far the cloud lies from the origin"),
    ]
    return [section("Hooks"), table(columns, [hook_row(store, hook) for hook in store.hooks])]


def hook_row(store: Store, name: str) -> dict[str, Any]:
    hook = store.hook(name)
    norms = ["not yet"] * 5
    if store.complete:
        try:
            numbers = hook_numbers(store, name)
            lengths = (numbers.mean_norm, numbers.median_norm, numbers.rms_norm, numbers.norm_of_mean)
            norms = [short(value) for value in lengths]
            norms.insert(3, f"{numbers.outliers:,}")
        except UserError as error:
            return row([name, {"text": str(error), "tone": "error-text"}, *[""] * 7])
    shape = " × ".join(f"{n:,}" for n in hook.shape)
    return row([name, shape, hook.dtype, size(store.rows * hook.array.row_bytes), *norms])
