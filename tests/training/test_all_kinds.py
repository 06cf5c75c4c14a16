"""Every kind of dictionary in one sweep: each learns, is evaluated, and resumes bit for bit with the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from activation_store.errors import UserError
from dictlearn.dictionaries import CONFIGS, dictionary_class
from dictlearn.metrics.command import run_evaluate
from dictlearn.metrics.record import EvaluateConfig, read_evaluation
from dictlearn.training.command import train_group
from dictlearn.training.configs import TrainConfig
from dictlearn.training.memory import parameters
from dictlearn.workspace import Workspace
from tests.training.planted import IN, OUT, SAE, metrics
from tests.training.test_resume import Killed, assert_same_runs, kill_at

# a cross-layer transcoder needs the hooks of several layers: test_several_hooks.py has it
KINDS = [kind for kind in CONFIGS if kind != "clt"]
NUMBERS = {
    "vsae": {"k": 4, "variance": "learned", "sigma": 0.1},
    "ksparse": {"k": 4},
    "icfl": {"rounds": 2, "width": 2, "reset_every": 10},
    "snmf": {"winners": 0.5, "iterations": 1},
    "crosscoder": {"l1_weight": 0.03},
    "relu": {"l1_weight": 0.03},
    "gated": {"l1_weight": 0.03},
    "jumprelu": {},
}
HOOKS = {
    "crosscoder": {"hook": (IN, OUT)},
    "skip": {"target_hook": OUT},
    "gated": {"target_hook": OUT},
}

SHARED = CONFIGS["batchtopk"](d_sae=64, k=4, dead_after_rows=1000)


def runs(prefix: str) -> list[TrainConfig]:
    return [
        replace(
            SAE,
            name=f"{prefix}-{kind}",
            steps=30,
            dictionary=CONFIGS[kind](d_sae=64, dead_after_rows=1000, **NUMBERS.get(kind, {"k": 4})),
            **HOOKS.get(kind, {}),
        )
        for kind in KINDS
    ]


def trained(workspace: Workspace, prefix: str) -> None:
    train_group(runs(prefix), workspace, workspace.sweep(prefix).checkpoints, prefix)


def test_every_kind_learns_in_a_sweep_and_resumes_with_the_others(workspace, monkeypatch):
    trained(workspace, "whole")
    for step in (3, 17):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                trained(workspace, "killed")
    trained(workspace, "killed")
    for kind in KINDS:
        assert_same_runs(workspace, f"whole-{kind}", f"killed-{kind}")
        lines = metrics(workspace, f"whole-{kind}")
        assert np.mean([line["fvu"] for line in lines[-3:]]) < 0.9 * lines[0]["fvu"], kind
        found = run_evaluate(EvaluateConfig(f"whole-{kind}", tokens=0), workspace)
        assert found.reconstruction["fvu"] < 0.9 * lines[0]["fvu"], kind


def test_k_may_be_another_after_training_and_the_evaluation_that_is_kept_is_that_of_training(workspace):
    free = [run for run in runs("k") if run.dictionary.kind in ("topk", "mp")]
    train_group([*free, replace(SAE, name="k-shared", steps=30, dictionary=SHARED)], workspace, workspace.root / "c")
    for run in free:
        own = run_evaluate(EvaluateConfig(run.name, tokens=0), workspace)
        by_k = [run_evaluate(EvaluateConfig(run.name, tokens=0, k=k), workspace) for k in (1, 4, 16)]
        assert [round(found.reconstruction["l0"]) for found in by_k[:2]] == [1, 4]
        assert by_k[0].reconstruction["fvu"] > by_k[1].reconstruction["fvu"] == own.reconstruction["fvu"]
        assert read_evaluation(workspace.run(run.name)) == own
        if run.dictionary.kind == "mp":
            assert by_k[2].reconstruction["fvu"] < own.reconstruction["fvu"], "each step shortens the residual"
        for k in (0, 65):
            with pytest.raises(UserError, match=f"k is {k}; it must lie between 1 and the 64 latents"):
                run_evaluate(EvaluateConfig(run.name, tokens=0, k=k), workspace)
    with pytest.raises(UserError, match="latents of kind 'batchtopk' are active is settled in training"):
        run_evaluate(EvaluateConfig("k-shared", tokens=0, k=2), workspace)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plan_counts_what_a_kind_learns(kind):
    config = CONFIGS[kind](d_sae=64, **NUMBERS.get(kind, {"k": 4}))
    several = kind in ("crosscoder", "clt")
    inputs = (6, 6) if several else (12,)
    outputs = inputs if not getattr(config, "transcodes", True) else (4, 5) if several else (9,)
    dictionary = dictionary_class(kind)(config, inputs, None if outputs == inputs else outputs)
    learned = sum(parameter.numel() for parameter in dictionary.parameters() if parameter.requires_grad)
    assert parameters(config, (inputs, outputs)) == learned
