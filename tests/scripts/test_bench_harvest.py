"""scripts/bench/harvest.py runs and prints its table. How fast anything is depends on the machine and is not tested."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_quick_run_prints_one_complete_row(monkeypatch, capsys):
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["harvest.py", "--quick"])
    try:
        runpy.run_path(str(ROOT / "scripts" / "bench" / "harvest.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    header, rule, row = lines[-3:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("---")
    assert cells[:2] == ["random:64x2", "32"]
    assert all(float(cell.replace(",", "")) > 0 for cell in cells[2:])
