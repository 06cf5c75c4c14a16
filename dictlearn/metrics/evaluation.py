"""One run's dictionary on one store's held-out documents: rows from the store, tokens through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from activation_store.progress import Progress
from activation_store.store import Store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.description import dictionary_fingerprint, hooks_of
from dictlearn.dictionaries.files import load
from dictlearn.metrics.downstream import Downstream, measure_downstream, measure_each_downstream
from dictlearn.metrics.reconstruction import measure_reconstruction
from dictlearn.metrics.record import EvaluateConfig, Evaluation, asked, fingerprint
from dictlearn.workspace import RunFiles

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SPLIT = "held-out"


def evaluate(config: EvaluateConfig, files: RunFiles, store: Store, progress: Progress) -> Evaluation:
    """Reconstruction on ``config.rows`` rows, downstream loss on ``config.tokens`` tokens."""
    dictionary = load(files.dictionary)
    if config.k is not None:
        dictionary.k = config.k  # type: ignore[assignment]
    hooks_in, hooks_out = hooks_of(dictionary.provenance)
    with progress.task(f"evaluating {files.name}", total=config.rows, unit="rows") as task:

        def counted() -> Iterator[tuple[Tensor, Tensor | None]]:
            for x, target in row_batches(store, hooks_in, hooks_out, config.rows, config.batch_size):
                yield x, target
                task.advance(len(x))

        reconstruction = asdict(measure_reconstruction(dictionary, counted()))
    del reconstruction["density"]
    of_parts = reconstruction.pop("fvu_of_parts")
    by_hook: dict[str, dict[str, float]] = {}
    if len(hooks_out) > 1:
        by_hook = {hook: {"fvu": fvu} for hook, fvu in zip(hooks_out, of_parts, strict=True)}
    downstream = None
    if config.tokens and (len(hooks_in) == len(hooks_out) == 1 or dictionary.causal):
        downstream = asdict(downstream_on_store(dictionary, store, config.tokens, progress))
    elif config.tokens:
        for hook, found in each_downstream_on_store(dictionary, store, config.tokens, progress).items():
            by_hook.setdefault(hook, {}).update(asdict(found))
    return Evaluation(
        run=files.name,
        store=store.name,
        store_fingerprint=fingerprint(store),
        dictionary_fingerprint=dictionary_fingerprint(files.dictionary),
        asked=asked(config),
        hook_in=dictionary.provenance["hook_in"],
        hook_out=dictionary.provenance["hook_out"],
        split=SPLIT,
        reconstruction=reconstruction,
        downstream=downstream,
        by_hook=by_hook,
    )


def row_batches(
    store: Store, hooks_in: Sequence[str], hooks_out: Sequence[str], limit: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Up to ``limit`` held-out rows in store order, as float32 batches; several hooks side by side."""

    def rows(hooks: Sequence[str], first: int, last: int) -> Tensor:
        return torch.cat([store.tensor(hook, first, last).float().flatten(1) for hook in hooks], dim=1)

    left = limit
    for start, stop in store.split_rows(SPLIT):
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop, first + left)
            if last <= first:
                return
            left -= last - first
            yield rows(hooks_in, first, last), None if hooks_out == hooks_in else rows(hooks_out, first, last)


def downstream_on_store(dictionary: Dictionary, store: Store, tokens: int, progress: Progress) -> Downstream:
    """Run the store's own model on the store's own held-out text."""
    _, hooks_out = hooks_of(dictionary.provenance)
    mean = torch.cat([_mean(store, hook) for hook in hooks_out])
    replaced = hooks_out if len(hooks_out) > 1 else hooks_out[0]
    with _counted_windows(store, tokens, progress) as (windows, skip_first):
        return measure_downstream(_model(store), dictionary, replaced, mean, windows, skip_first)


def each_downstream_on_store(
    dictionary: Dictionary, store: Store, tokens: int, progress: Progress
) -> dict[str, Downstream]:
    """Run each hook's own model on the held-out text, one hook replaced at a time."""
    hooks_in, hooks_out = hooks_of(dictionary.provenance)
    models = {each.name: _model(each) for each in store.together}
    of_hooks = {hook: models[store.home(hook)[0].name] for hook in (*hooks_in, *hooks_out)}
    means = {hook: _mean(store, hook) for hook in hooks_out}
    with _counted_windows(store, tokens, progress) as (windows, skip_first):
        return measure_each_downstream(of_hooks, dictionary, hooks_in, means, windows, skip_first)


def _model(store: Store) -> TransformerBridge:
    from activation_store.harvest.language_model import load_language_model, resolve_model

    return load_language_model(resolve_model(store.manifest.provenance["model"]["name"]))


def _mean(store: Store, hook: str) -> Tensor:
    return torch.tensor(store.statistics(hook).mean).float().flatten()


@contextmanager
def _counted_windows(
    store: Store, tokens: int, progress: Progress
) -> Iterator[tuple[Iterator[tuple[Tensor, Tensor]], bool]]:
    """The store's held-out text, and whether each window begins with BOS."""
    bos = store.manifest.batches["bos_token_id"]
    with progress.task("running the spliced model", total=tokens, unit="tokens") as task:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, real in token_windows(store, bos, store.manifest.batches["context"], tokens):
                yield batch, real
                task.advance(int(real.sum()))

        yield counted(), bos is not None


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
