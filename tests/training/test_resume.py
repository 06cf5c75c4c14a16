"""Resuming: a run that was stopped anywhere, in any way, and started again equals the run that was never stopped.

Equal means bit for bit: weights, and every line of metrics.jsonl but for the wall clock.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.training import checkpoint
from dictlearn.training.checkpoint import Checkpoints
from dictlearn.training.command import run_train
from dictlearn.training.config_files import config_to_dict
from dictlearn.training.interruption import Interruption, TrainingInterrupted
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.records import training
from dictlearn.training.together import Together
from dictlearn.workspace import Workspace
from tests.training.planted import KINDS, SAE, TRANSCODER, make_store, metrics, weights

AVERAGED = replace(
    TRANSCODER,
    name="averaged",
    optimiser=OptimiserConfig(rule="muon", learning_rate=3e-3, averaging=0.9),
    accumulate=2,
    seed=3,
)
RESUMED = [*KINDS, AVERAGED]


class Killed(BaseException):
    """Not an Exception: nothing on the way out may tidy up for it."""


def kill_at(monkeypatch, step: int) -> None:
    """From now on training dies when it is about to take this step, counted from 0; the state is thrown away."""
    take_step = Together.take_step

    def die(self, members, hooks, rows, at, steps):
        if at == step:
            raise Killed
        return take_step(self, members, hooks, rows, at, steps)

    monkeypatch.setattr(Together, "take_step", die)


def assert_same_runs(workspace: Workspace, one: str, other: str) -> None:
    mine, theirs = weights(workspace, one), weights(workspace, other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert metrics(workspace, one) == metrics(workspace, other)


@pytest.mark.parametrize("config", RESUMED, ids=lambda c: c.name)
def test_killed_at_any_step_and_rerun_equals_never_killed(workspace, config, monkeypatch):
    run_train(replace(config, name="whole"), workspace)
    for step in (0, 3, 7, 20, 41, 59):
        killed = replace(config, name=f"killed-{step}")
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                run_train(killed, workspace)
        run_train(killed, workspace)
        assert_same_runs(workspace, killed.name, "whole")


def test_a_rerun_goes_on_at_the_checkpoint_and_not_at_the_beginning(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 45)
        with pytest.raises(Killed):
            run_train(SAE, workspace)
    taken = []
    take_step = Together.take_step
    monkeypatch.setattr(Together, "take_step", lambda self, *a: taken.append(a[3]) or take_step(self, *a))
    run_train(SAE, workspace)
    assert taken == list(range(42, 60))


@pytest.mark.heavy
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kills=st.lists(st.integers(0, 59), min_size=1, max_size=4), every=st.integers(1, 20), kind=st.sampled_from(RESUMED)
)
def test_any_series_of_kills_ends_in_the_same_run(tmp_path_factory, kills, every, kind):
    workspace = Workspace(tmp_path_factory.mktemp("kills"))
    (workspace.root / "stores").mkdir()
    make_store(workspace.store("s"))
    run_train(replace(kind, name="whole"), workspace)
    killed = replace(kind, name="killed", checkpoint_every=every)
    for step in sorted(kills):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                run_train(killed, workspace)
    run_train(killed, workspace)
    assert_same_runs(workspace, "killed", "whole")


@pytest.fixture
def command(workspace, tmp_path):
    """Start `dictlearn train` of a configuration as a process of its own."""
    started = []

    def start(config, *options: str) -> subprocess.Popen:
        path = tmp_path / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(config_to_dict(config)))
        line = [sys.executable, "-m", "dictlearn.cli", "train", str(path), "--workspace", str(workspace.root), *options]
        started.append(
            subprocess.Popen(
                line,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_checkpoint(workspace: Workspace, name: str, after: int, process: subprocess.Popen) -> int:
    """The newest step that there is a checkpoint of, as soon as it is later than ``after``."""
    checkpoints = Checkpoints(workspace.run(name).checkpoints)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        newest = max(checkpoints.steps(), default=0)
        if newest > after:
            return newest
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint after step {after}: {process.communicate(timeout=60)}")


SLOW = replace(SAE, name="slow", steps=1500, checkpoint_every=20)


def test_a_real_process_killed_with_sigkill_resumes_bit_for_bit(workspace, command):
    run_train(replace(SLOW, name="whole"), workspace)
    step = 0
    for _ in range(2):
        process = command(SLOW)
        step = wait_for_checkpoint(workspace, "slow", step + 100, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    process = command(SLOW)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_runs(workspace, "slow", "whole")


@pytest.mark.heavy
def test_sigterm_writes_a_checkpoint_of_the_very_step_and_exits_cleanly(workspace, command):
    run_train(replace(SLOW, name="whole"), workspace)
    rare = replace(SLOW, checkpoint_every=700)
    process = command(rare)
    metrics_file = workspace.run("slow").metrics
    deadline = time.monotonic() + 120
    while not (metrics_file.exists() and metrics_file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    (step,) = Checkpoints(workspace.run("slow").checkpoints).steps()
    assert 0 < step < 700
    assert f"Interrupted after step {step:,} of 1,500" in errors and "Traceback" not in errors
    run_train(rare, workspace)
    assert_same_runs(workspace, "slow", "whole")


def test_what_decides_nothing_may_change_between_two_starts(workspace, monkeypatch):
    run_train(replace(SAE, name="whole"), workspace)
    with monkeypatch.context() as patch:
        kill_at(patch, 30)
        with pytest.raises(Killed):
            run_train(SAE, workspace)
    run_train(replace(SAE, checkpoint_every=3, keep_checkpoints=1, verify_reads=True, ops="portable"), workspace)
    assert_same_runs(workspace, "sae", "whole")


def test_a_configuration_from_before_a_setting_was_there_continues(workspace, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 30)
        with pytest.raises(Killed):
            run_train(SAE, workspace)
    path = workspace.run("sae").config
    record = yaml.safe_load(path.read_text())
    del record["row_filter"], record["accumulate"], record["optimiser"]["averaging"]
    path.write_text(yaml.safe_dump(record))
    run_train(SAE, workspace)
    assert len(metrics(workspace, "sae")) == 12


# --- damage -----------------------------------------------------------------------------------------------------------


def interrupted(workspace: Workspace, monkeypatch, config=SAE) -> Checkpoints:
    with monkeypatch.context() as patch:
        kill_at(patch, 45)
        with pytest.raises(Killed):
            run_train(config, workspace)
    return Checkpoints(workspace.run(config.name).checkpoints)


def newest(checkpoints: Checkpoints) -> Path:
    return checkpoints.folder / f"step-{max(checkpoints.steps()):09d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": lambda folder: flip(next(folder.glob("*.safetensors"))),
    "half a file": lambda folder: os.truncate(next(folder.glob("*.safetensors")), 1000),
    "no weights": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "half a state": lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text()[:40]),
    "an empty state": lambda folder: (folder / "state.json").write_text("{}"),
    "no checksum": lambda folder: next(folder.glob("sae.*.json")).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(workspace, monkeypatch, damage):
    run_train(replace(SAE, name="whole"), workspace)
    checkpoints = interrupted(workspace, monkeypatch)
    assert checkpoints.steps() == [35, 42]
    DAMAGE[damage](newest(checkpoints))
    said = []
    run_train(SAE, workspace, notify=said.append)
    sentence = said[-1]
    assert sentence.startswith("The checkpoint of step 42 in") and sentence.endswith(
        "; continuing from that of step 35."
    )
    assert_same_runs(workspace, "sae", "whole")


def test_a_damaged_checkpoint_is_put_aside_until_the_end(workspace, monkeypatch):
    """It must not count among those that are kept, nor give its files to a later one."""
    checkpoints = interrupted(workspace, monkeypatch)
    flip(newest(checkpoints) / "sae.0.safetensors")
    with monkeypatch.context() as patch:
        kill_at(patch, 47)
        with pytest.raises(Killed):
            run_train(replace(SAE, checkpoint_every=5), workspace)
    assert checkpoints.steps() == [40, 45]
    assert [path.name for path in checkpoints.folder.glob("damaged-*")] == ["damaged-000000042"]
    run_train(SAE, workspace)
    assert not checkpoints.folder.exists()


def test_when_all_checkpoints_are_damaged_nothing_is_thrown_away(workspace, monkeypatch):
    checkpoints = interrupted(workspace, monkeypatch)
    for step in checkpoints.steps():
        flip(checkpoints.folder / f"step-{step:09d}" / "sae.0.safetensors")
    lines = workspace.run("sae").metrics.read_text()
    with pytest.raises(UserError, match="step 42 in .*does not have its checksum.*delete that folder to start the run"):
        run_train(SAE, workspace)
    assert checkpoints.steps() == [35, 42] and workspace.run("sae").metrics.read_text() == lines


def test_a_kill_inside_a_checkpoint_leaves_the_one_before(workspace, monkeypatch):
    """At every place where something is about to be made durable, renamed or removed."""
    run_train(replace(SAE, name="whole"), workspace)
    places = ["sync_path", "_sync_folder", "_write_text", "_checksum", "replace", "rmtree"]
    for place in places:
        for call in (5, 8):
            name = f"{place.strip('_')}-{call}"
            of = {"replace": os, "rmtree": shutil}.get(place, checkpoint)
            function, calls = getattr(of, place), []

            def die(*arguments, function=function, calls=calls, last=call, **keywords):
                calls.append(1)
                if len(calls) == last:
                    raise Killed
                return function(*arguments, **keywords)

            with monkeypatch.context() as patch:
                patch.setattr(of, place, die)
                with pytest.raises(Killed):
                    run_train(replace(SAE, name=name), workspace)
            run_train(replace(SAE, name=name), workspace)
            assert_same_runs(workspace, name, "whole")


def test_checkpoints_of_other_runs_are_refused_by_name(workspace, monkeypatch):
    checkpoints = interrupted(workspace, monkeypatch)
    other = workspace.run("other").checkpoints
    other.parent.mkdir(parents=True)
    shutil.copytree(checkpoints.folder, other)
    with pytest.raises(UserError, match="are of the runs sae, and asked for are other"):
        run_train(replace(SAE, name="other"), workspace)


def test_the_checkpoint_of_an_older_version_is_refused_by_name(workspace):
    files = workspace.run("sae")
    files.folder.mkdir(parents=True)
    (files.folder / "checkpoint.pt").write_bytes(b"as it was")
    with pytest.raises(UserError, match="of an unfinished run of an older dictlearn.*delete checkpoint.pt"):
        run_train(SAE, workspace)
    assert (files.folder / "checkpoint.pt").exists()


def test_only_as_many_checkpoints_as_asked_are_kept_and_none_after_the_end(workspace, monkeypatch):
    assert interrupted(workspace, monkeypatch, replace(SAE, keep_checkpoints=3)).steps() == [28, 35, 42]
    run_train(replace(SAE, keep_checkpoints=3), workspace)
    assert sorted(path.name for path in workspace.run("sae").folder.iterdir()) == [
        "config.yaml",
        "dictionary",
        "metrics.jsonl",
    ]


def test_while_another_process_trains_the_run_its_checkpoints_are_left_alone(workspace, monkeypatch):
    """What is about to be removed may look damaged from outside."""
    checkpoints = interrupted(workspace, monkeypatch)
    (newest(checkpoints) / "state.json").unlink()
    before = sorted(checkpoints.folder.rglob("*"))
    with training(workspace.run("sae")), pytest.raises(UserError, match="is being written by process"):
        run_train(SAE, workspace)
    assert sorted(checkpoints.folder.rglob("*")) == before


def test_nothing_in_a_checkpoint_is_pickled(workspace, monkeypatch):
    """A checkpoint from somebody else must not be able to run code here."""
    checkpoints = interrupted(workspace, monkeypatch)
    assert {path.suffix for path in newest(checkpoints).iterdir()} == {".safetensors", ".json"}
    for path in newest(checkpoints).glob("*.json"):
        json.loads(path.read_text())


def test_interrupting_in_this_process_says_how_to_go_on(workspace, monkeypatch):
    take_step = Together.take_step

    def interrupt(self, *arguments):
        if arguments[3] == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Together, "take_step", interrupt)
        with pytest.raises(TrainingInterrupted, match="after step 11 of 60.*the same command continues from there"):
            run_train(SAE, workspace)
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(Checkpoints(workspace.run("sae").checkpoints).steps()) == 11
    run_train(SAE, workspace)
    run_train(replace(SAE, name="whole"), workspace)
    assert_same_runs(workspace, "sae", "whole")


def test_a_signal_that_comes_in_a_finaliser_is_kept_for_the_end_of_the_step(monkeypatch):
    """Python prints what is raised there, and goes on."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Something:
        pass

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    with Interruption(only_asked=False) as interruption:
        something = Something()
        weakref.finalize(something, stop)
        del something
        assert interruption.asked and not printed
        with pytest.raises(KeyboardInterrupt), interruption.put_off():
            pass


def test_interrupted_in_its_last_step_a_run_is_finished(workspace, monkeypatch):
    take_step = Together.take_step

    def interrupt(self, *arguments):
        if arguments[3] == 59:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Together, "take_step", interrupt)
        run_train(SAE, workspace)
    run_train(replace(SAE, name="whole"), workspace)
    assert_same_runs(workspace, "sae", "whole")


def test_interrupted_before_its_first_step_a_run_claims_no_checkpoint(workspace, monkeypatch):
    def interrupt(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Together, "take_step", interrupt)
    with pytest.raises(TrainingInterrupted, match="before the first step; the same command begins again"):
        run_train(SAE, workspace)
    assert not workspace.run("sae").checkpoints.exists()


def test_a_run_that_only_differs_in_a_decisive_setting_is_refused(workspace, monkeypatch):
    interrupted(workspace, monkeypatch)
    with pytest.raises(UserError, match="'sae' exists with another configuration .dictionary.k: 4, now 5"):
        run_train(replace(SAE, dictionary=TopKConfig(d_sae=64, k=5, dead_after_rows=3000)), workspace)
