"""The whole line on the bundled language model, in one process: harvest, train, evaluate, index, circuit.

Every step is what its verb does with the configuration written here, so that what the demo leaves in the workspace can
be continued with the verbs. A step that is finished is found and not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from activation_store.harvest.run import HarvestConfig, harvest
from activation_store.progress import Progress
from dictlearn import reports, terminal
from dictlearn.circuits import read, summary
from dictlearn.circuits.command import CircuitConfig, run_circuit
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.metrics.command import run_evaluate
from dictlearn.metrics.record import EvaluateConfig, Evaluation
from dictlearn.training.command import run_train
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.workspace import Workspace

STORE = "demo"
LAYERS = range(4)
RESIDUAL = "blocks.2.hook_resid_post"
PROMPT = "class Reader:\n    def __init__(self, stream, errors):\n        self.stream = stream\n        self."
"""Ends where the model has to copy a name it read before: `errors`."""


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole line on the bundled language model: harvest, train, evaluate, index, circuit."""

    tokens: int = 300_000
    """Tokens of the standard library's source to harvest."""
    steps: int = 400
    """Steps of each training."""


def harvest_config(config: DemoConfig, workspace: Workspace) -> HarvestConfig:
    hooks = [RESIDUAL]
    for layer in LAYERS:
        hooks += [f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"]
    return HarvestConfig(hooks=tuple(hooks), store=workspace.store(STORE), tokens=config.tokens)


def train_configs(config: DemoConfig) -> list[TrainConfig[Any]]:
    """An autoencoder of the residual stream, a transcoder of every MLP, and a codebook of the residual stream.

    The rate is higher than the default's because the runs are a thousand times shorter than the default is made for.
    """
    sae: TrainConfig[Any] = TrainConfig(
        name="sae",
        store=STORE,
        hook=RESIDUAL,
        dictionary=TopKConfig(d_sae=2048, k=32, dead_after_rows=100_000),
        optimiser=OptimiserConfig(learning_rate=2e-3),
        batch_size=2048,
        steps=config.steps,
        buffer_rows=131_072,
    )
    transcoders = [
        replace(
            sae,
            name=f"transcoder-{layer}",
            hook=f"blocks.{layer}.mlp.hook_in",
            target_hook=f"blocks.{layer}.hook_mlp_out",
        )
        for layer in LAYERS
    ]
    icfl = replace(
        sae,
        name="icfl",
        dictionary=ICFLConfig(d_sae=1024, rounds=8, width=4, dead_after_rows=100_000),
        optimiser=OptimiserConfig(learning_rate=5e-3),
        batch_size=1024,
    )
    return [sae, *transcoders, icfl]


EVALUATED = ("sae", "transcoder-2", "icfl")
INDEXED = ("sae", "transcoder-0", "transcoder-1", "transcoder-2", "transcoder-3")


def run_demo(config: DemoConfig, workspace: Workspace, progress: Progress) -> list[Evaluation]:
    """Run or finish every step; returns the evaluations it printed."""
    harvest(harvest_config(config, workspace), progress)
    for training in train_configs(config):
        run_train(training, workspace, progress)
    evaluations = [run_evaluate(EvaluateConfig(run, tokens=8_192), workspace, progress) for run in EVALUATED]
    reports.evaluations(evaluations)
    for run in INDEXED:
        run_index(IndexConfig(run), workspace, progress)
    transcoders = tuple(f"transcoder-{layer}" for layer in LAYERS)
    graph = run_circuit(CircuitConfig(prompt=PROMPT, transcoders=transcoders, name="demo"), workspace, progress)
    reports.circuit(summary(read(graph), rows=5))
    terminal.print_line(
        f"Everything is in {workspace.root}: browse it with `dictlearn app` (or `make app`), "
        "look at the store with `dictlearn store info demo`."
    )
    return evaluations
