"""What `dictlearn train` does with a configuration: the refusals and the plan, which need no torch, and the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.devices import refuse_missing
from activation_store.errors import UserError
from activation_store.loader import Loader, has_local_writer
from activation_store.progress import NoProgress, Progress
from activation_store.seeds import derive_seed
from dictlearn.dictionaries.configs import check_hooks
from dictlearn.training.config_files import config_from_yaml, config_to_dict, refuse_not_finite
from dictlearn.training.configs import TrainConfig
from dictlearn.training.memory import Widths, estimate, parameters
from dictlearn.training.records import check_writers
from dictlearn.workspace import RunFiles, Workspace

if TYPE_CHECKING:
    from activation_store.store import Store

Notify = Callable[[str], None]


def _nobody(sentence: str) -> None:
    """Nobody is told."""


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


@dataclass(frozen=True)
class Checked:
    """A group of runs that may begin: the rows, what has the statistics of each run, and the plan."""

    loader: Loader
    controls: list[Store]
    plan: TrainPlan


def check(configs: Sequence[TrainConfig[Any]], workspace: Workspace) -> Checked:
    """Everything about runs that read the same batches that can be said, or refused, without torch.

    Raises:
        UserError: an unknown store or hook, widths that cannot be, a name in use by a different run, settings that
            runs of one group cannot differ in.
    """
    first = configs[0]
    refuse_missing(first.device)
    for config in configs:
        refuse_not_finite(f"{config.name!r}: ", asdict(config))
        refuse_another(config, workspace.run(config.name))
    for config in configs[1:]:
        for name in TrainConfig.SHARED:
            if getattr(config, name) != getattr(first, name):
                raise UserError(
                    f"{config.name!r} has {name} {getattr(config, name)!r} and {first.name!r} has "
                    f"{getattr(first, name)!r}; runs that read the same batches cannot differ in it."
                )
        if config.seed_of_order != first.seed_of_order:
            raise UserError(f"{config.name!r} and {first.name!r} differ in order_seed; give one for all.")
    if first.aligned_stores and first.follow:
        raise UserError("follow is for one growing store; leave it out, or leave aligned_stores out.")
    store = workspace.open_store(first.store, first.aligned_stores, first.verify_reads)
    controls, widths = [], []
    for config in configs:
        widths.append(_check_widths(config, store))
        controls.append(_control(config, store, workspace))
    for name in ("batch_size", "accumulate", "buffer_rows", "log_every", "checkpoint_every", "keep_checkpoints"):
        for config in configs:
            if getattr(config, name) < 1:
                raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1.")
    check_writers(first.tensorboard, first.wandb)
    loader = open_loader(configs, store)
    rows, mixing = loader.rows, loader.mixing()
    for config in configs:
        if config.dictionary.d_sae > rows:
            raise UserError(
                f"{config.name!r} has {config.dictionary.d_sae} latents (d_sae) and the store {store.name!r} "
                f"{rows} rows to train on: each row could be a latent; lower d_sae or harvest more tokens."
            )
    steps = rows // first.batch_size if first.steps is None else first.steps
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1.")
    learned = sum(parameters(config.dictionary, of_run) for config, of_run in zip(configs, widths, strict=True))
    memory = estimate(configs, widths).total + 4 * first.buffer_rows * sum(loader.d(hook) for hook in loader.hooks)
    passes = steps * first.batch_size / rows
    return Checked(loader, controls, TrainPlan(rows, steps, passes, learned, memory, str(mixing), mixing.well_mixed))


def refuse_another(config: TrainConfig[Any], files: RunFiles) -> None:
    """Refuse a folder that belongs to a run of another configuration, naming what differs first."""
    if files.folder.exists() and not files.folder.is_dir():
        raise UserError(f"{str(files.folder)!r} is a file, where the run's folder would be; choose another name.")
    if not files.config.exists():
        return
    record, there = (
        config_to_dict(replace(one, precision=one.product_precision))  # auto follows the device, which is free
        for one in (config, config_from_yaml(files.config))  # what the file does not say is as by default
    )
    differing = [key for key in record if there[key] != record[key] and key not in TrainConfig.FREE]
    if not differing:
        return
    key = differing[0]
    before, now = there[key], record[key]
    while isinstance(before, dict) and isinstance(now, dict):
        inner = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        key, before, now = f"{key}.{inner}", before.get(inner), now.get(inner)
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    raise UserError(
        f"The run {files.name!r} exists with another configuration ({key}: {before!r}, now {now!r}{more}); give "
        "what it has, choose another name, or delete the old run."
    )


def _check_widths(config: TrainConfig[Any], store: Store) -> Widths:
    """Refuses what no dictionary or optimiser could be."""
    for name, hooks in (("hook", config.hooks), ("target_hook", config.hooks_rebuilt)):
        if not hooks or len(set(hooks)) < len(hooks):
            raise UserError(f"{name} is {', '.join(hooks) or 'empty'}; name at least one hook, and each of them once.")
    if config.target_hooks == config.hooks:
        raise UserError(f"target_hook is {config.hook!r}, the same as hook; leave it out to train an autoencoder.")
    widths = [_width(store, hook) for hook in config.hooks], [_width(store, hook) for hook in config.hooks_rebuilt]
    check_hooks(config.dictionary, widths[0], None if config.target_hooks is None else widths[1])
    config.optimiser.check()
    return widths


def _control(config: TrainConfig[Any], store: Store, workspace: Workspace) -> Store:
    """What has the statistics that centre and whiten: the store itself, or the one named in control_store."""
    control = store
    if config.control_store is not None:
        if config.aligned_stores:
            raise UserError("control_store is of one model and aligned_stores of several; leave control_store out.")
        control = workspace.open_store(config.control_store)
        if missing := [hook for hook in config.hooks if hook not in control.hooks]:
            raise UserError(
                f"The control store {config.control_store!r} has no hook {missing[0]!r}; it holds "
                f"{', '.join(control.hooks)}. Harvest that hook of the control text, or leave control_store out."
            )
        if any(control.d(hook) != store.d(hook) for hook in config.hooks) or _model(control) != _model(store):
            raise UserError(
                f"The control store {config.control_store!r} was not made by the model of {config.store!r}; name a "
                "store of the same model that holds the same hook."
            )
    _check_whitening(config, control)
    return control


def _check_whitening(config: TrainConfig[Any], control: Store) -> None:
    """Refuses to whiten by fewer rows than there are directions, unless shrinkage makes up for those without spread."""
    whitens = getattr(config.dictionary, "whiten", False) or getattr(config.dictionary, "scaling", "") == "whiten"
    rows, width = control.manifest.rows_planned, max(control.d(hook) for hook in config.hooks)
    if whitens and config.dictionary.shrinkage == 0 and rows <= width:
        raise UserError(
            f"The {rows:,} control rows of {control.name!r} cannot vary in all {width} directions, so that they do not "
            "whiten; set shrinkage above 0, or name a control_store with more rows."
        )


def open_loader(configs: Sequence[TrainConfig[Any]], store: Store) -> Loader:
    """The training rows, with the hooks of all runs, in the order that the first run's seed says."""
    first = configs[0]
    hooks = [hook for config in configs for hook in config.hooks + config.hooks_rebuilt]
    return Loader(
        store,
        hooks,
        first.batch_size,
        split="train",
        seed=derive_seed(first.seed_of_order, "order of rows"),
        buffer_rows=first.buffer_rows,
        row_filter=first.row_filter,
        follow=first.follow,
        device=first.device,
    )


def _width(store: Store, hook: str) -> int:
    if hook not in store.hooks:
        raise UserError(
            f"The store {store.name!r} has no hook {hook!r}; it holds {', '.join(store.hooks)}. "
            + ("Name its store in aligned_stores." if ":" in hook else "Choose one of them, or harvest the hook.")
        )
    return store.d(hook)


def _model(store: Store) -> str:
    return store.manifest.provenance["model"]["fingerprint"]


def run_train(
    config: TrainConfig[Any], workspace: Workspace, progress: Progress | None = None, notify: Notify = _nobody
) -> RunFiles:
    """Train one run, or continue it, or return at once when it is finished already."""
    files = workspace.run(config.name)
    train_group([config], workspace, files.checkpoints, None, progress, notify)
    return files


def train_group(
    configs: Sequence[TrainConfig[Any]],
    workspace: Workspace,
    checkpoints: Path,
    sweep: str | None = None,
    progress: Progress | None = None,
    notify: Notify = _nobody,
    checked: Checked | None = None,
) -> None:
    """Train runs that read each batch together.

    Args:
        notify: told what a person should know: badly mixed rows, a damaged checkpoint, a run of several that stopped.
        checked: what `check` has found of them, where that has been done.
    """
    checked = checked or check(configs, workspace)
    from dictlearn.dictionaries import dictionary_class
    from dictlearn.training import parallel
    from dictlearn.training.loop import Run, train

    refuse_operations(configs[0])
    for config in configs:
        kind = dictionary_class(config.dictionary.kind)
        parallel.refuse_what_cannot_be_shared(config, splits_latents=bool(kind.latent_tensors))
    processes = parallel.join(configs[0])
    told = notify if processes.leads else _nobody
    try:
        loader = checked.loader
        mixing = None if checked.plan.well_mixed else checked.plan.mixing
        for sentence in (mixing, nobody_writes(loader), never_dead(configs, checked.plan.steps)):
            if sentence is not None:
                told(sentence)
        loader.device = processes.device
        loader.part_of_batch = processes.data_part
        runs = [
            # The statistics of a store come with its last row: of one that is followed the loader has an estimate.
            Run(
                config,
                workspace.run(config.name),
                loader if config.follow and config.control_store is None else control,
                sweep,
            )
            for config, control in zip(configs, checked.controls, strict=True)
        ]
        shown = progress if progress is not None and processes.leads else NoProgress()
        train(runs, checked.plan.steps, loader, checkpoints, shown, told, processes)
    finally:
        processes.close()


def refuse_operations(config: TrainConfig[Any]) -> None:
    """Refuse kernels of a GPU where there is none, unless their interpreter was asked for."""
    if config.ops != "triton":
        return
    if find_spec("triton") is None:
        raise UserError("ops is triton, and the package triton is not installed; install it, or leave ops out.")
    if not config.device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"ops is triton, whose kernels run on a GPU, and the device is {config.device!r}; set device to cuda, or "
            "leave ops out."
        )


def nobody_writes(loader: Loader) -> str | None:
    """What to say of a store that is followed while no process adds to it; of an object store nobody here can know."""
    store = loader.store
    if not loader.follow or store.place.root is None or store.rows == loader.total_rows or has_local_writer(store):
        return None
    return (
        f"The store {store.name!r} has {store.rows:,} of {loader.total_rows:,} rows, and no process is writing it now; "
        f"start its `dictlearn harvest` again: training waits up to {loader.patience:,.0f} s for each next row."
    )


def never_dead(configs: Sequence[TrainConfig[Any]], steps: int) -> str | None:
    """What to say of runs that are over before a latent can count as dead, where something was to be done about it."""
    rows, idle = steps * configs[0].batch_size, []
    for config in configs:
        about = config.dictionary
        revives = getattr(about, "auxk_weight", 0) or getattr(about, "resample_every", 0)
        if revives and rows <= about.dead_after_rows:
            idle.append(config)
    if not idle:
        return None
    who = f"The run {idle[0].name!r} has" if len(idle) == 1 else f"{len(idle)} runs have"
    least = min(config.dictionary.dead_after_rows for config in idle)
    return (
        f"{who} {rows:,} rows, and a latent counts as dead after {least:,}: nothing will be done about dead latents. "
        f"Set dead_after_rows to {max(1, rows // 10):,}, say, a tenth of the run."
    )
