"""Sweeps: many runs that read each batch once are the runs they would be alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from activation_store.errors import UserError
from activation_store.loader import Loader
from activation_store.progress import NoProgress
from dictlearn import reports
from dictlearn.cli import main
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.sweep import is_sweep, plan, read_sweep, run_sweep
from dictlearn.training.checkpoint import Checkpoints
from dictlearn.training.command import run_train
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.together import Together
from dictlearn.workspace import Workspace
from tests.training.planted import IN, OUT, make_store, metrics, weights

COMMON = {
    "name": "w",
    "store": "s",
    "hook": IN,
    "batch_size": 128,
    "steps": 40,
    "buffer_rows": 1024,
    "log_every": 5,
    "checkpoint_every": 7,
    "optimiser": {"learning_rate": 3e-3},
    "dictionary": {"kind": "topk", "d_sae": 64, "k": 4, "dead_after_rows": 3000},
}
MIXED = COMMON | {
    "grid": {"seed": [0, 1]},
    "list": [
        {"name": "sae"},
        {"name": "wide", "dictionary.d_sae": 96, "optimiser.learning_rate": 1e-3},
        {"name": "transcoder", "target_hook": OUT},
        {"name": "codebook", "dictionary": {"kind": "icfl", "d_sae": 48, "rounds": 2, "width": 2}},
    ],
}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "workspace")
    (workspace.root / "stores").mkdir(parents=True)
    make_store(workspace.store("s"))
    return workspace


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep's file and read it."""

    def written(record: dict):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(record))
        return read_sweep(path)

    return written


def test_a_file_becomes_every_combination_of_the_grid_for_every_entry_of_the_list(sweep):
    configs = {config.name: config for config in sweep(MIXED).configs}
    names = ["sae", "wide", "transcoder", "codebook"]
    assert list(configs) == [f"w-{name}-seed{seed}" for name in names for seed in (0, 1)]
    assert configs["w-wide-seed1"].dictionary == TopKConfig(d_sae=96, k=4, dead_after_rows=3000)
    assert configs["w-wide-seed1"].optimiser == OptimiserConfig(learning_rate=1e-3)
    assert configs["w-wide-seed1"].seed == 1 and configs["w-wide-seed1"].order_seed == 0
    assert configs["w-codebook-seed0"].dictionary == ICFLConfig(d_sae=48, rounds=2, width=2)
    assert configs["w-transcoder-seed0"].target_hook == OUT


def test_a_grid_alone_names_its_runs_by_what_differs(sweep):
    record = COMMON | {"grid": {"dictionary.k": [2, 4], "optimiser.learning_rate": [0.001, 0.01]}}
    assert [config.name for config in sweep(record).configs] == [
        "w-k2-learningrate0.001",
        "w-k2-learningrate0.01",
        "w-k4-learningrate0.001",
        "w-k4-learningrate0.01",
    ]


@pytest.fixture
def threads():
    """Set their number; it is as before in the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Sums do not depend on how many threads make them; whether a product does is the library's affair."""
    threads(1)


def test_every_run_of_a_sweep_is_the_run_it_would_be_alone(workspace, sweep, one_thread):
    of = sweep(MIXED)
    run_sweep(of, workspace, NoProgress(), print)
    for config in of.configs:
        alone = replace(config, name="alone-" + config.name)
        run_train(alone, workspace)
        for name, tensor in weights(workspace, alone.name).items():
            assert torch.equal(tensor, weights(workspace, config.name)[name]), (config.name, name)
        assert metrics(workspace, alone.name) == metrics(workspace, config.name)
        assert yaml.safe_load(workspace.run(config.name).config.read_text())["sweep"] == "w"
    assert not workspace.sweep("w").checkpoints.exists()


def test_runs_on_threads_of_their_own_are_the_same_runs(workspace, sweep, monkeypatch, threads):
    """To float tolerance, since a product may be cut up differently."""
    threads(3)
    of = sweep(MIXED)
    taken = []
    enter = Together.__enter__
    monkeypatch.setattr(Together, "__enter__", lambda self: taken.append(self._workers) or enter(self))
    run_sweep(of, workspace, NoProgress(), print)
    assert taken == [3] and torch.get_num_threads() == 3
    monkeypatch.undo()
    for config in of.configs[::2]:
        alone = replace(config, name="alone-" + config.name)
        run_train(alone, workspace)
        lines = zip(metrics(workspace, alone.name), metrics(workspace, config.name), strict=True)
        for mine, theirs in lines:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3), config.name


def test_all_runs_together_read_each_batch_once(workspace, sweep, monkeypatch):
    reads = []
    read = Loader.read
    monkeypatch.setattr(Loader, "read", lambda self, rows: reads.append(len(rows)) or read(self, rows))
    run_sweep(sweep(MIXED | {"steps": 10}), workspace, NoProgress(), print)
    looked_at = -(-2700 // 128)  # initialisation looks at all rows once; reading ahead is at most 4 batches
    assert len(reads) <= looked_at + 10 + 2 * 4


def test_killed_anywhere_a_sweep_continues_all_its_runs_from_one_checkpoint(workspace, sweep, monkeypatch, one_thread):
    run_sweep(sweep(MIXED | {"name": "whole"}), workspace, NoProgress(), print)
    take_step = Together.take_step
    for step in (3, 17, 39):
        record = MIXED | {"name": f"killed{step}"}

        def die(self, members, hooks, rows, at, steps, last=step):
            if at == last:
                raise MemoryError
            return take_step(self, members, hooks, rows, at, steps)

        with monkeypatch.context() as patch:
            patch.setattr(Together, "take_step", die)
            with pytest.raises(MemoryError):
                run_sweep(sweep(record), workspace, NoProgress(), print)
        steps = Checkpoints(workspace.sweep(f"killed{step}").checkpoints).steps()
        assert steps == [s for s in (7, 14, 21, 28, 35) if s <= step][-2:]
        run_sweep(sweep(record), workspace, NoProgress(), print)
        for config in sweep(record).configs:
            whole = config.name.replace(f"killed{step}", "whole")
            for name, tensor in weights(workspace, config.name).items():
                assert torch.equal(tensor, weights(workspace, whole)[name]), (step, config.name, name)
            assert metrics(workspace, config.name) == metrics(workspace, whole)


def poison(monkeypatch, d_sae: int, step: int):
    """The loss of dictionaries of this width is NaN from a step on, in the third row of the batch."""
    loss, calls = TopK.loss, {}

    def poisoned(self, x, target=None):
        calls[id(self)] = calls.get(id(self), -1) + 1
        if self.d_sae == d_sae and calls[id(self)] >= step:
            x = x.clone()
            x[2] = float("nan")
        return loss(self, x, target)

    monkeypatch.setattr(TopK, "loss", poisoned)


def test_a_run_that_diverges_stops_and_the_others_go_on(workspace, sweep, monkeypatch, one_thread, capsys):
    record = COMMON | {"grid": {"dictionary.d_sae": [64, 80]}}
    run_sweep(sweep(record | {"name": "whole"}), workspace, NoProgress(), print)
    said = []
    with monkeypatch.context() as patch:
        poison(patch, 80, 17)
        run_sweep(sweep(record), workspace, NoProgress(), said.append)
    sentence = said[-1]
    reports.trained(reports.Trained.of([workspace.run(config.name) for config in sweep(record).configs]))
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "w-dsae" in line]
    assert [line[2:4] for line in table] == [["40", "│"], ["18,", "stopped"]]
    assert "run 'w-dsae80' is not finite at step 17 (mse nan" in sentence and "in rows " in sentence
    assert metrics(workspace, "w-dsae80")[-1] == {"step": 18, "stopped": sentence}
    assert not workspace.run("w-dsae80").dictionary.exists()
    assert metrics(workspace, "w-dsae64") == metrics(workspace, "whole-dsae64")
    for name, tensor in weights(workspace, "w-dsae64").items():
        assert torch.equal(tensor, weights(workspace, "whole-dsae64")[name])


def test_the_command_fails_when_a_run_of_the_sweep_has_stopped(workspace, tmp_path, monkeypatch, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(COMMON | {"grid": {"dictionary.d_sae": [64, 80]}}))
    poison(monkeypatch, 80, 17)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--workspace", str(workspace.root)])
    assert ended.value.code == 1
    assert "18, stopped" in capsys.readouterr().out


def test_the_last_good_state_of_a_stopped_run_stays_in_every_later_checkpoint(workspace, sweep, monkeypatch):
    record = COMMON | {"grid": {"dictionary.d_sae": [64, 80]}}
    saved = {}
    save = Checkpoints.save

    def look(self, step, position, members):
        save(self, step, position, members)
        folder = self.folder / f"step-{step:09d}"
        saved[step] = {path.name: path.read_bytes() for path in folder.glob("*80.0.safetensors")}

    monkeypatch.setattr(Checkpoints, "save", look)
    poison(monkeypatch, 80, 17)
    run_sweep(sweep(record), workspace, NoProgress(), lambda sentence: None)
    assert saved[7] != saved[14] == saved[21] == saved[35] != {}


def test_a_stopped_run_stays_stopped_when_the_sweep_is_continued(workspace, sweep, monkeypatch):
    record = COMMON | {"grid": {"dictionary.d_sae": [64, 80]}}
    take_step = Together.take_step

    def die(self, members, hooks, rows, at, steps):
        if at == 30:
            raise MemoryError
        return take_step(self, members, hooks, rows, at, steps)

    with monkeypatch.context() as patch:
        poison(patch, 80, 17)
        patch.setattr(Together, "take_step", die)
        with pytest.raises(MemoryError):
            run_sweep(sweep(record), workspace, NoProgress(), lambda sentence: None)
    going = []
    monkeypatch.setattr(
        Together,
        "take_step",
        lambda self, members, *a: going.append([m.name for m in members]) or take_step(self, members, *a),
    )
    run_sweep(sweep(record), workspace, NoProgress(), lambda sentence: None)
    assert going == [["w-dsae64"]] * 12
    assert metrics(workspace, "w-dsae80")[-1]["step"] == 18
    assert metrics(workspace, "w-dsae64")[-1]["step"] == 40


def test_a_sweep_that_ended_with_a_stopped_run_keeps_its_state_and_trains_nothing_again(workspace, sweep, monkeypatch):
    record = COMMON | {"grid": {"dictionary.d_sae": [64, 80]}}
    with monkeypatch.context() as patch:
        poison(patch, 80, 17)
        run_sweep(sweep(record), workspace, NoProgress(), lambda sentence: None)
    before, lines = weights(workspace, "w-dsae64"), metrics(workspace, "w-dsae64")
    checkpoints = Checkpoints(workspace.sweep("w").checkpoints)
    assert 40 in checkpoints.steps()
    assert (checkpoints.folder / "step-000000040" / "w-dsae80.0.safetensors").exists()
    taken, said = [], []
    monkeypatch.setattr(Together, "take_step", lambda self, *a: taken.append(a))
    run_sweep(sweep(record), workspace, NoProgress(), said.append)
    assert not taken and "run 'w-dsae80' is not finite at step 17" in said[-1]
    assert metrics(workspace, "w-dsae64") == lines and not workspace.run("w-dsae80").dictionary.exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(workspace, "w-dsae64").items())


def test_when_every_run_has_stopped_the_sweep_says_so(workspace, sweep, monkeypatch):
    poison(monkeypatch, 64, 9)
    with pytest.raises(UserError, match="All 2 runs have stopped. The first: The loss of run 'w-seed0'"):
        run_sweep(sweep(COMMON | {"grid": {"seed": [0, 1]}}), workspace, NoProgress(), lambda sentence: None)


def test_another_sweep_of_the_same_name_is_refused(workspace, sweep):
    run_sweep(sweep(COMMON | {"steps": 7, "grid": {"seed": [0]}}), workspace, NoProgress(), print)
    two = sweep(COMMON | {"steps": 7, "grid": {"seed": [0, 1]}})
    for ask in (lambda: plan(two, workspace), lambda: run_sweep(two, workspace, NoProgress(), print)):
        with pytest.raises(UserError, match="sweep 'w' exists with the runs w-seed0, and now there are w-seed0, w-see"):
            ask()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "a b", "grid": {"seed": [0]}}, "name is 'a b'; a sweep is called by letters"),
        ({"grid": {"seed": 0}}, "grid gives a list of values for each key"),
        ({"grid": {"dictionary.kk": [1]}}, "run w-kk1 has an unknown key dictionary.kk; did you mean dictionary.k"),
        ({"grid": {"seed.x": [1]}}, "seed.x changes a value of seed, which is 3 and has none"),
        ({"list": [{"seed": 1}, {"seed": 1}]}, "two runs called 'w-seed1'; give the entries of list a name each"),
        ({"list": ["seed"]}, "list holds an entry of keys and values"),
        ({"list": [{"name": 7}]}, "the name 7 in list is not a word; put it between quotes"),
        ({"list": [{7: 1}]}, "7 in grid or list is no key"),
        ({"grid": {7: [1]}}, "7 in grid or list is no key"),
        ({"grid": {"seed": list(range(300))}}, "asks for 300 runs, more than 256"),
        ({"grid": {"batch_size": [64, 128]}}, "batch_size 128 and 'w-batchsize64' has 64.*cannot differ in it"),
        ({"grid": {"order_seed": [1, 2]}}, "differ in order_seed; give one for all"),
        ({"grid": {"dictionary.k": [4, 65]}}, "k is 65, more than the 64 latents"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(workspace, sweep, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(sweep(COMMON | {"seed": 3} | changes), workspace)
    assert not (workspace.root / "runs").exists() and not (workspace.root / "sweeps").exists()


def test_a_file_with_a_grid_or_a_list_is_a_sweep(tmp_path):
    for record, expected in ((MIXED, True), (COMMON, False), (COMMON | {"grid": {}}, True)):
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(record))
        assert is_sweep(path) is expected


def test_the_command_trains_a_sweep_and_prints_a_table(workspace, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(COMMON | {"steps": 10, "grid": {"dictionary.k": [2, 4]}}))

    def run(*options: str) -> str:
        line = [sys.executable, "-m", "dictlearn.cli", "train", str(path), "--workspace", str(workspace.root), *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "150"}
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout

    dry = json.loads(run("--dry-run", "--json"))
    assert dry["runs"] == ["w-k2", "w-k4"] and dry["steps"] == 10
    output = run()
    assert "training 2 runs of w: 1,280 tokens" in output and "runs 2/2" in output
    assert output.count("use buffer_rows=") == 1
    assert [line.split()[0] for line in output.splitlines() if line.strip().startswith("w-k")] == ["w-k2", "w-k4"]


def test_runs_of_a_sweep_are_runs_like_any_other(workspace, sweep):
    of = sweep(COMMON | {"steps": 7, "grid": {"dictionary.k": [2]}})
    run_sweep(of, workspace, NoProgress(), print)
    (again,) = of.configs
    run_train(again, workspace)  # finished: found and not repeated
    assert [line["step"] for line in metrics(workspace, again.name)] == [5, 7]
