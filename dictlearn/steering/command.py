"""What the command line can ask of steering, and the refusals that need neither torch nor a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from activation_store.errors import UserError
from activation_store.harvest.language_model import ModelSpec, load_tokenizer, model_of, resolve_model
from activation_store.progress import NoProgress, Progress
from dictlearn.dictionaries.description import describe, hooks_of
from dictlearn.hook_names import check_editable
from dictlearn.steering.choice import check_latent, choose_hook
from dictlearn.workspace import Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformer_lens.model_bridge import TransformerBridge

    from dictlearn.steering.directions import Direction
    from dictlearn.steering.experiment import Steering

SIGNS = {"plus": (1,), "minus": (-1,), "both": (1, -1)}


@dataclass(frozen=True)
class SteerConfig:
    """Add what a latent writes, or a difference of means, at every position, and see what the model then says.

    How much is added is found for you: as much as moves the next token after the prompts by a KL.
    """

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """Name of the run; leave it out to steer by --toward and --away."""
    latent: Annotated[int | None, tyro.conf.Positional, tyro.conf.arg(metavar="LATENT")] = None
    """Number of the latent."""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--prompts"])] = ()
    """Texts to continue; BOS is put in front. Strengths are found for all of them together."""
    kl: tuple[float, ...] = (0.1, 0.25)
    """KL between the next token's distributions without and with steering to reach, in nats, the mean over prompts."""
    sign: Literal["plus", "minus", "both"] = "both"
    """Add the direction, take it away, or show both."""
    watch: tuple[str, ...] = ()
    """Texts whose first token's log-probability after the prompts is shown before and after."""
    toward: Path | None = None
    """Text file whose lines have a concept; their mean activation minus that of --away is the direction."""
    away: Path | None = None
    """Text file whose lines lack it."""
    hook: str | None = None
    """Where to steer: any hook with --toward and --away, and of a run that rebuilds several, one of these."""
    model: str | None = None
    """Language model, with --toward and --away: bundled (when not given), a folder, or a hub name."""
    samples: int = 1
    """Continuations to draw of each prompt, at each strength; 0 for none."""
    tokens: int = 50
    """Length of a continuation, in tokens."""
    temperature: float = 1.0
    """Divides the logits; below 1 likely tokens become likelier."""
    top_k: int = 30
    """Draw from so many of the likeliest tokens (the published setting); 0 for all."""
    top_p: float = 0.3
    """Of these, draw from as many as it takes to reach this probability (the published setting); 1 for all."""
    seed: int = 0
    """Decides what is drawn, the same for steered and unsteered."""
    device: str = "cpu"
    """Device to run the model on."""


@dataclass(frozen=True)
class SteerPlan:
    """What was settled before anything was loaded.

    Attributes:
        hook: where the direction is added, as the model calls it.
        prompts: text -> its token ids, BOS first where the model has one.
        watched: ids of the tokens to tell about.
        folder, written_hook: of the dictionary, and the hook as it calls it; with texts None.
        toward, away: token ids of the texts of a difference of means; with a run none.
    """

    spec: ModelSpec
    tokenizer: Tokenizer
    hook: str
    prompts: dict[str, list[int]]
    watched: list[int]
    folder: Path | None = None
    written_hook: str | None = None
    toward: tuple[list[int], ...] = ()
    away: tuple[list[int], ...] = ()


def check(config: SteerConfig, workspace: Workspace) -> SteerPlan:
    """Everything that can be refused before torch is imported.

    Raises:
        UserError: a number out of range, no prompt or one that does not fit with its continuation into the context;
            neither a latent nor texts, or both; an unknown or unfinished run, a latent it does not have, several hooks
            and none chosen; an unknown or changed model; a hook it does not have, or that cannot be edited.
    """
    _check_numbers(config)
    if (config.run is None) == (config.toward is None and config.away is None):
        raise UserError(
            "Name what to steer with: a run and a latent, or --toward FILE, --away FILE and --hook, and not both."
        )
    if config.run is None:
        spec, hook, found = _of_texts(config)
    else:
        spec, hook, found = _of_run(config, workspace)
    check_editable(hook)
    tokenizer = load_tokenizer(spec)
    prompts = {text: _tokens(spec, tokenizer, text, "prompt", config.tokens) for text in config.prompt}
    watched = [tokenizer.encode(text, add_special_tokens=False).ids[0] for text in config.watch if text]
    if len(watched) < len(config.watch):
        raise UserError("A text to --watch is empty; give the text of the next token, such as ' self'.")
    if config.run is None:
        found = {name: tuple(_tokens(spec, tokenizer, line, "line") for line in lines) for name, lines in found.items()}
    return SteerPlan(spec, tokenizer, hook, prompts, watched, **found)


def run_steer(config: SteerConfig, workspace: Workspace, progress: Progress | None = None) -> Steering:
    """Find the strengths, and say what they do.

    Raises:
        UserError: see `check`; also a device that is not there, and texts whose means do not differ.
    """
    plan = check(config, workspace)
    progress = progress or NoProgress()
    from activation_store.harvest.language_model import load_language_model
    from dictlearn.steering.experiment import experiment
    from dictlearn.steering.sampling import Sampling

    with progress.task("Loading the model", total=1, unit="model") as task:
        model = load_language_model(plan.spec, config.device)
        task.advance()
    return experiment(
        model,
        _direction(config, plan, model),
        plan.prompts,
        config.kl,
        SIGNS[config.sign],
        Sampling(config.samples, config.tokens, config.temperature, config.top_k, config.top_p, config.seed),
        plan.tokenizer,
        plan.watched,
        progress,
    )


def _direction(config: SteerConfig, plan: SteerPlan, model: TransformerBridge) -> Direction:
    import torch

    from dictlearn.loading import load
    from dictlearn.steering.detection import text_activations
    from dictlearn.steering.directions import difference_of_means, direction, of_latent

    if plan.folder is not None and config.latent is not None:
        written = of_latent(load(plan.folder), config.latent, plan.written_hook)
        return direction(written.unit, plan.hook, f"{written.name} of {config.run}")
    skip_first = plan.spec.bos_token_id is not None
    having, lacking = (torch.cat(text_activations(model, plan.hook, t, skip_first)) for t in (plan.toward, plan.away))
    return difference_of_means(having, lacking, plan.hook, f"mean of {config.toward} minus mean of {config.away}")


def _check_numbers(config: SteerConfig) -> None:
    if not config.prompt or not all(config.prompt):
        raise UserError("No prompt was given, or an empty one; give the text to continue with --prompt.")
    if not config.kl or not all(0 < kl < float("inf") for kl in config.kl):
        raise UserError(f"kl is {' '.join(map(str, config.kl)) or 'empty'}; give numbers above 0, in nats.")
    if not 0 < config.temperature < float("inf"):
        raise UserError(f"temperature is {config.temperature}; it must be above 0.")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p is {config.top_p}; it must be above 0 and at most 1.")
    for name, least in (("top_k", 0), ("samples", 0), ("tokens", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least {least}.")


def _of_run(config: SteerConfig, workspace: Workspace) -> tuple[ModelSpec, str, dict[str, Any]]:
    """The model, the hook as the model knows it, and what the plan needs of the dictionary."""
    run = str(config.run)
    if config.latent is None:
        raise UserError(f"Name a latent of {run!r} too, as in `dictlearn steer {run} 123`.")
    if config.model is not None:
        raise UserError(f"The run {run!r} knows its own model; leave --model out.")
    files = workspace.existing_run(run)
    files.refuse_unfinished()
    folder = files.dictionary if files.dictionary.exists() else files.folder
    description = describe(folder)
    made_from: dict[str, Any] = description.get("provenance") or {}
    if not {"hook_in", "hook_out", "model"} <= made_from.keys():
        raise UserError(
            f"The dictionary of {run!r} does not say which model and hooks it was trained on, so there is nothing to "
            "steer; name a run that dictlearn trained."
        )
    check_latent(config.latent, int(description["config"]["d_sae"]))
    written_hook = choose_hook(hooks_of(made_from)[1], config.hook)
    store, _, hook = written_hook.rpartition(":")
    # A run names aligned stores as it was told to, by a path or a URL perhaps; their hooks have the last part of it.
    of_store = {
        Path(other["name"]).name.removesuffix(".zarr"): other["model"] for other in made_from.get("aligned_stores", [])
    }
    trained_on = of_store[store] if store else made_from["model"]
    spec = model_of(trained_on, f"{run!r} was trained on it")
    return spec, hook, {"folder": folder, "written_hook": written_hook}


def _of_texts(config: SteerConfig) -> tuple[ModelSpec, str, dict[str, Any]]:
    """The model, the hook, and the lines of each file."""
    if config.toward is None or config.away is None or config.hook is None:
        raise UserError("A difference of means needs --toward FILE, --away FILE and --hook; give all three.")
    spec = resolve_model(config.model or "bundled")
    spec.hook_shape(config.hook)
    return spec, config.hook, {"toward": _lines(config.toward), "away": _lines(config.away)}


def _lines(path: Path) -> Sequence[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The text file {str(path)!r} cannot be read ({error}); give a file with a text a line."
        ) from None
    if not lines:
        raise UserError(f"The text file {str(path)!r} has no text; give a file with a text a line.")
    return lines


def _tokens(spec: ModelSpec, tokenizer: Tokenizer, text: str, what: str, more: int = 0) -> list[int]:
    """BOS, where there is one, and the tokens of a text that fits into the context with ``more`` behind it."""
    ids = list(tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise UserError(f"The {what} {text!r} has no tokens for {spec.name}; give some text.")
    ids = ids if spec.bos_token_id is None else [spec.bos_token_id, *ids]
    if spec.n_ctx is not None and len(ids) + more > spec.n_ctx:
        said, do = f"has {len(ids)} tokens", "shorten it"
        if more:
            said, do = f"{said}, and {more} are to follow", f"{do}, or ask for fewer --tokens"
        raise UserError(f"The {what} {text[:30]!r} {said}, but {spec.name} reads {spec.n_ctx} at most; {do}.")
    return ids
