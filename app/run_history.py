"""One training run as it lies on disk: configuration, curves, evaluation. Readable while the run is training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from activation_store.errors import UserError
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
        last: the last logged line.
        evaluation: evaluation.json, or None.
        provenance: hooks, model and store of the saved dictionary; empty while the run trains.
        finished: whether the dictionary is saved.
        problems: what of it could not be read, a sentence each.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    problems: tuple[str, ...] = ()

    @property
    def hook_in(self) -> str:
        return str(self.provenance.get("hook_in") or self.config.get("hook", ""))

    @property
    def hook_out(self) -> str:
        return str(self.provenance.get("hook_out") or self.config.get("target_hook") or self.hook_in)

    @property
    def is_transcoder(self) -> bool:
        return self.hook_in != self.hook_out

    @property
    def store(self) -> str:
        made_from = self.provenance.get("store") or {}
        return str(made_from.get("name") or self.config.get("store", ""))

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
        """The numbers of the evaluation by name; where there is none, of the last logged batch."""
        if self.evaluation is None:
            return {}
        sections = (self.evaluation.get("reconstruction"), self.evaluation.get("downstream"))
        return {name: value for section in sections if section for name, value in section.items()}


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
    lines, broken = read_lines(files.metrics)
    if broken:
        problems.append(f"{str(files.metrics)!r} has {broken} unreadable lines, which are left out of the curves.")
    evaluation: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}
    finished = files.dictionary.exists()
    try:
        evaluation = read_json(files.evaluation) if files.evaluation.exists() else None
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
        curves=columns(thinned(lines, POINTS)),
        last=lines[-1] if lines else {},
        evaluation=evaluation,
        provenance=provenance,
        finished=finished,
        problems=tuple(problems),
    )


def read_lines(path: Path) -> tuple[list[dict[str, float]], int]:
    """The logged lines of a metrics.jsonl, and how many could not be read.

    The last one does not count: a run that is training may be writing it.
    """
    text = path.read_text() if path.exists() else ""
    lines, broken = [], 0
    rows = text.splitlines()
    for number, row in enumerate(rows):
        try:
            line = json.loads(row)
            lines.append({name: value for name, value in line.items() if isinstance(value, int | float)})
        except (ValueError, AttributeError):
            broken += number < len(rows) - 1
    return lines, broken


def thinned(lines: Sequence[dict[str, float]], most: int) -> list[dict[str, float]]:
    """At most about ``most`` of the lines, evenly spaced, the last among them."""
    stride = max(1, -(-len(lines) // most))
    return list(lines[::-1][::stride][::-1])


def columns(lines: Sequence[dict[str, float]]) -> dict[str, list[float | None]]:
    """Metric -> one value a line, None where the line lacks it."""
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name) for line in lines] for name in names}


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
