"""The feature indexes of a workspace: which run each belongs to, and what it is in a line."""

from __future__ import annotations

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


def describe(manifest: IndexManifest) -> str:
    """What an index is, in a line."""
    made = manifest.made_from
    of = f"{made.d_sae:,} latents of {made.run} over {manifest.sizes.R:,} rows of {made.store}"
    return f"{of}; {manifest.sizes.N:,} activations"
