"""The plan of a harvest, as arithmetic: which tokens are in which batch, and which rows of the store come out of it.

Documents are taken in an order shuffled by the seed, each with a BOS token in front (when the model has one), and
written one after the other as a single stream. The stream is cut into windows of ``context`` tokens and the windows
into batches. A window may hold the end of one document and the beginning of the next: ``documents`` says which token
is whose. A window that begins inside a document gets a BOS of its own: models put their attention sink, with norms far
from all others, at the first position, and it should hold a token that gives no row. BOS and padding give no rows; they
are counted.

Nothing here touches a model. Which rows a batch gives depends on its tokens alone, so the batch that holds any row can
be found without computing those before it, and a batch is always computed whole: the last one is padded to full shape,
because another shape would change the last bits of every activation in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from activation_store.errors import UserError
from activation_store.harvest.corpus import Document
from activation_store.progress import NoProgress, Progress
from activation_store.seeds import permutation

TOKENIZED_AT_ONCE = 1_000_000
"""Characters handed to the tokenizer together: its own bookkeeping takes some 100 bytes per token until we drop it."""


@dataclass(frozen=True)
class Batch:
    """One forward pass. Legend: B windows, C tokens in a window, N rows that are kept, in the order of the store."""

    index: int
    first_row: int
    tokens_BC: np.ndarray
    kept_N: np.ndarray
    """Where the kept rows are among the B * C positions, ascending."""
    token_ids_N: np.ndarray
    positions_N: np.ndarray
    documents_N: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.kept_N)


@dataclass(frozen=True)
class BatchPlan:
    """A stream of tokens and how it is cut. Legend: T tokens in the stream, D documents used."""

    stream_T: np.ndarray
    document_starts_D: np.ndarray
    """Where in the stream each document begins, in the order they are taken."""
    document_ids: list[str]
    context: int
    batch_size: int
    bos_token_id: int | None

    @property
    def windows(self) -> int:
        return -(-len(self.stream_T) // self.context)

    @property
    def batches(self) -> int:
        return -(-self.windows // self.batch_size)

    @property
    def rows(self) -> int:
        return int(self.first_rows[-1])

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(batches + 1,): the first row of each batch, and the number of all rows."""
        step = self.context * self.batch_size
        counts = [
            int(self._keeps(self.stream_T[start : start + step]).sum()) for start in range(0, len(self.stream_T), step)
        ]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @property
    def excluded(self) -> dict[str, int]:
        """Positions computed that give no row, by reason. With the rows they make up all positions of all batches."""
        return {
            "bos": len(self.stream_T) - self.rows,
            "padding": self.batches * self.batch_size * self.context - len(self.stream_T),
        }

    @cached_property
    def rows_per_document(self) -> np.ndarray:
        """(D,): how many rows each document gives."""
        kept_before = np.concatenate([[0], np.cumsum(self._keeps(self.stream_T), dtype=np.int64)])
        ends = np.append(self.document_starts_D[1:], len(self.stream_T))
        return kept_before[ends] - kept_before[self.document_starts_D]

    @property
    def fingerprint(self) -> str:
        """Hash of everything above: two plans with the same fingerprint give the same batches."""
        digest = hashlib.sha256(self.stream_T.astype("<u4").tobytes())
        digest.update(self.document_starts_D.astype("<i8").tobytes())
        digest.update(json.dumps([self.document_ids, self.context, self.batch_size, self.bos_token_id]).encode())
        return "sha256:" + digest.hexdigest()

    def batch(self, index: int) -> Batch:
        """The ``index``-th batch, at its full shape."""
        step = self.context * self.batch_size
        start = index * step
        stream = self.stream_T[start : start + step].astype(np.int64)
        kept = np.flatnonzero(self._keeps(stream))
        padded = np.full(step, self.bos_token_id or 0, dtype=np.int64)
        padded[: len(stream)] = stream
        return Batch(
            index=index,
            first_row=int(self.first_rows[index]),
            tokens_BC=padded.reshape(self.batch_size, self.context),
            kept_N=kept,
            token_ids_N=stream[kept].astype(np.int32),
            positions_N=(kept % self.context).astype(np.int32),
            documents_N=(np.searchsorted(self.document_starts_D, start + kept, side="right") - 1).astype(np.int32),
        )

    def batches_from(self, row: int) -> Iterator[tuple[Batch, int]]:
        """Batches from the one that holds ``row`` on, each with how many of its rows come before ``row``."""
        if row >= self.rows:
            return
        for index in range(int(np.searchsorted(self.first_rows, row, side="right")) - 1, self.batches):
            batch = self.batch(index)
            if batch.rows:
                yield batch, max(0, row - batch.first_row)

    def _keeps(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens give a row: every one but BOS, wherever it stands."""
        return np.ones(len(tokens), dtype=bool) if self.bos_token_id is None else tokens != self.bos_token_id


def plan_batches(
    documents: Sequence[Document],
    tokenize: Callable[[list[str]], list[list[int]]],
    *,
    rows: int,
    context: int,
    batch_size: int,
    seed: int,
    bos_token_id: int | None,
    vocab_size: int,
    progress: Progress | None = None,
) -> BatchPlan:
    """Take documents, in an order shuffled by ``seed``, until they give ``rows`` rows, and cut the stream there.

    A corpus with fewer tokens gives all it has: ``plan.rows`` says how many. Documents beyond the last one needed are
    not tokenized, and the stream takes 2 bytes per token (4 when the vocabulary exceeds 65,536).

    Args:
        tokenize: texts -> token ids, without special tokens added.

    Raises:
        UserError: when the tokenizer gives a token that the model does not have, or no text gives any token.
    """
    if bos_token_id is not None and not 0 <= bos_token_id < vocab_size:
        raise UserError(
            f"The model's config names token {bos_token_id} as the beginning of a text, but its vocabulary has "
            f"{vocab_size} tokens; correct bos_token_id in its config.json."
        )
    if bos_token_id is not None and context < 2:
        raise UserError("A context of 1 token has room for BOS alone; use a context of at least 2.")
    order = permutation(len(documents), seed, "order of documents")
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    pieces, starts, ids = [], [], []
    tokens = kept = 0
    with (progress or NoProgress()).task("Tokenizing", total=rows, unit="rows") as task:
        for group in _groups([documents[i] for i in order]):
            kept_before = kept
            for document, encoded in zip(group, tokenize([document.text for document in group]), strict=True):
                piece = np.array([*([] if bos_token_id is None else [bos_token_id]), *encoded], dtype=np.int64)
                _check_vocabulary(piece, vocab_size, document)
                starts.append(tokens)
                ids.append(document.id)
                pieces.append(piece.astype(dtype))
                tokens += len(piece)
                kept += len(piece) if bos_token_id is None else int((piece != bos_token_id).sum())
                if kept >= rows:
                    break
            task.advance(min(kept, rows) - min(kept_before, rows))
            if kept >= rows:
                break
    if kept == 0:
        raise UserError(f"The corpus's {len(documents)} documents give no token, so there is nothing to harvest.")
    stream = np.concatenate(pieces)
    if kept > rows:
        is_row = np.ones(len(stream), dtype=bool) if bos_token_id is None else stream != bos_token_id
        stream = stream[: np.flatnonzero(is_row)[rows - 1] + 1]
    first_tokens = np.array(starts, dtype=np.int64)
    if bos_token_id is not None:
        stream, first_tokens = _with_bos_at_window_starts(stream, first_tokens, context, bos_token_id)
    return BatchPlan(stream, first_tokens, ids, context, batch_size, bos_token_id)


def _with_bos_at_window_starts(
    stream_T: np.ndarray, starts_D: np.ndarray, context: int, bos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put a BOS wherever a window would begin with another token; the documents' starts move along."""
    inserted, taken = [], 0
    while taken < len(stream_T):
        begins_with_bos = stream_T[taken] == bos
        if not begins_with_bos:
            inserted.append(taken)
        taken += context if begins_with_bos else context - 1
    return np.insert(stream_T, inserted, bos), starts_D + np.searchsorted(inserted, starts_D)


def _groups(documents: list[Document]) -> Iterator[list[Document]]:
    """Consecutive documents of about ``TOKENIZED_AT_ONCE`` characters together."""
    group: list[Document] = []
    chars = 0
    for document in documents:
        group.append(document)
        chars += len(document.text)
        if chars >= TOKENIZED_AT_ONCE:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _check_vocabulary(tokens: np.ndarray, vocab_size: int, document: Document) -> None:
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"The tokenizer gives token {int(tokens.max())} in document {document.id!r}, but the model's vocabulary "
            f"has {vocab_size} tokens: tokenizer.json and config.json do not belong together."
        )
