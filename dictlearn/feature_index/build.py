"""Building an index: the vocabulary and the logits, one pass of encoding, sorting by latent, decoder neighbours.

One sequence of steps, each of which leaves files behind (staging.py) and is skipped when they are there. Kill it at any
instant and run it again: the finished index is the same, byte for byte on the same machine, and no more than one part
of the encoding (about a third of `memory_mb` of activations) is computed twice.
"""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import numpy as np
import torch

from activation_store.errors import UserError
from activation_store.harvest.language_model import load_tokenizer
from activation_store.progress import Progress
from activation_store.spec import checksum
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.files import load
from dictlearn.feature_index.decoder import (
    evened,
    load_unembedding,
    logit_effects,
    logits_in_words,
    neighbours,
    neurons_of,
    reaching_the_end,
    top_neurons,
    why_no_logits,
)
from dictlearn.feature_index.encode import Part, encode_parts
from dictlearn.feature_index.plan import plan, refuse_full_disk, sample
from dictlearn.feature_index.spec import (
    ARRAYS,
    FORMAT_VERSION,
    LISTED,
    IndexManifest,
    Sizes,
    chunk_keys,
)
from dictlearn.feature_index.staging import Staging
from dictlearn.feature_index.transpose import Texts, count_by_latent, histogram_edges, plan_ranges, transpose
from dictlearn.feature_index.work import IndexWork, building_folder
from dictlearn.token_text import known_tokens, token_bytes

TEXT_ROWS = 1 << 20
"""Rows of text copied at a time."""


def build(work: IndexWork, progress: Progress) -> Path:
    """Build or continue the index described by ``work``. Returns its folder.

    Raises:
        UserError: another process builds it; the model cannot be loaded; an activation is not finite; memory_mb is too
            small for a latent; the disk has too little room, is full or cannot be written.
    """
    dictionary = load(work.files.dictionary, work.device)
    refuse_full_disk(work.path, plan(work, sample(dictionary, work)))
    made_from = {"format_version": FORMAT_VERSION, **dataclasses.asdict(work.made_from)}
    try:
        with Staging(building_folder(work.path), made_from) as staging:
            return _build(work, dictionary, staging, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of {str(work.path)!r} is full; free some space and run the same command again: what is "
                "finished will be used."
            ) from error
        raise UserError(f"The index {str(work.path)!r} cannot be written: {error.strerror or error}.") from error


def _build(work: IndexWork, dictionary: Dictionary, staging: Staging, progress: Progress) -> Path:
    made = work.made_from
    memory_bytes = work.memory_mb * 2**20

    _copy_text(work, staging)
    words = _decoder(work, dictionary, staging, progress)
    with progress.task(f"encoding {made.store} with {made.run}", total=made.rows, unit="rows") as task:
        parts = encode_parts(dictionary, work.store, work.hooks_in, made.rows, memory_bytes // 2, staging, task)
    counts_S = count_by_latent(parts, made.d_sae)
    edges = _transpose(work, parts, counts_S, staging, progress, memory_bytes)

    sizes = _sizes(work, staging, int(counts_S.sum()), len(edges) - 1)
    keys = [key for array in ARRAYS for key in chunk_keys(array, sizes.shape(array))]
    manifest = IndexManifest(
        made_from=made,
        sizes=sizes,
        rows_held_out=int(np.diff(_held_out(work), axis=1).sum()),
        histogram_edges=tuple(edges.tolist()),
        logits=words,
        has_logits=made.logits and why_no_logits(work.hooks_out, made.aligned_stores, work.model.layout) is None,
        files={key: checksum((staging.index / key).read_bytes()) for key in keys},
    )
    staging.write_metadata(sizes, manifest.to_bytes())
    staging.finish(work.path)
    return work.path


# --- the text ---------------------------------------------------------------------------------------------------------


def _copy_text(work: IndexWork, staging: Staging) -> None:
    """Tokens, positions, documents and vocabulary, so that a page needs neither the store nor the model."""
    if staging.is_done("text"):
        return
    rows = work.made_from.rows
    with staging.step("text"):
        vocabulary = work.model.vocab_size
        counts = np.zeros(vocabulary, dtype=np.int64)
        token_ids, positions = staging.long_array("text/token_ids", rows), staging.long_array("text/positions", rows)
        for start in range(0, rows, TEXT_ROWS):
            stop = min(start + TEXT_ROWS, rows)
            tokens = work.store.token_ids(start, stop)
            counts += np.bincount(tokens, minlength=vocabulary)
            token_ids.write(start, tokens)
            positions.write(start, work.store.positions(start, stop))
        pieces = token_bytes(load_tokenizer(work.model), vocabulary)
        staging.write_array("vocabulary/counts", counts)
        staging.write_array("vocabulary/pieces", np.frombuffer(b"".join(pieces), dtype=np.uint8))
        staging.write_array("vocabulary/piece_ends", np.cumsum([len(piece) for piece in pieces]))
        documents = [document for document in work.store.document_table if document.first_row < rows]
        ids = [document.id.encode() for document in documents]
        staging.write_array("documents/ids", np.frombuffer(b"".join(ids), dtype=np.uint8))
        staging.write_array("documents/id_ends", np.cumsum([len(id_) for id_ in ids]))
        staging.write_array("documents/first_rows", np.array([d.first_row for d in documents]))
        staging.write_array("documents/rows", np.array([min(d.rows, rows - d.first_row) for d in documents]))
        staging.write_array("documents/held_out", np.array([d.split != "train" for d in documents]))


def _held_out(work: IndexWork) -> np.ndarray:
    """(ranges, 2) of held-out rows among those encoded."""
    ranges = work.store.split_ranges("held-out").astype(np.int64)
    return np.minimum(ranges, work.made_from.rows)[ranges[:, 0] < work.made_from.rows]


def _sizes(work: IndexWork, staging: Staging, activations: int, bins: int) -> Sizes:
    documents = [document for document in work.store.document_table if document.first_row < work.made_from.rows]
    return Sizes(
        S=work.made_from.d_sae,
        N=activations,
        R=work.made_from.rows,
        D=len(documents),
        I=sum(len(document.id.encode()) for document in documents),
        V=work.model.vocab_size,
        P=sum(map(len, token_bytes(load_tokenizer(work.model), work.model.vocab_size))),
        H=bins,
        M=len(work.hooks_out) if len(work.hooks_out) > 1 else 0,
        W=0 if neurons_of(work.hooks_out) is None else LISTED,
    )


# --- the decoder ------------------------------------------------------------------------------------------------------


def _decoder(work: IndexWork, dictionary: Dictionary, staging: Staging, progress: Progress) -> str:
    """Neighbours and logits; returns the logits in words. Done first: a model that cannot be loaded is told at once."""
    made, hooks = work.made_from, work.hooks_out
    W_dec_SO = dictionary.W_dec.detach().cpu()
    if not staging.is_done("neighbours"):
        with (
            staging.step("neighbours"),
            progress.task("comparing decoder rows", total=made.d_sae, unit="latents") as task,
        ):
            W_even_SO, norms_SM = evened(W_dec_SO, dictionary)
            latents, cosines = neighbours(W_even_SO, task.advance)
            staging.write_array("neighbours/latents", latents)
            staging.write_array("neighbours/cosines", cosines)
            staging.write_array("decoder/norms", norms_SM.numpy())
    layer = neurons_of(hooks)
    if not staging.is_done("neurons"):
        with staging.step("neurons"):
            listed = (
                top_neurons(W_dec_SO) if layer is not None else (np.empty((made.d_sae, 0)), np.empty((made.d_sae, 0)))
            )
            for name, array in zip(("numbers", "weights"), listed, strict=True):
                staging.write_array(f"neurons/{name}", array)
    words = staging.folder / "logits.txt"
    if not staging.is_done("logits"):
        with staging.step("logits"):
            end, why_not = None, why_no_logits(hooks, made.aligned_stores, work.model.layout)
            tokens, values = np.full((made.d_sae, LISTED), -1), np.full((made.d_sae, LISTED), np.nan)
            found = (tokens, values, tokens, values)
            if made.logits and why_not is None:
                known_V = known_tokens(load_tokenizer(work.model), work.model.vocab_size)
                end = load_unembedding(work.model, known_V, layer)
                if end.W_out_NO is not None:
                    written_SO = W_dec_SO.float() @ end.W_out_NO
                else:
                    written = W_dec_SO.split(dictionary.output_parts, dim=1)
                    written_SO = torch.stack([written[part] for part in reaching_the_end(hooks)]).sum(dim=0)
                with progress.task("logits of every latent", total=made.d_sae, unit="latents") as task:
                    found = logit_effects(written_SO, end, task.advance)
            for name, array in zip(("top_tokens", "top_values", "bottom_tokens", "bottom_values"), found, strict=True):
                staging.write_array(f"logits/{name}", array)
            text = logits_in_words(hooks, made.logits, why_not, end)
            staging.write_file(words, text.encode(), subject="words")
    return words.read_text()


# --- sorting ----------------------------------------------------------------------------------------------------------


def _transpose(
    work: IndexWork, parts: list[Part], counts_S: np.ndarray, staging: Staging, progress: Progress, memory_bytes: int
) -> np.ndarray:
    """Write everything that is known of the activations; returns the edges of the histograms."""
    coactive = work.made_from.coactive
    edges = histogram_edges(parts)
    texts = Texts(
        tokens_of=lambda rows: work.store.take_row_array("token_ids", rows),
        held_out=_held_out(work),
        vocabulary=work.model.vocab_size,
    )
    ranges = plan_ranges(counts_S, memory_bytes, coactive)
    with progress.task("sorting by latent", total=int(counts_S.sum()), unit="activations") as task:
        found = transpose(parts, counts_S, ranges, edges, texts, coactive, staging, task.advance)
    for path, array in found.items():
        staging.write_array(path, array)
    return edges
