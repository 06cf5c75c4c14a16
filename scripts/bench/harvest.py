"""What a harvest takes beside the forward pass it cannot do without: one hook of the middle layer, written to disk.

    python scripts/bench/harvest.py --threads 1 --contexts 128 256 512 --models bundled random:512x8 random:256x6

In every round each job runs once, over the same number of windows and in an order that changes from round to round:

- bare Bridge, bare modules: the forward pass alone, stopped after that layer, its activation looked at by nobody. The
  modules with freed memory kept, as a harvest by them has it; the Bridge as it is, and once more with memory kept;
- harvest through the Bridge, through the modules: `dictlearn harvest` from the moment the model is loaded to the last
  byte of a complete store: batches, forward passes, conversion, checks, rows, statistics, fsync;
- writing: rows at hand into a complete store.

Printed are medians over the rounds, and of ratios the median of the rounds' ratios. CPU-seconds are those of the
process, all threads together: of wall time another process takes its share. A model is "bundled", a folder in Hugging
Face layout, or random:WIDTHxLAYERS, a GPT-2 with random weights made on the spot.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from activation_store.freed_memory import freed_memory_kept
from activation_store.harvest import HarvestConfig, describe, harvest, load_language_model, resolve_model
from activation_store.harvest.corpus import open_corpus
from activation_store.harvest.language_model import BUNDLED_FOLDER, ModelSpec, load_modules
from activation_store.harvest.modules import HookedModules, find_places
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter

TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Taken:
    """Seconds of one job."""

    cpu: float
    wall: float


class Stopwatch:
    """Measures a block; or, as the progress of a harvest, the part of it that is called Harvesting."""

    def __init__(self) -> None:
        self.taken = Taken(0, 0)
        self._measuring = True

    def task(self, title: str, total: float | None = None, unit: str = "") -> Stopwatch:
        self._measuring = title.startswith("Harvesting")
        return self

    def advance(self, n: float = 1, **shown: object) -> None:
        pass

    def tabulate(self, rows: Mapping[str, Mapping[str, object]]) -> None:
        pass

    def __enter__(self) -> Stopwatch:
        self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._measuring:
            self.taken = Taken(time.process_time() - self._began[0], time.perf_counter() - self._began[1])


# --- the jobs -------------------------------------------------------------------------------------------------------


def jobs(config: HarvestConfig, passes: int) -> dict[str, Callable[[], Taken]]:
    """What is measured, by name; each makes ``passes`` forward passes, or writes as many rows."""
    spec = resolve_model(config.model)
    bridge = load_language_model(spec)
    (hook,) = config.hooks
    layer = spec.last_layer_needed([hook])
    shapes = {hook: spec.hook_shape(hook)}
    plain = load_modules(spec, type(bridge.original_model))  # type: ignore[arg-type]
    modules = HookedModules(plain, find_places(bridge, [hook]), shapes)
    shape = (config.batch_size, config.context)
    tokens = torch.randint(spec.vocab_size, (passes, *shape), generator=torch.Generator().manual_seed(0))

    def stop(activation: torch.Tensor, hook: object) -> None:
        raise StopAtLayerException(activation)

    def bare_bridge(memory: Callable[[], AbstractContextManager[object]]) -> Taken:
        with memory(), Stopwatch() as watch, torch.inference_mode():
            for batch in tokens:
                bridge(batch, stop_at_layer=layer + 1, return_type=None, use_cache=False)
        return watch.taken

    def bare_modules() -> Taken:
        with freed_memory_kept(), Stopwatch() as watch, torch.inference_mode(), modules.hooks([(hook, stop)]):
            for batch in tokens:
                modules(batch)
        return watch.taken

    return {
        "bare bridge": partial(bare_bridge, nullcontext),
        "bare bridge, memory kept": partial(bare_bridge, freed_memory_kept),
        "bare modules": bare_modules,
        "harvest bridge": partial(harvested, replace(config, capture="bridge")),
        "harvest modules": partial(harvested, replace(config, capture="modules")),
        "writing": partial(written, spec, hook, config.tokens, Path(config.store).parent),
    }


def harvested(config: HarvestConfig) -> Taken:
    """A harvest into a store that is not kept."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(dir=Path(config.store).parent) as place:
        harvest(replace(config, store=Path(place) / "store.zarr"), watch)
    return watch.taken


def written(spec: ModelSpec, hook: str, rows: int, folder: Path) -> Taken:
    """A store of rows that are there already."""
    hooks = [HookSpec(hook, spec.hook_shape(hook), "bfloat16")]
    bits = np.random.default_rng(0).integers(1 << 14, size=(TOKENS_PER_PASS, *hooks[0].shape), dtype=np.uint16)
    plan = StorePlan(rows, [DocumentRows("all", "train", 0, rows)])
    zeros = np.zeros(TOKENS_PER_PASS, dtype=np.int32)
    with tempfile.TemporaryDirectory(dir=folder) as place, Stopwatch() as watch:
        writer = StoreWriter(Path(place) / "store.zarr", plan, hooks, Geometry(), {})
        for first in range(0, rows, TOKENS_PER_PASS):
            n = min(TOKENS_PER_PASS, rows - first)
            writer.append({hook: bits[:n]}, zeros[:n], zeros[:n], zeros[:n])
        writer.finish()
    return watch.taken


def measure(config: HarvestConfig, passes: int, rounds: int) -> dict[str, list[Taken]]:
    """Every job once in every round, after one round that does not count."""
    every = jobs(config, passes)
    names = list(every)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for number in range(-1, rounds):
        for name in names[number:] + names[:number]:
            seconds = every[name]()
            if number >= 0:
                taken[name].append(seconds)
    return taken


# --- the table ------------------------------------------------------------------------------------------------------

COLUMNS = (
    "model", "context", "bare Bridge tok/s", "harvest by it / it", "bare modules tok/s", "harvest by them / them",
    "harvest by modules / bare Bridge", "the same, memory kept in both", "writing alone / bare modules",
    "wall: harvest / bare modules",
)  # fmt: skip


def row(name: str, context: int, tokens: int, taken: dict[str, list[Taken]]) -> list[str]:
    """Ratios are of speeds: 0.97 means that 3 % of the time goes elsewhere."""

    def speed(job: str) -> str:
        return f"{tokens / median(seconds.cpu for seconds in taken[job]):,.0f}"

    def ratio(job: str, to: str, of: str = "cpu") -> str:
        pairs = zip(taken[job], taken[to], strict=True)
        return f"{median(getattr(b, of) / getattr(a, of) for a, b in pairs):.3f}"

    share = median(w.cpu / b.cpu for w, b in zip(taken["writing"], taken["bare modules"], strict=True))
    return [
        name,
        str(context),
        speed("bare bridge"),
        ratio("harvest bridge", "bare bridge"),
        speed("bare modules"),
        ratio("harvest modules", "bare modules"),
        ratio("harvest modules", "bare bridge"),
        ratio("harvest modules", "bare bridge, memory kept"),
        f"{share:.3f}",
        ratio("harvest modules", "bare modules", "wall"),
    ]


def random_gpt2(folder: Path, width: int, layers: int) -> Path:
    """A GPT-2 with random weights, heads of 32 numbers, and the bundled model's tokenizer."""
    vocabulary = resolve_model("bundled").vocab_size
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=512,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((BUNDLED_FOLDER / "tokenizer.json").read_bytes())
    return folder


def corpus(file: Path, chars: int) -> Path:
    """So much Python source: harvesting the whole standard library, every job would begin by reading all of it."""
    texts = (document.text for document in open_corpus("stdlib").documents)
    file.write_text("\n".join(texts)[:chars], encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bundled", "random:512x8", "random:256x6"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of one job")
    parser.add_argument("--quick", action="store_true", help="one small model, one round: that it runs, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.models, options.contexts, options.rounds, options.tokens = ["random:64x2"], [32], 1, TOKENS_PER_PASS
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} threads, ", end="")
    print(f"{options.tokens:,} tokens a job, {options.rounds} rounds, CPU-seconds but for the last column\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = corpus(Path(folder) / "corpus.txt", 10 * options.tokens)
        for model in options.models:
            location = model
            if model.startswith("random:"):
                width, layers = map(int, model.removeprefix("random:").split("x"))
                location = str(random_gpt2(Path(folder) / f"{width}x{layers}", width, layers))
            layer = resolve_model(location).n_layers // 2
            for context in options.contexts:
                config = HarvestConfig(
                    model=location,
                    hooks=(f"blocks.{layer}.hook_resid_post",),
                    corpus=str(text),
                    store=Path(folder) / "store.zarr",
                    tokens=options.tokens * (context - 2) // context,  # BOS gives no row
                    context=context,
                    batch_size=TOKENS_PER_PASS // context,
                    device="cpu",
                    threads=options.threads,
                )
                passes = describe(config).batches
                taken = measure(config, passes, options.rounds)
                line = row(Path(model).name, context, passes * TOKENS_PER_PASS, taken)
                print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
