"""What the command line can ask of the feature index, and the refusals that need no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from activation_store.errors import UserError
from activation_store.foreign import has_tokens
from activation_store.progress import NoProgress, Progress
from dictlearn.dictionaries.description import describe, dictionary_fingerprint, hooks_of
from dictlearn.feature_index.spec import IndexManifest, MadeFrom
from dictlearn.feature_index.work import IndexPlan, IndexWork, building_folder
from dictlearn.workspace import Workspace

if TYPE_CHECKING:
    from activation_store.store import Store

LEAST_MEMORY_MB = 128
MOST_ROWS = 2**31 - 1
"""Rows are kept as int32: with 32 activations a row, an index of that many rows has 500 GB."""


@dataclass(frozen=True)
class IndexConfig:
    """Encode a whole store with a trained dictionary and keep every activation, sorted by latent, to be browsed."""

    run: Annotated[str, tyro.conf.Positional]
    """Name of the run."""
    store: str | None = None
    """Store to encode; the one the run was trained on when not given."""
    name: str | None = None
    """Name of the index; the run's name when not given."""
    rows: int | None = None
    """Rows (tokens) to encode, from the store's first; all of them when not given."""
    logits: bool = True
    """Whether to list the tokens whose logits each latent moves most, which loads the language model."""
    coactive: bool = True
    """Whether to count which latents fire together."""
    memory_mb: int = 1024
    """Memory to work in, in MB, besides the dictionary and the language model."""
    device: str = "cpu"
    """Device to encode on."""


def dry_run(config: IndexConfig, workspace: Workspace) -> IndexPlan:
    """What an index would be, and take; some rows are encoded to know.

    Raises:
        UserError: see `check`; also too little disk for one that is not there.
    """
    work = check(config, workspace)
    from dictlearn.dictionaries.files import load
    from dictlearn.feature_index.plan import plan, refuse_full_disk, sample

    planned = plan(work, sample(load(work.files.dictionary, work.device), work))
    if not is_made(work.path, work.made_from):
        refuse_full_disk(work.path, planned)
    return planned


def check(config: IndexConfig, workspace: Workspace) -> IndexWork:
    """Everything that can be refused before torch is imported.

    Raises:
        UserError: no such run or store, an unfinished run or store, a store of another model or without the hook, a
            model that is gone or has changed, an index of that name made from something else.
    """
    from activation_store.harvest.language_model import model_of

    _check_numbers(config)
    files = workspace.existing_run(config.run)
    files.refuse_unfinished()
    description = describe(files.dictionary)
    trained_on = description["provenance"]
    store_name, aligned = config.store or trained_on["store"]["name"], trained_on.get("aligned_stores", [])
    if aligned and config.store is not None:
        raise UserError(f"The run {config.run!r} is of several aligned stores; leave --store out.")
    store = workspace.open_store(store_name, [other["name"] for other in aligned])
    hooks_in, hooks_out = hooks_of(trained_on)
    for each, made_by in zip(store.together, [trained_on, *aligned], strict=True):
        _check_model(each, config.run, made_by["model"])
    _check_store(store, config.run, hooks_in, description.get("input_parts", [description["d_in"]]))
    rows = min(store.rows, config.rows or store.rows)
    if rows > MOST_ROWS:
        raise UserError(
            f"The store {store.name!r} has {rows:,} rows; an index holds at most {MOST_ROWS:,}, so set rows."
        )
    model = model_of(trained_on["model"], f"the store {store.name!r} was harvested from it")
    made_from = MadeFrom(
        run=files.name,
        kind=description["kind"],
        dictionary_fingerprint=dictionary_fingerprint(files.dictionary),
        d_in=description["d_in"],
        d_out=description["d_out"],
        d_sae=int(description["config"]["d_sae"]),
        hook_in=trained_on["hook_in"],
        hook_out=trained_on["hook_out"],
        model=model.name,
        model_fingerprint=model.fingerprint,
        store=store_name,
        store_fingerprint=store.fingerprint,
        rows=rows,
        logits=config.logits,
        coactive=config.coactive,
        aligned_stores=[other["name"] for other in aligned],
        aligned_fingerprints=[other.fingerprint for other in store.together[1:]],
    )
    path = workspace.index(config.name or files.name)
    is_made(path, made_from)
    return IndexWork(path, made_from, files, store, hooks_in, hooks_out, model, config.memory_mb, config.device)


def run_index(config: IndexConfig, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Build an index, or continue one, or return at once when it is there already. Returns its folder.

    Raises:
        UserError: see `check`; also another process that builds the same index, and too little disk.
    """
    work = check(config, workspace)
    if is_made(work.path, work.made_from):
        # All that a kill between naming the index and clearing up can leave.
        shutil.rmtree(building_folder(work.path), ignore_errors=True)
        return work.path
    from dictlearn.feature_index.build import build

    return build(work, progress or NoProgress())


def is_made(path: Path, made_from: MadeFrom) -> bool:
    """Whether the index at ``path`` is complete and made from the same things. Names do not matter, contents do.

    Raises:
        UserError: it was made from something else, or is damaged.
    """
    if not path.exists():
        return False
    manifest = IndexManifest.read(path)
    for field, what in IDENTITY.items():
        there, now = getattr(manifest.made_from, field), getattr(made_from, field)
        if there != now:
            raise UserError(
                f"The index {path.name.removesuffix('.zarr')!r} exists and was made with another {what} "
                f"({_short(there)} there, {_short(now)} now); choose another --name, or delete {str(path)!r}."
            )
    manifest.check_files(path)
    return True


IDENTITY = {
    "dictionary_fingerprint": "dictionary",
    "store_fingerprint": "store",
    "aligned_fingerprints": "aligned store",
    "model_fingerprint": "model",
    "rows": "number of rows",
    "logits": "choice of logits",
    "coactive": "choice of coactive",
}


def _short(value: object) -> str:
    return value[:19] if isinstance(value, str) else f"{value}"


def _check_numbers(config: IndexConfig) -> None:
    if config.rows is not None and config.rows < 1:
        raise UserError(f"rows is {config.rows}; it must be at least 1.")
    if config.memory_mb < LEAST_MEMORY_MB:
        raise UserError(f"memory_mb is {config.memory_mb}; it must be at least {LEAST_MEMORY_MB}.")


def _check_model(store: Store, run: str, trained_on: dict[str, Any]) -> None:
    made_by = store.provenance["model"]
    if made_by["fingerprint"] != trained_on["fingerprint"]:
        raise UserError(
            f"The store {store.name!r} was made by the model {made_by['name']!r}, the run {run!r} was trained on "
            f"{trained_on['name']!r}; name a store of that model."
        )


def _check_store(store: Store, run: str, hooks: tuple[str, ...], widths: list[int]) -> None:
    name = store.name
    if not has_tokens(store):
        raise UserError(
            f"The store {name!r} has no tokens: it was imported from a file without them. A feature page shows text: "
            "index a store that has some."
        )
    for hook, d in zip(hooks, widths, strict=True):
        if hook not in store.hooks:
            raise UserError(
                f"The store {name!r} has no hook {hook!r}, which the run {run!r} encodes; it holds "
                f"{', '.join(store.hooks)}. Name a store that has it."
            )
        if store.d(hook) != d:
            raise UserError(
                f"The run {run!r} encodes rows of {d} values, those of {hook!r} in {name!r} have {store.d(hook)}; "
                "name the store it was trained on."
            )
    for each in store.together:
        if not each.complete:
            raise UserError(
                f"The store {each.name!r} has {each.rows:,} of {each.manifest.rows_planned:,} rows; run its "
                "`dictlearn harvest` again to finish it, then index it."
            )
