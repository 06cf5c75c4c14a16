"""The measurements of reading and writing run and fill their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
SMALL = {
    "read.py": ["--rows", "8192", "--width", "8", "--batches", "2", "--rounds", "1"],
    "write.py": ["--rows", "8192", "--rows-per-shard", "4096", "--widths", "8", "--rounds", "1"],
}


@pytest.mark.parametrize("script", SMALL)
def test_it_prints_a_table_of_numbers(script, tmp_path):
    command = [sys.executable, str(BENCH / script), *SMALL[script], "--folder", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=BENCH.parents[1], timeout=200)
    assert ran.returncode == 0, ran.stderr
    header, _, *rows = [line.strip("|").split("|") for line in ran.stdout.splitlines()]
    assert rows and all(len(row) == len(header) for row in rows)
    for row in rows:
        assert all(float(cell.replace(",", "")) >= 0 for cell in row[1:])
    assert not list(tmp_path.iterdir()), "what it wrote is removed"
