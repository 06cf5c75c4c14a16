"""What a run writes about itself while it trains: metrics.jsonl always, TensorBoard and Weights & Biases when asked.

metrics.jsonl is the record; the other two are copies of it. A run that resumes first cuts the file back to the step it
resumes at, so that the file of a run that was killed is, apart from the keys that begin with ``wall_``, byte for byte
that of a run that never was. TensorBoard is told which of its points to forget (``purge_step``). A Weights & Biases run
keeps its id in the run's folder and is sent what it lacks of the record. It cannot forget: lines it got before the kill
stay as they are, equal to the ones taken again but for the wall clock. Offline, every start leaves a folder of its own
under the same id, each with the whole record so far, and ``wandb sync`` puts them into one run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from activation_store.disk import replace_text
from activation_store.errors import UserError
from activation_store.ownership import Ownership
from dictlearn.workspace import RunFiles

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

NOT_IN_A_PROJECT = "/\\#?%:"
"""Characters that Weights & Biases does not take in the name of a project."""


def check_writers(tensorboard: bool, wandb: str | None) -> None:
    """Refuse, before training begins, what could not be written. Loads neither package, nor torch.

    Args:
        tensorboard: whether the run is to be copied to TensorBoard.
        wandb: the project to copy it to, or None.

    Raises:
        UserError: a package that is not installed, or a project name that cannot be.
    """
    for asked, package, setting in ((tensorboard, "tensorboard", "tensorboard"), (wandb is not None, "wandb", "wandb")):
        if asked and not _is_installed(package):
            raise UserError(
                f"{setting} is set, and the package {package!r} is not installed; `pip install {package}`, or leave "
                f"{setting} out: metrics.jsonl is written in any case."
            )
    if wandb is not None and (not wandb or set(wandb) & set(NOT_IN_A_PROJECT)):
        raise UserError(f"wandb is {wandb!r}; it names a project, in one or more characters other than / \\ # ? % :")


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a mere folder of that name, as wandb makes, has no origin


@contextmanager
def training(files: RunFiles) -> Iterator[None]:
    """Within the block this process trains the run, and no other may.

    Raises:
        UserError: another one does.
    """
    ownership = Ownership.take(files.lock, files.folder)
    try:
        yield
    finally:
        ownership.release()


def open_record(files: RunFiles, step: int, *, tensorboard: bool, wandb: str | None, config: dict[str, Any]) -> Record:
    """The record of a run that this process trains (`training`) and that goes on after ``step``; 0 if it begins.

    Args:
        files: of the run; its folder is there.
        step: the lines up to here are kept.
        tensorboard: copy the numbers to ``tensorboard/`` in the run's folder.
        wandb: copy the lines to this project of Weights & Biases; WANDB_MODE=offline keeps them in the run's folder.
        config: the run's configuration, shown by Weights & Biases; its ``sweep`` becomes the group.

    Raises:
        UserError: Weights & Biases refuses it, or cannot be reached.
    """
    cut_back(files.metrics, step)
    events = _open_tensorboard(files, step) if tensorboard else None
    run = _open_wandb(files, wandb, config) if wandb is not None else None
    return Record(files.metrics, events, run)


class Record:
    """The open record of one run; a context manager."""

    def __init__(self, metrics: Path, events: SummaryWriter | None, run: Run | None):
        self._events = events
        self._run = run
        if run is not None and metrics.exists():
            for line in metrics.read_text().splitlines():
                self._send(run, json.loads(line))
        self._metrics = metrics.open("a")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line of numbers and short words about ``line["step"]``; it has left this process when this returns.

        JSON has no spelling for a value that is not finite: it becomes null, and a curve has a gap there.
        """
        line = {name: value if _is_finite(value) else None for name, value in line.items()}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        step = int(line["step"])
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, str):
                    self._events.add_text(name, value, step)
                elif value is not None and name != "step":
                    self._events.add_scalar(name, value, step)
            self._events.flush()  # what a kill takes away would be missing: only later points are written again
        if self._run is not None:
            self._send(self._run, line)

    @staticmethod
    def _send(run: Run, line: Mapping[str, Any]) -> None:
        """To Weights & Biases: words as part of the run's summary, numbers unless it has those of this step."""
        run.summary.update({name: value for name, value in line.items() if isinstance(value, str)})
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if numbers.keys() != {"step"} and line["step"] >= run.step:
            run.log(numbers, step=int(line["step"]), commit=True)

    def close(self, failed: bool = False) -> None:
        """Online, this waits until Weights & Biases has everything; ``failed`` is what it shows the run as."""
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def cut_back(metrics: Path, step: int) -> None:
    """Drop the lines after ``step``, whose steps will be taken again, and one that a kill cut in half.

    A kill leaves either the old file or the new one. Where nothing is to be dropped the file is not touched.
    """
    if not metrics.exists():
        return
    kept = 0
    with metrics.open("rb") as file:
        for line in file:
            if not _is_whole(line) or json.loads(line)["step"] > step:
                break
            kept += len(line)
    if kept == metrics.stat().st_size:
        return
    temporary = metrics.with_suffix(".tmp")
    with metrics.open("rb") as file, temporary.open("wb") as shorter:
        shorter.write(file.read(kept))
        shorter.flush()
        os.fsync(shorter.fileno())
    os.replace(temporary, metrics)


def _is_whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and "step" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _open_tensorboard(files: RunFiles, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(files.tensorboard), purge_step=step + 1)


def _open_wandb(files: RunFiles, project: str, config: dict[str, Any]) -> Run:
    import wandb

    if not files.wandb_id.exists():
        replace_text(files.wandb_id, secrets.token_hex(8))  # not of the name: a run made anew under it is another run
    identity = files.wandb_id.read_text()
    try:
        return wandb.init(
            project=project,
            id=identity,
            name=files.name,
            group=config.get("sweep"),
            config=config,
            dir=str(files.folder),
            resume="allow",
            reinit="create_new",  # the members of a sweep have a run each, at the same time
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # wandb raises kinds of its own that it does not export
        raise UserError(
            f"Weights & Biases did not take the run {files.name!r} as {identity} of project {project!r} "
            f"({' '.join(str(error).split()).rstrip('.')}); log in with `wandb login`, set WANDB_MODE=offline, or "
            "leave wandb out."
        ) from error
