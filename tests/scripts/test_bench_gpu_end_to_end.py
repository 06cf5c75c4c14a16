"""The measurement from text to dictionaries runs on the CPU too; how fast anything is depends on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.heavy
def test_a_harvest_and_three_trainings_are_measured(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    small = ["--tokens", "9000", "--steps", "3", "--d-sae", "128", "--k", "4", "--batch", "256", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_end_to_end.py"), *small]
    command += ["--out", str(tmp_path / "out"), "--folder", str(place)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert ran.returncode == 0, ran.stderr
    assert not list(place.iterdir()), "what it wrote is removed"
    harvest, *trainings = json.loads((tmp_path / "out" / "end_to_end.json").read_text())
    assert harvest["what"] == "harvest, 9,000 rows" and harvest["tokens/s"] > 0
    assert [row["what"].partition(",")[0] for row in trainings] == ["topk", "batchtopk", "matryoshka"]
    for row in trainings:
        assert row["tokens/s"] > 0 and row["from the store / from memory"] == pytest.approx(
            row["tokens/s"] / row["from memory, tokens/s"]
        )
    table = (tmp_path / "out" / "end_to_end.md").read_text().splitlines()
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1
