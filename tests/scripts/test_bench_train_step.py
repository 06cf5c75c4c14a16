"""The measurement of training steps runs and fills its tables. How fast anything is depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
SMALL = ["--d-in", "16", "--d-sae", "64", "--k", "4", "--batch", "128", "--rows", "8192", "--threads", "1"]


def run(tmp_path: Path, *options: str) -> tuple[list[list[list[str]]], dict]:
    """Its tables, cell by cell with their headers, and what it measured."""
    file = tmp_path / "measured.json"
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, str(BENCH / "train_step.py"), *SMALL, "--folder", str(place), "--json", str(file)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, cwd=BENCH.parents[1], timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert not list(place.iterdir()), "what it wrote is removed"
    tables: list[list[list[str]]] = []
    for before, line in zip(["", *ran.stdout.splitlines()], ran.stdout.splitlines(), strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    for header, _, *rows in tables:
        assert rows and all(len(row) == len(header) for row in rows)
    return tables, json.loads(file.read_text())


def test_both_our_steps_lose_the_same_on_the_same_rows(tmp_path):
    tables, measured = run(tmp_path, "--rounds", "1")
    assert [[row[0] for row in table[2:]] for table in tables] == [["ours", "ours, dense", "encoder GEMM"]] * 2
    losses = defaultdict(list)
    for record in measured["records"]:
        losses[record["row"]] += [(record["dead_share"], loss) for loss in record["losses"]]
    assert len(losses["ours"]) == 2 * 2 * 2, "two steps, live and dead, in the round that warms up and in one more"
    np.testing.assert_allclose(losses["ours"], losses["ours, dense"], rtol=1e-5)
    live, dead = ([loss for share, loss in losses["ours"] if bool(share) is some] for some in (False, True))
    assert np.mean(dead) > np.mean(live) + 0.5 / 32, "AuxK adds up to 1 / 32 to the loss where latents are dead"
    assert measured["fvu"]["ours"] == pytest.approx(measured["fvu"]["ours, dense"], rel=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize(("mode", "first"), [("--stages", "encoder GEMM"), ("--loader", "memory, float32")])
def test_the_other_modes_fill_their_table(mode, first, tmp_path):
    (table,), _ = run(tmp_path, mode, "--rounds", "1", "--steps", "3")
    rows = {row[0]: row[1:] for row in table[2:]}
    assert first in rows
    assert all(float(cell.replace(",", "").rstrip("%")) >= 0 for cells in rows.values() for cell in cells)


@pytest.mark.heavy
def test_another_kind_stands_beside_topk_on_the_same_rows(tmp_path):
    kind = '{"kind": "icfl", "rounds": 2, "width": 2}'
    (table,), measured = run(tmp_path, "--kind", kind, "--rounds", "1")
    assert [row[0] for row in table[2:]] == ["TopK", kind]
    assert table[2][5:7] == ["1.00", "1.00"]
    assert measured["fvu"]["TopK"] != measured["fvu"][kind]
