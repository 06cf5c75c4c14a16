"""Handles on what the workspace holds, opened once and opened again when the file that commits it has changed.

Keys are paths and modification times, so a store that grew, or an index that was made anew, is seen at the next run of
the page. Everything raises UserError; pages show its sentence.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from activation_store.errors import UserError
from activation_store.spec import METADATA_FILE
from activation_store.store import Store, open_store
from dictlearn.app_command import WORKSPACE_VARIABLE
from dictlearn.circuits import graph as graphs
from dictlearn.comparison import decoders
from dictlearn.dictionaries import description
from dictlearn.feature_index import selectivity
from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.workspace import Workspace
from dictlearn_app import indexes
from dictlearn_app.notes import Notes
from dictlearn_app.run_history import RunHistory, read_run
from dictlearn_app.token_text import TokenTexts, read_token_texts

if TYPE_CHECKING:
    from dictlearn.circuits.graph import AttributionGraph
    from dictlearn.comparison.decoders import Agreement
    from dictlearn.feature_index.selectivity import Selective


MOST_PRODUCTS = 10**12
"""Of two decoders, the products that a page waits for, once: about a minute, or two of 32,768 latents of width 768."""


def workspace() -> Workspace:
    """The workspace that `dictlearn app` was started on."""
    return Workspace(Path(os.environ.get(WORKSPACE_VARIABLE, "workspace")))


def stamp(*paths: Path) -> tuple[int, ...]:
    """Modification times and sizes; a missing file is zeros."""
    found: list[int] = []
    for path in paths:
        try:
            status = path.stat()
            found += (status.st_mtime_ns, status.st_size)
        except OSError:
            found += (0, 0)
    return tuple(found)


def store(name: str) -> Store:
    """Raises UserError when there is none, or when it is damaged."""
    location = workspace().existing_store(name)
    return _store(location, stamp(Path(location) / METADATA_FILE))


def token_texts(model: str) -> TokenTexts:
    """Raises UserError when the model, and with it the tokenizer, is no longer to be found."""
    return _token_texts(model)


def run(name: str) -> RunHistory:
    files = workspace().existing_run(name)
    read = _run(files.folder, stamp(files.config, files.metrics, files.evaluation, files.dictionary))
    return replace(read, training=files.is_training())


def planned_steps(run: RunHistory) -> int | None:
    """Steps that the run takes in all; None where that is not to be told from its configuration and store."""
    steps, batch_size = run.config.get("steps"), run.config.get("batch_size")
    if isinstance(steps, int) or not isinstance(batch_size, int):
        return steps
    try:
        read = store(run.store)
    except UserError:
        return None
    filtered = any((run.config.get("row_filter") or {}).values())
    if filtered or not read.complete:
        return None
    return sum(stop - start for start, stop in read.split_rows("train")) // batch_size


def index(name: str) -> FeatureIndex:
    """Raises UserError when there is none, or a file of it is missing or of the wrong size."""
    path = workspace().existing_index(name)
    return _index(path, stamp(path / METADATA_FILE))


def recognisable(name: str) -> dict[int, Selective]:
    """Latents that one token explains, best first. Reads every activation once for each index."""
    path = workspace().existing_index(name)
    return _recognisable(path, stamp(path / METADATA_FILE))


def stale(opened: FeatureIndex) -> list[str]:
    """What is no longer as it was when the index was made, a sentence each."""
    return indexes.stale(opened.manifest, lambda name: store(name).fingerprint, dictionary_fingerprint)


def dictionary_fingerprint(run: str) -> str:
    """Raises UserError when there is no such run, or its dictionary is not there."""
    folder = workspace().existing_run(run).dictionary
    return _fingerprint(folder, stamp(folder / description.WEIGHTS, folder / description.DESCRIPTION))


def decoders_agree(a: str, b: str) -> Agreement:
    """How far the decoders of two runs' dictionaries agree. Computed once: a second for some thousand latents.

    Raises:
        UserError: no such run, it has no dictionary, decoder rows of two widths, or too many of them.
    """
    folders = [workspace().existing_run(name).dictionary for name in (a, b)]
    signed = decoders.SIGNED_CODES.isdisjoint(description.describe(folder)["kind"] for folder in folders)
    return _agreement(*folders, signed, stamp(*(folder / description.WEIGHTS for folder in folders)))


def notes() -> Notes:
    return Notes(workspace().notes)


def graph(name: str) -> AttributionGraph:
    path = workspace().existing_graph(name)
    return _graph(path, stamp(path))


@st.cache_resource(max_entries=8, show_spinner=False)
def _store(location: str, stamped: tuple[int, ...]) -> Store:
    return open_store(location)


@st.cache_resource(max_entries=4, show_spinner=False)
def _token_texts(model: str) -> TokenTexts:
    return read_token_texts(model)


@st.cache_resource(max_entries=200, show_spinner=False)
def _run(folder: Path, stamped: tuple[int, ...]) -> RunHistory:
    return read_run(folder)


@st.cache_resource(max_entries=8, show_spinner=False)
def _index(path: Path, stamped: tuple[int, ...]) -> FeatureIndex:
    return open_index(path)


@st.cache_data(max_entries=8, show_spinner="looking at every activation")
def _recognisable(path: Path, stamped: tuple[int, ...]) -> dict[int, Selective]:
    return {found.latent: found for found in selectivity.recognisable(_index(path, stamped), limit=200)}


@st.cache_data(max_entries=64, show_spinner=False)
def _fingerprint(folder: Path, stamped: tuple[int, ...]) -> str:
    return description.dictionary_fingerprint(folder)


@st.cache_resource(max_entries=32, show_spinner="matching decoder rows")
def _agreement(a: Path, b: Path, signed: bool, stamped: tuple[int, ...]) -> Agreement:
    rows_a, rows_b = decoders.decoder_rows(a), decoders.decoder_rows(b)
    if rows_a.size * len(rows_b) > MOST_PRODUCTS:
        raise UserError(
            f"To match {len(rows_a):,} latents with {len(rows_b):,} takes longer than a page may; in a notebook, "
            "`dictlearn.comparison.decoders.agreement` does it."
        )
    return decoders.agreement(rows_a, rows_b, signed=signed)


@st.cache_resource(max_entries=8, show_spinner=False)
def _graph(path: Path, stamped: tuple[int, ...]) -> AttributionGraph:
    return graphs.read(path)
