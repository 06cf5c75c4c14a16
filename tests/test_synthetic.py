"""Planted dictionaries: that rows are what their truth says, by (seed, purpose, number) alone, and in a store too.

Statistics are of several seeds together; each interval is so wide that a right program leaves it once in about 10,000
times, and the seeds are fixed.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest

from activation_store.errors import UserError
from activation_store.spec import Geometry
from activation_store.store import open_store
from dictlearn import synthetic
from dictlearn.synthetic import (
    CrossLayerFeatures,
    FeatureTree,
    SparseFeatures,
    input_hook,
    output_hook,
    write_store,
)

SPARSE = SparseFeatures(d=16, features=40, mean_l0=3.0)
TOPICS = replace(SPARSE, topics=4, nuisances=3)
TREE = FeatureTree(correlation=0.3)
LAYERS = CrossLayerFeatures(d=12, features=24, mean_l0=3.0)
KINDS = [SPARSE, TOPICS, TREE, LAYERS]
by_name = pytest.mark.parametrize("planted", KINDS, ids=["sparse", "topics", "tree", "layers"])

SEEDS = range(5)
ROWS = 4000
Z = 4.0
"""Standard errors: 6e-5 of a normal distribution lie outside."""


def draw_all(planted, rows=ROWS):
    """``rows`` rows of each of `SEEDS`."""
    return [replace(planted, seed=seed).draw(0, rows) for seed in SEEDS]


def digest(batch) -> str:
    content = b"".join(a.tobytes() for a in (*batch.activations.values(), batch.codes, *batch.labels.values()))
    return hashlib.sha256(content).hexdigest()


# --- the same batch again ---------------------------------------------------------------------------------------------


@by_name
def test_a_batch_is_the_same_whatever_was_drawn_before(planted):
    in_order = [digest(planted.draw(number, 50)) for number in range(4)]
    fresh = type(planted)(**asdict(planted))
    assert [digest(fresh.draw(number, 50)) for number in (3, 1, 2, 0)] == [in_order[i] for i in (3, 1, 2, 0)]


@by_name
def test_numbers_purposes_and_seeds_share_no_rows(planted):
    batches = [
        planted.draw(0, 50),
        planted.draw(1, 50),
        planted.draw(0, 50, "evaluate"),
        replace(planted, seed=1).draw(0, 50),
    ]
    for name in ("codes", "x"):
        rows = np.concatenate([getattr(batch, name) for batch in batches])
        rows = rows[(rows != 0).any(axis=1)]
        assert len(rows) > 100 and len(np.unique(rows, axis=0)) == len(rows)
    for one, other in itertools.combinations(batches, 2):
        assert ((one.codes != 0) != (other.codes != 0)).any()
        for name, labels in one.labels.items():
            assert (labels != other.labels[name]).any()


@by_name
def test_noise_changes_no_code(planted):
    quiet, loud = replace(planted, noise=0.0), replace(planted, noise=0.5)
    np.testing.assert_array_equal(quiet.draw(2, 30).codes, loud.draw(2, 30).codes)
    for hook, values in loud.draw(2, 3000).activations.items():
        noise = values - quiet.draw(2, 3000).activations[hook]
        assert noise.std() == pytest.approx(0.5, rel=Z / np.sqrt(2 * noise.size))
        assert abs(noise.mean()) < Z * 0.5 / np.sqrt(noise.size)


def test_inputs_and_outputs_of_layers_have_noise_of_their_own():
    quiet, loud = replace(LAYERS, noise=0.0).draw(0, 3000), replace(LAYERS, noise=0.5).draw(0, 3000)
    noise = [(loud.activations[hook] - quiet.activations[hook]).ravel() for hook in loud.activations]
    apart = np.corrcoef(noise) - np.eye(len(noise))
    assert np.abs(apart).max() < 5 / np.sqrt(len(noise[0]))


# --- rows are what the truth says -------------------------------------------------------------------------------------


@by_name
def test_directions_have_unit_length(planted):
    np.testing.assert_allclose(np.linalg.norm(planted.directions, axis=1), 1)


@pytest.mark.parametrize("planted", [SPARSE, TREE], ids=["sparse", "tree"])
def test_rows_are_codes_times_directions(planted):
    batch = replace(planted, noise=0.0).draw(0, 200)
    np.testing.assert_allclose(batch.x, batch.codes @ planted.directions, atol=1e-5)


@by_name
def test_each_feature_is_on_at_its_rate(planted):
    """Each rate within its interval, five seeds pooled; and the mean L0 within its own, per seed."""
    batches = draw_all(planted)
    on = np.concatenate([batch.codes != 0 for batch in batches])
    error = np.sqrt(planted.rates * (1 - planted.rates) / len(on))
    assert (np.abs(on.mean(axis=0) - planted.rates) < Z * error).all()
    for batch in batches:
        l0 = (batch.codes != 0).sum(axis=1)
        assert abs(l0.mean() - planted.expected_l0) < Z * l0.std() / np.sqrt(len(l0))


def test_rates_fall_as_a_power_law_to_the_mean_l0():
    for exponent, features, mean_l0 in [(1.0, 100, 4.0), (0.5, 64, 7.0), (0.0, 10, 10.0)]:
        planted = SparseFeatures(features=features, exponent=exponent, mean_l0=mean_l0)
        assert planted.expected_l0 == pytest.approx(mean_l0)
        slope = np.polyfit(np.log(np.arange(1, features + 1)), np.log(planted.rates), 1)[0]
        assert slope == pytest.approx(-exponent, abs=1e-9)


def test_features_without_topics_are_independent_and_magnitudes_as_asked():
    for asked_std in (0.25, 0.0):
        planted = replace(SPARSE, magnitude_mean=2.0, magnitude_std=asked_std)
        codes = np.concatenate([batch.codes for batch in draw_all(planted)])
        magnitudes = codes[codes != 0].astype(np.float64)
        assert magnitudes.min() > 0
        assert abs(magnitudes.mean() - 2) <= Z * asked_std / np.sqrt(len(magnitudes)) + 1e-12
        assert magnitudes.std() == pytest.approx(asked_std, rel=0.05)
    together = np.corrcoef((codes != 0).T)
    assert np.abs(together[~np.eye(len(together), dtype=bool)]).max() < 5.5 / np.sqrt(len(codes))


# --- topics and nuisances ---------------------------------------------------------------------------------------------


def test_features_of_a_topic_go_together_and_show_its_label():
    batches = draw_all(TOPICS)
    on = np.concatenate([batch.codes != 0 for batch in batches])
    topic = np.concatenate([batch.labels["topic"] for batch in batches])
    of = TOPICS.topic_of_feature
    assert set(of) == {-1, 0, 1, 2, 3} and (of[TOPICS.rates > 0.5] == -1).all()
    for name, expected in (("same", 1 + 0.8 * 3), ("other", 1 - 0.8)):
        for feature in np.flatnonzero(of >= 0):
            there = (topic == of[feature]) == (name == "same")
            rate = expected * TOPICS.rates[feature]
            assert abs(on[there, feature].mean() - rate) < Z * np.sqrt(rate * (1 - rate) / there.sum())
    together = np.corrcoef(on.T)
    common = np.flatnonzero((of >= 0) & (TOPICS.rates > 0.05))
    same = [together[i, j] for i in common for j in common if i < j and of[i] == of[j]]
    other = [together[i, j] for i in common for j in common if i < j and of[i] != of[j]]
    assert same and other and np.mean(same) > 0.05 > 0 > np.mean(other)


def test_conditions_shift_their_rows_within_a_few_directions():
    plain = replace(TOPICS, nuisances=0)
    shifted, batch = TOPICS.draw(0, 400), plain.draw(0, 400)
    np.testing.assert_array_equal(shifted.codes, batch.codes)
    np.testing.assert_allclose(
        shifted.x - batch.x, TOPICS.nuisance_offsets[shifted.labels["nuisance"]].astype(np.float32), atol=1e-5
    )
    many = replace(SPARSE, nuisances=500)
    lengths = np.linalg.svd(many.nuisance_offsets, compute_uv=False) / np.sqrt(500)
    assert (lengths > 1e-9).sum() == 4
    np.testing.assert_allclose(lengths[:4], 2.0, rtol=0.25)


def test_controls_lack_the_features_of_topics_and_nothing_else():
    controls = TOPICS.draw_controls(0, 5 * ROWS)
    on, of = controls.codes != 0, TOPICS.topic_of_feature
    assert not on[:, of >= 0].any() and (controls.labels["topic"] == -1).all()
    rates = TOPICS.rates[of < 0]
    assert (np.abs(on[:, of < 0].mean(axis=0) - rates) < Z * np.sqrt(rates * (1 - rates) / len(on))).all()
    assert set(controls.labels["nuisance"]) == {0, 1, 2}


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_is_that_of_the_paper():
    tree = FeatureTree()
    assert tree.expected_l0 == pytest.approx(1.36)
    assert tree.rates.tolist() == pytest.approx([0.2] * 3 + [0.05] * 8 + [0.04] * 9)
    assert tree.parents.tolist() == [-1] * 11 + [0, 0, 0, 1, 1, 1, 2, 2, 2]
    on = np.concatenate([batch.codes != 0 for batch in draw_all(tree)])
    assert (on[:, :11].sum(axis=1) == 1).all()
    assert (on[:, 11:].sum(axis=1) <= 1).all()
    for child, parent in enumerate(tree.parents):
        assert parent < 0 or not (on[:, child] & ~on[:, parent]).any()
    childless = 1 - on[:, 11:].any(axis=1)[on[:, :3].any(axis=1)].mean()
    assert abs(childless - 0.4) < Z * np.sqrt(0.24 / on[:, :3].sum())


def test_magnitudes_of_branches_and_children_are_gaussian_as_asked():
    from scipy.stats import kstest

    for tree in (FeatureTree(), FeatureTree(magnitude=(1.0, 0.25), child_magnitude=(0.5, 0.125))):
        codes = np.concatenate([batch.codes for batch in draw_all(tree)])
        for part, (mean, std) in ((codes[:, :11], tree.magnitude), (codes[:, 11:], tree.child_magnitude)):
            assert kstest((part[part != 0] - mean) / std, "norm").pvalue > 1e-4


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 0.9])
def test_siblings_have_the_correlation_asked_for_and_families_are_orthogonal(correlation):
    for seed in SEEDS:
        tree = FeatureTree(seed=seed, correlation=correlation)
        siblings = tree.parents[:, None] == tree.parents
        expected = np.where(np.eye(20, dtype=bool), 1.0, np.where(siblings, correlation, 0.0))
        np.testing.assert_allclose(tree.directions @ tree.directions.T, expected, atol=1e-12)


# --- across layers ----------------------------------------------------------------------------------------------------


def test_a_feature_is_read_at_one_layer_and_written_there_and_to_later_ones():
    """Every feature alone, found in the inputs and outputs by regressing them on the true codes."""
    planted = replace(LAYERS, noise=0.0, exponent=0.0)
    batch = planted.draw(0, 2000)
    for layer in range(4):
        read = np.linalg.lstsq(batch.codes, batch.activations[input_hook(layer)], rcond=None)[0]
        written = np.linalg.lstsq(batch.codes, batch.activations[output_hook(layer)], rcond=None)[0]
        for feature in range(planted.features):
            begins = feature % 4
            assert np.linalg.norm(read[feature]) == pytest.approx(float(layer == begins), abs=1e-4)
            assert np.linalg.norm(written[feature]) == pytest.approx(float(begins <= layer < begins + 3), abs=1e-4)
            if layer == begins:
                np.testing.assert_allclose(read[feature], planted.directions[feature], atol=1e-4)
            np.testing.assert_allclose(written[feature], planted.written_directions[feature, layer], atol=1e-4)
    assert planted.written.sum(axis=1).tolist() == [3, 3, 2, 1] * 6


def test_a_feature_that_stays_is_seen_by_later_layers_and_by_no_earlier_one():
    planted = replace(LAYERS, noise=0.0, exponent=0.0, stays=0.5)
    batch = planted.draw(0, 2000)
    strength = np.stack(
        [
            np.linalg.norm(np.linalg.lstsq(batch.codes, batch.activations[input_hook(layer)], rcond=None)[0], axis=1)
            for layer in range(4)
        ],
        axis=1,
    )
    after = np.arange(4) - planted.read_layer[:, None]
    np.testing.assert_allclose(strength, np.select([after == 0, after > 0], [1.0, 0.5], 0.0), atol=1e-4)


# --- in a store -------------------------------------------------------------------------------------------------------


@by_name
def test_a_store_holds_the_rows_of_the_batches(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(synthetic, "ROWS_PER_DRAW", 128)
    write_store(tmp_path / "s", planted, 700, Geometry(32, 256))
    store = open_store(tmp_path / "s")
    batches = [planted.draw(number, 128, "store") for number in range(6)]
    for hook, width in planted.widths.items():
        expected = np.concatenate([batch.activations[hook] for batch in batches])[:700]
        assert expected.shape == (700, width)
        np.testing.assert_array_equal(store.tensor(hook, 0, 700).numpy(), expected)
    codes = np.concatenate([batch.codes for batch in batches])[:700]
    tokens = store.token_ids(0, 700)
    assert ((tokens == 0) == (codes == 0).all(axis=1)).all()
    on = tokens > 0
    assert (codes[on, tokens[on] - 1] == codes[on].max(axis=1)).all()
    assert store.manifest.complete and store.manifest.provenance["planted"]["settings"]["seed"] == 0
    assert sum(stop - start for start, stop in store.split_rows("held-out")) == 0
    # Seven documents: the tenth would be held out.
    np.testing.assert_array_equal(store.documents(0, 700), np.arange(700) // 100)
    np.testing.assert_array_equal(store.positions(0, 700), np.arange(700) % 100)


def test_a_store_that_was_cut_short_continues_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ROWS_PER_DRAW", 96)
    write_store(tmp_path / "whole", TREE, 1100, Geometry(32, 256))
    drawn = []

    class Stops(Exception):
        pass

    def draw(self, number, rows, purpose="train", *, original=FeatureTree.draw):
        drawn.append(number)
        if len(drawn) == 7:
            raise Stops
        return original(self, number, rows, purpose)

    monkeypatch.setattr(FeatureTree, "draw", draw)
    with pytest.raises(Stops):
        write_store(tmp_path / "cut", TREE, 1100, Geometry(32, 256))
    assert open_store(tmp_path / "cut").rows == 512
    write_store(tmp_path / "cut", TREE, 1100, Geometry(32, 256))
    assert drawn == [*range(7), *range(5, 12)]
    whole, cut = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "cut")
    )
    assert whole and cut == whole
    splits = open_store(tmp_path / "whole").split_rows("held-out")
    assert list(splits) == [(900, 1000)]
    with pytest.raises(UserError, match="was made otherwise"):
        write_store(tmp_path / "cut", replace(TREE, seed=1), 1100, Geometry(32, 256))


def test_dictionaries_train_on_planted_stores(tmp_path):
    """An autoencoder, and a transcoder of one layer: through the store, the loader and the engine."""
    import dictlearn
    from dictlearn.dictionaries.configs import TopKConfig
    from dictlearn.metrics.recovery import matched_cosine
    from dictlearn.training.command import run_train
    from dictlearn.training.configs import TrainConfig
    from dictlearn.training.optimiser_config import OptimiserConfig
    from dictlearn.workspace import Workspace

    workspace = Workspace(tmp_path)
    for name, planted, hook, target in (
        ("sparse", SPARSE, synthetic.HOOK, None),
        ("layers", replace(LAYERS, mean_l0=2.0), input_hook(0), output_hook(0)),
    ):
        write_store(workspace.store(name), planted, 6000, Geometry(64, 1024))
        config = TrainConfig(
            name=name,
            store=name,
            hook=hook,
            target_hook=target,
            dictionary=TopKConfig(d_sae=40, k=3, dead_after_rows=5000),
            optimiser=OptimiserConfig(learning_rate=1e-2),
            batch_size=128,
            steps=150,
            buffer_rows=1024,
        )
        trained = dictlearn.load(run_train(config, workspace).folder)
        truth = planted.directions
        if isinstance(planted, CrossLayerFeatures):
            truth = planted.written_directions[planted.read_layer == 0, 0]
        score = matched_cosine(trained.W_dec.detach().numpy(), truth)
        assert score.value > score.floor + 5 * score.floor_std, name


def test_what_needs_a_language_model_refuses_without_asking_the_hub(tmp_path, monkeypatch):
    from activation_store.harvest import language_model

    monkeypatch.setattr(language_model, "_hub_file", lambda *asked: pytest.fail(f"the hub was asked for {asked}"))
    write_store(tmp_path / "s", TREE, 100)
    with pytest.raises(UserError, match="There is no model 'planted features'"):
        language_model.resolve_model(open_store(tmp_path / "s").provenance["model"]["name"])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (SparseFeatures, dict(mean_l0=20.0), "at most at 6.12, where the most common one is always on"),
        (SparseFeatures, dict(mean_l0=0.0), "A mean_l0 of 0 cannot be had from 256 features"),
        (SparseFeatures, dict(d=0), "d is 0; it must be at least 1."),
        (SparseFeatures, dict(noise=-1.0), "noise is -1.0; it must not be negative."),
        (SparseFeatures, dict(noise=float("nan")), "noise is nan; it must not be negative."),
        (SparseFeatures, dict(magnitude_mean=0.0), "magnitude_mean is 0.0; it must be positive."),
        (SparseFeatures, dict(topics=3, topic_strength=1.5), "topic_strength is 1.5; it must lie between 0 and 1."),
        (SparseFeatures, dict(d=3, nuisances=2), "no 4 orthogonal nuisance_directions in d = 3 coordinates"),
        (FeatureTree, dict(correlation=1.0), "The correlation of siblings is 1.0; it must lie from 0 to below 1."),
        (FeatureTree, dict(child_magnitude=(0.0, 0.1)), "child_magnitude is (0.0, 0.1); it needs a mean above 0"),
        (CrossLayerFeatures, dict(layers=2), "A feature cannot be written to 3 of 2 layers."),
        (CrossLayerFeatures, dict(mean_l0=9.0), "where the most common one is always on"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings, sentence):
    with pytest.raises(UserError) as caught:
        kind(**settings)
    assert sentence in str(caught.value)


def test_a_store_of_no_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="A store of 0 rows was asked for"):
        write_store(tmp_path / "s", TREE, 0)
