"""The whole line on the bundled model, at a small size: what it leaves, that it is not done twice, and the notebook.

The corpus's first held-out document comes after 61,745 rows, so fewer tokens would leave nothing to evaluate on.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from activation_store.harvest.language_model import BUNDLED_FOLDER
from activation_store.progress import NoProgress
from dictlearn.demo import EVALUATED, INDEXED, LAYERS, DemoConfig, run_demo
from dictlearn.workspace import Workspace

SMALL = DemoConfig(tokens=66_000, steps=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Workspace:
    assert (BUNDLED_FOLDER / "model.safetensors").exists(), "the bundled language model is missing"
    workspace = Workspace(tmp_path_factory.mktemp("demo") / "workspace")
    run_demo(SMALL, workspace, NoProgress())
    return workspace


def stamps(workspace: Workspace) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in workspace.root.rglob("*") if path.is_file()}


def test_every_artefact_is_there_and_every_number_is_finite(made):
    assert made.stores() == ["demo"]
    assert made.runs() == sorted(["sae", "icfl", *(f"transcoder-{layer}" for layer in LAYERS)])
    assert made.indexes() == sorted(INDEXED)
    assert made.graphs() == ["demo"]
    for run in EVALUATED:
        record = json.loads(made.run(run).evaluation.read_text())
        for name, value in (record["reconstruction"] | record["downstream"]).items():
            assert math.isfinite(value), f"{run}: {name}"
        assert record["downstream"]["ce_clean"] < record["downstream"]["ce_zero_ablated"]


def test_a_second_run_reuses_everything_but_the_graph(made):
    before = stamps(made)
    run_demo(SMALL, made, NoProgress())
    changed = {path for path, stamp in stamps(made).items() if before.get(path) != stamp}
    assert {Path(path).name for path in changed} <= {"demo.json"}


def test_the_notebook_of_the_readme_runs(made, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(made.root.parent)
    names: dict = {}
    exec(block, names)
    assert names["codes"].dense().shape == (512, 2048)
    assert names["logits"].shape[-1] == 4096
    assert set(names["table"]["run"]) == set(EVALUATED)
    assert os.getcwd() == str(made.root.parent)
