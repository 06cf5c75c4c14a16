"""What the command line can ask of evaluation, and the refusals that need no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from dictlearn.dictionaries.description import describe
from dictlearn.workspace import RunFiles, Workspace


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


@dataclass(frozen=True)
class Evaluation:
    """Everything `dictlearn evaluate` found, as it stands in evaluation.json (densities are in the feature index)."""

    run: str
    store: str
    hook_in: str
    hook_out: str
    split: str
    reconstruction: dict[str, float]
    downstream: dict[str, float] | None


def run_evaluate(config: EvaluateConfig, workspace: Workspace, progress: Progress | None = None) -> Evaluation:
    """Measure a run and write its evaluation.json.

    Raises:
        UserError: no such run or store, a store of another model, no held-out rows.
    """
    from activation_store.store import open_store

    files = workspace.existing_run(config.run)
    if not files.dictionary.exists():
        raise UserError(
            f"The run {config.run!r} has not finished training; run `dictlearn train` on it again to continue."
        )
    made_from = describe(files.dictionary)["provenance"]
    store = open_store(workspace.existing_store(config.store or made_from["store"]["name"]))
    if store.manifest.provenance["model"]["fingerprint"] != made_from["model"]["fingerprint"]:
        raise UserError(
            f"The store {store.path.name!r} was made by the model {store.manifest.provenance['model']['name']!r}, the run "
            f"{config.run!r} was trained on {made_from['model']['name']!r}; name a store of that model."
        )
    for hook in (made_from["hook_in"], made_from["hook_out"]):
        if hook not in store.hooks:
            raise UserError(f"The store {store.path.name!r} has no hook {hook!r}, which the run {config.run!r} needs.")
    from dictlearn.metrics.evaluation import evaluate

    evaluation = evaluate(config, files, store, progress or NoProgress())
    write_evaluation(evaluation, files)
    return evaluation


def write_evaluation(evaluation: Evaluation, files: RunFiles) -> None:
    temporary = files.evaluation.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    os.replace(temporary, files.evaluation)


def read_evaluation(files: RunFiles) -> dict[str, Any] | None:
    """The evaluation of a run, when it has one."""
    from dictlearn.workspace import read_json

    return read_json(files.evaluation) if files.evaluation.exists() else None
