"""Dictionaries of several hooks: of one store, of the layers of a model, and of the same rows of two models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import dictlearn
from activation_store.errors import UserError
from activation_store.store import open_store
from dictlearn.dictionaries.configs import CrossLayerConfig, ICFLConfig, TopKConfig
from dictlearn.metrics.command import run_evaluate
from dictlearn.metrics.record import EvaluateConfig, write_evaluation
from dictlearn.training.command import check, run_train
from dictlearn.training.config_files import config_from_yaml
from dictlearn.training.control import SideBySide
from tests.training.planted import IN, LAYERS, OUT, SAE, metrics
from tests.training.test_resume import Killed, assert_same_runs, kill_at

INPUTS, OUTPUTS = (
    tuple(f"blocks.{layer}.{name}" for layer in range(LAYERS)) for name in ("mlp.hook_in", "hook_mlp_out")
)
BOTH = replace(SAE, name="both", hook=(IN, OUT))
WHITENED = replace(BOTH, name="whitened", dictionary=replace(SAE.dictionary, scaling="whiten"))
ACROSS_MODELS = replace(SAE, name="models", hook=(IN, f"t:{IN}"), aligned_stores=("t",))
ACROSS_LAYERS = replace(
    SAE,
    name="layers",
    store="layered",
    hook=INPUTS,
    target_hook=OUTPUTS,
    dictionary=CrossLayerConfig(d_sae=96, k=3, dead_after_rows=1500),
)


@pytest.mark.parametrize("config", [BOTH, WHITENED, ACROSS_MODELS, ACROSS_LAYERS], ids=lambda config: config.name)
def test_a_run_learns_resumes_and_is_evaluated(stores, config, monkeypatch):
    run_train(config, stores)
    lines = metrics(stores, config.name)
    assert np.mean([line["fvu"] for line in lines[-3:]]) < 0.8 * lines[0]["fvu"]
    with monkeypatch.context() as patch:
        kill_at(patch, 20)
        with pytest.raises(Killed):
            run_train(replace(config, name="killed"), stores)
    run_train(replace(config, name="killed"), stores)
    assert_same_runs(stores, config.name, "killed")

    files = stores.run(config.name)
    dictionary = dictlearn.load(files.folder)
    assert config_from_yaml(files.config) == config
    assert dictionary.provenance["hook_in"] == list(config.hooks)
    assert dictionary.provenance["hook_out"] == list(config.hooks_rebuilt)
    store = stores.open_store(config.store, config.aligned_stores)
    assert dictionary.input_parts == tuple(store.d(hook) for hook in config.hooks)

    found = run_evaluate(EvaluateConfig(config.name, tokens=0), stores)
    assert list(found.by_hook) == list(config.hooks_rebuilt)
    rows = np.concatenate([np.arange(start, stop) for start, stop in store.split_rows("held-out")])
    x, target = (
        torch.cat([torch.from_numpy(np.array(store.take(hook, rows))) for hook in hooks], dim=1)
        for hooks in (config.hooks, config.hooks_rebuilt)
    )
    errors = (target - dictionary(x)).double().square().split(dictionary.output_parts, dim=1)
    spreads = (target - target.mean(dim=0)).double().square().split(dictionary.output_parts, dim=1)
    for numbers, error, spread in zip(found.by_hook.values(), errors, spreads, strict=True):
        assert numbers["fvu"] == pytest.approx(float(error.sum() / spread.sum()), rel=1e-4)


def test_the_control_of_several_hooks_has_a_block_for_each(stores):
    store = open_store(stores.store("s"))
    both = SideBySide([store.statistics(IN), store.statistics(OUT)])
    covariance = both.second_moment - np.outer(both.mean, both.mean)
    own = store.statistics(OUT).second_moment - np.outer(store.statistics(OUT).mean, store.statistics(OUT).mean)
    np.testing.assert_allclose(covariance[16:, 16:], own)
    assert not covariance[:16, 16:].any() and covariance[:16, :16].any()


def test_a_dictionary_across_models_says_which_they_were(stores):
    run_train(ACROSS_MODELS, stores)
    made_from = dictlearn.load(stores.run("models").folder).provenance
    assert made_from["model"]["fingerprint"] == "sha256:model"
    (other,) = made_from["aligned_stores"]
    assert other["name"] == "t" and other["model"]["fingerprint"] == "sha256:tuned"
    found = run_evaluate(EvaluateConfig("models", tokens=0), stores)
    first, second = (open_store(stores.store(name)).fingerprint for name in ("s", "t"))
    assert found.store_fingerprint == f"{first}+{second}"
    for written, again in ((first + "+sha256:before", True), (found.store_fingerprint, False)):
        write_evaluation(replace(found, store_fingerprint=written, split="an old one"), stores.run("models"))
        assert (run_evaluate(EvaluateConfig("models", tokens=0), stores) == found) == again
    with pytest.raises(UserError, match="is of several aligned stores; leave --store out"):
        run_evaluate(EvaluateConfig("models", store="s", tokens=0), stores)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hook": (IN, IN)}, f"hook is {IN}, {IN}; name at least one hook, and each of them once"),
        ({"hook": ()}, "hook is empty; name at least one hook"),
        ({"hook": (IN, OUT), "target_hook": (IN, OUT)}, "the same as hook"),
        ({"hook": (IN, f"t:{IN}")}, f"has no hook 't:{IN}'; it holds .*Name its store in aligned_stores"),
        ({"hook": (IN, OUT), "dictionary": ICFLConfig(d_sae=8, rounds=1, width=2)}, "'icfl' is of one hook alone"),
        ({"hook": (IN, OUT), "dictionary": TopKConfig(d_sae=8, k=2, scaling="per_token")}, "rows of their own"),
        ({"dictionary": CrossLayerConfig(d_sae=8, k=2)}, "'clt' predicts one hook from another"),
        ({"dictionary": CrossLayerConfig(d_sae=8, k=2), "target_hook": OUT}, "hook names 1 and target_hook 1"),
        ({"aligned_stores": ("t",), "follow": True}, "follow is for one growing store"),
        ({"aligned_stores": ("t",), "control_store": "s"}, "control_store is of one model"),
        ({"aligned_stores": ("s",)}, "Two of the stores to be read together are called 's'"),
        ({"aligned_stores": ("layered",)}, "do not hold the same rows"),
        ({"aligned_stores": ("u",)}, "There is no store 'u'"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(stores, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run_train(replace(SAE, **changes), stores)
    assert not (stores.root / "runs").exists()


def test_the_plan_of_a_cross_layer_transcoder_counts_its_decoders(stores):
    short = replace(ACROSS_LAYERS, steps=1)
    run_train(short, stores)
    dictionary = dictlearn.load(stores.run("layers").folder)
    planned = check([short], stores).plan.parameters
    assert planned == sum(parameter.numel() for parameter in dictionary.parameters())
