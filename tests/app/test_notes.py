"""Notes on features: kept by run, dictionary and latent, in a file made with the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from activation_store.errors import UserError
from dictlearn_app.notes import Notes


def test_reading_makes_no_file(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.sqlite")
    assert notes.read("sae", "sha256:1", 5) == "" and notes.of_run("sae", "sha256:1") == {}
    assert not notes.path.exists()


def test_a_note_is_replaced_and_removed(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.sqlite")
    notes.write("sae", "sha256:1", 5, "  inside a docstring ")
    notes.write("sae", "sha256:1", 6, "'; DROP TABLE feature_notes; --")
    assert notes.of_run("sae", "sha256:1") == {5: "inside a docstring", 6: "'; DROP TABLE feature_notes; --"}
    notes.write("sae", "sha256:1", 5, "")
    assert notes.read("sae", "sha256:1", 5) == ""


def test_a_run_trained_again_has_no_notes_yet(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.sqlite")
    notes.write("sae", "sha256:1", 5, "old")
    assert notes.read("sae", "sha256:2", 5) == ""


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"notes.sqlite' cannot be used \(.*\); restore the file, or move it away"):
        Notes(tmp_path / "notes.sqlite").read("sae", "sha256:1", 5)
