"""Training one run: what it leaves behind, what it reads, and what it refuses.

What is known about resuming is in test_resume.py, about one step in test_step.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import dictlearn
from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.store import open_store
from dictlearn import cli
from dictlearn.dictionaries.configs import ICFLConfig, KSparseConfig, SemiNMFConfig, TopKConfig
from dictlearn.dictionaries.files import load, save
from dictlearn.dictionaries.semi_nmf import SemiNMF
from dictlearn.dictionaries.topk import TopK
from dictlearn.training.command import check, never_dead, nobody_writes, run_train, train_group
from dictlearn.training.config_files import config_from_yaml, config_to_dict
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.together import Together
from tests.training.planted import CODEBOOK, IN, KINDS, OUT, SAE, TRANSCODER, make_store, metrics, weights


def test_a_run_too_short_for_a_latent_to_count_as_dead_says_so(workspace):
    said = []
    default = replace(SAE, dictionary=TopKConfig(d_sae=64, k=4))
    run_train(default, workspace, notify=said.append)
    *_, sentence, operations = said
    assert operations == "Training with the portable operations on cpu, in float32."
    assert "has 7,680 rows, and a latent counts as dead after 10,000,000" in sentence
    assert sentence.endswith("Set dead_after_rows to 768, say, a tenth of the run.")
    for config in (SAE, replace(CODEBOOK, steps=2), replace(default, dictionary=TopKConfig(d_sae=64, auxk_weight=0))):
        assert never_dead([config], 60) is None
    assert "2 runs have 7,680 rows, and a latent" in (never_dead([default, SAE, replace(default, seed=1)], 60) or "")


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.name)
def test_a_run_learns_and_leaves_config_metrics_and_dictionary(workspace, config):
    files = run_train(config, workspace)
    lines = metrics(workspace, config.name)
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert np.mean([line["fvu"] for line in lines[-3:]]) < 0.8 * lines[0]["fvu"]
    assert config_from_yaml(files.config) == config
    dictionary = dictlearn.load(files.folder)
    assert dictionary.provenance["hook_in"] == IN
    assert dictionary.provenance["hook_out"] == (config.target_hook or IN)
    assert dictionary.provenance["model"]["fingerprint"] == "sha256:model"
    assert not files.checkpoints.exists()


def test_a_run_may_follow_a_store_that_is_still_being_written(workspace, monkeypatch):
    """Whenever the rows come, the run is the same: the order is fixed by what the store will hold."""
    monkeypatch.setattr("activation_store.loader.POLL_SECONDS", 0.02)
    monkeypatch.setattr("activation_store.loader.CALIBRATION_ROWS", 500)
    monkeypatch.setattr("dictlearn.training.loop.INITIAL_ROWS", 500)
    after = replace(TRANSCODER, name="after", follow=True)
    run_train(after, workspace)
    growing = workspace.store("growing")
    seen: list[int] = []
    begun = threading.Event()
    wait_in_the_middle = lambda part: part == 6 and begun.wait(60)  # noqa: E731
    thread = threading.Thread(target=make_store, args=[growing], kwargs={"between": wait_in_the_middle})
    thread.start()
    while not (growing / "zarr.json").exists():
        time.sleep(0.01)
    take_step = Together.take_step

    def step(*arguments):
        seen.append(open_store(growing).rows)
        begun.set()
        return take_step(*arguments)

    monkeypatch.setattr(Together, "take_step", step)
    run_train(replace(after, name="during", store="growing"), workspace)
    thread.join()
    assert seen[0] < 3000 and seen[-1] == 3000
    assert metrics(workspace, "during") == metrics(workspace, "after")
    found, expected = weights(workspace, "during"), weights(workspace, "after")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_store_that_is_followed_and_that_nobody_writes_is_told_of(workspace):
    said, followed = [], replace(SAE, store="growing", follow=True)

    def look(part: int) -> None:
        if part == 6:
            said.append(nobody_writes(check([followed], workspace).loader))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_store(workspace.store("growing"), between=look)
    said.append(nobody_writes(check([followed], workspace).loader))
    assert said[0] is None and said[1] is not None
    assert re.match(r"The store 'growing' has 1,\d{3} of 3,000 rows, and no process is writing it now; start", said[1])
    assert nobody_writes(check([replace(followed, store="s")], workspace).loader) is None


def test_rows_far_from_the_others_can_be_left_out(workspace):
    plan = check([replace(SAE, row_filter=RowFilter(max_norm_ratio=1.0))], workspace).plan
    store = open_store(workspace.store("s"))
    median = store.statistics(IN).median_norm
    training = np.concatenate([np.arange(*rows) for rows in store.split_rows("train")])
    assert plan.rows == int((store.take_norms(IN, training) <= median).sum())
    assert 0 < plan.rows < len(training)
    with pytest.raises(UserError, match="passes the filter .left out of 2,700 rows: norms 2,700"):
        check([replace(SAE, row_filter=RowFilter(max_norm_ratio=1e-6))], workspace)


def test_a_run_that_verifies_its_reads_refuses_a_damaged_store(workspace):
    shard = next(path for path in workspace.store("s").rglob("c.1.0") if IN in str(path))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.1\.0 is damaged"):
        run_train(replace(SAE, verify_reads=True), workspace)


def test_a_buffer_too_small_to_mix_is_called_out_with_the_size_that_would_do(workspace):
    plan = check([replace(SAE, buffer_rows=128)], workspace).plan
    assert not plan.well_mixed and "use buffer_rows=" in plan.mixing


def test_a_finished_run_is_returned_and_another_config_under_its_name_refused(workspace):
    files = run_train(SAE, workspace)
    before = files.metrics.stat().st_mtime_ns
    run_train(SAE, workspace)
    assert files.metrics.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="'sae' exists with another configuration \\(seed: 0, now 1\\)"):
        run_train(replace(SAE, seed=1), workspace)


def test_a_run_begun_on_a_gpu_is_taken_up_elsewhere_only_in_the_precision_it_had(workspace):
    """The device is free and `precision: auto` follows it: half a run in bfloat16, half in float32 is no run."""
    files = run_train(SAE, workspace)
    text = files.config.read_text()
    files.config.write_text(text.replace("device: cpu", "device: cuda"))
    with pytest.raises(UserError, match=r"another configuration \(precision: 'bfloat16', now 'float32'\); "):
        run_train(SAE, workspace)
    run_train(replace(SAE, precision="bfloat16"), workspace)
    files.config.write_text(text)
    run_train(replace(SAE, precision="float32"), workspace)


def test_seeds_differ_and_the_same_seed_repeats(workspace):
    """A peer's runner has a seed that nothing reads."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_train(replace(SAE, name=name, seed=seed, steps=10), workspace)
    a, b, c = (weights(workspace, name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["W_dec"], c["W_dec"])


def test_training_reads_no_held_out_row(workspace, monkeypatch):
    from activation_store.loader import Loader

    seen = []
    read = Loader.read
    monkeypatch.setattr(Loader, "read", lambda self, rows: (seen.append(rows), read(self, rows))[1])
    run_train(replace(SAE, steps=21), workspace)
    assert not ((np.concatenate(seen) // 100) % 10 == 0).any()
    assert len(np.unique(np.concatenate(seen))) > 2000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"store": "t"}, "There is no store 't' in .*did you mean s"),
        ({"hook": "blocks.1.mlp.hook_in"}, "has no hook 'blocks.1.mlp.hook_in'; it holds blocks.0.mlp.hook_in"),
        ({"target_hook": IN}, "the same as hook"),
        ({"dictionary": TopKConfig(d_sae=8, k=9)}, "k is 9, more than the 8 latents"),
        (
            {"dictionary": TopKConfig(d_sae=2701, k=4)},
            "'sae' has 2701 latents \\(d_sae\\) and .* 2700 rows to train on",
        ),
        ({"batch_size": 10_000}, "2,700 rows in split 'train': not enough for one batch of 10,000"),
        ({"steps": 0}, "steps is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"name": "a b"}, "'a b' is no name"),
        ({"optimiser": OptimiserConfig(gradient_clip=math.nan)}, "'sae': optimiser.gradient_clip is nan; it must be a"),
        ({"dictionary": KSparseConfig(d_sae=8, k=2, alpha=math.inf)}, "'sae': dictionary.alpha is inf; it must be a"),
        ({"target_hook": OUT, "dictionary": ICFLConfig(rounds=2, width=2)}, "kind 'icfl' rebuilds its own input"),
        ({"target_hook": OUT, "dictionary": KSparseConfig(d_sae=8, k=2)}, "kind 'ksparse' rebuilds its own input"),
        ({"dictionary": SemiNMFConfig(d_sae=8, features="non_negative")}, "Non-negative features rebuild no negative"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(workspace, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run_train(replace(SAE, **changes), workspace)
    assert not (workspace.root / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(device="tpu3"), "There is no device 'tpu3'; use cpu, cuda"),
        (dict(ops="triton"), "ops is triton, whose kernels run on a GPU, and the device is 'cpu'; set device to cuda"),
    ],
)
def test_devices_and_operations_that_are_not_there_are_refused_before_a_folder_is_made(
    workspace, monkeypatch, changes, sentence
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=sentence):
        run_train(replace(SAE, **changes), workspace)
    assert not workspace.run("sae").folder.exists()


def test_without_triton_its_operations_are_refused(workspace, monkeypatch):
    monkeypatch.setattr("dictlearn.training.command.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package triton is not installed"):
        run_train(replace(SAE, ops="triton"), workspace)


def test_a_control_store_of_another_model_is_refused(workspace):
    make_store(workspace.store("other"), rows=1000, fingerprint="sha256:other")
    with pytest.raises(UserError, match="control store 'other' was not made by the model of 's'"):
        check([replace(CODEBOOK, control_store="other")], workspace)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: [", "is not YAML"),
        ("", "holds no configuration"),
        ("name: a\nstore: s\nhook: h\nlearning_rate: 1", "unknown key learning_rate"),
        (
            "name: a\nstore: s\nhook: h\ndictionary: {kind: topk, dsae: 4}",
            "dictionary.dsae; did you mean dictionary.d_sae",
        ),
        (
            "name: a\nstore: s\nhook: h\ndictionary: {kind: tokp}",
            "no dictionary of kind 'tokp'; the kinds are abstopk, batchtopk, ",
        ),
        ("name: a\nstore: s\nhook: h\nsteps: many", "steps: .*integer.*'many'"),
        ("store: s\nhook: h", "name: Field required"),
        ("name: a\nstore: s\nhook: h\nname: b", "has the key name twice, in lines 1 and 4; leave one of them out"),
        ("name: a\nstore: s\nhook: h\ndictionary:\n  k: 2\n  d_sae: 4\n  k: 3", "the key k twice, in lines 5 and 7"),
        ("list: [{seed: 1}, {seed: 2, seed: 3}]", "the key seed twice, in lines 1 and 1"),
        ("name: &a [*a]", "name: Input should be a valid string"),
        (
            "name: a\nstore: s\nhook: h\nrow_filter: {max_norm: 10}",
            "row_filter.max_norm; did you mean row_filter.max_n",
        ),
        ("name: a\nstore: s\nhook: h\noptimiser: adam", "optimiser is 'adam'; it should be keys and values such as"),
        ("name: a\nstore: s\nhook: h\nsteps: yes", "steps is true; it should be a number or a name"),
        ("name: a\nstore: s\nhook: h\ndictionary: {k: on}", "dictionary.k is true; it should be a number or a name"),
        ("name: a\nstore: s\nhook: h\nrow_filter: 3", "row_filter is 3; it should be keys and values such as"),
        ("name: a\nstore: s\nhook: h\ndictionary: {kind: [topk]}", "dictionary.kind is .'topk'.; it should be"),
        (
            "name: a\nstore: s\nhook: h\noptimiser: {learning_rate: .nan}",
            "optimiser.learning_rate is nan; it must be a",
        ),
        ("name: a\nstore: s\nhook: h\ndictionary: {auxk_weight: .inf}", "dictionary.auxk_weight is inf; it must be"),
    ],
)
def test_a_wrong_configuration_file_is_refused_by_the_key_that_is_wrong(tmp_path, text, sentence):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        config_from_yaml(path)


def test_what_is_no_text_is_refused_as_a_configuration(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        config_from_yaml(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        config_from_yaml(tmp_path / "config.yaml")


def test_a_kind_that_begins_with_many_rows_is_given_them_and_its_neighbours_what_they_get_alone(workspace, monkeypatch):
    monkeypatch.setattr("dictlearn.training.loop.INITIAL_ROWS", 300)
    given = {}

    def look(kind):
        initialise = kind.initialise

        def looking(self, x, *arguments):
            given.setdefault(kind.kind, []).append(x)
            return initialise(self, x, *arguments)

        monkeypatch.setattr(kind, "initialise", looking)

    look(TopK)
    look(SemiNMF)
    many = replace(SAE, name="snmf", steps=1, dictionary=SemiNMFConfig(d_sae=16, rows=1000, iterations=2, sweeps=2))
    one = replace(SAE, steps=1)
    train_group([one, many], workspace, workspace.sweep("both").checkpoints, "both")
    run_train(replace(one, name="alone"), workspace)
    assert len(given["snmf"][0]) == 1024
    assert torch.equal(*given["topk"]) and len(given["topk"][0]) == 384


def test_results_are_json_and_nothing_else_when_asked_for(workspace, tmp_path, capsys):
    path = tmp_path / "sae.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(replace(SAE, steps=5))))
    end = ["--json", "--workspace", str(workspace.root)]
    cli.main(["train", str(path), *end])
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["run"] == "sae" and run["step"] == 5 and run["dictionary"] == str(workspace.run("sae").dictionary)
    cli.main(["evaluate", "sae", "--tokens", "0", *end])
    assert json.loads(capsys.readouterr().out)["reconstruction"]["rows"] == 300


def test_a_dictionary_is_never_beside_the_description_of_another(workspace, tmp_path, monkeypatch):
    """Killed between the two files it has none, and not that of before."""
    run_train(replace(SAE, steps=1), workspace)
    dictionary = load(workspace.run("sae").dictionary)
    save(dictionary, tmp_path / "d")
    rename = os.replace

    def killed(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("dictlearn.dictionaries.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(dictionary, tmp_path / "d")
    with pytest.raises(UserError, match="There is no dictionary in"):
        load(tmp_path / "d")


def test_a_dry_run_refuses_what_training_would(workspace, capsys):
    run_train(replace(SAE, steps=1), workspace)
    (workspace.root / "runs" / "file").touch()
    with pytest.raises(UserError, match=r"exists with another configuration \(dictionary.k: 4, now 5, and 1 more\)"):
        check([replace(SAE, dictionary=replace(SAE.dictionary, k=5), steps=2)], workspace)
    with pytest.raises(UserError, match="is a file, where the run's folder would be; choose another name"):
        check([replace(SAE, name="file")], workspace)
    with pytest.raises(UserError, match="There is no device 'tpu3'"):
        check([replace(SAE, name="new", device="tpu3")], workspace)


def test_a_kind_beside_a_file_of_another_kind_is_refused(workspace, tmp_path, capsys):
    path = tmp_path / "sae.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(SAE)))
    with pytest.raises(SystemExit):
        cli.main(["train", str(path), "--kind", "icfl", "--workspace", str(workspace.root)])
    assert "The file configures a dictionary of kind 'topk', and --kind asks for 'icfl'" in capsys.readouterr().err
