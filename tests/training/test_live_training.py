"""The training loop does not know whether its rows come from a store or from a language model at work."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dictlearn
from activation_store.harvest.live import LiveLoader
from activation_store.harvest.run import HarvestConfig, harvest
from activation_store.loader import Loader
from activation_store.progress import NoProgress
from activation_store.source import ActivationSource
from activation_store.store import open_store
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.training import loop
from dictlearn.training.checkpoint import Checkpoints
from dictlearn.training.configs import TrainConfig
from dictlearn.training.loop import Run, train
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.workspace import RunFiles, Workspace
from tests.tiny_models import CORPUS_TEXT

HOOK, TARGET = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"
STEPS = 24
OF_A_SOURCE = dict(split="train", seed=5, buffer_rows=512)

SAE = TrainConfig(
    name="sae",
    store="s",
    hook=HOOK,
    target_hook=TARGET,
    dictionary=TopKConfig(d_sae=64, k=4),
    optimiser=OptimiserConfig(learning_rate=3e-3),
    batch_size=100,
    steps=STEPS,
    log_every=4,
    checkpoint_every=5,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> HarvestConfig:
    """The bundled model over some 3,000 rows."""
    folder = tmp_path_factory.mktemp("live training")
    (folder / "corpus").mkdir()
    for number in range(30):
        (folder / "corpus" / f"{number:02}.txt").write_text(CORPUS_TEXT[number:] * 4 + f"# {number}\n" * number)
    return HarvestConfig(
        hooks=(HOOK, TARGET),
        corpus=str(folder / "corpus"),
        tokens=3000,
        context=32,
        batch_size=8,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=folder / "store.zarr",
        device="cpu",
    )


@pytest.fixture(scope="module")
def harvested(config) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        return Path(harvest(config))


def run(folder: Path, source: ActivationSource, config: TrainConfig = SAE) -> RunFiles:
    files = Workspace(folder).run(config.name)
    train([Run(config, files, source)], STEPS, source, files.checkpoints, NoProgress())
    return files


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return dictlearn.load(files.folder).state_dict()


def lines(files: RunFiles) -> list[dict]:
    read = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("wall_")} for line in read]


def assert_same(one: RunFiles, other: RunFiles) -> None:
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and lines(one) == lines(other)
    assert dictlearn.load(one.folder).provenance == dictlearn.load(other.folder).provenance


@pytest.mark.parametrize("dictionary", [SAE.dictionary, ICFLConfig(d_sae=48, rounds=2, width=2)], ids=lambda d: d.kind)
def test_a_run_on_a_live_model_is_that_on_the_store_it_would_make(tmp_path, config, harvested, dictionary, monkeypatch):
    """Within the first epoch: later ones are in another order. (Looking at all rows first enters the second.)"""
    monkeypatch.setattr(loop, "INITIAL_ROWS", 1000)
    asked = replace(SAE, dictionary=dictionary, target_hook=None if dictionary.kind == "icfl" else TARGET)
    hooks = [HOOK, TARGET]
    live = run(tmp_path / "live", LiveLoader(config, 100, **OF_A_SOURCE), asked)
    stored = run(tmp_path / "stored", Loader(open_store(harvested), hooks, 100, follow=True, **OF_A_SOURCE), asked)
    assert_same(live, stored)
    assert lines(live)[-1]["fvu"] < lines(live)[0]["fvu"]


def test_a_run_on_a_live_model_continues_bit_for_bit(tmp_path, config, monkeypatch):
    loader = LiveLoader(config, 100, **OF_A_SOURCE)
    whole = run(tmp_path / "whole", loader)
    opened = loader._open()

    class Stopped(Exception):
        pass

    save, saved = Checkpoints.save, []

    def save_twice(self, step, position, members):
        save(self, step, position, members)
        saved.append(step)
        if len(saved) == 2:
            raise Stopped

    monkeypatch.setattr(Checkpoints, "save", save_twice)
    for _ in range(2):
        continued = LiveLoader(config, 100, **OF_A_SOURCE)
        continued._opened = opened  # the model, loaded: it takes seconds
        try:
            files = run(tmp_path / "stopped", continued)
        except Stopped:
            assert saved == [5, 10]
    assert saved == [5, 10, 15, 20]
    assert_same(whole, files)
