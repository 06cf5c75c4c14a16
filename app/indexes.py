"""The feature indexes of a workspace: which run each belongs to, and what it is in a line."""

from __future__ import annotations

from collections.abc import Callable

from activation_store.errors import UserError
from dictlearn.feature_index.spec import IndexManifest
from dictlearn.workspace import Workspace


def by_run(workspace: Workspace) -> dict[str, list[str]]:
    """Run -> the indexes of its dictionary, by name. Damaged ones belong to none."""
    found: dict[str, list[str]] = {}
    for name in workspace.indexes():
        try:
            run = IndexManifest.read(workspace.index(name)).made_from.run
        except UserError:
            continue
        found.setdefault(run, []).append(name)
    return found


def stale(manifest: IndexManifest, store: Callable[[str], str], dictionary: Callable[[str], str]) -> list[str]:
    """What the index was made from and is no longer there, or is another thing now: a sentence each.

    Args:
        store, dictionary: from the name of a store, or of a run, to the fingerprint it has now; raise UserError.
    """
    made = manifest.made_from
    again = f"make the index again with `dictlearn index {made.run}`"
    sentences = []
    try:
        if store(made.store) != made.store_fingerprint:
            sentences.append(f"The store {made.store!r} is another than the indexed one; {again}.")
    except UserError as error:
        sentences.append(f"Rows are not linked to their store: {error}")
    try:
        if dictionary(made.run) != made.dictionary_fingerprint:
            sentences.append(f"The run {made.run!r} has been trained again since it was indexed; {again}.")
    except UserError as error:
        sentences.append(f"The run that was indexed cannot be read: {error}")
    return sentences


def describe(manifest: IndexManifest) -> str:
    """What an index is, in a line."""
    made = manifest.made_from
    of = f"{made.d_sae:,} latents of {made.run} over {manifest.sizes.R:,} rows of {made.store}"
    return f"{of}; {manifest.sizes.N:,} activations"
