"""Runs side by side: which of them compare, their numbers, and the curves that their sparsities make.

Runs compare where they have the same input and the same target and were measured on the same rows of one store.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dictlearn import hook_names
from dictlearn.training.configs import TrainConfig
from dictlearn_app.run_history import RunHistory, differing, flattened

SEEDS = frozenset({"seed", "order_seed"})
BESIDES = frozenset({"name", "sweep", "store", "aligned_stores", "hook", "target_hook", *TrainConfig.FREE}) | SEEDS
"""Of a configuration: what says nothing of how a run was trained, or is the same in all that compare."""

SPARSITY = frozenset(
    f"dictionary.{name}" for name in ("k", "alpha", "rounds", "width", "l1_weight", "l0_weight", "target_l0")
)
"""What moves a run along the curve of its kind."""

DERIVED = {"alive_share": "dead_share", "ce_increase": "ce_spliced"}
"""Numbers that follow from those of an evaluation, and the one that each is listed after."""

SPARSENESS = ("rows", "l0", "dead_share", "rare_share")
"""What a dictionary of several hooks has once."""

LABELLED = 2
"""Settings named beside a kind, where several curves are of that kind."""


# --- which runs compare -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The finished runs of one input and one target on one store.

    Attributes:
        store: that they were evaluated on; trained on, where they are not evaluated.
        hooks: what they read and predict, in words.
        runs: by name.
    """

    store: str
    hooks: str
    runs: tuple[RunHistory, ...]

    @property
    def evaluated(self) -> list[RunHistory]:
        return [run for run in self.runs if run.final]

    @property
    def waiting(self) -> list[RunHistory]:
        return [run for run in self.runs if not run.final]


def groups(runs: Iterable[RunHistory]) -> list[Group]:
    """The groups of the finished runs, that with the most evaluated ones first."""
    found: dict[tuple[str, str], list[RunHistory]] = {}
    for run in runs:
        if run.finished:
            found.setdefault((evaluated_on(run), run.hooks), []).append(run)
    made = [Group(*key, tuple(sorted(some, key=lambda run: run.name))) for key, some in found.items()]
    return sorted(made, key=lambda group: (-len(group.evaluated), -len(group.runs), group.store, group.hooks))


def evaluated_on(run: RunHistory) -> str:
    """The name of the store."""
    return str((run.evaluation or {}).get("store") or run.store)


@dataclass(frozen=True)
class Measured:
    """What a run was measured on: numbers of two that differ in any of this do not compare.

    Attributes:
        fingerprint: of the store; "" in evaluations of older versions.
        split: the documents, such as "held-out".
        rows: of the reconstruction.
        tokens: through the spliced model; None where it was not run.
    """

    fingerprint: str
    split: str
    rows: int | None
    tokens: int | None

    def compares(self, other: Measured) -> bool:
        mine, others = (self.fingerprint, self.split, self.rows), (other.fingerprint, other.split, other.rows)
        return mine == others and (self.tokens == other.tokens or None in (self.tokens, other.tokens))

    def __str__(self) -> str:
        rows = "an unknown number of rows" if self.rows is None else f"{self.rows:,} rows"
        tokens = "" if self.tokens is None else f" and {self.tokens:,} tokens"
        store = f" of {self.fingerprint.removeprefix('sha256:')[:8]}" if self.fingerprint else ""
        return f"{rows}{tokens}{store}"


def measured(run: RunHistory) -> Measured:
    evaluation = run.evaluation or {}
    tokens = [count(part, "tokens") for part in (run.final, *run.by_hook.values())]
    return Measured(
        fingerprint=str(evaluation.get("store_fingerprint") or ""),
        split=str(evaluation.get("split") or ""),
        rows=count(evaluation.get("reconstruction"), "rows"),
        tokens=next((number for number in tokens if number is not None), None),
    )


def count(section: Any, name: str) -> int | None:
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if isinstance(value, int) else None


def unlike(runs: Sequence[RunHistory]) -> tuple[Measured | None, dict[Measured, list[RunHistory]]]:
    """What most of the runs were measured on, and those that were measured on something else."""
    found = {run.name: measured(run) for run in runs}
    if not found:
        return None, {}
    known = Counter(one for one in found.values() if one.tokens is not None) or Counter(found.values())
    (most, _), *_ = known.most_common()
    others: dict[Measured, list[RunHistory]] = {}
    for run in runs:
        if not found[run.name].compares(most):
            others.setdefault(found[run.name], []).append(run)
    return most, others


# --- numbers ----------------------------------------------------------------------------------------------------------


def numbers(run: RunHistory) -> dict[str, float]:
    """Everything measured, with the shares and differences that pages draw beside what they follow from."""
    measured_, found = run.final, dict[str, float]()
    derived = {}
    if "dead_share" in measured_:
        derived["alive_share"] = 1 - measured_["dead_share"]
    if {"ce_spliced", "ce_clean"} <= measured_.keys():
        derived["ce_increase"] = measured_["ce_spliced"] - measured_["ce_clean"]
    for name, value in measured_.items():
        found[name] = value
        found |= {new: derived[new] for new, after in DERIVED.items() if after == name and new in derived}
    return found


def at_hook(run: RunHistory, hook: str) -> RunHistory:
    """The run with the numbers of one of its hooks in place of those of all; how sparse it is stays."""
    evaluation = run.evaluation or {}
    sparsity = {name: value for name, value in run.final.items() if name in SPARSENESS}
    alone = {"reconstruction": sparsity | run.by_hook.get(hook, {}), "downstream": None}
    return replace(run, evaluation=evaluation | alone)


def hooks_measured(runs: Sequence[RunHistory]) -> list[str]:
    """The hooks that any of the runs was measured at alone."""
    return list(dict.fromkeys(hook for run in runs for hook in run.by_hook))


def metric_names(runs: Sequence[RunHistory]) -> list[str]:
    """What any of the runs was measured by, in the order of the evaluations."""
    return list(dict.fromkeys(name for run in runs for name in numbers(run)))


def ordered(runs: Sequence[RunHistory], sort: str, ascending: bool) -> list[RunHistory]:
    """By a metric, or by "run" or "kind"; runs that lack it come last. Without one: as curves are drawn."""
    if sort in ("run", "kind"):
        return sorted(runs, key=lambda run: (run.kind if sort == "kind" else run.name, run.name), reverse=not ascending)
    if sort in metric_names(runs):
        found = [(numbers(run).get(sort), run) for run in runs]
        there = sorted((one for one in found if usable(one[0])), key=lambda one: one[0], reverse=not ascending)
        return [run for _, run in there] + [run for value, run in found if not usable(value)]
    return [run for line in curves(runs) for point in line.points for run in point]


def usable(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def as_csv(runs: Sequence[RunHistory], at: str = "") -> str:
    """A line for each run, every number with all of its digits; ``at`` is the hook that they are of, "" for all."""
    names = metric_names(runs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "kind", "latents", "seed", "store", "store_fingerprint", "hook_in", "hook_out", "at", "split", *names]
    )
    for run in runs:
        found, on = numbers(run), measured(run)
        settings = [run.kind, run.d_sae, run.config.get("seed")]
        hooks = ["+".join(run.hooks_in), "+".join(run.hooks_out)]
        writer.writerow(
            [
                run.name,
                *("" if value is None else value for value in settings),
                evaluated_on(run),
                on.fingerprint,
                *hooks,
                at,
                on.split,
                *(found.get(name, "") for name in names),
            ]
        )
    return text.getvalue()


# --- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Runs of one kind whose settings are the same but for their sparsity.

    Attributes:
        label: the kind, and what tells it from other curves of that kind.
        points: the runs of each sparsity, which differ in their seeds; sparsest first.
    """

    label: str
    points: tuple[tuple[RunHistory, ...], ...]


def curves(runs: Sequence[RunHistory]) -> list[Curve]:
    """The runs as curves, ordered by label."""
    settings = {run.name: relevant(run) for run in runs}
    lines: dict[str, dict[str, list[RunHistory]]] = {}
    for run in runs:
        own = settings[run.name]
        line = written({key: value for key, value in own.items() if key not in SPARSITY} | {"kind": run.kind})
        lines.setdefault(line, {}).setdefault(written(own), []).append(run)
    labels = labelled({line: next(iter(points.values()))[0] for line, points in lines.items()}, settings)
    made = [
        Curve(labels[line], tuple(tuple(point) for point in sorted(points.values(), key=mean_l0)))
        for line, points in lines.items()
    ]
    return sorted(made, key=lambda curve: curve.label)


def relevant(run: RunHistory) -> dict[str, Any]:
    return {key: value for key, value in flattened(run.config).items() if key not in BESIDES}


def written(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def mean_l0(point: Sequence[RunHistory]) -> float:
    found = [value for run in point if usable(value := run.final.get("l0"))]
    return sum(found) / len(found) if found else math.inf


def labelled(first: Mapping[str, RunHistory], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each curve is called, from its first run: its kind, and of several of one kind what differs among them."""
    labels: dict[str, str] = {}
    for kind in dict.fromkeys(run.kind for run in first.values()):
        lines = {line: settings[run.name] for line, run in first.items() if run.kind == kind}
        keys = dict.fromkeys(key for own in lines.values() for key in own if key not in SPARSITY)
        differing = [key for key in keys if len({written({key: own.get(key)}) for own in lines.values()}) > 1]
        for number, (line, own) in enumerate(lines.items(), start=1):
            named = [f"{key.split('.')[-1]} {own.get(key)}" for key in differing[:LABELLED]]
            label = ", ".join([kind or "dictionary", *named]).replace("_", " ")
            taken = label in labels.values()
            labels[line] = f"{label} ({number})" if taken else label
    return labels


def told_apart(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """The settings that differ, but for those that only some kinds have and that are the same in all of these."""
    settings = differing(runs)
    kinds = {run.kind for run in runs}

    def says_more_than_the_kind(values: list[Any]) -> bool:
        return len(kinds) == 1 or len({written({"": value}) for value in values if value is not None}) > 1

    return {key: values for key, values in settings.items() if key != "sweep" and says_more_than_the_kind(values)}


# --- two of them ------------------------------------------------------------------------------------------------------


def two(runs: Sequence[RunHistory], indexed: Collection[str] = ()) -> tuple[str, str] | None:
    """Two runs to match the latents of: seeds of one setting rather than others, indexed ones first, then the best."""
    if len(runs) < 2:
        return None
    twins = [point[:2] for curve in curves(runs) for point in curve.points if len(point) > 1]
    with_pages = [run for run in runs if run.name in indexed]
    candidates = [*twins, tuple(with_pages[:2]) if len(with_pages) > 1 else tuple(runs[:2])]

    def rank(pair: Sequence[RunHistory]) -> tuple[int, float]:
        return -sum(run.name in indexed for run in pair), sum(run.final.get("fvu", math.inf) for run in pair)

    first, second = min(candidates, key=rank)
    return first.name, second.name


def other_target(a: RunHistory, b: RunHistory) -> str:
    """Why the decoder rows of two runs may not compare, a sentence; empty where they write to the same hooks."""
    if a.hooks_out == b.hooks_out:
        return ""
    return (
        f"{a.name} writes to {hook_names.together(a.hooks_out)} and {b.name} to {hook_names.together(b.hooks_out)}: "
        "cosines between the two mean something where both are the residual stream, or are added to it."
    )
