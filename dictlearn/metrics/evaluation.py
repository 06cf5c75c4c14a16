"""One run's dictionary on one store's held-out documents: rows from the store, tokens through the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from activation_store.progress import Progress
from activation_store.store import Store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.files import load
from dictlearn.metrics.command import EvaluateConfig, Evaluation, asked
from dictlearn.metrics.downstream import Downstream, measure_downstream
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.workspace import RunFiles

SPLIT = "held-out"


def evaluate(config: EvaluateConfig, files: RunFiles, store: Store, progress: Progress) -> Evaluation:
    """Reconstruction on ``config.rows`` rows, downstream loss on ``config.tokens`` tokens."""
    dictionary = load(files.dictionary)
    hook_in, hook_out = dictionary.provenance["hook_in"], dictionary.provenance["hook_out"]
    with progress.task(f"evaluating {files.name}", total=config.rows, unit="rows") as task:

        def counted() -> Iterator[tuple[Tensor, Tensor | None]]:
            for x, target in row_batches(store, hook_in, hook_out, config.rows, config.batch_size):
                yield x, target
                task.advance(len(x))

        reconstruction = asdict(measure_reconstruction(dictionary, counted()))
    del reconstruction["density"]
    downstream = None
    if config.tokens:
        downstream = asdict(downstream_on_store(dictionary, store, config.tokens, progress))
    return Evaluation(
        run=files.name,
        store=store.name,
        store_fingerprint=store.fingerprint,
        asked=asked(config),
        hook_in=hook_in,
        hook_out=hook_out,
        split=SPLIT,
        reconstruction=reconstruction,
        downstream=downstream,
    )


def row_batches(
    store: Store, hook_in: str, hook_out: str, limit: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Up to ``limit`` held-out rows in store order, as float32 batches."""
    left = limit
    for start, stop in store.split_rows(SPLIT):
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop, first + left)
            if last <= first:
                return
            left -= last - first
            x = store.tensor(hook_in, first, last).float().flatten(1)
            yield x, None if hook_out == hook_in else store.tensor(hook_out, first, last).float().flatten(1)


def downstream_on_store(dictionary: Dictionary, store: Store, tokens: int, progress: Progress) -> Downstream:
    """Run the store's own model on the store's own held-out text."""
    from activation_store.harvest.language_model import load_language_model, resolve_model

    record = store.manifest.provenance
    spec = resolve_model(record["model"]["name"])
    model = load_language_model(spec)
    hook_out = dictionary.provenance["hook_out"]
    mean = torch.tensor(store.statistics(hook_out).mean).float().flatten()
    bos = store.manifest.batches["bos_token_id"]
    with progress.task("running the spliced model", total=tokens, unit="tokens") as task:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, real in token_windows(store, bos, store.manifest.batches["context"], tokens):
                yield batch, real
                task.advance(int(real.sum()))

        return measure_downstream(model, dictionary, hook_out, mean, counted(), skip_first=bos is not None)


def token_windows(
    store: Store, bos: int | None, context: int, limit: int, batch_size: int = 8
) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out text of the store as batches of ``(tokens (B, context), real (B, context))``.

    Each document starts a window of its own, and every window starts with BOS when there is one, so that no prediction
    crosses a document and the position that rows leave out is always the first.
    """
    windows: list[np.ndarray] = []
    length = context - (bos is not None)
    left = limit
    for start, stop in store.split_rows(SPLIT):
        documents, token_ids = store.documents(start, stop), store.token_ids(start, stop)
        edges = [0, *(np.flatnonzero(np.diff(documents)) + 1), stop - start]
        for first, last in pairwise(edges):
            for begin in range(first, last, length):
                window = token_ids[begin : min(begin + length, last)]
                if len(window) < 2 or left <= 0:
                    continue
                windows.append(window[:left])
                left -= len(window)
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        tokens = torch.zeros(len(batch), context, dtype=torch.int64)
        real = torch.zeros(len(batch), context, dtype=torch.bool)
        for row, window in enumerate(batch):
            offset = 0
            if bos is not None:
                tokens[row, 0] = bos
                real[row, 0] = True
                offset = 1
            tokens[row, offset : offset + len(window)] = torch.from_numpy(window.astype(np.int64))
            real[row, offset : offset + len(window)] = True
        yield tokens, real
