"""What the command line can ask of evaluation, and the refusals that need no torch."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from activation_store.errors import UserError
from activation_store.foreign import has_tokens
from activation_store.progress import NoProgress, Progress
from dictlearn.dictionaries import config_class
from dictlearn.dictionaries.description import describe, hooks_of
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
    asked: dict[str, int]
    hook_in: str | list[str]
    hook_out: str | list[str]
    split: str
    reconstruction: dict[str, float]
    downstream: dict[str, float] | None
    by_hook: dict[str, dict[str, float]] = field(default_factory=dict)


def run_evaluate(config: EvaluateConfig, workspace: Workspace, progress: Progress | None = None) -> Evaluation:
    """Measure a run and write its evaluation.json, which is that of the k of training.

    Raises:
        UserError: no such run or store, a store of another model, no held-out rows, a k that cannot be.
    """
    files = workspace.existing_run(config.run)
    if not files.dictionary.exists():
        raise UserError(
            f"The run {config.run!r} has not finished training; run `dictlearn train` on it again to continue."
        )
    description = describe(files.dictionary)
    if config.k is not None:
        _check_k(config.k, description)
    made_from = description["provenance"]
    aligned = made_from.get("aligned_stores", [])
    if aligned and config.store is not None:
        raise UserError(f"The run {config.run!r} is of several aligned stores; leave --store out.")
    name = config.store or made_from["store"]["name"]
    store = workspace.open_store(name, [other["name"] for other in aligned])
    for each, trained_on in zip(store.together, [made_from, *aligned], strict=True):
        model = each.manifest.provenance["model"]
        if model["fingerprint"] != trained_on["model"]["fingerprint"]:
            raise UserError(
                f"The store {each.name!r} was made by the model {model['name']!r}, the run {config.run!r} was "
                f"trained on {trained_on['model']['name']!r}; name a store of that model."
            )
    for hook in itertools.chain(*hooks_of(made_from)):
        if hook not in store.hooks:
            raise UserError(f"The store {store.name!r} has no hook {hook!r}, which the run {config.run!r} needs.")
    there = read_evaluation(files)
    if (
        there is not None
        and config.k is None
        and (there.store_fingerprint, there.asked) == (fingerprint(store), asked(config))
    ):
        return there
    if config.tokens:
        for each in store.together:
            _refuse_without_text_or_model(each)
    from dictlearn.metrics.evaluation import evaluate

    evaluation = evaluate(config, files, store, progress or NoProgress())
    if config.k is None:
        write_evaluation(evaluation, files)
    return evaluation


def _check_k(k: int, description: Mapping[str, Any]) -> None:
    kind, d_sae = description["kind"], description["config"]["d_sae"]
    if not getattr(config_class(kind), "k_is_free", False):
        raise UserError(f"How many latents of kind {kind!r} are active is settled in training; leave k out.")
    if not 1 <= k <= d_sae:
        raise UserError(f"k is {k}; it must lie between 1 and the {d_sae} latents of d_sae.")


def fingerprint(store: Store) -> str:
    """Of all stores that the numbers come from: another harvest of an aligned one makes them stale too."""
    return "+".join(each.fingerprint for each in store.together)


def _refuse_without_text_or_model(store: Store) -> None:
    from activation_store.harvest.language_model import resolve_model

    alone = "--tokens 0 measures reconstruction alone"
    if not has_tokens(store):
        raise UserError(
            f"The store {store.name!r} has no text to run the language model on: it was imported from a file without "
            f"tokens; {alone}."
        )
    try:
        resolve_model(store.provenance["model"]["name"])
    except UserError as refusal:
        raise UserError(f"{str(refusal).rstrip('.')}; {alone}.") from refusal


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


def asked(config: EvaluateConfig) -> dict[str, int]:
    """The numbers that an evaluation depends on: one with the same is not made again."""
    numbers = {"rows": config.rows, "tokens": config.tokens, "batch_size": config.batch_size, "k": config.k}
    return {name: number for name, number in numbers.items() if number is not None}


def write_evaluation(evaluation: Evaluation, files: RunFiles) -> None:
    temporary = files.evaluation.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    os.replace(temporary, files.evaluation)


def read_evaluation(files: RunFiles) -> Evaluation | None:
    """The evaluation of a run, when it has one of this version."""
    if not files.evaluation.exists():
        return None
    record = read_json(files.evaluation)
    names = {f.name for f in fields(Evaluation)}
    needed = {f.name for f in fields(Evaluation) if f.default_factory is MISSING}
    return Evaluation(**record) if needed <= set(record) <= names else None
