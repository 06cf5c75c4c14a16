"""What can be asked of a training run. No torch here, so that a wrong number is refused before anything loads.

The sentence under a field is its help text on the command line.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from tyro.conf import arg

from activation_store.errors import UserError
from activation_store.filters import RowFilter
from dictlearn.training.optimiser_config import OptimiserConfig

DictionaryConfig = TypeVar("DictionaryConfig")
Hooks = Annotated[str | tuple[str, ...], arg(metavar="HOOK [HOOK ...]")]
TargetHooks = Annotated[str | tuple[str, ...] | None, arg(metavar="HOOK [HOOK ...]")]


@dataclass(frozen=True)
class TrainConfig(Generic[DictionaryConfig]):
    """Fit one dictionary to the rows of a store's training documents."""

    name: str
    """Name of the run; it becomes a folder in the workspace."""
    store: str
    """Name or path of the activation store."""
    hook: Hooks
    """Hook whose activation is encoded, such as blocks.2.hook_resid_post; several are encoded side by side."""
    dictionary: DictionaryConfig
    """The dictionary and its numbers."""
    target_hook: TargetHooks = None
    """Hook to predict, or several; a transcoder when given, an autoencoder of `hook` when not."""
    control_store: str | None = None
    """Store whose mean and covariance centre and whiten the activations; `store` itself when not given."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """Update rule, learning rate and schedule."""
    batch_size: int = 4096
    """Rows (tokens) per step, over all processes."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, where a whole one does not fit into memory."""
    steps: int | None = None
    """Steps to take; one pass over the training rows when not given."""
    buffer_rows: int = 262_144
    """Rows in the mixing buffer that batches are drawn from."""
    aligned_stores: tuple[str, ...] = ()
    """Stores of the same rows made by other models; their hooks are called STORE:HOOK, for crosscoders."""
    row_filter: RowFilter = field(default_factory=RowFilter)
    """Rows to train on, of the store's training documents."""
    follow: bool = False
    """Train on a store that is still being harvested, waiting for its rows; statistics come from the first of them."""
    verify_reads: bool = False
    """Compare every file of the store with its checksum before anything of it is used."""
    seed: int = 0
    """Decides the initial weights, and the order of rows unless order_seed is given."""
    order_seed: int | None = None
    """Decides the order of rows."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the large matrix products: bfloat16 by autocast, float32, or auto: bfloat16 on a GPU, float32 on a CPU."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; an interrupted run continues at the last one."""
    keep_checkpoints: int = 2
    """Checkpoints kept while the run trains; should the newest be damaged, the one before takes its place."""
    tensorboard: bool = False
    """Copy the metrics to TensorBoard files in the run's folder (needs the package tensorboard)."""
    wandb: str | None = None
    """Copy the metrics to this project of Weights & Biases (needs the package wandb; WANDB_MODE=offline works)."""
    device: str = "cpu"
    """Device to train on; under torchrun, cuda means each process's own."""
    latent_parts: int = 1
    """Under torchrun: how many processes hold a part of the latents each; the others share the rows."""
    ops: Literal["auto", "portable", "triton", "reference"] = "auto"
    """Implementation of the inner operations; auto takes the fastest: triton on a GPU, portable elsewhere."""

    FREE: ClassVar[tuple[str, ...]] = (
        *("verify_reads", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "wandb"),
        *("device", "latent_parts", "ops"),
    )
    """What a run may be continued with another value of: nothing of it decides what is learned."""
    SHARED: ClassVar[tuple[str, ...]] = (
        *("store", "aligned_stores", "batch_size", "steps", "buffer_rows", "row_filter", "follow", "verify_reads"),
        "log_every",
        *("checkpoint_every", "keep_checkpoints", "tensorboard", "wandb", "device", "latent_parts", "ops"),
    )
    """What all runs that read the same batches have in common, besides the order of rows."""

    def __post_init__(self) -> None:
        for name in ("hook", "target_hook"):
            hooks = getattr(self, name)
            if hooks is not None and not isinstance(hooks, str):  # a list, where it was read from a file
                object.__setattr__(self, name, hooks[0] if len(hooks) == 1 else tuple(hooks))

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that are encoded."""
        return (self.hook,) if isinstance(self.hook, str) else self.hook

    @property
    def target_hooks(self) -> tuple[str, ...] | None:
        """The hooks that are predicted; None for an autoencoder."""
        return (self.target_hook,) if isinstance(self.target_hook, str) else self.target_hook

    @property
    def hooks_rebuilt(self) -> tuple[str, ...]:
        """The hooks that the output is compared with."""
        return self.target_hooks or self.hooks

    @property
    def seed_of_order(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed


SECTIONS = {"dictionary": "kind: topk", "optimiser": "learning_rate: 0.001", "row_filter": "positions: [1, 100]"}
"""Keys of a configuration that have keys of their own, with an example."""


def config_from_yaml(path: str | Path) -> TrainConfig[Any]:
    """Read a run's configuration; an unknown key or a wrong type is named.

    Raises:
        UserError: no such file, not YAML, or a value that does not fit.
    """
    record = read_yaml(path)
    record.pop("sweep", None)  # whose member a run is decides nothing about it
    return config_from_dict(record, repr(str(path)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file. Raises UserError when there is none, or it holds something else."""
    import yaml

    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no configuration file {str(path)!r}.")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The configuration file {str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is no text in UTF-8, as a configuration file is.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} holds no configuration; it should be keys and values such as 'name: sae'.")
    return record


def config_to_dict(config: TrainConfig[Any]) -> dict[str, Any]:
    """Plain values for YAML, the dictionary's kind included."""
    record = json.loads(json.dumps(asdict(config)))  # with lists for tuples, as YAML gives them back
    record["dictionary"] = {"kind": config.dictionary.kind, **record["dictionary"]}
    return record


def config_from_dict(record: dict[str, Any], where: str) -> TrainConfig[Any]:
    """The configuration that plain values say; a key that is unknown or a value that does not fit is named.

    Args:
        where: the file or option that the values come from, for the sentence.

    Raises:
        UserError: an unknown key or kind, a missing key, or a value that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    from dictlearn.dictionaries import config_class

    sections = {name: record.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} is {section!r}; it should be keys and values such as {SECTIONS[name]!r}.")
    nested = dict(sections["dictionary"])
    kind = nested.pop("kind", "topk")
    if not isinstance(kind, str):
        raise UserError(f"{where}: dictionary.kind is {kind!r}; it should be a name such as topk.")
    try:
        _refuse_unknown_keys(where, "", record, TrainConfig)
        _refuse_unknown_keys(where, "dictionary.", nested, config_class(kind))
        _refuse_unknown_keys(where, "optimiser.", sections["optimiser"], OptimiserConfig)
        _refuse_unknown_keys(where, "row_filter.", sections["row_filter"], RowFilter)
        dictionary: Any = TypeAdapter(config_class(kind)).validate_python(nested)
        complete: Any = TrainConfig[config_class(kind)]  # type: ignore[misc]
        config: TrainConfig[Any] = TypeAdapter(complete).validate_python(record | {"dictionary": dictionary})
        refuse_not_finite(f"{where}: ", asdict(config))
        _refuse_truths(where, "", record, config_to_dict(config))
        return config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key}: {first['msg']} (found {first['input']!r}).") from error


def refuse_not_finite(prefix: str, values: dict[str, Any]) -> None:
    """Raise UserError for a number that is infinite or none, at any depth; ``prefix`` begins the sentence."""
    for key, value in values.items():
        if isinstance(value, dict):
            refuse_not_finite(f"{prefix}{key}.", value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{key} is {value}; it must be a finite number.")


def _refuse_truths(where: str, prefix: str, given: dict[str, Any], made: dict[str, Any]) -> None:
    """YAML reads yes and on as true, which Python takes for the number 1."""
    for key, value in given.items():
        if isinstance(value, dict):
            _refuse_truths(where, f"{prefix}{key}.", value, made.get(key) or {})
        elif isinstance(value, bool) and not isinstance(made.get(key), bool):
            raise UserError(
                f"{where}: {prefix}{key} is {'true' if value else 'false'}; it should be a number or a name."
            )


def _refuse_unknown_keys(where: str, prefix: str, record: dict[str, Any], cls: type) -> None:
    from difflib import get_close_matches

    known = [f.name for f in fields(cls)]
    for key in record:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise UserError(f"{where} has an unknown key {prefix}{key}; {hint}")
