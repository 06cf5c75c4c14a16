"""Shuffled batches of 4,096 rows, read back from disk through a warm page cache: ours, SAELens', and the bare gather.

    python scripts/bench/read.py --rounds 7
    PYTHONPATH=. peer/bin/python scripts/bench/read.py --rounds 7      # with SAELens, where it is installed

SAELens 6 cannot share an environment with TransformerLens 4, but activation_store's reader needs neither, so this runs
where SAELens is: python -m venv peer; peer/bin/pip install sae-lens==6.54.12 google-crc32c xxhash numcodecs.

The same rows, float32, lie in a store, in a SAELens activation cache, and in a flat file. In every round each reader
delivers the same number of batches:

- bare: np.take of the rows that the loader would deliver, from a memory map of the flat file;
- loader: `activation_store.Loader`, in the caller's thread, and with its reading threads;
- bfloat16: the same from a bfloat16 store, delivered as it is, and converted to float32;
- zstd: the same from a compressed store, whose chunks are decoded into the mixing buffer;
- SAELens: `ActivationsStore` over its cache, with a mixing buffer of as many rows.

Medians over the rounds; of ratios the median of the rounds'. Files are opened and mapped anew each time, by all.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from activation_store.bfloat16 import from_float32
from activation_store.loader import Loader
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.writer import StoreWriter

HOOK = "blocks.4.hook_resid_post"
BATCH_ROWS = 4096
CONTEXT = 128
BUFFER_ROWS = 131_072


def rows_of(context: int, d: int) -> np.ndarray:
    return np.random.default_rng(context).standard_normal((CONTEXT, d), dtype=np.float32)


def make_store(path: Path, rows: int, d: int, dtype: str, compression: str = "none") -> None:
    documents = [DocumentRows(str(i), "train", i * CONTEXT, CONTEXT) for i in range(rows // CONTEXT)]
    hook = HookSpec(HOOK, (d,), dtype)
    with StoreWriter(path, StorePlan(rows, documents), [hook], Geometry(), {}, compression=compression) as writer:
        for context in range(rows // CONTEXT):
            values = rows_of(context, d)
            about = np.full(CONTEXT, context)
            stored = from_float32(values) if dtype == "bfloat16" else values
            writer.append({HOOK: stored}, about, np.arange(CONTEXT), about)
        writer.finish()


def make_flat_file(path: Path, rows: int, d: int) -> None:
    with path.open("wb") as file:
        for context in range(rows // CONTEXT):
            file.write(rows_of(context, d).tobytes())


def make_saelens_cache(path: Path, rows: int, d: int) -> None:
    import datasets

    def contexts() -> Iterator[dict[str, Any]]:
        for context in range(rows // CONTEXT):
            yield {HOOK: rows_of(context, d), "token_ids": np.full(CONTEXT, context, dtype=np.int32)}

    shape = datasets.Array2D(shape=(CONTEXT, d), dtype="float32")
    token_ids = datasets.Sequence(datasets.Value("int32"), length=CONTEXT)
    features = datasets.Features({HOOK: shape, "token_ids": token_ids})
    made = datasets.Dataset.from_generator(contexts, features=features, cache_dir=str(path.parent / "cache"))
    made.save_to_disk(str(path))


def readers(folder: Path, rows: int, d: int, batches: int) -> dict[str, Callable[[], None]]:
    """What is measured, by name: each delivers ``batches`` batches."""
    settings: dict[str, Any] = {"split": "all", "epochs": 1, "buffer_rows": BUFFER_ROWS}
    planned = [
        taken for _, _, taken in Loader(open_store(folder / "float32"), [HOOK], BATCH_ROWS, **settings).rows_from(0, 0)
    ]

    def bare() -> None:
        flat = np.memmap(folder / "flat", dtype=np.float32, mode="r", shape=(rows, d))
        for taken in planned[:batches]:
            torch.from_numpy(np.take(flat, taken, axis=0))

    def loader(store: str, dtype: torch.dtype = torch.float32, **more: Any) -> Callable[[], None]:
        def read() -> None:
            made = Loader(open_store(folder / store), [HOOK], BATCH_ROWS, dtype=dtype, **settings, **more)
            for _ in itertools.islice(made, batches):
                pass

        return read

    every = {
        "bare gather, float32": bare,
        "loader, float32, caller's thread": loader("float32", prefetch=0),
        "loader, float32": loader("float32"),
        "loader, bfloat16": loader("bfloat16", torch.bfloat16),
        "loader, bfloat16 to float32": loader("bfloat16"),
        "loader, bfloat16, zstd": loader("zstd", torch.bfloat16),
    }
    if importlib.util.find_spec("sae_lens") is not None:
        every["SAELens, float32"] = saelens_reader(folder / "saelens", rows, d, batches)
    return every


def saelens_reader(path: Path, rows: int, d: int, batches: int) -> Callable[[], None]:
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer

    sizes = {"n_layers": 1, "d_model": 8, "n_ctx": CONTEXT, "d_head": 8, "d_vocab": 8, "act_fn": "relu"}
    never_run = HookedTransformer(sizes)  # the constructor wants a model, reading a cache does not

    def read() -> None:
        store = ActivationsStore(
            model=never_run,
            dataset=None,
            cached_activations_path=str(path),
            streaming=False,
            hook_name=HOOK,
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=d,
            n_batches_in_buffer=BUFFER_ROWS // BATCH_ROWS,
            total_training_tokens=rows,
            store_batch_size_prompts=BATCH_ROWS // CONTEXT,
            train_batch_size_tokens=BATCH_ROWS,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        for _ in range(batches):
            store.next_batch()

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=393_216)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, default=48, help="batches that a reader delivers in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = options.rows // BATCH_ROWS * BATCH_ROWS
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        make_flat_file(folder / "flat", rows, options.width)
        make_store(folder / "float32", rows, options.width, "float32")
        make_store(folder / "bfloat16", rows, options.width, "bfloat16")
        make_store(folder / "zstd", rows, options.width, "bfloat16", "zstd")
        if importlib.util.find_spec("sae_lens") is not None:
            make_saelens_cache(folder / "saelens", rows, options.width)
        every = readers(folder, rows, options.width, options.batches)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
        names = list(every)
        for number in range(-1, options.rounds):  # the first round warms the page cache
            for name in names[number:] + names[:number]:
                began = time.perf_counter(), time.process_time()
                every[name]()
                if number >= 0:
                    taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    show(taken, options.batches * BATCH_ROWS)


def show(taken: dict[str, list[tuple[float, float]]], rows: int) -> None:
    has_peer = "SAELens, float32" in taken
    print("| reader | rows/s | rows per CPU-s | x bare (wall) | x bare (CPU) |" + (" x SAELens (wall) |" * has_peer))
    print("| --- | --- | --- | --- | --- |" + " --- |" * has_peer)
    for name, seconds in taken.items():
        wall, cpu = (rows / median(pair[i] for pair in seconds) for i in (0, 1))
        cells = [f"{wall:,.0f}", f"{cpu:,.0f}"]
        cells += [f"{_times(seconds, taken['bare gather, float32'], i):.2f}" for i in (0, 1)]
        if has_peer:
            cells.append(f"{_times(seconds, taken['SAELens, float32'], 0):.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def _times(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], which: int) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return median(their[which] / our[which] for our, their in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
