"""Saving and loading our own dictionaries: a folder with ``dictionary.json`` and ``dictionary.safetensors``.

What is saved is folded: it takes raw activations and needs nothing of the training code. Both files are written under
temporary names; the JSON file of before goes first and the new one comes last, so a folder that has it is whole.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from activation_store.devices import refuse_missing
from activation_store.disk import sync_path
from activation_store.errors import UserError
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.description import DESCRIPTION, FORMAT, FORMAT_VERSION, WEIGHTS, describe


def save(dictionary: Dictionary, folder: str | Path, provenance: dict[str, Any] | None = None) -> Path:
    """Fold and write ``dictionary``; replaces what the folder held. ``provenance`` defaults to the dictionary's own."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folded = dictionary.fold()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in folded.state_dict().items()}
    description = {"format": FORMAT, "version": FORMAT_VERSION, **folded.described()}
    description["provenance"] = dictionary.provenance if provenance is None else provenance
    save_file(tensors, folder / (WEIGHTS + ".tmp"))
    (folder / (DESCRIPTION + ".tmp")).write_text(json.dumps(description, indent=2) + "\n")
    for name in (WEIGHTS, DESCRIPTION):
        sync_path(folder / (name + ".tmp"))
    (folder / DESCRIPTION).unlink(missing_ok=True)
    for name in (WEIGHTS, DESCRIPTION):
        os.replace(folder / (name + ".tmp"), folder / name)
    with suppress(OSError):  # some network file systems cannot
        sync_path(folder)
        sync_path(folder.parent)
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """Read a dictionary that `save` wrote, in evaluation mode, taking raw activations.

    Raises:
        UserError: no dictionary there, an unknown kind, or damaged files; no such device.
    """
    refuse_missing(str(device))
    folder = Path(folder)
    description = describe(folder)
    cls = dictionary_class(description["kind"])
    try:
        config = cls.Config(**description["config"])
        d_in, d_out = (
            description.get(f"{of}_parts", description[d]) for of, d in (("input", "d_in"), ("output", "d_out"))
        )
        dictionary = cls(config, d_in, None if description["autoencoder"] else d_out)
        dictionary.drop_scaling()
        tensors = load_file(folder / WEIGHTS)
        if description["version"] == 1:
            del tensors["input_scale"], tensors["target_scale"]
        dictionary.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The dictionary in {str(folder)!r} is damaged ({reason}); restore it or train again."
        ) from error
    dictionary.provenance = description.get("provenance", {})
    return dictionary.to(device).eval().requires_grad_(False)
