"""Training by several processes, started by torchrun as a user starts them: the same run as by one process.

Losses are compared to float tolerance: what is summed in another order differs in the last bits, and a selection near
the threshold may flip.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import dictlearn
from activation_store.errors import UserError
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.training.checkpoint import Checkpoints
from dictlearn.training.command import run_train, train_group
from dictlearn.training.config_files import config_to_dict
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.parallel import refuse_what_cannot_be_shared
from dictlearn.workspace import Workspace
from tests.command_with_threads import no_group_is_left
from tests.training.planted import CODEBOOK, IN, metrics
from tests.training.test_all_kinds import runs as all_kinds
from tests.training.test_several_hooks import ACROSS_LAYERS, ACROSS_MODELS

LONG = TrainConfig(
    name="long",
    store="s",
    hook=IN,
    dictionary=TopKConfig(d_sae=65, k=4, dead_after_rows=1500),
    optimiser=OptimiserConfig(learning_rate=3e-3, averaging=0.9),
    batch_size=128,
    steps=120,
    buffer_rows=1024,
    log_every=5,
    checkpoint_every=20,
)


DYING = """
import os, signal
from dictlearn.training import loop
from tests import command_with_threads

loop.save = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
command_with_threads.main()
"""


def torchrun(
    workspace: Workspace,
    folder: Path,
    config: TrainConfig | dict,
    size: int,
    module: str = "tests.command_with_threads",
) -> subprocess.Popen:
    """A run, or a sweep as its file has it; ``module`` may lie in the folder."""
    record = config_to_dict(config) if isinstance(config, TrainConfig) else config
    path = folder / f"{record['name']}-{size}.yaml"
    path.write_text(yaml.safe_dump(record))
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone", "-m"]
    line += [module, "train", str(path), "--workspace", str(workspace.root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output


def assert_close_runs(workspace: Workspace, one: str, other: str) -> None:
    mine, theirs = metrics(workspace, one), metrics(workspace, other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-3), (a["step"], key)
    found, expected = (dictlearn.load(workspace.run(name).folder) for name in (one, other))
    assert found.W_dec.shape == expected.W_dec.shape
    assert torch.cosine_similarity(found.W_dec, expected.W_dec).median() > 0.999
    x = 3 * torch.randn(64, found.d_in, generator=torch.Generator().manual_seed(0)) + 1
    mine, theirs = found(x), expected(x)
    assert torch.linalg.vector_norm(mine - theirs) < 0.05 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize(
    ("size", "latent_parts"),
    [
        pytest.param(2, 1, marks=pytest.mark.heavy),
        (2, 2),
        pytest.param(4, 2, marks=pytest.mark.heavy),
        pytest.param(4, 4, marks=pytest.mark.heavy),
    ],
)
def test_several_processes_train_the_run_of_one(workspace, tmp_path, size, latent_parts):
    run_train(replace(LONG, name="alone"), workspace)
    output = finished(torchrun(workspace, tmp_path, replace(LONG, latent_parts=latent_parts), size))
    assert_close_runs(workspace, "long", "alone")
    assert output.count("training long: 15,360 tokens") == 1, "one process speaks for all"
    assert no_group_is_left(output, size)
    assert not workspace.run("long").checkpoints.exists()


@pytest.mark.heavy
@pytest.mark.parametrize("latent_parts", [1, 2])
def test_two_processes_train_every_kind_as_one_does(workspace, tmp_path, latent_parts):
    """Those whose latents can be spread, by parts of the latents too. A few steps: later the last bits have grown."""
    alone = [replace(run, steps=12, log_every=3, latent_parts=latent_parts) for run in all_kinds("kinds")]
    if latent_parts > 1:
        alone = [run for run in alone if dictionary_class(run.dictionary.kind).latent_tensors]
        assert {run.dictionary.kind for run in alone} >= {"topk", "abstopk", "ksparse"}
    shared = {key: config_to_dict(alone[0])[key] for key in (*TrainConfig.SHARED, "optimiser", "hook")}
    entries = [
        {"name": run.dictionary.kind, "dictionary": record["dictionary"]}
        | {key: record[key] for key in ("hook", "target_hook")}
        for run in alone
        for record in [config_to_dict(run)]
    ]
    finished(torchrun(workspace, tmp_path, {"name": "both", **shared, "list": entries}, 2))
    train_group(
        [replace(run, latent_parts=1, order_seed=0) for run in alone], workspace, workspace.sweep("a").checkpoints
    )
    for run in alone:
        assert_close_runs(workspace, f"both-{run.dictionary.kind}", run.name)


@pytest.mark.heavy
@pytest.mark.parametrize("config", [ACROSS_LAYERS, ACROSS_MODELS], ids=lambda config: config.name)
def test_two_processes_train_a_dictionary_of_several_hooks(stores, tmp_path, config):
    short = replace(config, steps=12, log_every=3)
    finished(torchrun(stores, tmp_path, replace(short, name="both"), 2))
    run_train(replace(short, name="alone"), stores)
    assert_close_runs(stores, "both", "alone")


def wait_for_step(workspace: Workspace, name: str, least: int, process: subprocess.Popen) -> None:
    checkpoints = Checkpoints(workspace.run(name).checkpoints)
    deadline = time.monotonic() + 200
    while max(checkpoints.steps(), default=0) < least:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(process.communicate()[0][-3000:])
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.heavy
def test_a_rank_killed_in_the_middle_stops_the_job_and_fewer_processes_continue_it(workspace, tmp_path):
    """A checkpoint of two parts of the latents is continued by one process that holds them all."""
    slow = replace(LONG, steps=1200, latent_parts=2)
    run_train(replace(slow, name="alone", latent_parts=1), workspace)
    process = torchrun(workspace, tmp_path, slow, 2)
    wait_for_step(workspace, "long", 40, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another one of this run has gone" in output or "Signal 9" in output
    steps = Checkpoints(workspace.run("long").checkpoints).steps()
    assert steps and max(steps) < 1200
    newest = workspace.run("long").checkpoints / f"step-{max(steps):09d}"
    assert {path.name for path in newest.glob("*.safetensors")} == {"long.0.safetensors", "long.1.safetensors"}
    run_train(replace(slow, latent_parts=1), workspace)
    mine, theirs = metrics(workspace, "long"), metrics(workspace, "alone")
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    tail = [sum(line["loss"] for line in lines[-20:]) / 20 for lines in (mine, theirs)]
    assert tail[0] == pytest.approx(tail[1], rel=0.05)


@pytest.mark.heavy
def test_a_checkpoint_of_one_process_is_continued_by_four(workspace, tmp_path, monkeypatch):
    from tests.training.test_resume import Killed, kill_at

    run_train(replace(LONG, name="alone"), workspace)
    with monkeypatch.context() as patch:
        kill_at(patch, 70)
        with pytest.raises(Killed):
            run_train(LONG, workspace)
    finished(torchrun(workspace, tmp_path, replace(LONG, latent_parts=2), 4))
    assert_close_runs(workspace, "long", "alone")


@pytest.mark.heavy
def test_sigterm_to_torchrun_leaves_a_checkpoint_of_one_step(workspace, tmp_path):
    slow = replace(LONG, steps=4000, latent_parts=2, checkpoint_every=3000)
    process = torchrun(workspace, tmp_path, slow, 2)
    deadline = time.monotonic() + 100
    while not workspace.run("long").last_metrics() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    (step,) = Checkpoints(workspace.run("long").checkpoints).steps()
    assert 0 < step < 3000


@pytest.mark.heavy
def test_killed_while_the_parts_are_put_together_the_same_command_finishes(workspace, tmp_path):
    """The checkpoint that they are put together from is there already then."""
    run_train(replace(LONG, name="alone"), workspace)
    config = replace(LONG, latent_parts=2)
    (tmp_path / "dying.py").write_text(DYING)
    died = torchrun(workspace, tmp_path, config, 2, module="dying")
    died.communicate(timeout=240)
    assert died.returncode != 0 and not workspace.run("long").dictionary.exists()
    assert max(Checkpoints(workspace.run("long").checkpoints).steps()) == 120
    finished(torchrun(workspace, tmp_path, config, 2))
    assert_close_runs(workspace, "long", "alone")
    assert not workspace.run("long").checkpoints.exists()


@pytest.mark.parametrize(
    ("changes", "size", "splits", "sentence"),
    [
        ({"latent_parts": 3}, 4, True, "latent_parts is 3, and there are 4 processes; it must divide their number"),
        ({"latent_parts": 2}, 1, True, "latent_parts is 2, and there are 1 processes"),
        ({"latent_parts": 2, "dictionary": CODEBOOK.dictionary}, 2, False, "of kind 'icfl' cannot be spread"),
        ({"batch_size": 130}, 4, True, "batch_size is 130, which 4 processes in 1 parts each cannot share evenly"),
        ({"follow": True}, 2, True, "follow is for one process"),
        ({"latent_parts": 2, "optimiser": OptimiserConfig(rule="muon")}, 2, True, "Muon's step of a weight matrix"),
        ({"dictionary": TopKConfig(d_sae=64, k=4, resample_every=5)}, 2, True, "resample_every draws from all rows"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_a_sentence(monkeypatch, changes, size, splits, sentence):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(UserError, match=sentence):
        refuse_what_cannot_be_shared(replace(LONG, **changes), splits)
