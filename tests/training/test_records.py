"""What a run writes about itself: metrics.jsonl, TensorBoard's events and Weights & Biases' offline folder, read back.

The record of a run that was killed, at any moment, and went on is that of a run that was not.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from activation_store.errors import UserError
from dictlearn.training.command import run_train
from dictlearn.training.records import Record, check_writers, cut_back, open_record, training
from dictlearn.workspace import RunFiles, Workspace
from tests.training.test_training import SAE, make_store

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    (tmp_path / "run").mkdir()
    return RunFiles(tmp_path / "run")


def opened(files: RunFiles, step: int = 0, tensorboard: bool = False, wandb: str | None = None) -> Record:
    return open_record(files, step, tensorboard=tensorboard, wandb=wandb, config={"name": "run", "sweep": "sizes"})


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "fvu": 0.1 + 1e-17 * step, "wall_seconds": time.perf_counter()}


def lines(files: RunFiles) -> list[dict]:
    refuse = lambda spelling: pytest.fail(f"{spelling} is not JSON")  # noqa: E731
    return [json.loads(text, parse_constant=refuse) for text in files.metrics.read_text().splitlines()]


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_numbers_and_words_are_read_as_they_were_written(files):
    with opened(files) as record:
        record.write({"step": 10, "loss": 0.1 + 0.2})
        record.write({"step": 12, "stopped": "The loss is not finite."})
        assert lines(files) == [{"step": 10, "loss": 0.1 + 0.2}, {"step": 12, "stopped": "The loss is not finite."}]


def test_what_is_not_finite_becomes_null_and_readers_leave_it_out(files):
    with opened(files) as record:
        record.write({"step": 10, "loss": NAN, "fvu": INFINITE, "mse": -INFINITE, "l0": 3})
    assert lines(files) == [{"step": 10, "loss": None, "fvu": None, "mse": None, "l0": 3}]
    assert files.last_metrics() == {"step": 10, "l0": 3}


@pytest.mark.parametrize("torn", ["", '{"step": 40, "lo', '{"step": 40}', "{}\n", "[1]\n", "\0\0\0\0\n"])
@pytest.mark.parametrize("step", [0, 15, 20, 30, 99])
def test_steps_to_be_taken_again_and_a_torn_line_are_cut(files, step, torn):
    whole = [json.dumps(line(at)) + "\n" for at in (10, 20, 30)]
    files.metrics.write_text("".join(whole) + torn)
    cut_back(files.metrics, step)
    assert files.metrics.read_text() == "".join(whole[: step // 10])
    assert sorted(path.name for path in files.folder.iterdir()) == ["metrics.jsonl"]


def test_where_nothing_is_to_be_cut_the_file_is_not_touched(files):
    cut_back(files.metrics, 5)
    assert not files.metrics.exists()
    files.metrics.write_text('{"step": 10}\n{"step": 20}\n')
    os.utime(files.metrics, ns=(1, 1))
    before = files.metrics.stat()
    cut_back(files.metrics, 20)
    after = files.metrics.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_kill_while_cutting_leaves_the_old_file(files, monkeypatch):
    text = '{"step": 10}\n{"step": 20}\n'
    files.metrics.write_text(text)

    def die(source, target):
        assert files.metrics.read_text() == text
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        cut_back(files.metrics, 10)
    assert files.metrics.read_text() == text


WRITER = """
import sys, time
from pathlib import Path
from dictlearn.training.records import open_record, training
from dictlearn.workspace import RunFiles

folder, step, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
copies = dict(tensorboard=sys.argv[5] == "all", wandb="tests" if sys.argv[5] == "all" else None)
with training(RunFiles(folder)), open_record(RunFiles(folder), step, **copies, config={}) as record:
    while step < steps:
        step += 10
        numbers = {"loss": 1 / step, "fvu": 1 / 3 + step, "wall_seconds": time.time()}
        record.write({"step": step, **numbers, "words": "x" * 5000})
        time.sleep(pause)
"""


def write_in_a_process(
    files: RunFiles, step: int, steps: int, pause: float = 0, also: str = "none"
) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(files.folder), str(step), str(steps), str(pause), also]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "offline"}
    environment.pop("WANDB_SERVICE", None)  # wandb's own process, which children share: it would outlive the kill
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()


def kill_after(process: subprocess.Popen, files: RunFiles, size: int) -> None:
    """SIGKILL as soon as the file is larger than ``size``."""
    deadline = time.monotonic() + 60
    while not (files.metrics.exists() and files.metrics.stat().st_size > size):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL


def without_wall_clock(files: RunFiles) -> str:
    kept = [{key: value for key, value in at.items() if not key.startswith("wall_")} for at in lines(files)]
    return "\n".join(json.dumps(at) for at in kept)


def test_while_it_is_written_the_run_is_training_and_nobody_else_may(files):
    process = write_in_a_process(files, 0, 10**9, pause=0.01)
    try:
        while not files.metrics.exists():
            assert process.poll() is None
        assert files.is_training()
        with pytest.raises(UserError, match=f"is being written by process {process.pid}; wait for it to end"):
            training(files).__enter__()
    finally:
        kill_after(process, files, 1)
    assert files.lock.exists() and not files.is_training()
    with training(files):
        assert files.is_training()
    assert not files.lock.exists()


def test_what_cannot_be_opened_is_not_left_locked(files):
    files.metrics.mkdir()
    with pytest.raises(IsADirectoryError), training(files):
        opened(files)
    assert not files.is_training()


def test_killed_five_times_and_resumed_it_is_the_file_of_a_run_that_was_not(files, tmp_path):
    whole = RunFiles(tmp_path / "whole")
    whole.folder.mkdir()
    steps = 4000
    finish(write_in_a_process(whole, 0, steps))
    resumed_at = 0
    for size in (1, 20_000, 90_000, 200_000, 600_000):
        kill_after(write_in_a_process(files, resumed_at, 10**9), files, size)
        resumed_at = (resumed_at + files.metrics.stat().st_size // 5100 * 10 // 2) // 20 * 10
    finish(write_in_a_process(files, resumed_at, steps))
    assert 0 < resumed_at < steps
    assert without_wall_clock(files) == without_wall_clock(whole)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(files: RunFiles, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(files.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_what_was_written_at_once(files):
    with opened(files, tensorboard=True) as record:
        record.write({"step": 10, "loss": 0.5, "l0": 4})
        record.write({"step": 20, "loss": NAN, "l0": 4})
        record.write({"step": 20, "stopped": "The loss is not finite."})
        assert events(files, "loss") == [(10, 0.5)]
        assert events(files, "l0") == [(10, 4.0), (20, 4.0)]


def test_without_being_asked_nothing_but_the_lines_is_written(files):
    with opened(files) as record:
        record.write(line(10))
    assert [path.name for path in files.folder.iterdir()] == ["metrics.jsonl"]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def offline_folders(files: RunFiles) -> list[Path]:
    return sorted(files.folder.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)


def history(folder: Path) -> list[dict]:
    """The rows of a run that has ended; wandb's own process writes them a moment after ours has finished it."""
    deadline = time.monotonic() + 30
    while not any(record.HasField("exit") for record in transaction_log(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rows = [record.history.item for record in transaction_log(folder) if record.HasField("history")]
    named = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in named]


def transaction_log(folder: Path) -> list:
    """The records of a run's .wandb file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record as Logged

    (log,) = folder.glob("run-*.wandb")
    content = log.read_bytes()
    found, part, place, block = [], b"", 7, 32_768
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        part += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Logged.FromString(part))
            part = b""
    return found


def test_an_offline_run_has_every_line_under_one_id(files, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with opened(files, wandb="tests") as record:
        record.write({"step": 10, "loss": 0.5, "fvu": NAN})
        record.write({"step": 20, "loss": 0.25, "fvu": 0.5})
        record.write({"step": 20, "stopped": "The loss is not finite."})
    (folder,) = offline_folders(files)
    assert folder.name.endswith(files.wandb_id.read_text())
    assert history(folder) == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25, "fvu": 0.5}]
    assert b"The loss is not finite." in next(folder.glob("*.wandb")).read_bytes()


def test_two_runs_record_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    both = [RunFiles(tmp_path / name) for name in ("a", "b")]
    for files in both:
        files.folder.mkdir()
    with opened(both[0], wandb="tests") as a, opened(both[1], wandb="tests") as b:
        for step in (10, 20):
            a.write({"step": step, "loss": 1})
            b.write({"step": step, "loss": 2})
    assert [[row["loss"] for row in history(offline_folders(files)[0])] for files in both] == [[1, 1], [2, 2]]
    assert both[0].wandb_id.read_text() != both[1].wandb_id.read_text()


def test_after_a_kill_the_copies_lack_nothing_and_repeat_nothing(files):
    """A kill takes away what Weights & Biases has not yet written: the next start sends it again."""
    process = write_in_a_process(files, 0, 10**9, pause=0.01, also="all")
    kill_after(process, files, 60_000)
    assert len(lines(files)) > 10
    finish(write_in_a_process(files, 50, 100, also="all"))
    steps = list(range(10, 101, 10))
    assert [at["step"] for at in lines(files)] == steps
    assert events(files, "loss") == [(step, pytest.approx(1 / step)) for step in steps]
    first, second = offline_folders(files)
    assert first.name.split("-")[-1] == second.name.split("-")[-1] == files.wandb_id.read_text()
    assert [row["step"] for row in history(second)] == steps


class HasUpTo20:
    """A run that the server already has, up to a step."""

    step = 21

    def __init__(self):
        self.summary, self.sent = {}, []

    def log(self, numbers, step, commit):
        self.sent.append(numbers)

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_an_online_run_is_sent_what_it_lacks_and_how_it_ended(files, monkeypatch):
    import wandb

    files.metrics.write_text("".join(json.dumps({"step": step, "loss": None}) + "\n" for step in (10, 20, 30)))
    run = HasUpTo20()
    monkeypatch.setattr(wandb, "init", lambda **settings: run)
    record = opened(files, step=30, wandb="p")
    record.write({"step": 40, "l0": 4, "stopped": "enough"})
    record.close(failed=True)
    assert run.sent == [{"step": 40, "l0": 4}] and run.summary == {"stopped": "enough"} and run.exit_code == 1
    with opened(files, step=10, wandb="p") as record:
        record.write({"step": 20, "loss": 0.5})
        record.write({"step": 30, "loss": 0.25})
    assert run.sent[1:] == [{"step": 30, "loss": 0.25}] and run.exit_code == 0


def test_a_training_run_is_copied_to_both(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workspace = Workspace(tmp_path)
    (tmp_path / "stores").mkdir()
    make_store(workspace.store("s"))
    files = run_train(replace(SAE, tensorboard=True, wandb="tests"), workspace)
    of_loss = [(at["step"], at["loss"]) for at in lines(files)]
    assert len(of_loss) == 12
    assert events(files, "loss") == [(step, pytest.approx(loss)) for step, loss in of_loss]
    (folder,) = offline_folders(files)
    assert [(row["step"], row["loss"]) for row in history(folder)] == of_loss


def test_a_refusal_of_wandb_is_one_sentence(files, monkeypatch):
    import wandb

    def refuse(**settings):
        raise RuntimeError("the run was\ndeleted.")  # wandb raises kinds that it does not export

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"did not take the run 'run' as \w{16} of project 'p' \(the run was deleted\)"):
        opened(files, wandb="p")


# --- refused before training begins -----------------------------------------------------------------------------------


def test_what_is_there_is_let_through():
    check_writers(tensorboard=True, wandb="saes of layer 3")
    check_writers(tensorboard=False, wandb=None)


@pytest.mark.parametrize(
    ("tensorboard", "wandb", "lacking", "sentence"),
    [
        (True, None, "tensorboard", "tensorboard is set, and .* `pip install tensorboard`, or leave tensorboard out"),
        (False, "p", "wandb", "wandb is set, and .* `pip install wandb`, or leave wandb out"),
        (False, "", "", "wandb is ''; it names a project"),
        (False, "team/project", "", "wandb is 'team/project'; it names a project"),
    ],
)
def test_what_cannot_be_written_is_refused(monkeypatch, tensorboard, wandb, lacking, sentence):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lacking else find(name))
    with pytest.raises(UserError, match=sentence):
        check_writers(tensorboard, wandb)


def test_a_folder_called_wandb_is_not_the_package(monkeypatch):
    """Weights & Biases leaves such a folder wherever a script ran, and Python takes it for a package."""
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder)
    with pytest.raises(UserError, match="the package 'wandb' is not installed"):
        check_writers(False, "p")


def test_the_check_loads_neither_torch_nor_the_packages():
    code = (
        "from dictlearn.training.records import check_writers; check_writers(True, 'p'); import sys; "
        "print({'torch', 'wandb', 'tensorboard'} & sys.modules.keys())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "set()\n"
