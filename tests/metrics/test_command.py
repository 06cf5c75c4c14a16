"""What `dictlearn evaluate` measures again, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from activation_store.errors import UserError
from dictlearn.metrics.command import run_evaluate
from dictlearn.metrics.record import EvaluateConfig
from dictlearn.training.command import run_train
from dictlearn.workspace import Workspace
from tests.training.planted import SAE, make_store


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """A store of a model that has changed since, and a run."""
    workspace = Workspace(tmp_path)
    (tmp_path / "stores").mkdir()
    make_store(workspace.store("s"), model="bundled")
    run_train(replace(SAE, steps=5), workspace)
    return workspace


def test_an_evaluation_is_of_the_dictionary_that_is_there_now(workspace):
    config = EvaluateConfig("sae", tokens=0)
    before = run_evaluate(config, workspace)
    run_train(replace(SAE, name="other", steps=5, seed=1), workspace)
    there = workspace.run("sae").dictionary
    shutil.rmtree(there)
    shutil.copytree(workspace.run("other").dictionary, there)
    after = run_evaluate(config, workspace)
    assert after.dictionary_fingerprint != before.dictionary_fingerprint
    expected = run_evaluate(replace(config, run="other"), workspace).reconstruction
    assert after.reconstruction == expected != before.reconstruction


def test_a_second_evaluation_of_the_same_is_read(workspace, monkeypatch):
    first = run_evaluate(EvaluateConfig("sae", tokens=0), workspace)
    monkeypatch.setattr("dictlearn.metrics.evaluation.evaluate", lambda *arguments: pytest.fail("measured again"))
    assert run_evaluate(EvaluateConfig("sae", tokens=0), workspace) == first


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"tokens": -1}, "tokens is -1; it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({}, "The model 'bundled' has changed since the store 's' was harvested from it"),
    ],
)
def test_what_cannot_be_measured_is_refused(workspace, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run_evaluate(EvaluateConfig("sae", **changes), workspace)
    assert not workspace.run("sae").evaluation.exists()
