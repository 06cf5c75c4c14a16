"""Fit one dictionary to the rows of a store, or of a live model.

A step is: batch, loss (encode, decode, terms), backward, projection, clip, optimise, constrain, count, log. A run that
is killed and started again continues at its last checkpoint and then equals, bit for bit on the same machine, the run
that was never killed: weights, moments, the loader's position, random streams and counters are all in the checkpoint,
and the metrics file is cut back to it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from activation_store.errors import UserError
from activation_store.progress import Progress
from activation_store.seeds import derive_seed
from activation_store.source import ActivationSource
from activation_store.store import Store
from dictlearn.dictionaries import dictionary_class
from dictlearn.dictionaries.base import Dictionary, Loss, Update
from dictlearn.dictionaries.files import save
from dictlearn.training.command import OptimiserConfig, TrainConfig, config_to_dict
from dictlearn.training.records import open_record
from dictlearn.workspace import RunFiles

INITIAL_ROWS = 16_384
"""Rows that data-dependent initialisation looks at: enough for a geometric median at any width in use."""


@dataclass
class TrainState:
    """All that a checkpoint holds."""

    step: int
    dictionary: Dictionary
    optimiser: torch.optim.Optimizer
    loader: ActivationSource
    generator: torch.Generator

    def save(self, files: RunFiles) -> None:
        record = {
            "step": self.step,
            "dictionary": self.dictionary.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "loader": self.loader.state_dict(),
            "generator": self.generator.get_state(),
        }
        temporary = files.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, files.checkpoint)

    def load(self, files: RunFiles) -> None:
        try:
            record = torch.load(files.checkpoint, weights_only=True)
            self.dictionary.load_state_dict(record["dictionary"])
            self.optimiser.load_state_dict(record["optimiser"])
            self.loader.load_state_dict(record["loader"])
            self.generator.set_state(record["generator"])
            self.step = record["step"]
        except UserError:
            raise
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise UserError(
                f"The checkpoint {str(files.checkpoint)!r} cannot be read ({str(error).splitlines()[0]}); "
                "delete it to start the run again from its first step."
            ) from error


def train(
    config: TrainConfig[Any],
    steps: int,
    loader: ActivationSource,
    control: Store | ActivationSource,
    files: RunFiles,
    progress: Progress,
) -> RunFiles:
    """Train to ``steps`` and save the folded dictionary; a finished run is returned as it is.

    ``control`` is what has the statistics that centre and whiten, for dictionaries that do.
    """
    claim(config, files)
    if files.dictionary.exists():
        return files
    state = build(config, loader, control)
    if files.checkpoint.exists():
        state.load(files)

    dictionary, optimiser = state.dictionary, state.optimiser
    with (
        open_record(files, state.step, tensorboard=False, wandb=None, config=config_to_dict(config)) as record,
        progress.task(f"training {config.name}", total=steps * config.batch_size, unit="tokens") as task,
    ):
        task.advance(state.step * config.batch_size)
        batches = iter(state.loader)
        started, first_step = time.perf_counter(), state.step
        while state.step < steps:
            rows = next(batches)
            x, target = rows[config.hook], rows.get(config.target_hook or "")
            set_learning_rate(optimiser, config, state.step, steps)
            dictionary.schedule(state.step, steps)
            loss = dictionary.loss(x, target)
            refuse_nonfinite(loss, state.step, config.name)
            optimiser.zero_grad(set_to_none=True)
            loss.total.backward()
            dictionary.project_gradients()
            gradient_norm = clip(dictionary, config.optimiser)
            optimiser.step()
            extras = dictionary.after_update(Update(optimiser, state.step, steps, state.generator, x, target, loss))
            dictionary.observe(loss.codes)
            state.step += 1

            if state.step % config.log_every == 0 or state.step == steps:
                line = measure(state, config, loss, x if target is None else target) | extras
                line["gradient_norm"] = float(gradient_norm)
                line["wall_seconds"] = time.perf_counter() - started
                line["wall_tokens_per_second"] = (
                    (state.step - first_step) * config.batch_size / max(line["wall_seconds"], 1e-9)
                )
                record.write(line)
                task.advance(0, loss=line["loss"], FVU=line["fvu"], L0=line["l0"], dead=line["dead_share"])
            if state.step % config.checkpoint_every == 0 and state.step < steps:
                state.save(files)
            task.advance(config.batch_size)

    save(dictionary, files.dictionary)
    files.checkpoint.unlink(missing_ok=True)
    return files


def claim(config: TrainConfig[Any], files: RunFiles) -> None:
    """Write the configuration, or refuse a folder that belongs to a run of another configuration."""
    record = config_to_dict(config)
    if files.config.exists():
        there = yaml.safe_load(files.config.read_text())
        differing = [key for key in record if there.get(key) != record[key]]
        if differing:
            key = differing[0]
            raise UserError(
                f"The run {files.name!r} exists with another configuration ({key}: {there.get(key)!r}, "
                f"now {record[key]!r}); choose another name, or delete the old run."
            )
        return
    files.folder.mkdir(parents=True, exist_ok=True)
    temporary = files.config.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(record, sort_keys=False))
    os.replace(temporary, files.config)


def build(config: TrainConfig[Any], loader: ActivationSource, control: Store | ActivationSource) -> TrainState:
    """Initialised dictionary and optimiser, before the first step."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "dictionary") % 2**63)
    d_out = None if config.target_hook is None else loader.d(config.target_hook)
    dictionary = dictionary_class(config.dictionary.kind)(config.dictionary, loader.d(config.hook), d_out)
    dictionary.provenance = provenance(config, loader)
    first = first_rows(loader, min(INITIAL_ROWS, loader.rows))
    dictionary.initialise(
        first[config.hook], first.get(config.target_hook or ""), generator, control.statistics(config.hook)
    )
    dictionary.to(config.device)
    optimiser = torch.optim.Adam(
        [parameter for parameter in dictionary.parameters() if parameter.requires_grad],
        lr=peak_learning_rate(config),
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    return TrainState(0, dictionary, optimiser, loader, generator)


def provenance(config: TrainConfig[Any], loader: ActivationSource) -> dict[str, Any]:
    """What the dictionary was made from, kept beside its weights."""
    manifest = loader.manifest
    return {
        "hook_in": config.hook,
        "hook_out": config.target_hook or config.hook,
        "model": manifest.provenance["model"],
        "bos_left_out": manifest.batches.get("bos_token_id") is not None,
        "store": {"name": config.store, "fingerprint": manifest.fingerprint},
        "seed": config.seed,
    }


def first_rows(loader: ActivationSource, count: int) -> dict[str, Tensor]:
    """The first rows in training order, gathered from whole batches, without moving the loader."""
    state = loader.state_dict()
    batches, rows = [], 0
    for batch in loader:
        batches.append(batch)
        rows += len(next(iter(batch.values())))
        if rows >= count:
            break
    loader.load_state_dict(state)
    return {hook: torch.cat([batch[hook] for batch in batches]).cpu() for hook in batches[0]}


def peak_learning_rate(config: TrainConfig[Any]) -> float:
    rate = config.optimiser.learning_rate
    return 2e-4 / (config.dictionary.d_sae / 2**14) ** 0.5 if rate is None else rate


def set_learning_rate(optimiser: torch.optim.Optimizer, config: TrainConfig[Any], step: int, steps: int) -> None:
    """Linear warm-up (at most a tenth of the run), constant, linear decay over the last ``decay_share``."""
    warm_up = max(1.0, min(config.optimiser.warm_up_steps, steps / 10))
    decay = max(1.0, steps * config.optimiser.decay_share)
    factor = min(1.0, (step + 1) / warm_up, (steps - step) / decay)
    for group in optimiser.param_groups:
        group["lr"] = peak_learning_rate(config) * factor


def clip(dictionary: Dictionary, config: OptimiserConfig) -> Tensor:
    """Clip the whole gradient; returns its norm before clipping."""
    limit = config.gradient_clip if config.gradient_clip > 0 else float("inf")
    return torch.nn.utils.clip_grad_norm_(dictionary.parameters(), limit)


def refuse_nonfinite(loss: Loss, step: int, run: str) -> None:
    """Stop before a NaN spreads into a checkpoint."""
    if torch.isfinite(loss.total):
        return
    terms = ", ".join(f"{name} {float(value)}" for name, value in loss.terms.items())
    raise UserError(
        f"The loss of run {run!r} is not finite at step {step} ({terms}); the last checkpoint is kept. "
        "Lower the learning rate, or verify the store with `dictlearn store verify`."
    )


@torch.no_grad()
def measure(state: TrainState, config: TrainConfig[Any], loss: Loss, target: Tensor) -> dict[str, float]:
    """The numbers of one line of metrics.jsonl, about one batch."""
    deviation = (target - target.mean(dim=0)).square().sum()
    dead_after = getattr(config.dictionary, "dead_after_rows", 10_000_000)
    return {
        "step": state.step,
        "rows": state.step * config.batch_size,
        "loss": float(loss.total),
        **{name: float(value) for name, value in loss.terms.items()},
        "fvu": float((target - loss.output).square().sum() / deviation),
        "l0": float(loss.codes.l0().float().mean()),
        "dead_share": float((state.dictionary.rows_since_fired > dead_after).float().mean()),
        "learning_rate": state.optimiser.param_groups[0]["lr"],
    }
