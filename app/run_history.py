"""One training run as it lies on disk: configuration, curves, evaluation, state. Readable while the run is training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from activation_store.errors import UserError
from dictlearn import hook_names
from dictlearn.dictionaries.description import describe
from dictlearn.workspace import RunFiles, read_json

POINTS = 600
"""Points kept of a curve: more than a panel has pixels for."""


@dataclass(frozen=True)
class RunHistory:
    """A run's files, read.

    Attributes:
        config: nested, as in config.yaml; empty for a dictionary that was not trained here.
        curves: metric -> values at the logged steps, thinned to `POINTS`; None where a line lacks the metric.
        last: the numbers of the last logged line.
        stopped: why the run stopped before its end, a sentence; empty when it did not.
        training: whether a process trains the run at this moment.
        evaluation: evaluation.json, or None.
        provenance: hooks, model and store of the saved dictionary; empty while the run trains.
        finished: whether the dictionary is saved.
        problems: what of it could not be read, a sentence each.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    training: bool = False
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    problems: tuple[str, ...] = ()

    @property
    def hooks_in(self) -> tuple[str, ...]:
        return hook_names.names(self.provenance.get("hook_in") or self.config.get("hook"))

    @property
    def hooks_out(self) -> tuple[str, ...]:
        written = self.provenance.get("hook_out") or self.config.get("target_hook")
        return hook_names.names(written) or self.hooks_in

    @property
    def hooks(self) -> str:
        """What it reads and what it predicts, in words."""
        return hook_names.in_words(self.hooks_in, self.hooks_out)

    @property
    def is_transcoder(self) -> bool:
        return self.hooks_in != self.hooks_out

    @property
    def store(self) -> str:
        made_from = self.provenance.get("store") or {}
        return str(made_from.get("name") or self.config.get("store", ""))

    @property
    def sweep(self) -> str:
        """The sweep that the run was trained in; empty when it was trained alone."""
        return str(self.config.get("sweep") or "")

    @property
    def state(self) -> str:
        """One of "finished", "stopped", "training", "interrupted", "not begun"."""
        if self.finished:
            return "finished"
        if self.stopped:  # the others of its sweep may go on
            return "stopped"
        if self.training:
            return "training"
        return "interrupted" if self.last else "not begun"

    @property
    def kind(self) -> str:
        dictionary = self.config.get("dictionary")
        return str(dictionary.get("kind", "")) if isinstance(dictionary, dict) else ""

    @property
    def d_sae(self) -> int | None:
        dictionary = self.config.get("dictionary")
        return dictionary.get("d_sae") if isinstance(dictionary, dict) else None

    @property
    def final(self) -> dict[str, float]:
        """The numbers of the evaluation by name, without those of single hooks."""
        evaluation = self.evaluation or {}
        return only_numbers(evaluation.get("reconstruction")) | only_numbers(evaluation.get("downstream"))

    @property
    def by_hook(self) -> dict[str, dict[str, float]]:
        """What was measured at each hook alone, of a dictionary that rebuilds several."""
        found = (self.evaluation or {}).get("by_hook")
        return {str(hook): only_numbers(some) for hook, some in found.items()} if isinstance(found, dict) else {}


def only_numbers(section: Any) -> dict[str, float]:
    """The numbers of a part of an evaluation; none where it is damaged."""
    there = section.items() if isinstance(section, dict) else ()
    return {str(name): value for name, value in there if isinstance(value, int | float)}


def read_run(folder: Path) -> RunHistory:
    """Read what is there. A damaged file costs its own part and a sentence in ``problems``, not the run."""
    files = RunFiles(folder)
    problems: list[str] = []
    config: dict[str, Any] = {}
    if files.config.exists():
        try:
            config = yaml.safe_load(files.config.read_text())
            if not isinstance(config, dict):
                raise ValueError("it holds no keys and values")
        except (OSError, ValueError, yaml.YAMLError) as error:
            config = {}
            problems.append(f"{str(files.config)!r} cannot be read ({' '.join(str(error).split())}); restore it.")
    lines, stopped, broken = read_lines(files.metrics, POINTS)
    if broken:
        problems.append(f"{str(files.metrics)!r} has {broken} unreadable lines, which are left out of the curves.")
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}
    finished = files.dictionary.exists()
    try:
        evaluation = read_json(files.evaluation) if files.evaluation.exists() else None
        if not isinstance(evaluation, dict | None):
            evaluation = None
            raise UserError(f"{str(files.evaluation)!r} holds no keys and values; evaluate the run again.")
    except UserError as error:
        problems.append(str(error))
    try:
        provenance = describe(files.dictionary)["provenance"] if finished else {}
    except UserError as error:
        problems.append(str(error))
    if not config and not finished:
        problems.append(f"{str(folder)!r} holds neither a configuration nor a dictionary; delete it if it is no run.")
    return RunHistory(
        name=folder.name,
        config=config,
        curves=columns(lines),
        last=lines[-1] if lines else {},
        stopped=stopped,
        evaluation=evaluation,
        provenance=provenance,
        finished=finished,
        problems=tuple(problems),
    )


def read_lines(path: Path, most: int) -> tuple[list[dict[str, float]], str, int]:
    """About ``most`` lines of a metrics.jsonl, evenly spaced, the last among them.

    Returns:
        The numbers of each line; why the run stopped, or ""; and how many of the lines could not be read. The last one
        does not count there: a run that is training may be writing it.
    """
    rows = path.read_text().splitlines() if path.exists() else []
    stride = max(1, -(-len(rows) // most))
    evenly = set(range(len(rows) - 1, -1, -stride))
    last_whole = max(0, len(rows) - 2)  # where the last is half a line, or says why the run stopped
    lines, stopped, broken = [], "", 0
    for number in sorted(evenly | {last_whole} if rows else evenly):
        try:
            line = json.loads(rows[number])
            stopped = str(line.get("stopped", ""))
            if not stopped:
                lines.append({name: value for name, value in line.items() if isinstance(value, int | float)})
        except (ValueError, AttributeError):
            broken += number < len(rows) - 1
    return lines, stopped, broken


def columns(lines: Sequence[dict[str, float]]) -> dict[str, list[float | None]]:
    """Metric -> one value a line, None where the line lacks it."""
    names = dict.fromkeys(name for line in lines for name in line)
    values = {name: [line.get(name) for line in lines] for name in names}
    if "wall_seconds" in values:
        values["wall_seconds"] = continued(values["wall_seconds"])
    return values


def continued(seconds: Sequence[float | None]) -> list[float | None]:
    """Seconds of training in all, out of those since the last start: every resume counts from 0 again."""
    before, last, total = 0.0, 0.0, list[float | None]()
    for value in seconds:
        if value is not None:
            before, last = before + (last if value < last else 0.0), value
        total.append(None if value is None else before + value)
    return total


def differing(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Dotted configuration keys whose values are not the same in all runs -> the value in each; None where absent."""
    flat = [flattened(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key != "name")
    rows = {key: [values.get(key) for values in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
