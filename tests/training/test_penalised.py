"""Runs of the kinds with a sparsity penalty: they learn, resume bit for bit, and can be evaluated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import dictlearn
from activation_store.errors import UserError
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.configs import GatedConfig, JumpReLUConfig, ReLUConfig
from dictlearn.training import parallel
from dictlearn.training.command import run_train
from tests.training.planted import SAE, TRANSCODER, metrics, weights
from tests.training.test_resume import Killed, assert_same_runs, kill_at

COMMON = {"d_sae": 64, "dead_after_rows": 1000, "warm_up_share": 0.5, "resample_every": 9, "shrinkage": 0.01}
RUNS = [
    replace(SAE, name="relu", dictionary=ReLUConfig(l1_weight=0.05, **COMMON)),
    replace(TRANSCODER, name="jumprelu", accumulate=2, dictionary=JumpReLUConfig(bandwidth=0.1, **COMMON)),
    replace(SAE, name="gated", dictionary=GatedConfig(l1_weight=0.05, scaling="whiten", **COMMON)),
]


@pytest.mark.parametrize("config", RUNS, ids=lambda c: c.name)
def test_a_run_learns_and_resumes_in_the_middle_of_its_warm_up(workspace, config, monkeypatch):
    run_train(config, workspace)
    lines = metrics(workspace, config.name)
    assert np.mean([line["fvu"] for line in lines[-3:]]) < 0.8 * lines[0]["fvu"]
    killed = replace(config, name="killed")
    for step in (17, 40):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                run_train(killed, workspace)
    run_train(killed, workspace)
    assert_same_runs(workspace, config.name, "killed")
    assert weights(workspace, config.name)["W_enc"].shape == (64, 16)
    assert dictlearn.load(workspace.run("killed").folder).config == config.dictionary


@pytest.mark.parametrize("config", RUNS, ids=lambda c: c.name)
def test_latents_are_not_spread_over_processes(config, monkeypatch):
    monkeypatch.setattr(parallel, "processes_asked", lambda: 2)
    splits = bool(dictionary_class(config.name).latent_tensors)
    with pytest.raises(UserError, match=f"kind '{config.name}' cannot be spread over processes yet"):
        parallel.refuse_what_cannot_be_shared(replace(config, latent_parts=2), splits_latents=splits)
