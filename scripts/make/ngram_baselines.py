"""Interpolated n-gram language models with modified Kneser-Ney smoothing: what the bundled language model must beat.

Chen and Goodman (1999, "An empirical study of smoothing techniques for language modeling", section 3), interpolated
form, with the three discounts of each order estimated from that order's counts of counts. For a history ``h`` of
``m - 1`` tokens, with ``h'`` the history without its oldest token::

    p_m(w | h) = (a(hw) - D(a(hw))) / a(h.) + gamma(h) * p_{m-1}(w | h'),      p_0(w) = 1 / vocabulary

``a`` is the count of ``hw`` at the highest order and, below it, the number of different tokens seen in front of ``hw``.
A history never reaches back over the beginning of its document: the beginning is a symbol of its own, and nothing
precedes it, so n-grams that start with it keep their plain counts at every order.

An n-gram is named by a number: the rank of (number of its history, last token) among all that were seen at its order.
That needs no packing of tokens into one word, so neither the vocabulary nor the order is limited.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """What was counted at one order m. Rows are n-grams, in the order of their names.

    ``keys`` (grams,) sorted: history name * symbols + last token. ``discounted`` (grams,): max(a - D(a), 0).
    ``totals`` and ``released`` (histories,): the sum of a over the tokens seen after a history, and of D(a).
    """

    keys: np.ndarray
    discounted: np.ndarray
    totals: np.ndarray
    released: np.ndarray
    discounts: tuple[float, float, float]


class KneserNey:
    """An n-gram model of documents that end with one more token, ``end_token`` (the packed stream's separator)."""

    def __init__(self, documents: list[np.ndarray], order: int, vocabulary: int, end_token: int) -> None:
        """Count and estimate.

        Args:
            documents: integer arrays of tokens, with neither the separator in front nor the one behind.
            order: 1 for unigrams, 5 for histories of four tokens.
            vocabulary: number of tokens; tokens are 0 .. vocabulary - 1.
            end_token: the token that is predicted where a document ends.
        """
        if order < 1:
            raise ValueError(f"an n-gram model has an order of at least 1, not {order}")
        self.order = order
        self.vocabulary = vocabulary
        self.end_token = end_token
        self.start = vocabulary  # the symbol in front of every document; it is never predicted
        self.symbols = vocabulary + 1
        self.orders: list[Order] = []
        self._count(documents)

    def _count(self, documents: list[np.ndarray]) -> None:
        symbols, offsets = self._stream(documents)
        names: list[np.ndarray] = []  # per order: the name of the n-gram that ends at each position, or -1
        keys: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        firsts: list[np.ndarray] = []
        for m in range(1, self.order + 1):
            if m == 1:
                present = offsets >= 1
                histories = np.zeros(len(symbols), dtype=np.int64)
            else:
                present = offsets >= m - 1
                # The history of the n-gram ending at i is the (m-1)-gram ending at i-1. At order 2 the start symbol is
                # a history too, and it has no name of its own at order 1, so histories of one token are symbols.
                histories = np.roll(symbols if m == 2 else names[m - 2], 1)
            positions = np.flatnonzero(present)
            unique, first, inverse, count = np.unique(
                histories[positions] * self.symbols + symbols[positions],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            name = np.full(len(symbols), -1, dtype=np.int64)
            name[positions] = inverse
            names.append(name)
            keys.append(unique)
            counts.append(count)
            firsts.append(positions[first])
        for m in range(1, self.order + 1):
            adjusted = counts[m - 1]
            if m < self.order:
                preceding = np.bincount(names[m - 1][firsts[m]], minlength=len(adjusted))
                adjusted = np.where(preceding > 0, preceding, adjusted)  # nothing precedes those that begin a document
            histories_of_grams = keys[m - 1] // self.symbols
            number_of_histories = 1 if m == 1 else self.symbols if m == 2 else len(keys[m - 2])
            discounts = estimate_discounts(adjusted)
            discount = np.array([0.0, *discounts])[np.minimum(adjusted, 3)]
            self.orders.append(
                Order(
                    keys=keys[m - 1],
                    discounted=adjusted - discount,
                    totals=np.bincount(histories_of_grams, weights=adjusted, minlength=number_of_histories),
                    released=np.bincount(histories_of_grams, weights=discount, minlength=number_of_histories),
                    discounts=discounts,
                )
            )

    def _stream(self, documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All documents as [start, tokens..., end_token], and each symbol's offset in its document."""
        pieces = [np.concatenate([[self.start], document, [self.end_token]]) for document in documents]
        symbols = np.concatenate(pieces).astype(np.int64)
        if symbols.min() < 0 or any((document >= self.vocabulary).any() for document in documents):
            raise ValueError(f"a document holds a token outside 0 .. {self.vocabulary - 1}")
        return symbols, np.concatenate([np.arange(len(piece)) for piece in pieces])

    def log_probabilities(self, documents: list[np.ndarray]) -> np.ndarray:
        """Natural log of p(token | at most order - 1 tokens before it in its document).

        Returns one float64 per predicted token: each document's tokens and then its end, documents one after another.
        So it lines up with ``stream[1:]`` of a stream in which the separator stands before every document, plus one.
        """
        symbols, offsets = self._stream(documents)
        return np.log(self._probabilities(symbols, offsets)[offsets >= 1])

    def distribution(self, history: list[int], at_document_start: bool = False) -> np.ndarray:
        """(vocabulary,) p(. | history): the oldest token first; longer histories than order - 1 are cut."""
        front = [self.start] if at_document_start else []
        context = np.array([*front, *history][max(0, len(front) + len(history) - (self.order - 1)) :], dtype=np.int64)
        rows = np.concatenate([np.append(context, token) for token in range(self.vocabulary)])
        offsets = np.tile(np.arange(len(context) + 1), self.vocabulary)
        return self._probabilities(rows, offsets)[offsets == len(context)]

    def _probabilities(self, symbols: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """p(symbol | history) at each position; ``offsets`` says how many symbols before it may be used."""
        probability = np.full(len(symbols), 1.0 / self.vocabulary)
        name = symbols
        for m, order in enumerate(self.orders, start=1):
            histories = np.zeros_like(symbols) if m == 1 else np.roll(name, 1)
            usable = (offsets >= m - 1) & (histories >= 0)
            history = np.where(usable, histories, 0)
            total = order.totals[history]
            seen_history = usable & (total > 0)
            key = history * self.symbols + symbols
            rank = np.minimum(np.searchsorted(order.keys, key), len(order.keys) - 1)
            seen = seen_history & (order.keys[rank] == key)
            safe_total = np.where(seen_history, total, 1.0)
            own = np.where(seen, order.discounted[rank], 0.0) / safe_total
            probability = np.where(seen_history, own + order.released[history] / safe_total * probability, probability)
            name = symbols if m == 1 else np.where(seen, rank, -1)
        return probability


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """(D1, D2, D3+) from the counts of counts of one order: Chen and Goodman (1999), equation 26.

    Toy data lacks some counts of counts or makes an estimate leave (0, count): there a discount is 0.5 * count, which
    keeps the model proper.
    """
    n = [int((counts == value).sum()) for value in (1, 2, 3, 4)]
    y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.5
    discounts = []
    for count in (1, 2, 3):
        here, above = n[count - 1], n[count]
        estimate = count - (count + 1) * y * above / here if here else 0.0
        discounts.append(float(estimate) if 0 < estimate < count else 0.5 * count)
    return discounts[0], discounts[1], discounts[2]
