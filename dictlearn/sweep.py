"""Many runs from one file, trained together: each batch is read once.

    name: widths                      the sweep; its runs are called widths-k16-seed0 and so on
    store: code                       what all runs have in common, as in a run's own configuration
    hook: blocks.2.hook_resid_post
    dictionary: {kind: topk, d_sae: 4096}
    grid:                             every combination of these values
      dictionary.k: [16, 32, 64]
      seed: [0, 1]
    list:                             each of these, with every combination of the grid
      - {}
      - {hook: blocks.1.hook_resid_post}
      - {name: codebook, dictionary: {kind: icfl, rounds: 8}}

A key with dots changes one value of a section; a section given whole replaces it. All runs see the same rows in the
same order (`order_seed`; `seed` when not given), whatever their own seeds.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_store.disk import replace_text
from activation_store.errors import UserError
from activation_store.progress import Progress
from dictlearn.training.command import Notify, check, train_group
from dictlearn.training.config_files import config_from_dict, read_yaml
from dictlearn.training.configs import TrainConfig
from dictlearn.workspace import NAME, Workspace

MOST = 256
"""Runs of one sweep: more is a slip of the pen."""


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file says it."""

    name: str
    configs: list[TrainConfig[Any]]
    text: str
    """Of the file."""


@dataclass(frozen=True)
class SweepPlan:
    """What `dictlearn train SWEEP.yaml --dry-run` prints."""

    runs: list[str]
    rows: int
    steps: int
    passes: float
    parameters: int
    bytes_in_memory: int
    mixing: str


def is_sweep(path: str | Path) -> bool:
    """Whether a configuration file describes many runs. Raises UserError when there is none, or it is not YAML."""
    return not {"grid", "list"}.isdisjoint(read_yaml(path))


def read_sweep(path: str | Path) -> Sweep:
    """The runs that a file asks for.

    Raises:
        UserError: a key or value that does not fit, two runs of one name, or too many.
    """
    record = read_yaml(path)
    where = repr(str(path))
    name = record.pop("name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: name is {name!r}; a sweep is called by letters, digits, '.', '_' and '-'.")
    grid, entries = record.pop("grid", None) or {}, record.pop("list", None) or [{}]
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise UserError(f"{where}: grid gives a list of values for each key, such as 'dictionary.k: [16, 32]'.")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: list holds an entry of keys and values for each run, such as '- {{seed: 1}}'.")
    for key in itertools.chain(grid, *entries):
        if not isinstance(key, str):
            raise UserError(f"{where}: {key!r} in grid or list is no key; write the name of a setting there.")
    for entry in entries:
        if not isinstance(entry.get("name", ""), str):
            raise UserError(f"{where}: the name {entry['name']!r} in list is not a word; put it between quotes.")
    record.setdefault("order_seed", record.get("seed", 0))
    configs = []
    for entry in entries:
        for values in itertools.product(*grid.values()):
            changes = entry | dict(zip(grid, values, strict=True))
            given = changes.pop("name", None)
            entry_changes = {key: value for key, value in changes.items() if key not in grid and given is None}
            in_grid = dict(zip(grid, values, strict=True))
            own = "-".join(
                filter(None, [given, *(_word(key, value) for key, value in {**entry_changes, **in_grid}.items())])
            )
            full = f"{name}-{own}" if own else name
            configs.append(config_from_dict(_changed(record, changes, where) | {"name": full}, f"{where}, run {full}"))
    names = [config.name for config in configs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two runs called {twice!r}; give the entries of list a name each.")
    if len(configs) > MOST:
        raise UserError(f"{where} asks for {len(configs)} runs, more than {MOST}; make several sweeps of it.")
    return Sweep(name, configs, Path(path).read_text(encoding="utf-8"))


def _word(key: str, value: Any) -> str:
    """What a change adds to a run's name: the last part of the key, and the value."""
    if isinstance(value, dict):
        return "-".join(_word(inner, of) for inner, of in value.items())
    return key.rpartition(".")[2].replace("_", "") + re.sub(r"[^A-Za-z0-9._-]", "", str(value))


def _changed(record: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of ``record`` with some values changed."""
    changed = copy.deepcopy(record)
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = changed
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{where}: {key} changes a value of {section}, which is {place!r} and has none.")
        place[last] = copy.deepcopy(value)
    return changed


def plan(sweep: Sweep, workspace: Workspace) -> SweepPlan:
    """What the sweep will do. Raises UserError for what `train` would refuse."""
    refuse_another(sweep, workspace)
    found = check(sweep.configs, workspace).plan
    return SweepPlan(
        [config.name for config in sweep.configs],
        found.rows,
        found.steps,
        found.passes,
        found.parameters,
        found.bytes_in_memory,
        found.mixing,
    )


def refuse_another(sweep: Sweep, workspace: Workspace) -> None:
    """Refuse the name of a sweep of other runs."""
    files = workspace.sweep(sweep.name)
    there = [config.name for config in read_sweep(files.config).configs] if files.config.exists() else None
    asked = [config.name for config in sweep.configs]
    if there not in (None, asked):
        raise UserError(
            f"The sweep {sweep.name!r} exists with the runs {', '.join(there or [])}, and now there are "
            f"{', '.join(asked)}; choose another name, or delete {str(files.folder)!r}."
        )


def run_sweep(sweep: Sweep, workspace: Workspace, progress: Progress, notify: Notify) -> None:
    """Train all runs of a sweep, or continue them (see `dictlearn.training.command.train_group`).

    Raises:
        UserError: the sweep of this name has other runs, or what `train` refuses.
    """
    refuse_another(sweep, workspace)
    checked = check(sweep.configs, workspace)
    files = workspace.sweep(sweep.name)
    if not files.config.exists() and os.environ.get("RANK", "0") == "0":  # under torchrun one process writes
        files.folder.mkdir(parents=True, exist_ok=True)
        replace_text(files.config, sweep.text)
    train_group(sweep.configs, workspace, files.checkpoints, sweep.name, progress, notify, checked)
