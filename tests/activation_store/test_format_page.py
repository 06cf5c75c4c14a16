"""docs/store-format.md says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from activation_store.hdf5 import to_hdf5
from activation_store.spec import FORMAT_VERSION, MANIFEST_ATTRIBUTE
from activation_store.store import open_store
from scripts.make.page_tables import with_tables
from scripts.make.store_format_tables import TABLES
from tests.activation_store.small_store import make

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"


def test_the_tables_are_those_of_the_code():
    text = PAGE.read_text()
    assert with_tables(text, TABLES) == text, "run scripts/make/store_format_tables.py docs/store-format.md"
    assert all(len(made().splitlines()) > 2 for made in TABLES.values())


def test_a_table_that_says_something_else_is_found():
    text = PAGE.read_text()
    assert with_tables(text.replace("`token_ids` | (rows,)", "`token_ids` | (rows, 2)"), TABLES) == text


def test_the_page_names_every_key_of_a_manifest_and_no_other(small_path):
    manifest = json.loads((small_path / "zarr.json").read_text())["attributes"][MANIFEST_ATTRIBUTE]
    section = PAGE.read_text().split("## The manifest")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert named == list(manifest)
    assert f"**format\nversion {FORMAT_VERSION}**" in PAGE.read_text()
    for key in (*manifest["geometry"], *manifest["plan"], *manifest["hooks"][0]):
        assert f"`{key}`" in section


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "store.zarr")
    to_hdf5("store.zarr", "store.h5")
    store = open_store("store.zarr")
    bits = store.read_rows("blocks.0.hook_resid_post", 0, store.rows)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 2  # of Zarr, and of HDF5
    for example in examples:
        found: dict[str, np.ndarray] = {}
        exec(example.replace("blocks.2.", "blocks.0."), found)
        assert np.array_equal(found["rows"].view(np.uint32) >> 16, bits)
