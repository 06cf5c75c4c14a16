"""What can be asked of an evaluation, and what it found, as a run keeps it in evaluation.json."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from activation_store.disk import replace_text
from dictlearn.workspace import RunFiles, Workspace, read_json

if TYPE_CHECKING:
    import pandas as pd

    from activation_store.store import Store


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a trained dictionary on held-out documents: reconstruction, sparsity, and what splicing it in costs."""

    run: Annotated[str, tyro.conf.Positional]
    """Name of the run."""
    store: str | None = None
    """Store to evaluate on; the one the run was trained on when not given."""
    rows: int = 65_536
    """Held-out rows (tokens) to measure reconstruction on."""
    tokens: int = 16_384
    """Held-out tokens to run the spliced model on; 0 skips the language model."""
    batch_size: int = 4096
    """Rows per batch."""
    k: int | None = None
    """Latents active per row instead of those of training, for kinds with a k to choose; printed, but not kept."""


@dataclass(frozen=True)
class Evaluation:
    """Everything `dictlearn evaluate` found, as it stands in evaluation.json (densities are in the feature index).

    ``reconstruction`` and ``downstream`` are `dictlearn.metrics.reconstruction.Reconstruction` (without its densities)
    and `dictlearn.metrics.downstream.Downstream` as dicts; the second is None when no tokens were asked for, and for
    dictionaries whose outputs cannot be put in place together. ``by_hook`` has, of dictionaries that rebuild several
    hooks, each one's fvu, and for those just named what it costs to replace that hook alone.
    """

    run: str
    store: str
    store_fingerprint: str
    dictionary_fingerprint: str
    asked: dict[str, int]
    hook_in: str | list[str]
    hook_out: str | list[str]
    split: str
    reconstruction: dict[str, float]
    downstream: dict[str, float] | None
    by_hook: dict[str, dict[str, float]] = field(default_factory=dict)


def asked(config: EvaluateConfig) -> dict[str, int]:
    """The numbers that an evaluation depends on: one with the same is not made again."""
    numbers = {"rows": config.rows, "tokens": config.tokens, "batch_size": config.batch_size, "k": config.k}
    return {name: number for name, number in numbers.items() if number is not None}


def fingerprint(store: Store) -> str:
    """Of all stores that the numbers come from: another harvest of an aligned one makes them stale too."""
    return "+".join(each.fingerprint for each in store.together)


def write_evaluation(evaluation: Evaluation, files: RunFiles) -> None:
    replace_text(files.evaluation, json.dumps(asdict(evaluation), indent=2) + "\n")


def read_evaluation(files: RunFiles) -> Evaluation | None:
    """The evaluation of a run, when it has one of this version; of which dictionary, it says."""
    if not files.evaluation.exists():
        return None
    record = read_json(files.evaluation)
    names = {f.name for f in fields(Evaluation)}
    needed = {f.name for f in fields(Evaluation) if f.default_factory is MISSING}
    return Evaluation(**record) if needed <= set(record) <= names else None


def evaluations(workspace: str | Path = "workspace") -> pd.DataFrame:
    """Every evaluated run of a workspace, a row each: the run, its store and hooks, then every metric by its name."""
    import pandas as pd

    there = Workspace(Path(workspace))
    found = [read_evaluation(there.run(name)) for name in there.runs()]
    return pd.DataFrame(
        {
            "run": e.run,
            "store": e.store,
            "hook_in": e.hook_in,
            "hook_out": e.hook_out,
            **e.reconstruction,
            **(e.downstream or {}),
        }
        for e in found
        if e is not None
    )
