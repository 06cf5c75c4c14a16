"""Fit dictionaries to the rows of a store, or of a live model: one, or many that read each batch once.

A step is in `dictlearn.training.step`; here is what is around it: batches, logging, checkpoints, interruption. A run
that is killed and started again continues at its last checkpoint and then equals, bit for bit on the same machine, the
run that was never killed: weights, moments, the loader's position, random streams and counters are all in the
checkpoint, and the metrics file is cut back to it. A member whose loss is no longer finite stops; the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from activation_store.disk import replace_text
from activation_store.errors import UserError
from activation_store.progress import Progress, Task
from activation_store.seeds import derive_seed
from activation_store.source import ActivationSource
from activation_store.store import Store
from dictlearn import ops
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.files import save
from dictlearn.dictionaries.scaling import ControlStatistics
from dictlearn.training.checkpoint import Checkpoints, Progressed, put_back
from dictlearn.training.config_files import config_to_dict
from dictlearn.training.configs import TrainConfig
from dictlearn.training.control import SideBySide
from dictlearn.training.interruption import Interruption, TrainingInterrupted
from dictlearn.training.memory import estimate, what_to_lower
from dictlearn.training.optimisers import Average, Optimiser
from dictlearn.training.parallel import Processes, keep_latents, with_all_latents
from dictlearn.training.records import Record, open_record, training
from dictlearn.training.step import Member, NotFinite, Step, side_by_side
from dictlearn.training.together import Together
from dictlearn.workspace import RunFiles

INITIAL_ROWS = 16_384
"""Rows that data-dependent initialisation looks at: enough for a geometric median at any width in use."""


@dataclass(frozen=True)
class Run:
    """A run to be trained.

    Attributes:
        control: what has the statistics that centre and whiten, for dictionaries that do.
        sweep: name of the sweep it belongs to.
    """

    config: TrainConfig[Any]
    files: RunFiles
    control: Store | ActivationSource
    sweep: str | None = None


def train(
    runs: Sequence[Run],
    steps: int,
    loader: ActivationSource,
    folder: Path,
    progress: Progress,
    notify: Callable[[str], None] = lambda sentence: None,
    processes: Processes | None = None,
) -> None:
    """Train all runs to ``steps`` and save their folded dictionaries; nothing is done where all are finished.

    Args:
        runs: with the same settings of what they share (`TrainConfig.SHARED`); ``loader`` delivers all their hooks.
        folder: of the checkpoints, which cover all runs.
        notify: told what a person should know meanwhile: a damaged checkpoint, a run of several that stopped.

    Raises:
        UserError: another process that trains a run; no run that goes on; too little memory.
        TrainingInterrupted: on Ctrl-C or SIGTERM; a checkpoint was written.
    """
    processes = processes or Processes()
    shared = runs[0].config
    checkpoints = Checkpoints(
        folder,
        shared.keep_checkpoints,
        *processes.latent_part,
        writes=processes.data_part[0] == 0,
        leads=processes.leads,
        wait=processes.wait,
    )
    if all(run.files.dictionary.exists() for run in runs):
        checkpoints.remove()
        return
    ops.set_backend(shared.ops)
    using = f"{ops.backend(processes.device)} operations on {processes.device}, in {shared.product_precision}"
    notify(f"Training with the {using}.")
    begin_with = [min(max(INITIAL_ROWS, getattr(run.config.dictionary, "rows", 0)), loader.rows) for run in runs]
    first = first_rows(loader, max(begin_with))
    members = [
        build(run, whole_batches(first, count, shared.batch_size), loader, processes)
        for run, count in zip(runs, begin_with, strict=True)
    ]
    del first
    if processes.leads:
        for run in runs:
            write_config(run)  # a kind that refuses its first rows leaves no folder

    with ExitStack() as opened:
        if processes.leads:
            for run in runs:
                opened.enter_context(training(run.files))
        step = checkpoints.restore(members, loader.load_state_dict, notify)
        position, saved = loader.state_dict(), step
        for one in members:
            if one.stopped is not None:
                notify(one.stopped)
        records = [opened.enter_context(open_record_of(run, step)) for run in runs if processes.leads]
        task = opened.enter_context(progress.task(title(runs), total=steps * shared.batch_size, unit="tokens"))
        together = opened.enter_context(Together(len(runs), not processes.device.startswith("cuda"), processes.several))
        interruption = opened.enter_context(Interruption(only_asked=processes.several))
        opened.enter_context(explained(runs, loader, processes))
        task.advance(step * shared.batch_size)
        batches = iter(loader)
        started, first_step = time.perf_counter(), step
        try:
            while step < steps and go_on(members):
                rows = next(batches)
                with interruption.put_off():
                    going = [number for number, member in enumerate(members) if member.stopped is None]
                    results = together.take_step(
                        [members[number].member for number in going],
                        [(runs[number].config.hooks, runs[number].config.target_hooks) for number in going],
                        rows,
                        step,
                        steps,
                    )
                    step += 1
                    position = loader.state_dict()
                    found = dict(zip(going, results, strict=True))
                    logs = step % shared.log_every == 0 or step == steps
                    saves = step % shared.checkpoint_every == 0 and step < steps
                    if logs or saves:
                        found |= not_finite_until_now(members)
                    lines = stopped_members(runs, members, found, step, saved, position, loader, notify)
                    if logs:
                        wall = time.perf_counter() - started
                        rate = (step - first_step) * shared.batch_size / max(wall, 1e-9)
                        numbers = measured(runs, members, found, rows, step)
                        show(task, runs, members, numbers)
                        walls = {"wall_seconds": wall, "wall_tokens_per_second": rate}
                        lines |= {number: line | walls for number, line in numbers.items()}
                    write(records, lines)
                    task.advance(shared.batch_size)
                    if saves and go_on(members):
                        checkpoints.save(step, position, members)
                        saved = step
                    del results, found  # what they hold of this batch makes room for the next step
                if processes.any(interruption.asked):
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            found = not_finite_until_now(members)
            write(records, stopped_members(runs, members, found, step, saved, position, loader, notify))
            if go_on(members) and step == 0:
                raise TrainingInterrupted("Interrupted before the first step; the same command begins again.") from None
            if go_on(members) and step < steps:
                if saved < step:
                    checkpoints.save(step, position, members)
                raise TrainingInterrupted(
                    f"Interrupted after step {step:,} of {steps:,}, of which there is a checkpoint; the same command "
                    "continues from there."
                ) from None

        stopped = [member.stopped for member in members if member.stopped is not None]
        if len(stopped) == len(runs):
            others = f"All {len(runs)} runs have stopped. The first: " if len(runs) > 1 else ""
            raise UserError(f"{others}{stopped[0]}")
        finish(runs, members, checkpoints, step, position, processes)


def title(runs: Sequence[Run]) -> str:
    return f"training {runs[0].config.name}" if len(runs) == 1 else f"training {len(runs)} runs of {runs[0].sweep}"


def show(task: Task, runs: Sequence[Run], members: Sequence[Progressed], numbers: Mapping[int, dict[str, Any]]) -> None:
    """The numbers of the last batch: of one run in a line, of several in a table that says which have stopped."""
    shown = {
        number: {
            name: line[key] for name, key in {"loss": "loss", "FVU": "fvu", "L0": "l0", "dead": "dead_share"}.items()
        }
        for number, line in numbers.items()
    }
    if len(runs) == 1:
        task.advance(0, **shown.get(0, {}))
        return
    task.advance(0, runs=f"{len(numbers)}/{len(runs)}")
    task.tabulate(
        {
            run.config.name: shown.get(number, {"loss": f"stopped at step {members[number].stopped_at}"})
            for number, run in enumerate(runs)
        }
    )


def write_config(run: Run) -> None:
    """The configuration, where there is none yet: the folder is now this run's."""
    files = run.files
    if files.config.exists():
        return
    record = config_to_dict(run.config) | ({"sweep": run.sweep} if run.sweep else {})
    files.folder.mkdir(parents=True, exist_ok=True)
    replace_text(files.config, yaml.safe_dump(record, sort_keys=False))


def build(run: Run, first: dict[str, Tensor], loader: ActivationSource, processes: Processes) -> Progressed:
    """Initialised from the ``first`` rows, before the first step; every process keeps its part of the latents."""
    config = run.config
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "dictionary") % 2**63)
    dictionary = empty(config, loader)
    dictionary.provenance = provenance(run, loader)
    target = None if config.target_hooks is None else side_by_side(first, config.target_hooks)
    with ops.one_process():  # every process initialises the whole dictionary
        dictionary.initialise(side_by_side(first, config.hooks), target, generator, control_statistics(run))
    rows = processes.rows_of(dictionary.d_sae)
    keep_latents(dictionary, rows)
    dictionary.to(processes.device)
    return Progressed(
        Member(
            config.name,
            dictionary,
            Optimiser(config.optimiser, dictionary),
            generator,
            config.optimiser.gradient_clip,
            config.accumulate,
            config.product_precision,
            Average(config.optimiser.averaging, dictionary) if config.optimiser.averaging else None,
        ),
        rows,
    )


def empty(config: TrainConfig[Any], loader: ActivationSource) -> Dictionary:
    """The dictionary with nothing in it yet."""
    widths_in = [loader.d(hook) for hook in config.hooks]
    widths_out = None if config.target_hooks is None else [loader.d(hook) for hook in config.target_hooks]
    return dictionary_class(config.dictionary.kind)(config.dictionary, widths_in, widths_out)


def control_statistics(run: Run) -> ControlStatistics:
    """Of the hooks that are encoded; of several hooks, each is centred and whitened by itself."""
    found = [run.control.statistics(hook) for hook in run.config.hooks]
    return found[0] if len(found) == 1 else SideBySide(found)


def provenance(run: Run, loader: ActivationSource) -> dict[str, Any]:
    """What the dictionary was made from, kept beside its weights."""
    config, manifest = run.config, loader.manifest
    aligned = [
        {"name": name, "fingerprint": store.fingerprint, "model": store.provenance["model"]}
        for name, store in zip(config.aligned_stores, aligned_stores(run), strict=True)
    ]
    return {
        "hook_in": config.hook,
        "hook_out": config.target_hook or config.hook,
        "model": manifest.provenance["model"],
        "bos_left_out": manifest.batches.get("bos_token_id") is not None,
        "store": {"name": config.store, "fingerprint": manifest.fingerprint},
        **({"aligned_stores": aligned} if aligned else {}),
        "seed": config.seed,
    }


def aligned_stores(run: Run) -> list[Store]:
    return run.control.together[1:] if run.config.aligned_stores and isinstance(run.control, Store) else []


def first_rows(loader: ActivationSource, count: int) -> dict[str, Tensor]:
    """The first rows in training order, gathered from whole batches, without moving the loader."""
    state, part = loader.state_dict(), loader.part_of_batch
    loader.part_of_batch = (0, 1)  # every process initialises from the same rows
    batches, rows = [], 0
    for batch in loader:
        batches.append(batch)
        rows += len(next(iter(batch.values())))
        if rows >= count:
            break
    loader.part_of_batch = part
    loader.load_state_dict(state)
    return {hook: torch.cat([batch[hook] for batch in batches]).cpu() for hook in batches[0]}


def whole_batches(rows: dict[str, Tensor], count: int, batch_size: int) -> dict[str, Tensor]:
    """The first batches of these rows that have ``count`` together: what `first_rows` gives for it."""
    return {hook: values[: -(-count // batch_size) * batch_size] for hook, values in rows.items()}


def open_record_of(run: Run, step: int) -> Record:
    return open_record(
        run.files,
        step,
        tensorboard=run.config.tensorboard,
        wandb=run.config.wandb,
        config=config_to_dict(run.config) | ({"sweep": run.sweep} if run.sweep else {}),
    )


def go_on(members: Sequence[Progressed]) -> bool:
    """Whether any does; what has stopped is not saved, so that the same command begins before it did."""
    return any(member.stopped is None for member in members)


def write(records: Sequence[Record], lines: Mapping[int, dict[str, Any]]) -> None:
    """Lines of metrics.jsonl; only one of several processes has records."""
    for number, line in lines.items():
        if records:
            records[number].write(line)


def not_finite_until_now(members: Sequence[Progressed]) -> dict[int, Step | NotFinite]:
    """Of the members that go on, those with a step that was not finite among those that the host ran ahead of."""
    found: dict[int, Step | NotFinite] = {}
    for number, one in enumerate(members):
        try:
            one.member.unread.settle()
        except NotFinite as result:
            found[number] = result
    return found


def stopped_members(
    runs: Sequence[Run],
    members: Sequence[Progressed],
    found: Mapping[int, Step | NotFinite],
    step: int,
    saved: int,
    position: dict[str, Any],
    loader: ActivationSource,
    notify: Callable[[str], None],
) -> dict[int, dict[str, Any]]:
    """Stop the members of which a step was not finite; returns the last line of each one's metrics.

    Args:
        step, saved: how many have been taken, and how many at the last checkpoint.
        position: of the loader after the last of them.
    """
    lines = {}
    for number, result in found.items():
        if isinstance(result, NotFinite):
            why = not_finite(runs[number], result, saved, loader.rows_before(position, step - 1 - result.step))
            members[number].stop(why, result.step)
            lines[number] = {"step": result.step + 1, "stopped": why}
            if len(runs) > 1:
                notify(why)
    return lines


def not_finite(run: Run, found: NotFinite, saved: int, batch: np.ndarray) -> str:
    """The sentence about a member that stops in a step that updated nothing, on a batch of these rows of the store."""
    where = ""
    if len(found.rows):
        rows = batch[found.rows.numpy()]
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        where = f", in rows {', '.join(map(str, rows[:5]))}{more} of the store"
    kept = f"its checkpoint of step {saved:,} is kept" if saved else "it has no checkpoint yet"
    return (
        f"The loss of run {run.config.name!r} is not finite at step {found.step} ({found.terms}{where}); {kept}. Train "
        "with a lower learning rate under another name, or verify the store with `dictlearn store verify`."
    )


def measured(
    runs: Sequence[Run],
    members: Sequence[Progressed],
    found: Mapping[int, Step | NotFinite],
    rows: Mapping[str, Tensor],
    step: int,
) -> dict[int, dict[str, Any]]:
    """Of each member that goes on, the numbers of one line of metrics.jsonl, about one batch."""
    return {
        number: measure(
            runs[number].config,
            members[number].member.dictionary,
            result,
            side_by_side(rows, runs[number].config.hooks_rebuilt),
            step,
        )
        for number, result in found.items()
        if isinstance(result, Step)
    }


@torch.no_grad()
def measure(config: TrainConfig[Any], dictionary: Dictionary, found: Step, target: Tensor, step: int) -> dict[str, Any]:
    """The numbers about one batch, over all processes."""
    loss = found.loss
    error = ops.mean_over_rows((target - loss.output).square().sum())
    deviation = ops.mean_over_rows((target - ops.mean_over_rows(target.mean(dim=0))).square().sum())
    dead = (dictionary.rows_since_fired > getattr(config.dictionary, "dead_after_rows", 10_000_000)).float().sum()
    return {
        "step": step,
        "rows": step * config.batch_size,
        "loss": float(ops.mean_over_rows(loss.total.detach())),
        **{name: float(ops.mean_over_rows(value)) for name, value in loss.terms.items()},
        "fvu": float(error / deviation),
        "l0": float(ops.mean_over_rows(ops.total_over_latents(loss.codes.l0().float().mean()))),
        "dead_share": float(ops.total_over_latents(dead) / config.dictionary.d_sae),
        "learning_rate": found.learning_rate,
        "gradient_norm": float(found.gradient_norm),
        **{name: float(number) for name, number in found.extras.items()},
    }


@contextmanager
def explained(runs: Sequence[Run], loader: ActivationSource, processes: Processes) -> Iterator[None]:
    """Too little memory, or another process that has gone, as a sentence."""
    configs = [run.config for run in runs]
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if on_gpu or "can't allocate memory" in reason:
            widths = [
                ([loader.d(hook) for hook in config.hooks], [loader.d(hook) for hook in config.hooks_rebuilt])
                for config in configs
            ]
            there = torch.cuda.mem_get_info()[1] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            lower = what_to_lower(estimate(configs, widths), there, configs[0].batch_size, processes.data_part[1])
            raise UserError(f"There is not enough memory: {lower}") from error
        if processes.several:
            raise UserError(
                f"Process {processes.data_part[0]}, {processes.latent_part[0]} stops, because another one of this run "
                f"has gone or failed ({reason.splitlines()[0]}); the same command continues at the last checkpoint."
            ) from error
        raise


def finish(
    runs: Sequence[Run],
    members: Sequence[Progressed],
    checkpoints: Checkpoints,
    step: int,
    position: dict[str, Any],
    processes: Processes,
) -> None:
    """Save the dictionaries of the runs that came to their end, and let go of the checkpoints.

    Those of runs of which one stopped are kept: they hold its last good state, and say that it stopped.
    """
    stopped = any(one.stopped is not None for one in members)
    if (stopped or processes.latent_part[1] > 1) and step not in checkpoints.steps():
        checkpoints.save(step, position, members)
    if processes.leads:
        for run, one in zip(runs, members, strict=True):
            if one.stopped is not None:
                continue
            whole = one.member if processes.latent_part[1] == 1 else assembled(run, one, checkpoints)
            dictionary = whole.dictionary if whole.average is None else whole.average.applied(whole.dictionary)
            save(dictionary, run.files.dictionary)
    if not stopped:
        checkpoints.remove()


def assembled(run: Run, one: Progressed, checkpoints: Checkpoints) -> Member:
    """A member with the latents of all processes, from the checkpoint that they have written."""
    dictionary = with_all_latents(one.member.dictionary)
    averaging = run.config.optimiser.averaging
    member = Member(
        one.member.name,
        dictionary,
        Optimiser(run.config.optimiser, dictionary),
        torch.Generator(),
        average=Average(averaging, dictionary) if averaging else None,
    )
    put_back(member, checkpoints.read_newest(Progressed(member, (0, dictionary.d_sae))))
    return member
