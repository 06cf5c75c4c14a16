"""A small store of sparse combinations of known directions, so that learning shows, and runs over it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import dictlearn
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter
from dictlearn.dictionaries.configs import ICFLConfig, KSparseConfig, MatryoshkaConfig, TopKConfig
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.workspace import Workspace

IN, OUT = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
LAYERS = 3
"""Of the store "layered"."""


def make_store(
    path: Path,
    rows: int = 3000,
    fingerprint: str = "sha256:model",
    between=lambda part: None,
    seed: int = 0,
    model: str = "planted",
) -> None:
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(40, 16))
    x = ((rng.random((rows, 40)) < 0.1) * rng.exponential(size=(rows, 40))) @ directions + 3
    y = np.tanh(x @ rng.normal(size=(16, 12)) / 4)
    documents = [
        DocumentRows(f"doc{i}", "held-out" if i % 10 == 0 else "train", i * 100, 100) for i in range(rows // 100)
    ]
    plan = StorePlan(rows, documents, {"BOS": 30}, {"seed": 0, "context": 16, "bos_token_id": 0})
    hooks = [HookSpec(IN, (16,), "float32"), HookSpec(OUT, (12,), "float32")]
    provenance = {"model": {"name": model, "fingerprint": fingerprint}, "corpus": {"name": "none"}}
    with StoreWriter(path, plan, hooks, Geometry(64, 512), provenance) as writer:
        for number, part in enumerate(np.array_split(np.arange(rows), 10)):
            between(number)
            values = {IN: x[part].astype(np.float32), OUT: y[part].astype(np.float32)}
            writer.append(values, part % 50, part % 100, part // 100)
        writer.finish()


SAE = TrainConfig(
    name="sae",
    store="s",
    hook=IN,
    dictionary=TopKConfig(d_sae=64, k=4, dead_after_rows=3000),
    optimiser=OptimiserConfig(learning_rate=3e-3),
    batch_size=128,
    steps=60,
    buffer_rows=1024,
    log_every=5,
    checkpoint_every=7,
)
TRANSCODER = replace(SAE, name="transcoder", target_hook=OUT)
CODEBOOK = replace(SAE, name="icfl", dictionary=ICFLConfig(d_sae=48, rounds=2, width=2, reset_every=10))
NESTED = replace(
    TRANSCODER, name="matryoshka", dictionary=MatryoshkaConfig(d_sae=64, k=4, k_start=8, dead_after_rows=3000)
)
TIED = replace(SAE, name="ksparse", dictionary=KSparseConfig(d_sae=64, k=4, k_start=8))
KINDS = [SAE, TRANSCODER, CODEBOOK, NESTED, TIED]


def weights(workspace: Workspace, name: str) -> dict[str, torch.Tensor]:
    return dictlearn.load(workspace.run(name).folder).state_dict()


def metrics(workspace: Workspace, name: str) -> list[dict]:
    """The lines without the wall clock, which no resume can repeat."""
    lines = [json.loads(line) for line in workspace.run(name).metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("wall_")} for line in lines]
