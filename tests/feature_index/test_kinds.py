"""The index of every kind of dictionary, of several hooks too, holds what a dense float64 encoding gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dictlearn
from activation_store.errors import UserError
from activation_store.store import Store
from dictlearn import reports
from dictlearn.dictionaries import CONFIGS, config_class
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.decoder import reaching_the_end, why_no_logits
from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.feature_index.read import feature_page
from dictlearn.feature_index.spec import LISTED
from dictlearn.training.command import run_train
from dictlearn.training.configs import TrainConfig
from dictlearn.workspace import Workspace

from .conftest import HOOK, D, make_model, make_store
from .test_decoder import save_real_model

DOCUMENTS = [60, 45, 80, 1, 0, 64]
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
IN = tuple(f"blocks.{layer}.mlp.hook_in" for layer in range(2))
OUT = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(2))

SIGNED = {"abstopk", "ksparse", "icfl"}
SETTINGS = {
    "topk": dict(k=4),
    "batchtopk": dict(k=4),
    "matryoshka": dict(k=4),
    "abstopk": dict(k=4),
    "vsae": dict(k=4, sigma=0.3),
    "skip": dict(k=4),
    "ksparse": dict(k=6, alpha=1.5),
    "mp": dict(k=4),
    "icfl": dict(rounds=3, width=2),
    "snmf": dict(winners=0.3, iterations=5, tolerance=1e-5, sweeps=20),
    "clt": dict(k=3),
}


def trained(workspace: Workspace, kind: str, hook, target=None, aligned=()) -> torch.nn.Module:
    """A run of thirty steps, so that thresholds are what training makes of them."""
    config = config_class(kind)(d_sae=24, **SETTINGS.get(kind, {}))
    run_train(
        TrainConfig(
            name="run",
            store="store",
            hook=hook,
            target_hook=target,
            dictionary=config,
            aligned_stores=tuple(aligned),
            steps=30,
            batch_size=32,
            buffer_rows=256,
        ),
        workspace,
    )
    return dictlearn.load(workspace.run("run").folder)


def indexed(workspace: Workspace, **asked) -> FeatureIndex:
    return open_index(run_index(IndexConfig("run", **{"logits": False, **asked}), workspace))


SMALL = {"snmf": 1e-4}
"""Up to here an activation may be there or not: coordinate descent ends by comparing changes with a tolerance, and in
float32 a pass sooner or later than in float64. Over six seeds activations were at most 2.3e-5 off, the least 4.7e-5."""


def assert_holds(index: FeatureIndex, dictionary, store: Store, hooks) -> np.ndarray:
    """Returns the activations that the index lists, (rows, d_sae); a dense encoding in float64 has the same."""
    small = SMALL.get(dictionary.kind, 0.0)
    x = torch.cat([store.tensor(hook, 0, store.rows).double() for hook in hooks], dim=1)
    with torch.no_grad():
        dense = dictionary.double().encode(x).dense().numpy()
    table = index.table()
    np.testing.assert_allclose(index.array("latents/total"), dense.sum(axis=0), rtol=1e-5, atol=1e-4 + 10 * small)
    listed = np.zeros_like(dense)
    for latent in range(index.d_sae):
        rows, values = index.activations(latent)
        assert (np.diff(rows.astype(np.int64)) > 0).all() and values.all()
        listed[rows, latent] = values
    np.testing.assert_allclose(listed, dense, rtol=1e-4, atol=max(1e-5, small))
    sure = np.maximum(np.abs(dense), np.abs(listed)) > small
    np.testing.assert_array_equal(listed[sure] != 0, dense[sure] != 0)
    np.testing.assert_array_equal(table.count, (listed != 0).sum(axis=0))
    assert (listed != 0).sum() == index.array("activations/offsets")[-1] > store.rows / 2
    return listed


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("skip", "crosscoder", "clt")])
def test_every_activation_of_every_kind_is_kept(kind, tmp_path) -> None:
    """Signed codes keep their sign, and are shown from both ends; those of all other kinds are positive."""
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", DOCUMENTS)
    dictionary = trained(workspace, kind, HOOK)
    index = indexed(workspace)
    dense = assert_holds(index, dictionary, store, [HOOK])
    assert (dense < 0).any() == (kind in SIGNED) == (index.manifest.histogram_edges[0] < 0)
    shown = [[band.kind for band in feature_page(index, latent).bands] for latent in range(index.d_sae)]
    assert [("bottom" in kinds) for kinds in shown] == (dense < 0).any(axis=0).tolist()
    assert [("top" in kinds) for kinds in shown] == (dense > 0).any(axis=0).tolist()
    assert feature_page(index, 0).writes_to == feature_page(index, 0).neurons == () and set(
        index.table().writes_to
    ) == {""}
    assert np.isnan(index.table().writes_to_share).all()


def test_a_transcoder_that_skips_is_indexed_by_its_latents_alone(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", DOCUMENTS, hook=(IN[0], OUT[0]))
    dictionary = trained(workspace, "skip", IN[0], OUT[0])
    assert_holds(indexed(workspace), dictionary, store, [IN[0]])


# --- several hooks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crosscoder", "batchtopk"])
def test_a_crosscoder_is_indexed_and_says_which_hooks_a_latent_writes_to(kind, tmp_path, capsys) -> None:
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", DOCUMENTS, hook=(EARLY, LATE))
    dictionary = trained(workspace, kind, (EARLY, LATE))
    index = indexed(workspace)
    rows = dictionary.W_dec.double().numpy() / np.repeat(dictionary.spread_of_parts.double().numpy(), D)
    norms = np.stack([np.linalg.norm(rows[:, :D], axis=1), np.linalg.norm(rows[:, D:], axis=1)], axis=1)
    assert_holds(index, dictionary, store, [EARLY, LATE])
    share = norms / norms.sum(axis=1, keepdims=True)
    assert np.ptp(share[:, 0]) > 0.05
    for latent in range(index.d_sae):
        found = feature_page(index, latent).writes_to
        assert [one.hook for one in found] == [EARLY, LATE]
        np.testing.assert_allclose([one.norm for one in found], norms[latent], rtol=1e-5)
        np.testing.assert_allclose([one.share for one in found], share[latent], rtol=1e-5)
    reports.feature(feature_page(index, 7))
    assert f"writes to: {EARLY} {share[7, 0]:.0%}, {LATE} {share[7, 1]:.0%}\n" in capsys.readouterr().out
    table = index.table()
    assert table.writes_to.tolist() == [[EARLY, LATE][which] for which in share.argmax(axis=1)]
    np.testing.assert_allclose(table.writes_to_share, share.max(axis=1), rtol=1e-5)
    assert index.provenance["hook_in"] == index.provenance["hook_out"] == [EARLY, LATE]
    cosines = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = cosines @ cosines.T
    np.fill_diagonal(cosines, -2)
    for latent in range(index.d_sae):
        expected = np.sort(cosines[latent])[::-1][:LISTED]
        np.testing.assert_allclose(index.array("neighbours/cosines")[latent], expected, atol=1e-5)


def test_hooks_of_several_models_are_encoded_side_by_side_and_have_no_logits(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    store = make_store(workspace, "store", DOCUMENTS)
    tuned_model = make_model(workspace.root / "tuned-model")
    (tuned_model / "model.safetensors").write_bytes(b"weights that were trained further")
    tuned = make_store(workspace, "tuned", DOCUMENTS, model=tuned_model, before=0.1)
    assert (store.tensor(HOOK, 0, 99) != tuned.tensor(HOOK, 0, 99)).any()
    hooks = (HOOK, f"tuned:{HOOK}")
    dictionary = trained(workspace, "crosscoder", hooks, aligned=["tuned"])
    index = indexed(workspace, logits=True)
    assert_holds(index, dictionary, workspace.open_store("store", ["tuned"]), hooks)
    page = feature_page(index, 3)
    assert [one.hook for one in page.writes_to] == list(hooks) and page.top_logits == ()
    assert page.logits_are.startswith("Not defined: the dictionary writes to the hooks of several models")
    assert not index.manifest.has_logits
    assert index.provenance["aligned_stores"] == ["tuned"]
    with pytest.raises(UserError, match="'run' is of several aligned stores; leave --store out"):
        run_index(IndexConfig("run", store="store", name="other"), workspace)
    workspace.store("tuned").rename(tmp_path / "put aside")
    make_store(workspace, "tuned", DOCUMENTS, model=tuned_model, per_shard=32)
    with pytest.raises(UserError, match="The index 'run' exists and was made with another aligned store"):
        run_index(IndexConfig("run"), workspace)
    (tuned_model / "model.safetensors").write_bytes(b"weights that were trained even further")
    workspace.store("tuned").rename(tmp_path / "put aside too")
    make_store(workspace, "tuned", DOCUMENTS, model=tuned_model)
    with pytest.raises(UserError, match="The store 'tuned' was made by the model"):
        run_index(IndexConfig("run"), workspace)


def test_a_cross_layer_transcoder_writes_to_all_layers_and_its_logits_are_their_sum(tmp_path) -> None:
    workspace = Workspace(tmp_path)
    model = save_real_model(workspace.root / "model", "gpt2")
    store = make_store(workspace, "store", DOCUMENTS, hook=IN + OUT, model=model)
    dictionary = trained(workspace, "clt", IN, OUT)
    index = indexed(workspace, logits=True)
    W_dec = dictionary.W_dec.detach().clone()
    assert_holds(index, dictionary, store, IN)
    page = feature_page(index, 20)  # of the last layer, which writes to no earlier one
    assert [one.share for one in page.writes_to] == [0, 1]
    assert f"decoder row at {OUT[0]} + {OUT[1]}, LayerNorm" in page.logits_are

    from activation_store.harvest.language_model import load_language_model, resolve_model

    language_model = load_language_model(resolve_model(str(model)))
    written = (W_dec[:, :D] + W_dec[:, D:]).float()
    centred = (written - written.mean(dim=1, keepdim=True)) * language_model.ln_final.weight.detach().float()
    effects = (centred @ language_model.W_U.detach().float())[:, :257]
    effects = effects - effects.mean(dim=1, keepdim=True)
    top = effects.topk(LISTED, dim=1).values.numpy()
    np.testing.assert_allclose(index.array("logits/top_values"), top, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("hooks", "reaching"),
    [
        (OUT, [0, 1]),
        ((EARLY, LATE), [1]),
        ((LATE, EARLY), [0]),
        ((OUT[0], "blocks.0.hook_resid_post", OUT[1]), [1, 2]),
        (("blocks.1.hook_resid_mid", OUT[1], "blocks.1.hook_attn_out"), [0, 1]),
        (("hook_embed", "blocks.0.attn.hook_out"), [0, 1]),
        (("blocks.10.hook_mlp_out", "blocks.9.hook_out"), [0, 1]),
    ],
)
def test_rows_that_the_stream_holds_already_are_not_counted_twice(hooks, reaching) -> None:
    assert reaching_the_end(hooks) == reaching and why_no_logits(hooks, (), "llama") is None


def test_a_hook_beside_the_stream_leaves_no_logits() -> None:
    assert why_no_logits((OUT[0], IN[1]), (), "llama") == f"{IN[1]} does not write into the residual stream"
