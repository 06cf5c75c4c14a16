"""Taking a store away, so that no half of one is ever left that looks like a store.

A local store first gets another name, in one step, and then loses its manifest and the rest; an object store, which
cannot rename, loses the manifest first. A removal that was killed is finished by asking for it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from activation_store.errors import UserError
from activation_store.location import open_place
from activation_store.ownership import Ownership
from activation_store.place import Place
from activation_store.spec import ACTIVATIONS, DOCUMENT_TABLE, MANIFEST_ATTRIBUTE, METADATA_FILE, OWNER_FILE, Manifest

ASIDE = ".removed"
"""What a local store's name ends in while it is taken away."""


@dataclass(frozen=True)
class Contents:
    """What would be lost. ``bytes`` counts every file.

    ``problem`` says why nothing else is known, of a store that is damaged, of another version, or half removed.
    """

    location: str
    bytes: int
    rows: int = 0
    hooks: tuple[str, ...] = ()
    complete: bool = False
    fingerprint: str | None = None
    problem: str | None = None


def look(location: str | os.PathLike[str]) -> Contents | None:
    """What is in the store at ``location``, as far as it can be told; None when nothing is there.

    Raises:
        UserError: something is there that is not a store.
    """
    place = open_place(location)
    names = _names(place)
    aside = _aside(place)
    if not names and aside is not None and aside.exists():
        size = sum(open_place(aside).sizes().values())
        return Contents(place.location, size, problem="its removal was interrupted")
    if not names:
        return None
    if METADATA_FILE not in names and {ACTIVATIONS, DOCUMENT_TABLE} <= names:
        return Contents(place.location, sum(place.sizes().values()), problem="it has no manifest")
    content = b""
    with contextlib.suppress(FileNotFoundError):
        content = place.read(METADATA_FILE)
    if f'"{MANIFEST_ATTRIBUTE}"'.encode() not in content:
        raise UserError(f"{place.location} is not an activation store: it is left alone.")
    size = sum(place.sizes().values())
    try:
        manifest = Manifest.from_bytes(content, place.where(METADATA_FILE))
    except UserError as refusal:
        return Contents(place.location, size, problem=str(refusal).rstrip("."))
    return Contents(
        place.location,
        size,
        manifest.rows,
        tuple(hook.name for hook in manifest.hooks),
        manifest.complete,
        manifest.fingerprint,
    )


def remove(location: str | os.PathLike[str]) -> None:
    """Remove a store, or finish removing it.

    Raises:
        UserError: there is none, or something else; a process is writing it; it cannot be removed.
    """
    place = open_place(location)
    if look(location) is None:
        raise UserError(f"There is no store {place.location}.")
    aside = _aside(place)
    try:
        if aside is None:
            _remove_objects(place)
            return
        if place.root is not None and _names(place):
            _move_aside(place.root, aside)
        _remove_folder(aside)
    except OSError as problem:
        raise UserError(f"{place.location} cannot be removed: {problem.strerror or problem}.") from problem


def _move_aside(folder: Path, aside: Path) -> None:
    if aside.exists():  # of an earlier store of this name
        _remove_folder(aside)
    owner = Ownership.take(folder / OWNER_FILE, store=folder)
    try:
        os.rename(folder, aside)
    except BaseException:
        owner.release()
        raise
    owner.moved(aside / OWNER_FILE)
    owner.release()


def _remove_folder(aside: Path) -> None:
    (aside / METADATA_FILE).unlink(missing_ok=True)
    shutil.rmtree(aside)


def _remove_objects(place: Place) -> None:
    owner = place.own()
    try:
        place.remove([METADATA_FILE], "removal")
        place.remove(sorted(_names(place) - {OWNER_FILE}), "removal")
    finally:
        owner.release()


def _aside(place: Place) -> Path | None:
    return None if place.root is None else place.root.with_name(place.root.name + ASIDE)


def _names(place: Place) -> set[str]:
    try:
        return place.names()
    except OSError as problem:
        raise UserError(f"{place.location} cannot be read: {problem.strerror or problem}.") from problem
