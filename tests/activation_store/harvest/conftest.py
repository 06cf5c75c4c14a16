"""A small corpus on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import CORPUS_TEXT


@pytest.fixture
def corpus_folder(tmp_path) -> Path:
    """Twenty short documents of different lengths."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(CORPUS_TEXT[number:] * (1 + number % 4) + f"# {number}\n")
    return folder
