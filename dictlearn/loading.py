"""`dictlearn.load`: a trained dictionary from wherever it lies."""

from __future__ import annotations

from pathlib import Path

import torch

from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.description import DESCRIPTION
from dictlearn.dictionaries.files import load as load_folder
from dictlearn.workspace import RunFiles


def load(path: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """Read the dictionary in a run's folder or in a dictionary's own folder; it takes raw activations.

    Raises:
        UserError: nothing there, an unfinished run, or damaged files.
    """
    path = Path(path)
    if (path / DESCRIPTION).exists():
        return load_folder(path, device)
    run = RunFiles(path)
    run.refuse_unfinished()
    return load_folder(run.dictionary if run.dictionary.exists() else path, device)
