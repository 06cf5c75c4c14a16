"""`dictlearn evaluate`: the refusals that need no torch, then the measurement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from activation_store.errors import UserError
from activation_store.foreign import has_tokens
from activation_store.progress import NoProgress, Progress
from dictlearn.dictionaries import config_class
from dictlearn.dictionaries.description import describe, dictionary_fingerprint, hooks_of
from dictlearn.metrics.record import EvaluateConfig, Evaluation, asked, fingerprint, read_evaluation, write_evaluation
from dictlearn.workspace import Workspace

if TYPE_CHECKING:
    from activation_store.store import Store


def run_evaluate(config: EvaluateConfig, workspace: Workspace, progress: Progress | None = None) -> Evaluation:
    """Measure a run and write its evaluation.json, which is that of the k of training.

    Raises:
        UserError: no such run or store, a store of another model, a model that is gone or has changed, no held-out
            rows, numbers or a k that cannot be.
    """
    _check_numbers(config)
    files = workspace.existing_run(config.run)
    files.refuse_unfinished()
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
    made_of = fingerprint(store), dictionary_fingerprint(files.dictionary), asked(config)
    if (
        there is not None
        and config.k is None
        and made_of == (there.store_fingerprint, there.dictionary_fingerprint, there.asked)
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


def _check_numbers(config: EvaluateConfig) -> None:
    for name, least in (("rows", 1), ("tokens", 0), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least {least}.")


def _check_k(k: int, description: Mapping[str, Any]) -> None:
    kind, d_sae = description["kind"], description["config"]["d_sae"]
    if not getattr(config_class(kind), "k_is_free", False):
        raise UserError(f"How many latents of kind {kind!r} are active is settled in training; leave k out.")
    if not 1 <= k <= d_sae:
        raise UserError(f"k is {k}; it must lie between 1 and the {d_sae} latents of d_sae.")


def _refuse_without_text_or_model(store: Store) -> None:
    from activation_store.harvest.language_model import model_of

    alone = "--tokens 0 measures reconstruction alone"
    if not has_tokens(store):
        raise UserError(
            f"The store {store.name!r} has no text to run the language model on: it was imported from a file without "
            f"tokens; {alone}."
        )
    try:
        model_of(store.provenance["model"], f"the store {store.name!r} was harvested from it")
    except UserError as refusal:
        raise UserError(f"{str(refusal).rstrip('.')}; {alone}.") from refusal
