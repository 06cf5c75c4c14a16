"""What the command line can ask of training, and the refusals that need no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.loader import Loader
from activation_store.progress import NoProgress, Progress
from activation_store.seeds import derive_seed
from dictlearn.workspace import RunFiles, Workspace

if TYPE_CHECKING:
    from activation_store.store import Store

DictionaryConfig = TypeVar("DictionaryConfig")


@dataclass(frozen=True)
class OptimiserConfig:
    """Adam (0.9, 0.999), linear warm-up, constant, linear decay to zero at the end."""

    learning_rate: float | None = None
    """Peak learning rate; 2e-4 / sqrt(d_sae / 16384) when not given (Gao et al. 2024; the rule most trainers use)."""
    warm_up_steps: int = 1000
    """Steps of linear warm-up; at most a tenth of the run."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the rate falls to zero."""
    gradient_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class TrainConfig(Generic[DictionaryConfig]):
    """Fit one dictionary to the rows of a store's training documents."""

    name: str
    """Name of the run; it becomes a folder in the workspace."""
    store: str
    """Name or path of the activation store."""
    hook: str
    """Hook whose activation is encoded, such as blocks.2.hook_resid_post."""
    dictionary: DictionaryConfig
    """The dictionary and its numbers."""
    target_hook: str | None = None
    """Hook to predict; a transcoder when given, an autoencoder of `hook` when not."""
    control_store: str | None = None
    """Store whose mean and covariance centre and whiten the activations; `store` itself when not given."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """Learning rate and schedule."""
    batch_size: int = 4096
    """Rows (tokens) per step."""
    steps: int | None = None
    """Steps to take; one pass over the training rows when not given."""
    buffer_rows: int = 262_144
    """Rows in the mixing buffer that batches are drawn from."""
    row_filter: RowFilter = field(default_factory=RowFilter)
    """Rows to train on, of the store's training documents."""
    follow: bool = False
    """Train on a store that is still being harvested, waiting for its rows; statistics come from the first of them."""
    verify_reads: bool = False
    """Compare every file of the store with its checksum before anything of it is used."""
    seed: int = 0
    """Decides the initial weights and the order of rows."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; an interrupted run continues at the last one."""
    device: str = "cpu"
    """Device to train on."""


@dataclass(frozen=True)
class TrainPlan:
    """What `dictlearn train --dry-run` prints."""

    rows: int
    steps: int
    passes: float
    parameters: int
    bytes_in_memory: int
    mixing: str
    """How well the buffer mixes documents, and how large it would have to be if it does not."""
    well_mixed: bool


def check(config: TrainConfig[Any], workspace: Workspace) -> tuple[Loader, Store, TrainPlan]:
    """The training rows, the store whose statistics are used, and the plan: all that needs no torch.

    Raises:
        UserError: an unknown store or hook, widths that cannot be, a name in use by a different run.
    """
    from activation_store.store import open_store

    store = open_store(workspace.existing_store(config.store), verify_reads=config.verify_reads)
    d_in = _width(store, config.hook)
    d_out = d_in if config.target_hook is None else _width(store, config.target_hook)
    if config.target_hook == config.hook:
        raise UserError(f"target_hook is {config.hook!r}, the same as hook; leave it out to train an autoencoder.")
    config.dictionary.check(d_in, d_out)
    control = store if config.control_store is None else open_store(workspace.existing_store(config.control_store))
    if _width(control, config.hook) != d_in or _model(control) != _model(store):
        raise UserError(
            f"The control store {config.control_store!r} was not made by the model of {config.store!r}; name a "
            "store of the same model that holds the same hook."
        )
    for name in ("batch_size", "buffer_rows", "log_every", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    loader = open_loader(config, store)
    rows, mixing = loader.rows, loader.mixing()
    steps = rows // config.batch_size if config.steps is None else config.steps
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1.")
    parameters = config.dictionary.d_sae * (d_in + d_out + 1) + d_out
    hooks = d_in + (d_out if config.target_hook else 0)
    memory = 4 * (4 * parameters + config.buffer_rows * hooks + 2 * config.batch_size * config.dictionary.d_sae)
    passes = steps * config.batch_size / rows
    return loader, control, TrainPlan(rows, steps, passes, parameters, memory, str(mixing), mixing.well_mixed)


def open_loader(config: TrainConfig[Any], store: Store) -> Loader:
    """The training rows of a store, in the run's own order."""
    hooks = [config.hook] if config.target_hook is None else [config.hook, config.target_hook]
    return Loader(
        store,
        hooks,
        config.batch_size,
        split="train",
        seed=derive_seed(config.seed, "order of rows"),
        buffer_rows=config.buffer_rows,
        row_filter=config.row_filter,
        follow=config.follow,
        device=config.device,
    )


def _width(store: Store, hook: str) -> int:
    if hook not in store.hooks:
        raise UserError(
            f"The store {store.name!r} has no hook {hook!r}; it holds {', '.join(store.hooks)}. "
            "Choose one of them, or harvest the hook."
        )
    return store.d(hook)


def _model(store: Store) -> str:
    return store.manifest.provenance["model"]["fingerprint"]


def run_train(config: TrainConfig[Any], workspace: Workspace, progress: Progress | None = None) -> RunFiles:
    """Train, or continue, or return at once when the run is finished already."""
    loader, control, plan = check(config, workspace)
    from dictlearn.training.loop import train

    # The statistics of a store come with its last row: of one that is followed the loader has an estimate.
    has_statistics = loader if config.follow and config.control_store is None else control
    return train(config, plan.steps, loader, has_statistics, workspace.run(config.name), progress or NoProgress())


def config_to_dict(config: TrainConfig[Any]) -> dict[str, Any]:
    """Plain values for YAML, the dictionary's kind included."""
    record = json.loads(json.dumps(asdict(config)))  # with lists for tuples, as YAML gives them back
    record["dictionary"] = {"kind": config.dictionary.kind, **record["dictionary"]}
    return record


def config_from_yaml(path: str | Path) -> TrainConfig[Any]:
    """Read a run's configuration; an unknown key or a wrong type is named.

    Raises:
        UserError: no such file, not YAML, or a value that does not fit.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from dictlearn.dictionaries import config_class

    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no configuration file {str(path)!r}.")
    try:
        record = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} holds no configuration; it should be keys and values such as 'name: sae'.")
    nested = dict(record.get("dictionary") or {})
    kind = nested.pop("kind", "topk")
    try:
        _refuse_unknown_keys(path, "", record, TrainConfig)
        _refuse_unknown_keys(path, "dictionary.", nested, config_class(kind))
        _refuse_unknown_keys(path, "optimiser.", record.get("optimiser") or {}, OptimiserConfig)
        record["dictionary"] = TypeAdapter(config_class(kind)).validate_python(nested)
        complete: Any = TrainConfig[config_class(kind)]  # type: ignore[misc]
        return TypeAdapter(complete).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{str(path)!r}: {where}: {first['msg']} (found {first['input']!r}).") from error


def _refuse_unknown_keys(path: Path, prefix: str, record: dict[str, Any], cls: type) -> None:
    from dataclasses import fields
    from difflib import get_close_matches

    known = [f.name for f in fields(cls)]
    for key in record:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise UserError(f"{str(path)!r} has an unknown key {prefix}{key}; {hint}")
