"""One implementation of a training step, in a process of its own: what train_step.py starts. Needs torch and numpy.

Takes its settings as JSON in its only argument, sets itself up, says which versions it runs, and then answers
questions, one line of JSON each way:

    {"question": "steps", "first": 6, "steps": 2, "dead_share": 0.25}  -> seconds, CPU-seconds and losses of these steps
    {"question": "peak", ...the same}                                  -> bytes above weights, moments and rows
    {"question": "stages", ...the same}                                -> seconds of each stage
    {"question": "fvu"}                                                -> of the rows that were held out

Every peer runs as its users get it for TopK with AuxK, through the function that its own trainer calls for each batch.
Where that is the body of a longer loop (sparsify), its calls are made here in the same order.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

AUXK_WEIGHT = 1 / 32
GRADIENT_CLIP = 1.0
MANY_STEPS = 1_000_000
"""Steps of the run that the measured ones are taken from: none of them is in a warm-up or a decay."""


class Implementation:
    """A model and its optimiser.

    Attributes:
        packages: whose versions are shown.
        device: where the model is made; rows come from there.
        model: has the parameters that are learned.
    """

    packages: tuple[str, ...] = ("torch",)
    device: ClassVar[str] = "cpu"
    model: torch.nn.Module

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        raise NotImplementedError

    def hold_dead(self, dead_S: Tensor) -> None:
        """Make the next step take the latents for dead where this is 1, and no others (it is 0 there)."""
        raise NotImplementedError

    def step(self, x: Tensor) -> Tensor | float:
        """One step on a batch (B, D); returns its loss."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor) -> Tensor | None:
        """(B, D), or None where nothing is learned."""
        raise NotImplementedError


class Moments:
    """The statistics of rows (B, D), for dictionaries that centre or whiten."""

    def __init__(self, rows: Tensor) -> None:
        exact = rows.double()
        self.mean, self.second_moment = exact.mean(dim=0).numpy(), (exact.T @ exact / len(rows)).numpy()


class Ours(Implementation):
    packages = ("torch", "dictlearn-lab")
    backend = "portable"
    numbers: ClassVar[dict[str, Any]] = {}
    """The kind and its settings, where it is not TopK."""

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        from activation_store.freed_memory import freed_memory_kept
        from dictlearn import ops
        from dictlearn.dictionaries import dictionary_class
        from dictlearn.training.optimiser_config import OptimiserConfig
        from dictlearn.training.optimisers import Optimiser
        from dictlearn.training.step import Member, take_step

        ops.set_backend(self.backend)
        generator = torch.Generator().manual_seed(0)
        settings = self.numbers or {"kind": "topk", "k": k, "auxk_weight": AUXK_WEIGHT}
        made = dictionary_class(settings["kind"])
        config = made.Config(d_sae=d_sae, **{name: value for name, value in settings.items() if name != "kind"})
        self.model = self.dictionary = made(config, d_in)
        self.dictionary.initialise(first_rows, None, generator, Moments(first_rows))
        optimiser = Optimiser(OptimiserConfig(learning_rate=learning_rate), self.dictionary)
        self.member = Member("ours", self.dictionary, optimiser, generator, GRADIENT_CLIP)
        self.steps = MANY_STEPS // 2
        self.take_step = take_step
        self.memory = freed_memory_kept()  # as in training
        self.memory.__enter__()

    def hold_dead(self, dead_S: Tensor) -> None:
        self.dictionary.rows_since_fired.copy_(dead_S * (self.dictionary.config.dead_after_rows + 1))

    def step(self, x: Tensor) -> Tensor:
        taken = self.take_step(self.member, x, None, self.steps, MANY_STEPS)
        self.steps += 1
        return taken.loss.total.detach()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.dictionary(x)


class OursDense(Ours):
    """The same step through the reference operations: dense codes, plain autograd."""

    backend = "reference"


def of_kind(numbers: dict[str, Any]) -> type[Ours]:
    """Our step of another kind than TopK."""
    return type("OursOfKind", (Ours,), {"numbers": numbers})


class EncoderGEMM(Implementation):
    """The product that no step can do without, into memory that is there already."""

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        self.model = self.encoder = torch.nn.Linear(d_in, d_sae)
        self.pre_BS = torch.empty(0)

    def hold_dead(self, dead_S: Tensor) -> None:
        pass

    def step(self, x: Tensor) -> float:
        if len(self.pre_BS) != len(x):
            self.pre_BS = torch.zeros(len(x), self.encoder.out_features)
        with torch.no_grad():
            torch.addmm(self.encoder.bias, x, self.encoder.weight.T, out=self.pre_BS)
        return 0.0

    def reconstruct(self, x: Tensor) -> None:
        return None


class SAELens(Implementation):
    packages = ("torch", "sae-lens")
    autocast: ClassVar[bool] = False
    choices: ClassVar[dict[str, Any]] = {}

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        rows = len(first_rows)
        config = SAETrainerConfig(
            MANY_STEPS * rows,
            rows,
            lr=learning_rate,
            lr_end=learning_rate / 10,
            device=self.device,
            autocast=self.autocast,
        )
        torch.manual_seed(0)
        sae_config = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=self.device, **self.choices)
        self.model = sae = TopKTrainingSAE(sae_config)
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))

    def hold_dead(self, dead_S: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.copy_(dead_S * (self.trainer.cfg.dead_feature_window + 1))

    def step(self, x: Tensor) -> Tensor:
        loss = self.trainer.step(x).loss.detach()
        self.trainer.n_training_steps += 1
        return loss

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae(x)


class SAELensSparse(SAELens):
    """Decodes from a sparse tensor. With rescaling, which is its default, the backward pass is not implemented."""

    choices: ClassVar[dict[str, Any]] = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}


class DictionaryLearning(Implementation):
    packages = ("torch", "dictionary-learning")

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer, geometric_median

        # past the warm-up and the first thousand steps, in which it keeps no threshold
        self.trainer = TopKTrainer(
            MANY_STEPS, d_in, d_sae, k, layer=0, lm_name="", lr=learning_rate, seed=0, device="cpu", warmup_steps=0
        )
        self.model = self.trainer.ae
        self.trainer.ae.b_dec.data = geometric_median(first_rows)
        self.steps = self.trainer.threshold_start_step + 1

    def hold_dead(self, dead_S: Tensor) -> None:
        # it compares after counting the batch, where most latents fire, so the counters alone would not hold them
        self.trainer.dead_feature_threshold = torch.where(dead_S.bool(), 0, 10_000_000)

    def step(self, x: Tensor) -> float:
        loss = self.trainer.update(self.steps, x)
        self.steps += 1
        return loss

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


class Sparsify(Implementation):
    """Its default optimiser is a sign descent; Adam is its choice that all others have too. It clips no gradient.

    Its AuxK reaches the decoder alone: the encoder's backward pass drops the gradient of the pre-activations.
    """

    packages = ("torch", "eai-sparsify")

    def __init__(self, d_in: int, d_sae: int, k: int, learning_rate: float, first_rows: Tensor) -> None:
        if self.device == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(0)
        config = SparseCoderConfig(num_latents=d_sae, k=k)
        self.model = self.coder = SparseCoder(d_in, config, device=self.device, dtype=torch.float32)
        self.coder.b_dec.data = first_rows.mean(0)
        self.optimiser = torch.optim.Adam(self.coder.parameters(), lr=learning_rate)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=self.device)
        self.dead_after = 10_000_000

    def hold_dead(self, dead_S: Tensor) -> None:
        self.tokens_since_fired.copy_(dead_S * (self.dead_after + 1))

    def step(self, x: Tensor) -> float:
        coder = self.coder
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=x, dead_mask=self.tokens_since_fired > self.dead_after)
        fired = torch.zeros(coder.num_latents, dtype=torch.bool, device=self.device)
        fired[out.latent_indices.flatten()] = True
        shown = float(out.fvu.detach()), float(out.auxk_loss.detach())
        (out.fvu + AUXK_WEIGHT * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[fired] = 0
        return shown[0] + AUXK_WEIGHT * shown[1]

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.coder(x).sae_out


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "ours": Ours,
    "ours-dense": OursDense,
    "encoder-gemm": EncoderGEMM,
    "sae-lens": SAELens,
    "sae-lens-sparse": SAELensSparse,
    "dictionary-learning": DictionaryLearning,
    "sparsify": Sparsify,
}


# --- the stages of our step -----------------------------------------------------------------------------------------

STAGE_OF_RANGE = {
    "project_gradients": "projection",
    "after_update": "decoder norm",
    "observe": "counting",
    "clip": "clip",
    "Optimizer.step": "Adam",
    "Optimizer.zero_grad": "Adam",
}
"""Ranges of the step that are one stage, whatever runs in them."""

STAGE_OF_OPERATION = {
    ("forward", "addmm"): "encoder GEMM",
    ("forward", "topk"): "selection",
    ("forward", "embedding_bag"): "decode",
    ("backward", "embedding_bag"): "weight gradients",
    ("backward", "sparse_sampled_addmm"): "pair products",
}
"""Operations that are a stage of their own; others are shown by their names."""

BETWEEN = "between operations"


def profiled(ours: Ours, x: Tensor) -> dict[str, float]:
    """Seconds of each stage of one step, by its operations; what is in no operation is the time between them."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from dictlearn.training import step

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            with record_function(name):
                return function(*arguments, **more)

        return call

    parts = [(ours.dictionary, part) for part in ("project_gradients", "after_update", "observe")] + [(step, "clip")]
    with ExitStack() as stack:
        for owner, part in parts:
            stack.enter_context(patch.object(owner, part, named(part, getattr(owner, part))))
        record = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        began = time.perf_counter()
        ours.step(x)
        took = time.perf_counter() - began
    stages: dict[str, float] = defaultdict(float)
    for event in record.events():
        stages[_stage(event)] += event.self_cpu_time_total / 1e6
    stages[BETWEEN] += took - sum(stages.values())
    return dict(stages)


def _stage(event: Any) -> str:
    """Of one profiled operation, by its name and by what it runs within."""
    within = []
    while event is not None:
        within.append(event.name)
        event = event.cpu_parent
    for name in within:
        for start, stage in STAGE_OF_RANGE.items():
            if name.startswith(start):
                return stage
    pass_ = "backward" if any(name.startswith("autograd::engine") for name in within) else "forward"
    operations = [name.removeprefix("aten::") for name in within if name.startswith("aten::")]
    if not operations:
        return BETWEEN
    outermost = operations[-1]
    return STAGE_OF_OPERATION.get((pass_, outermost), f"{outermost}, {pass_}")


# --- questions ------------------------------------------------------------------------------------------------------


class Bench:
    """A set-up implementation, the rows it learns from, and what it can be asked."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.rows = np.load(settings["rows"], mmap_mode="r")
        self.batch, self.d_sae = settings["batch"], settings["d_sae"]
        self.held_out = settings["held_out"]
        name = settings["implementation"]
        chosen = of_kind(json.loads(name)) if name.startswith("{") else IMPLEMENTATIONS[name]
        first = self._rows(0)
        self.implementation = chosen(self.rows.shape[1], self.d_sae, settings["k"], settings["learning_rate"], first)
        self.delivered = self._delivered(settings["store"]) if settings.get("store") else None
        self.implementation.hold_dead(self._dead(0.25))
        self.implementation.step(first[:8].clone())  # makes the moments, and loads what torch loads late
        self.versions = {name: importlib.metadata.version(name) for name in chosen.packages}
        for parameter in self.implementation.model.parameters():
            parameter.grad = None
        self.base = self._reset_peak()

    def steps(self, first: int, steps: int, dead_share: float) -> dict[str, Any]:
        wall = cpu = 0.0
        losses = []
        for number in range(first, first + steps):
            x = self._rows(number)
            self.implementation.hold_dead(self._dead(dead_share))
            began = time.perf_counter(), time.process_time()
            loss = self.implementation.step(x if self.delivered is None else next(self.delivered))
            wall, cpu = wall + time.perf_counter() - began[0], cpu + time.process_time() - began[1]
            losses.append(float(loss))
        return {"wall": wall, "cpu": cpu, "losses": losses}

    def peak(self, first: int, steps: int, dead_share: float) -> int:
        self._reset_peak()
        self.steps(first, steps, dead_share)
        return _status("VmHWM") - self.base

    def stages(self, first: int, steps: int, dead_share: float) -> list[dict[str, float]]:
        assert isinstance(self.implementation, Ours)
        taken = []
        for number in range(first, first + steps):
            x = self._rows(number)
            self.implementation.hold_dead(self._dead(dead_share))
            taken.append(profiled(self.implementation, x))
        return taken

    def fvu(self) -> float | None:
        x = torch.from_numpy(np.array(self.rows[-self.held_out :]))
        with torch.no_grad():
            output = self.implementation.reconstruct(x)
        if output is None:
            return None
        return float((x - output).square().sum() / (x - x.mean(0)).square().sum())

    def _rows(self, number: int) -> Tensor:
        """Batch ``number``, which is the same for every implementation."""
        batches = (len(self.rows) - self.held_out) // self.batch
        first = number % batches * self.batch
        return torch.from_numpy(np.array(self.rows[first : first + self.batch]))

    def _dead(self, share: float) -> Tensor:
        dead_S = torch.zeros(self.d_sae, dtype=torch.long)
        dead_S[torch.randperm(self.d_sae, generator=torch.Generator().manual_seed(1))[: int(share * self.d_sae)]] = 1
        return dead_S

    def _delivered(self, store: str) -> Iterator[Tensor]:
        from activation_store.loader import Loader
        from activation_store.store import open_store

        for rows in Loader(open_store(Path(store)), ["hook"], self.batch):
            yield rows["hook"]

    def _reset_peak(self) -> int:
        """Give back what is free and forget the high-water mark of the resident set; returns the bytes now held."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints goes to the error stream
    bench = Bench(json.loads(sys.argv[1]))
    answers.write(json.dumps(bench.versions) + "\n")
    answers.flush()
    for line in sys.stdin:
        details = json.loads(line)
        answers.write(json.dumps(getattr(bench, details.pop("question"))(**details)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
