"""docs/training.md and docs/scaling.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dictlearn.sweep import read_sweep
from scripts.make.page_tables import with_tables
from scripts.make.training_tables import TABLES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "training.md"


def test_the_tables_are_those_of_the_configurations():
    text = PAGE.read_text()
    assert with_tables(text, TABLES) == text, "run scripts/make/training_tables.py docs/training.md"
    assert all(len(made().splitlines()) > 4 for made in TABLES.values())


def test_the_sweep_on_the_page_is_one(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path / "widths.yaml"
    path.write_text(example)
    names = [config.name for config in read_sweep(path).configs]
    assert len(names) == 8 and "widths-sae-k16-seed0" in names
    assert "`widths-sae-k16-seed0`" in PAGE.read_text()


def test_the_memory_of_a_million_latents_is_what_the_page_says():
    m, d, B, k, parts = 2**20, 4096, 8192, 64, 8
    rows = dict(re.findall(r"^\| \**([^|]+?)\** \| \**([\d.]+)\** \|", (DOCS / "scaling.md").read_text(), re.MULTILINE))
    weights, moments, pre = 2 * m * d * 4, 2 * 2 * m * d * 4, B * m * 2
    expected = {
        "weights, float32 (2 m d)": weights,
        "gradients": weights,
        "two moments": moments,
        "pre-activations of a batch, bfloat16": pre,
        "together": 2 * weights + moments + pre,
        "candidates: 7 x B k float32": 7 * B * k * 4,
        "decoded sum: all-reduce of B d float32": 2 * B * d * 4 * (parts - 1) / parts,
        "AuxK: 7 x B k_aux candidates at k_aux = 256, and another decoded sum": 7 * B * 256 * 4
        + 2 * B * d * 4 * (parts - 1) / parts,
    }
    for name, size in expected.items():
        assert float(rows[name]) == pytest.approx(size / 1e9, rel=0.03), name
