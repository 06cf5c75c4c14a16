"""What can be asked of a training run. No torch here, so that a wrong number is refused before anything loads.

The sentence under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from tyro.conf import arg

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
    """Of the large matrix products: bfloat16 by autocast, float32, or auto: bfloat16 on a GPU, float32 on a CPU.
    To continue a run on another device, name what it began with."""
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
    def product_precision(self) -> Literal["float32", "bfloat16"]:
        """Of the large products. On a CPU without matrix units bfloat16 is the slower one: it has to be asked for."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if self.device.startswith("cuda") else "float32"

    @property
    def seed_of_order(self) -> int:
        return self.seed if self.order_seed is None else self.order_seed
