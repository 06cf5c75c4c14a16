"""What the command line can ask of stores: look into one, check it, copy it out and in, merge, remove.

Every verb is a config (its fields are the options), a function from it to a result, and how the result is drawn. None
needs torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.progress import Progress
from dictlearn import reports, terminal
from dictlearn.workspace import Workspace

if TYPE_CHECKING:
    from activation_store.describe import StoreDescription
    from activation_store.remove import Contents

ROWS_SHOWN_AT_MOST = 10_000

StoreName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
FileName = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class StoreVerb:
    """A verb of ``dictlearn store``."""

    config: type
    run: Callable[[Any, Workspace, Progress], Any]
    show: Callable[[Any], None]
    words: str


# --- info -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfoConfig:
    """Show what is inside a store: hooks with sizes and norms, rows by split, what was left out, its first text."""

    store: StoreName
    """Name, path or URL of the store."""


@dataclass(frozen=True)
class StoreInfo:
    """A store's description, and the text that it begins with (None where the tokens cannot be read)."""

    description: StoreDescription
    beginning: str | None


def run_info(config: InfoConfig, workspace: Workspace, progress: Progress) -> StoreInfo:
    """Raises UserError when there is no such store, or it is damaged."""
    from activation_store.describe import describe
    from activation_store.store import open_store

    described = describe(open_store(workspace.existing_store(config.store)))
    vocabulary, _ = _vocabulary(described.provenance)
    return StoreInfo(described, _text(described.first_token_ids, vocabulary) if vocabulary else None)


# --- verify -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifyConfig:
    """Read every byte of a store and name each part that is not as it was written. Exit code 2 if there is one."""

    store: StoreName
    """Name, path or URL of the store."""


@dataclass(frozen=True)
class Verified:
    """A store without damage."""

    location: str


def run_verify(config: VerifyConfig, workspace: Workspace, progress: Progress) -> Verified:
    """Raises UserError naming every damaged part."""
    from activation_store.verify import verify

    location = workspace.existing_store(config.store)
    damaged = verify(location, progress=progress)
    if damaged:
        name = open_place(location).name
        raise UserError(f"The store {name!r} is damaged: {'; '.join(str(part) for part in damaged)}.")
    return Verified(location)


# --- sample -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig:
    """Draw rows at random and show each token in its text, with document, position, split and norms."""

    store: StoreName
    """Name, path or URL of the store."""
    rows: int = 10
    """How many rows to draw."""
    seed: int = 0
    """Decides which rows: the same seed draws the same ones."""
    hook: str | None = None
    """Hook whose norms are shown; those of every hook when not given."""


@dataclass(frozen=True)
class SampleRow:
    """One row: the text around its token, where it comes from, and its norm at each hook.

    Where the tokenizer is not to be had, ``before``, ``token`` and ``after`` are token ids.
    """

    row: int
    before: str
    token: str
    after: str
    token_id: int
    document: str
    split: str
    position: int
    norms: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """Rows of a store. ``no_text`` says why token ids are shown in the place of text."""

    location: str
    rows: list[SampleRow]
    no_text: str | None


def run_sample(config: SampleConfig, workspace: Workspace, progress: Progress) -> Sample:
    """Raises UserError when there is no such store or hook, or no row in it."""
    from activation_store.sample import draw_rows
    from activation_store.store import open_store

    if not 1 <= config.rows <= ROWS_SHOWN_AT_MOST:
        raise UserError(f"--rows is {config.rows}; it must be between 1 and {ROWS_SHOWN_AT_MOST:,}.")
    store = open_store(workspace.existing_store(config.store))
    drawn = draw_rows(store, config.rows, config.seed, None if config.hook is None else [config.hook])
    vocabulary, no_text = _vocabulary(store.provenance)
    return Sample(
        store.location,
        [
            SampleRow(
                row=each.row,
                before=_text(each.token_ids[: each.index], vocabulary),
                token=_text([each.token_ids[each.index]], vocabulary),
                after=_text(each.token_ids[each.index + 1 :], vocabulary, continues=True),
                token_id=each.token_ids[each.index],
                document=each.document,
                split=each.split,
                position=each.position,
                norms=each.norms,
            )
            for each in drawn
        ],
        no_text,
    )


def _vocabulary(provenance: Mapping[str, Any]) -> tuple[list[bytes] | None, str | None]:
    """The bytes of each token of the model that a store was made from; or None, and why."""
    from dictlearn.token_text import read_vocabulary

    model = (provenance.get("model") or {}).get("name")
    if not model:
        return None, "the store does not say which model its tokens are of"
    try:
        vocabulary, fingerprint = read_vocabulary(model)
    except UserError as refusal:
        return None, str(refusal).rstrip(".")
    recorded = provenance.get("tokenizer")
    if recorded is not None and recorded != fingerprint:
        return None, f"the tokenizer of {model} is no longer the one that the store was made with"
    return vocabulary, None


def _text(token_ids: list[int], vocabulary: list[bytes] | None, continues: bool = False) -> str:
    """Tokens as one line of text that is safe to show, or as numbers."""
    from dictlearn.token_text import shown

    if vocabulary is None:
        numbers = " ".join("?" if token < 0 else str(token) for token in token_ids)
        return f" {numbers}" if continues and numbers else numbers
    known = range(len(vocabulary))
    pieces = [vocabulary[token] if token in known else f"<unknown {token}>".encode() for token in token_ids]
    return shown(b"".join(pieces))


# --- HDF5 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToHDF5Config:
    """Write a store to one HDF5 file, which `from-hdf5` turns back into the same store, byte for byte.

    The datasets have the names of the store's arrays; bfloat16 is uint16 bits with the attribute dtype = "bfloat16".
    An existing file is not overwritten.
    """

    store: StoreName
    """Name, path or URL of the store."""
    file: FileName
    """The file to make."""


@dataclass(frozen=True)
class FileWritten:
    """A file, and its size in bytes."""

    file: str
    bytes: int


def run_to_hdf5(config: ToHDF5Config, workspace: Workspace, progress: Progress) -> FileWritten:
    """Raises UserError: see `activation_store.hdf5.to_hdf5`."""
    from activation_store.hdf5 import to_hdf5

    try:
        to_hdf5(workspace.existing_store(config.store), config.file, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted: {config.file} was not made, and nothing was left behind.") from None
    return FileWritten(str(config.file), config.file.stat().st_size)


@dataclass(frozen=True)
class FromHDF5Config:
    """Make a store of an HDF5 file: one that `to-hdf5` wrote, or one dataset (rows, d) of anybody's.

    Of somebody else's file, --dataset and --hook are needed. It tells nothing of tokens, positions and documents: these
    are unknown, and the last tenth of the rows is held out. Interrupted, the same command continues.
    """

    file: FileName
    """The file to read."""
    store: StoreName
    """Name, path or URL of the store to make."""
    dataset: str | None = None
    """Path of the dataset in somebody else's file: float16, float32, float64, or bfloat16 as bits with an attribute."""
    hook: str | None = None
    """Hook that its activations are of, such as blocks.8.hook_resid_post."""
    dtype: str | None = None
    """Type on disk: bfloat16, float16 or float32; the dataset's own when not given."""
    model: str | None = None
    """Language model they are of, if it can be named: "bundled", a folder, or a hub name."""
    compression: str = "none"
    """Compression of the store: none or zstd. A file that `to-hdf5` wrote says itself."""


@dataclass(frozen=True)
class StoreMade:
    """A store, new or finished."""

    location: str
    rows: int
    hooks: list[str]


def run_from_hdf5(config: FromHDF5Config, workspace: Workspace, progress: Progress) -> StoreMade:
    """Raises UserError: see `activation_store.hdf5.from_hdf5` and `activation_store.hdf5_dataset.import_dataset`."""
    location = workspace.store_location(config.store)
    if config.dataset is None and config.hook is None:
        given = [f"--{name}" for name in ("dtype", "model") if getattr(config, name) is not None]
        given += ["--compression"] if config.compression != "none" else []
        if given:
            raise UserError(f"{given[0]} is for a dataset of somebody else's: name it with --dataset and --hook.")
        from activation_store.hdf5 import from_hdf5

        from_hdf5(config.file, location, progress)
        return _made(location)
    if config.dataset is None or config.hook is None:
        raise UserError("A dataset of somebody else's needs both --dataset (its path) and --hook (what it is of).")
    from activation_store.hdf5_dataset import import_dataset

    import_dataset(
        config.file,
        config.dataset,
        config.hook,
        location,
        dtype=config.dtype,
        model=_model(config.model),
        compression=config.compression,
        progress=progress,
    )
    return _made(location)


def _model(name: str | None) -> dict[str, Any] | None:
    """Provenance of the language model called ``name``."""
    from activation_store.harvest.language_model import resolve_model

    return None if name is None else resolve_model(name).provenance()


def _made(location: str) -> StoreMade:
    from activation_store.store import open_store

    store = open_store(location)
    return StoreMade(store.location, store.rows, list(store.hooks))


# --- SAELens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FromSAELensConfig:
    """Make a store of activations that SAELens cached (the folder its CacheActivationsRunner wrote).

    Each cached context becomes a document; the last tenth of them is held out. A cache holds one hook: caches of the
    same tokens at several hooks become one store by `merge`. Interrupted, the same command continues.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The cache."""
    store: StoreName
    """Name, path or URL of the store to make."""
    model: str | None = None
    """Language model it was cached from ("bundled", a folder, or a hub name): a cache on disk does not say."""
    dtype: str | None = None
    """Type on disk: bfloat16, float16 or float32; the cache's own when not given."""
    compression: str = "none"
    """Compression of the store: none or zstd."""


def run_from_saelens(config: FromSAELensConfig, workspace: Workspace, progress: Progress) -> StoreMade:
    """Raises UserError: see `activation_store.saelens_cache.import_saelens_cache`."""
    from activation_store.saelens_cache import import_saelens_cache

    location = workspace.store_location(config.store)
    import_saelens_cache(
        config.folder,
        location,
        dtype=config.dtype,
        model=_model(config.model),
        compression=config.compression,
        progress=progress,
    )
    return _made(location)


# --- merge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeConfig:
    """Make one store of several: of the same hooks, one after the other; of the same rows, with the hooks of all.

    Model and tokenizer must be the same. The stores stay as they are. Interrupted, the same command continues.
    """

    stores: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE STORE ...")]
    """Names, paths or URLs of two stores or more."""
    into: str
    """Name, path or URL of the store to make."""
    keep_repeated: bool = False
    """Keep the rows of documents that are in two of the stores (their names get "#2"), and do not refuse them."""
    compression: str = "none"
    """Compression of the merged store: none or zstd."""


def run_merge(config: MergeConfig, workspace: Workspace, progress: Progress) -> StoreMade:
    """Raises UserError: see `activation_store.merge.merge`."""
    from activation_store.merge import merge

    location = workspace.store_location(config.into)
    merge(
        [workspace.existing_store(name) for name in config.stores],
        location,
        keep_repeated=config.keep_repeated,
        compression=config.compression,
        progress=progress,
    )
    return _made(location)


# --- rm ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoveConfig:
    """Remove a store, after saying what would be lost and asking.

    It is refused while a process writes the store. A removal that was interrupted is finished by asking for it again.
    """

    store: StoreName
    """Name, path or URL of the store."""
    yes: bool = False
    """Do not ask."""


@dataclass(frozen=True)
class Removal:
    """What was lost, and what had been made from it."""

    lost: Contents
    runs: list[str]
    indexes: list[str]


def run_remove(config: RemoveConfig, workspace: Workspace, progress: Progress) -> Removal:
    """Raises UserError: no such store, a process is writing it, or the person did not say yes."""
    from activation_store.remove import look, remove

    location = workspace.store_location(config.store)
    lost = look(location)
    if lost is None:
        workspace.existing_store(config.store)  # says which stores there are
        raise UserError(f"There is no store {location}.")
    removal = Removal(lost, _runs_from(workspace, lost), _indexes_from(workspace, lost))
    if not config.yes:
        reports.removal_ahead(removal)
        try:
            said_yes = terminal.ask("Remove it?")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Nothing was removed: {location} is as it was.") from None
        if not said_yes:
            raise UserError(f"Nothing was removed: {location} is as it was. (--yes removes without asking.)")
    try:
        remove(location)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted; the same command finishes removing {location}.") from None
    return removal


def _runs_from(workspace: Workspace, lost: Contents) -> list[str]:
    """Runs trained on a store, also those that are not finished and could not be; not where a copy of it stays."""
    from dictlearn.dictionaries.description import describe

    found = []
    for name in workspace.runs():
        files = workspace.run(name)
        named, made_from = [], {}
        with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
            config = yaml.safe_load(files.config.read_text())
            named = [config.get("store"), config.get("control_store")]
        with contextlib.suppress(UserError):
            made_from = describe(files.dictionary).get("provenance", {}).get("store", {})
        fingerprint = made_from.get("fingerprint")
        if fingerprint is None:
            lacks = lost.location in [workspace.store_location(store) for store in named if store]
        else:
            lacks = fingerprint == lost.fingerprint and not _stays(workspace, str(made_from.get("name")), lost)
        if lacks:
            found.append(name)
    return found


def _indexes_from(workspace: Workspace, lost: Contents) -> list[str]:
    from dictlearn.feature_index.spec import IndexManifest

    found = []
    for name in workspace.indexes():
        with contextlib.suppress(UserError):
            made = IndexManifest.read(workspace.index(name)).made_from
            if made.store_fingerprint == lost.fingerprint and not _stays(workspace, made.store, lost):
                found.append(name)
    return found


def _stays(workspace: Workspace, name: str, lost: Contents) -> bool:
    """Whether what is lost is only a copy of the store of this name."""
    from activation_store.remove import look

    location = workspace.store_location(name)
    if location == lost.location:
        return False
    other = look(location)
    return other is not None and other.fingerprint == lost.fingerprint


# --- the table --------------------------------------------------------------------------------------------------------

VERBS = {
    "info": StoreVerb(InfoConfig, run_info, reports.store, "show what is inside"),
    "verify": StoreVerb(VerifyConfig, run_verify, reports.verified, "read every byte and name what is damaged"),
    "sample": StoreVerb(SampleConfig, run_sample, reports.sample, "show rows drawn at random, in their text"),
    "merge": StoreVerb(MergeConfig, run_merge, reports.store_made, "make one store of several"),
    "rm": StoreVerb(RemoveConfig, run_remove, reports.removed, "remove a store"),
    "to-hdf5": StoreVerb(ToHDF5Config, run_to_hdf5, reports.file_written, "write a store to one HDF5 file"),
    "from-hdf5": StoreVerb(FromHDF5Config, run_from_hdf5, reports.store_made, "make a store of an HDF5 file"),
    "from-saelens": StoreVerb(
        FromSAELensConfig, run_from_saelens, reports.store_made, "make a store of a SAELens activation cache"
    ),
}


def usage() -> str:
    """What `dictlearn store --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.words}" for name, verb in VERBS.items())
    return (
        "dictlearn store: look into activation stores, check, copy, merge and remove them\n\n"
        f"usage: dictlearn store VERB [OPTIONS]\n\n{verbs}\n\n"
        "`dictlearn store VERB --help` explains a verb. A store is a name in the workspace (--workspace FOLDER), a "
        "path,\nor a URL such as s3://bucket/name. --json prints results for other programs."
    )
