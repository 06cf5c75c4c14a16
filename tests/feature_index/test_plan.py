"""What an index will take is measured in rows of the store, and comes out as planned."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dictlearn import cli
from dictlearn.feature_index import plan as planning
from dictlearn.feature_index.command import IndexConfig, check, dry_run, run_index
from dictlearn.feature_index.index import open_index
from dictlearn.feature_index.staging import Staging
from dictlearn.workspace import Workspace

from .conftest import make_run, make_store

CONFIG = IndexConfig("run", logits=False)
COUNTED = ("activations", "latents", "neighbours", "coactive", "logits", "decoder", "text")


def bytes_of(*folders) -> int:
    """Of all files but metadata."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".json"]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("kind", ["topk", "icfl", "gated"])
def test_activations_and_bytes_are_as_planned_where_all_rows_are_sampled(kind, tmp_path, monkeypatch) -> None:
    """But for the end of the offsets and, without negative codes, the histogram's half that is not there."""
    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [200, 150, 50]), kind=kind)
    planned, of_parts = dry_run(CONFIG, workspace), []
    finish = Staging.finish
    monkeypatch.setattr(
        Staging, "finish", lambda self, path: of_parts.append(bytes_of(self.folder / "parts")) or finish(self, path)
    )
    index = open_index(run_index(CONFIG, workspace))
    assert planned.rows == planned.rows_sampled == 400
    assert planned.activations == index.array("activations/offsets")[-1]
    unused = 0 if kind == "icfl" else 40 * 8 * 24
    assert planned.bytes_on_disk == bytes_of(*(index.path / name for name in COUNTED)) - 8 + unused
    header_and_offsets = 2 * 128 + 25 * 8
    assert planned.bytes_while_building - planned.bytes_on_disk == of_parts[0] - header_and_offsets


def test_codes_of_no_fixed_number_are_counted_in_rows_from_the_whole_store(tmp_path, monkeypatch) -> None:
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", [500, 700, 300])
    make_run(workspace, "run", store, kind="gated")
    monkeypatch.setattr(planning, "BLOCK_ROWS", 32)
    asked = []
    encode_rows = planning.encode_rows
    monkeypatch.setattr(planning, "encode_rows", lambda *of: asked.append(of[3:]) or encode_rows(*of))
    planned = dry_run(CONFIG, workspace)
    assert len(asked) == 8 and asked[0] == (0, 32) and asked[-1] == (store.rows - 32, store.rows)
    activations = open_index(run_index(CONFIG, workspace)).array("activations/offsets")[-1]
    assert planned.rows_sampled == 256 and abs(planned.activations / activations - 1) < 0.1
    assert planned.active_per_row == pytest.approx(planned.activations / store.rows, abs=0.01)


def test_a_dry_run_of_the_command_says_it_and_makes_nothing(tmp_path, capsys) -> None:
    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [60]))
    cli.main(["index", "run", "--no-logits", "--dry-run", "--json", "--workspace", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(dry_run(CONFIG, workspace))
    assert not list(tmp_path.glob("indexes/*"))
    cli.main(["index", "run", "--no-logits", "--json", "--workspace", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == {"index": str(workspace.index("run"))}


def test_what_is_refused_needs_no_sample(tmp_path, monkeypatch) -> None:
    workspace = Workspace(tmp_path)
    make_run(workspace, "run", make_store(workspace, "store", [60]))
    monkeypatch.setattr(planning, "sample", None)
    assert check(CONFIG, workspace).made_from.rows == 60
