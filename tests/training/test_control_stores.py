"""Rows that centre and whiten: those of another store, when it is named, and what is refused of it beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import dictlearn
from activation_store.errors import UserError
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.writer import StoreWriter
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.training.command import check, run_train
from tests.training.planted import CODEBOOK, IN, OUT, SAE, make_store

SHORT = {"steps": 2, "checkpoint_every": 2, "log_every": 1}
WHITENED = TopKConfig(d_sae=64, k=4, scaling="whiten", dead_after_rows=3000)


@pytest.fixture
def workspace(workspace):
    """Besides s: neutral, of the same model and other text, and tiny, of no more rows than coordinates, one hook."""
    make_store(workspace.store("neutral"), rows=2000, seed=5)
    plan = StorePlan(16, [DocumentRows("doc", "train", 0, 16)], {}, {"bos_token_id": None})
    provenance = open_store(workspace.store("s")).provenance
    with StoreWriter(workspace.store("tiny"), plan, [HookSpec(IN, (16,), "float32")], Geometry(), provenance) as writer:
        rows = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
        writer.append({IN: rows}, np.arange(16), np.arange(16), np.zeros(16, dtype=int))
        writer.finish()
    return workspace


def test_codes_are_centred_and_whitened_by_the_control_rows(workspace):
    run_train(replace(CODEBOOK, control_store="neutral", **SHORT), workspace)
    dictionary = dictlearn.load(workspace.run("icfl").folder).double()
    of_control, of_rows = (open_store(workspace.store(name)).statistics(IN) for name in ("neutral", "s"))
    np.testing.assert_allclose(dictionary.mean, of_control.mean, rtol=1e-5)
    assert np.abs(dictionary.mean.numpy() - of_rows.mean).max() > 0.1
    for statistics, whitened in ((of_control, True), (of_rows, False)):
        covariance = statistics.second_moment - np.outer(statistics.mean, statistics.mean)
        after = dictionary.whiten.numpy().T @ covariance @ dictionary.whiten.numpy()
        # shrinkage leaves directions of little spread below 1
        assert (np.abs(after - np.diag(np.diag(after))).max() < 1e-3) == whitened
        assert (np.diag(after).min() > 0.5 and np.diag(after).max() < 1.001) == whitened


@pytest.mark.parametrize("dictionary", [CODEBOOK.dictionary, WHITENED], ids=["icfl", "topk"])
def test_other_control_rows_give_another_dictionary_and_the_stores_own_the_same(workspace, dictionary):
    plain = replace(SAE, dictionary=dictionary, **SHORT)
    names = {None: "none", "s": "itself", "neutral": "neutral"}
    for control, name in names.items():
        run_train(replace(plain, name=name, control_store=control), workspace)
    none, itself, neutral = (dictlearn.load(workspace.run(name).folder).W_dec.detach() for name in names.values())
    assert (none == itself).all() and (none != neutral).any()


def test_a_control_store_of_another_hook_is_refused_by_its_name(workspace):
    with pytest.raises(UserError, match=f"control store 'tiny' has no hook '{OUT}'; it holds {IN}"):
        check([replace(CODEBOOK, hook=OUT, control_store="tiny")], workspace)
    assert not (workspace.root / "runs").exists()


@pytest.mark.parametrize(
    "dictionary",
    [ICFLConfig(d_sae=48, rounds=2, width=2, shrinkage=0), replace(WHITENED, shrinkage=0)],
    ids=["icfl", "topk"],
)
def test_too_few_control_rows_to_whiten_by_are_refused_unless_shrinkage_makes_up_for_it(workspace, dictionary):
    config = replace(SAE, dictionary=dictionary, control_store="tiny")
    with pytest.raises(UserError, match="The 16 control rows of 'tiny' cannot vary in all 16 directions"):
        check([config], workspace)
    check([replace(config, dictionary=replace(dictionary, shrinkage=0.01))], workspace)
    check([replace(config, control_store="neutral")], workspace)


def test_control_rows_need_not_vary_where_nothing_is_whitened(workspace):
    unwhitened = ICFLConfig(d_sae=48, rounds=2, width=2, whiten=False, shrinkage=0)
    check([replace(CODEBOOK, dictionary=unwhitened, control_store="tiny")], workspace)
