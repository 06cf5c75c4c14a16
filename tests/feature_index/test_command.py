"""What `dictlearn index` refuses: one sentence each, before torch is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from activation_store.errors import UserError
from dictlearn.dictionaries.description import DESCRIPTION
from dictlearn.feature_index.command import IndexConfig, dry_run, run_index
from dictlearn.feature_index.work import building_folder
from dictlearn.workspace import Workspace

from .conftest import make_model, make_run, make_store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = IndexConfig("run", logits=False)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    make_run(workspace, "run", make_store(workspace, "store", [60, 50, 40]))
    return workspace


def refusal(config: IndexConfig, workspace: Workspace) -> str:
    with pytest.raises(UserError) as caught:
        run_index(config, workspace)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


def test_no_such_run(workspace) -> None:
    assert "There is no run 'rum' in" in refusal(replace(CONFIG, run="rum"), workspace)
    assert "did you mean run?" in refusal(replace(CONFIG, run="rum"), workspace)


def test_a_run_that_has_not_finished(workspace) -> None:
    shutil.rmtree(workspace.run("run").dictionary)
    workspace.run("run").config.touch()
    assert "The run 'run' has not finished training" in refusal(CONFIG, workspace)


def test_no_such_store(workspace) -> None:
    assert "There is no store 'other'" in refusal(replace(CONFIG, store="other"), workspace)


def test_a_store_of_another_model(workspace) -> None:
    other = make_model(workspace.root / "other-model")
    (other / "model.safetensors").write_bytes(b"other weights")
    make_store(workspace, "other", [40], model=other)
    sentence = refusal(replace(CONFIG, store="other"), workspace)
    assert "The store 'other' was made by the model" in sentence and "name a store of that model" in sentence


def test_a_store_without_the_hook(workspace) -> None:
    make_store(workspace, "other", [40], hook="blocks.2.hook_resid_post")
    sentence = refusal(replace(CONFIG, store="other"), workspace)
    assert "has no hook 'blocks.1.hook_resid_post'" in sentence and "it holds blocks.2.hook_resid_post" in sentence


def test_a_store_that_is_still_growing(workspace) -> None:
    make_store(workspace, "growing", [100, 60], finish=False)
    sentence = refusal(replace(CONFIG, store="growing"), workspace)
    assert "has 64 of 160 rows" in sentence and "`dictlearn harvest` again" in sentence


def test_a_model_that_has_changed_or_is_gone(workspace) -> None:
    model = workspace.root / "model"
    (model / "model.safetensors").write_bytes(b"trained further")
    assert "has changed since the store 'store' was harvested" in refusal(CONFIG, workspace)
    shutil.rmtree(model)
    assert "There is no model" in refusal(CONFIG, workspace)


def test_an_index_made_from_something_else(workspace) -> None:
    path = run_index(CONFIG, workspace)
    sentence = refusal(replace(CONFIG, rows=100), workspace)
    assert "The index 'run' exists and was made with another number of rows (150 there, 100 now)" in sentence
    assert f"choose another --name, or delete '{path}'" in sentence
    assert "another choice of coactive" in refusal(replace(CONFIG, coactive=False), workspace)
    make_run(workspace, "run", make_store(workspace, "store-2", [60], seed=3), d_sae=16)
    assert "was made with another dictionary (sha256:" in refusal(CONFIG, workspace)


def test_the_same_things_under_other_names_are_the_same(workspace) -> None:
    path = run_index(CONFIG, workspace)
    os.rename(workspace.store("store"), workspace.store("renamed"))
    os.rename(workspace.run("run").folder, workspace.run("renamed").folder)
    assert run_index(replace(CONFIG, run="renamed", store="renamed", name="run"), workspace) == path


def test_a_damaged_index_is_not_reused(workspace) -> None:
    path = run_index(CONFIG, workspace)
    (path / "latents/count/c.0").unlink()
    assert "damaged at" in refusal(CONFIG, workspace) and "latents/count/c.0" in refusal(CONFIG, workspace)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"memory_mb": 10}, "memory_mb is 10; it must be at least 128"),
        ({"name": "a b"}, "'a b' is no name for something in a workspace"),
    ],
)
def test_numbers_and_names_that_cannot_be(workspace, changes, words) -> None:
    assert words in refusal(replace(CONFIG, **changes), workspace)


def test_too_little_disk(workspace, monkeypatch) -> None:
    """What is there already is not planned again."""
    planned = dry_run(CONFIG, workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=planned.bytes_while_building - 1))
    sentence = refusal(CONFIG, workspace)
    assert "takes about 0.0 GB (4.0 latents fire in a row), the disk of" in sentence
    assert not building_folder(workspace.index("run")).exists()
    with pytest.raises(UserError, match="free some space, or set rows"):
        dry_run(CONFIG, workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=planned.bytes_while_building))
    run_index(CONFIG, workspace)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert run_index(CONFIG, workspace) and dry_run(CONFIG, workspace) == planned


def test_activations_that_are_no_numbers(workspace) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = workspace.run("run").dictionary / "dictionary.safetensors"
    tensors = load_file(weights)
    tensors["b_enc"][3] = torch.inf
    save_file(tensors, weights)
    assert "Row 0 of the store 'store' gives an activation that is not a number" in refusal(CONFIG, workspace)


def test_a_damaged_dictionary(workspace) -> None:
    file = workspace.run("run").dictionary / DESCRIPTION
    file.write_text(json.dumps({"version": 1}))
    assert "is damaged" in refusal(CONFIG, workspace)


def test_refusals_and_an_index_that_is_there_need_no_torch(workspace) -> None:
    run_index(CONFIG, workspace)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from activation_store.errors import UserError\n"
        "from dictlearn.feature_index.command import IndexConfig, run_index\n"
        "from dictlearn.feature_index.index import open_index\n"
        "from dictlearn.feature_index.read import feature_page\n"
        "from dictlearn.feature_index.selectivity import recognisable\n"
        "from dictlearn.workspace import Workspace\n"
        f"workspace = Workspace(Path({str(workspace.root)!r}))\n"
        "index = open_index(run_index(IndexConfig('run', logits=False), workspace))\n"
        "feature_page(index, 3), recognisable(index)\n"
        "for config in (IndexConfig('rum'), IndexConfig('run', store='no'), IndexConfig('run', rows=3)):\n"
        "    try:\n        run_index(config, workspace)\n"
        "    except UserError:\n        pass\n"
        "    else:\n        raise SystemExit('not refused')\n"
        "slow = {'torch', 'transformers', 'transformer_lens', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "raise SystemExit(f'loaded {slow}' if slow else 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
