"""The description beside a saved dictionary's weights, read without torch, so that commands can refuse early."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from activation_store.errors import UserError
from dictlearn.hook_names import names

FORMAT = "dictlearn-dictionary"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""Version 1 has the scales of input and target among its weights, all 1."""
DESCRIPTION = "dictionary.json"
WEIGHTS = "dictionary.safetensors"


def describe(folder: str | Path) -> dict[str, Any]:
    """The contents of ``dictionary.json``, checked; reads no weights."""
    path = Path(folder) / DESCRIPTION
    if not path.exists():
        raise UserError(
            f"There is no dictionary in {str(folder)!r}: {DESCRIPTION} is missing. Train one, or check the name."
        )
    try:
        description = json.loads(path.read_text())
        version = description["version"]
        description["kind"], description["config"], description["d_in"], description["d_out"]
        if version == 1:
            made_from = description.get("provenance", {})
            description["autoencoder"] = made_from.get("hook_in") == made_from.get("hook_out")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); restore it or train again.") from error
    if version not in READABLE:
        raise UserError(
            f"{str(path)!r} has format version {version}; this dictlearn reads version {FORMAT_VERSION} and before. "
            "Use the dictlearn that wrote it, or a newer one."
        )
    return description


def hooks_of(provenance: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``(hooks that are encoded, hooks that are rebuilt)`` of a provenance, where one is a plain string."""
    return names(provenance["hook_in"]), names(provenance["hook_out"])


def dictionary_fingerprint(folder: Path) -> str:
    """Hash of a saved dictionary: its description and its weights."""
    digest = hashlib.sha256()
    for name in (DESCRIPTION, WEIGHTS):
        digest.update(name.encode())
        try:
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(
                f"The dictionary in {str(folder)!r} is damaged ({name}: {error.strerror}); restore it or train again."
            ) from None
    return "sha256:" + digest.hexdigest()
