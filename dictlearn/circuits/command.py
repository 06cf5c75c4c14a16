"""What the command line can ask of circuits, and the refusals that need neither torch nor a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from activation_store.errors import UserError
from activation_store.harvest.language_model import ModelSpec, load_tokenizer, resolve_model
from activation_store.progress import NoProgress, Progress
from dictlearn.circuits.hooks import layer_of
from dictlearn.dictionaries.description import describe, dictionary_fingerprint
from dictlearn.token_text import text_of
from dictlearn.workspace import Workspace


@dataclass(frozen=True)
class CircuitConfig:
    """Trace which transcoder features, heads and tokens made the prediction after a prompt; write the graph as JSON."""

    prompt: str
    """Text whose next token is explained; BOS is put in front."""
    transcoders: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--transcoder"])]
    """Names of the runs whose transcoders stand for MLPs, one per layer at most; other MLPs are error nodes."""
    name: str = "circuit"
    """Name of the graph in the workspace; a graph of that name is replaced."""
    model: str = "bundled"
    """Language model the transcoders were trained on: bundled, a folder, or a hub name."""
    max_logits: int = 10
    """Explain at most this many of the likeliest next tokens."""
    logit_probability: float = 0.95
    """Explain next tokens until their probabilities sum to this."""
    node_threshold: float = 0.8
    """Share of the influence that the kept nodes cover."""
    edge_threshold: float = 0.98
    """Share of the influence that the edges between them cover."""
    max_features: int = 2048
    """Trace the inputs of at most this many features, the most influential first; scores depend on it."""
    nulls: bool = True
    """Measure the scores of untrained and permuted transcoders too, beside the graph's own."""
    seed: int = 0
    """Decides those."""
    export: Path | None = None
    """Also write the graph in the JSON of circuit-tracer's viewer and Neuronpedia to this file."""


@dataclass(frozen=True)
class CircuitPlan:
    """What was settled before anything was loaded.

    Attributes:
        token_ids: the prompt, BOS first where the model has one.
        runs: layer -> name of the run.
        folders: layer -> folder of its dictionary.
        dropped_positions: (0,) when BOS was left out of what the transcoders saw.
    """

    spec: ModelSpec
    token_ids: list[int]
    text_of: Callable[[int], str]
    runs: dict[int, str]
    folders: dict[int, Path]
    dropped_positions: tuple[int, ...]


def check(config: CircuitConfig, workspace: Workspace) -> CircuitPlan:
    """Everything that can be refused before torch is imported.

    Raises:
        UserError: an empty prompt or one longer than the model's context; no transcoder, an unknown run, an
            autoencoder, a transcoder of another model, two for one layer; a number out of range.
    """
    if not config.prompt:
        raise UserError("The prompt is empty; give the text whose next token should be explained with --prompt.")
    if not config.transcoders:
        raise UserError("No transcoder was named; name the runs whose transcoders stand for MLPs with --transcoder.")
    for name in ("max_logits", "max_features"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    for name in ("logit_probability", "node_threshold", "edge_threshold"):
        if not 0 < getattr(config, name) <= 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be above 0 and at most 1.")
    workspace.graph(config.name)  # refuses what is no name
    if config.export is not None and (Path(config.export).is_dir() or not Path(config.export).parent.is_dir()):
        raise UserError(f"export is {str(config.export)!r}; it should be a file in a folder that is there.")
    spec = resolve_model(config.model)
    runs, folders, bos_left_out = _transcoders(config.transcoders, spec, workspace)
    tokenizer = load_tokenizer(spec)
    ids = list(tokenizer.encode(config.prompt, add_special_tokens=False).ids)
    if not ids:
        raise UserError(f"The prompt {config.prompt!r} has no tokens for {spec.name}; give some text.")
    token_ids = ids if spec.bos_token_id is None else [spec.bos_token_id, *ids]
    if spec.n_ctx is not None and len(token_ids) > spec.n_ctx:
        bos = "" if spec.bos_token_id is None else " with BOS"
        raise UserError(
            f"The prompt has {len(token_ids)} tokens{bos}, but {spec.name} reads {spec.n_ctx} at most; shorten it."
        )
    dropped = (0,) if bos_left_out and spec.bos_token_id is not None else ()
    return CircuitPlan(spec, token_ids, text_of(tokenizer), runs, folders, dropped)


def run_circuit(config: CircuitConfig, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Make the graph and write it into the workspace.

    Raises:
        UserError: see `check`; also a model that cannot be traced.
    """
    plan = check(config, workspace)
    from activation_store.harvest.language_model import load_language_model
    from dictlearn.circuits.attribution import attribute
    from dictlearn.circuits.circuit_tracer import export
    from dictlearn.circuits.graph import write
    from dictlearn.loading import load

    transcoders = {}
    for layer, folder in plan.folders.items():
        transcoders[layer] = load(folder)
        transcoders[layer].provenance = transcoders[layer].provenance | {
            "run": plan.runs[layer],
            "dictionary_fingerprint": dictionary_fingerprint(folder),
        }
    graph = attribute(
        load_language_model(plan.spec),
        transcoders,
        plan.token_ids,
        prompt=config.prompt,
        text_of=plan.text_of,
        model_record=plan.spec.provenance(),
        max_logits=config.max_logits,
        logit_probability=config.logit_probability,
        node_threshold=config.node_threshold,
        edge_threshold=config.edge_threshold,
        max_features=config.max_features,
        dropped_positions=plan.dropped_positions,
        nulls=config.nulls,
        seed=config.seed,
        progress=progress or NoProgress(),
    )
    path = write(graph, workspace.graph(config.name))
    if config.export is not None:
        export(graph, config.export)
    return path


def _transcoders(
    names: Sequence[str], spec: ModelSpec, workspace: Workspace
) -> tuple[dict[int, str], dict[int, Path], bool]:
    runs: dict[int, str] = {}
    folders: dict[int, Path] = {}
    bos_left_out = False
    for name in names:
        files = workspace.existing_run(name)
        files.refuse_unfinished()
        folder = files.dictionary if files.dictionary.exists() else files.folder
        made_from: dict[str, Any] = describe(folder).get("provenance") or {}
        if not {"hook_in", "hook_out", "model"} <= made_from.keys():
            raise UserError(
                f"The dictionary of {name!r} does not say which model and hooks it was trained on, so it cannot stand "
                "for an MLP; name a run that dictlearn trained."
            )
        layer = layer_of(made_from["hook_in"], made_from["hook_out"], name)
        known = "fingerprint" if made_from["model"]["fingerprint"] else "name"  # an import may know the name alone
        if made_from["model"][known] != getattr(spec, known):
            raise UserError(
                f"The transcoder {name!r} was trained on the model {made_from['model']['name']!r}, not on "
                f"{spec.name!r}; name that model with --model, or another run."
            )
        if layer >= spec.n_layers:
            raise UserError(f"The transcoder {name!r} is of layer {layer}, but {spec.name} has {spec.n_layers} layers.")
        if runs.get(layer) == name:
            raise UserError(f"The transcoder {name!r} was named twice; name it once.")
        if layer in runs:
            raise UserError(f"{runs[layer]!r} and {name!r} are both transcoders of layer {layer}; name one of them.")
        runs[layer], folders[layer] = name, folder
        bos_left_out |= bool(made_from.get("bos_left_out", True))
    return runs, folders, bos_left_out
