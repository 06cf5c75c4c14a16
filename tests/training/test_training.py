"""Training: what a run leaves behind, that it resumes bit for bit after a kill, and what it refuses.

The store is small and synthetic: sparse combinations of known directions, so that learning shows.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dictlearn
from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.writer import StoreWriter
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.training.command import OptimiserConfig, TrainConfig, check, config_from_yaml, config_to_dict, run_train
from dictlearn.workspace import Workspace

IN, OUT = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"


def make_store(path: Path, rows: int = 3000, fingerprint: str = "sha256:model", between=lambda part: None) -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40, 16))
    x = ((rng.random((rows, 40)) < 0.1) * rng.exponential(size=(rows, 40))) @ directions + 3
    y = np.tanh(x @ rng.normal(size=(16, 12)) / 4)
    documents = [
        DocumentRows(f"doc{i}", "held-out" if i % 10 == 0 else "train", i * 100, 100) for i in range(rows // 100)
    ]
    plan = StorePlan(rows, documents, {"BOS": 30}, {"seed": 0, "context": 16, "bos_token_id": 0})
    hooks = [HookSpec(IN, (16,), "float32"), HookSpec(OUT, (12,), "float32")]
    provenance = {"model": {"name": "planted", "fingerprint": fingerprint}, "corpus": {"name": "none"}}
    with StoreWriter(path, plan, hooks, Geometry(64, 512), provenance) as writer:
        for number, part in enumerate(np.array_split(np.arange(rows), 10)):
            between(number)
            values = {IN: x[part].astype(np.float32), OUT: y[part].astype(np.float32)}
            writer.append(values, part % 50, part % 100, part // 100)
        writer.finish()


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "stores").mkdir(parents=True)
    make_store(workspace.store("s"))
    return workspace


SAE = TrainConfig(
    name="sae",
    store="s",
    hook=IN,
    dictionary=TopKConfig(d_sae=64, k=4, dead_after_rows=3000),
    optimiser=OptimiserConfig(learning_rate=3e-3),
    batch_size=128,
    steps=60,
    buffer_rows=1024,
    log_every=5,
    checkpoint_every=7,
)
TRANSCODER = replace(SAE, name="transcoder", target_hook=OUT)
CODEBOOK = replace(SAE, name="icfl", dictionary=ICFLConfig(d_sae=48, rounds=2, width=2, reset_every=10))


def weights(workspace: Workspace, name: str) -> dict[str, torch.Tensor]:
    return dictlearn.load(workspace.run(name).folder).state_dict()


def metrics(workspace: Workspace, name: str) -> list[dict]:
    """The lines without the wall clock, which no resume can repeat."""
    lines = [json.loads(line) for line in workspace.run(name).metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("wall_")} for line in lines]


@pytest.mark.parametrize("config", [SAE, TRANSCODER, CODEBOOK], ids=lambda c: c.name)
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
    assert not files.checkpoint.exists()


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
    loop = importlib.import_module("dictlearn.training.loop")
    set_rate = loop.set_learning_rate

    def step(*arguments):
        seen.append(open_store(growing).rows)
        begun.set()
        return set_rate(*arguments)

    monkeypatch.setattr(loop, "set_learning_rate", step)
    run_train(replace(after, name="during", store="growing"), workspace)
    thread.join()
    assert seen[0] < 3000 and seen[-1] == 3000
    assert metrics(workspace, "during") == metrics(workspace, "after")
    found, expected = weights(workspace, "during"), weights(workspace, "after")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_far_from_the_others_can_be_left_out(workspace):
    _, _, plan = check(replace(SAE, row_filter=RowFilter(max_norm_ratio=1.0)), workspace)
    store = open_store(workspace.store("s"))
    median = store.statistics(IN).median_norm
    training = np.concatenate([np.arange(*rows) for rows in store.split_rows("train")])
    assert plan.rows == int((store.take_norms(IN, training) <= median).sum())
    assert 0 < plan.rows < len(training)
    with pytest.raises(UserError, match="passes the filter .left out of 2,700 rows: norms 2,700"):
        check(replace(SAE, row_filter=RowFilter(max_norm_ratio=1e-6)), workspace)


def test_a_run_that_verifies_its_reads_refuses_a_damaged_store(workspace):
    shard = next(path for path in workspace.store("s").rglob("c.1.0") if IN in str(path))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.1\.0 is damaged"):
        run_train(replace(SAE, verify_reads=True), workspace)


def test_a_buffer_too_small_to_mix_is_called_out_with_the_size_that_would_do(workspace):
    plan = check(replace(SAE, buffer_rows=128), workspace)[2]
    assert not plan.well_mixed and "use buffer_rows=" in plan.mixing


@pytest.mark.parametrize("config", [SAE, TRANSCODER, CODEBOOK], ids=lambda c: c.name)
def test_killed_at_any_step_and_rerun_equals_never_killed(workspace, config, monkeypatch):
    """In-process kills at every fifth step: the state is thrown away as a kill throws it away."""
    run_train(replace(config, name="whole"), workspace)
    whole, whole_metrics = weights(workspace, "whole"), metrics(workspace, "whole")
    from dictlearn.training import loop

    class Killed(BaseException):
        pass

    set_rate = loop.set_learning_rate
    for step in (3, 7, 20, 41, 59):
        name = f"killed-{step}"

        def die(optimiser, config, at, steps, step=step):
            if at == step:
                raise Killed
            set_rate(optimiser, config, at, steps)

        monkeypatch.setattr(loop, "set_learning_rate", die)
        with pytest.raises(Killed):
            run_train(replace(config, name=name), workspace)
        monkeypatch.setattr(loop, "set_learning_rate", set_rate)
        run_train(replace(config, name=name), workspace)
        for key, tensor in weights(workspace, name).items():
            assert torch.equal(tensor, whole[key]), f"killed at {step}: {key}"
        assert metrics(workspace, name) == whole_metrics


def test_a_real_process_killed_with_sigkill_resumes_bit_for_bit(workspace, tmp_path):
    slow = replace(SAE, name="slow", steps=400, checkpoint_every=20)
    run_train(replace(slow, name="whole"), workspace)
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(slow)))
    command = [sys.executable, "-m", "dictlearn.cli", "train", str(path), "--workspace", str(workspace.root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        files = workspace.run("slow")
        seen = files.checkpoint.stat().st_mtime_ns if files.checkpoint.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and killed < 2:
            if files.checkpoint.exists() and files.checkpoint.stat().st_mtime_ns > seen:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
        process.wait(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
    assert killed == 2
    for key, tensor in weights(workspace, "slow").items():
        assert torch.equal(tensor, weights(workspace, "whole")[key]), key
    assert metrics(workspace, "slow") == metrics(workspace, "whole")


def test_a_finished_run_is_returned_and_another_config_under_its_name_refused(workspace):
    files = run_train(SAE, workspace)
    before = files.metrics.stat().st_mtime_ns
    run_train(SAE, workspace)
    assert files.metrics.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="'sae' exists with another configuration \\(seed: 0, now 1\\)"):
        run_train(replace(SAE, seed=1), workspace)


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


def test_a_nan_stops_the_run_by_name_and_keeps_the_last_checkpoint(workspace, monkeypatch):
    from dictlearn.dictionaries.topk import TopK

    loss = TopK.loss
    calls = []

    def poisoned(self, x, target=None):
        calls.append(1)
        return loss(self, x * float("nan") if len(calls) == 10 else x, target)

    monkeypatch.setattr(TopK, "loss", poisoned)
    with pytest.raises(UserError, match="loss of run 'sae' is not finite at step 9 \\(mse nan\\)"):
        run_train(SAE, workspace)
    saved = torch.load(workspace.run("sae").checkpoint, weights_only=True)
    assert saved["step"] == 7 and all(torch.isfinite(saved["dictionary"][name]).all() for name in ("W_enc", "W_dec"))


def test_a_damaged_checkpoint_is_refused_by_name(workspace):
    files = workspace.run("sae")
    files.folder.mkdir(parents=True)
    files.checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint.pt' cannot be read"):
        run_train(SAE, workspace)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"store": "t"}, "There is no store 't' in .*did you mean s"),
        ({"hook": "blocks.1.mlp.hook_in"}, "has no hook 'blocks.1.mlp.hook_in'; it holds blocks.0.mlp.hook_in"),
        ({"target_hook": IN}, "the same as hook"),
        ({"dictionary": TopKConfig(d_sae=8, k=9)}, "k is 9, more than the 8 latents"),
        ({"batch_size": 10_000}, "2,700 rows in split 'train': not enough for one batch of 10,000"),
        ({"steps": 0}, "steps is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"name": "a b"}, "'a b' is no name"),
        ({"target_hook": OUT, "dictionary": ICFLConfig(rounds=2, width=2)}, "ICFL rebuilds its own input"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(workspace, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run_train(replace(SAE, **changes), workspace)
    assert not (workspace.root / "runs").exists()


def test_a_control_store_of_another_model_is_refused(workspace):
    make_store(workspace.store("other"), rows=1000, fingerprint="sha256:other")
    with pytest.raises(UserError, match="control store 'other' was not made by the model of 's'"):
        check(replace(CODEBOOK, control_store="other"), workspace)


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
            "no dictionary of kind 'tokp'; the kinds are icfl, topk",
        ),
        ("name: a\nstore: s\nhook: h\nsteps: many", "steps: .*integer.*'many'"),
        ("store: s\nhook: h", "name: Field required"),
    ],
)
def test_a_wrong_configuration_file_is_refused_by_the_key_that_is_wrong(tmp_path, text, sentence):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        config_from_yaml(path)
