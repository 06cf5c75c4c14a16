"""Streaming mean, second moment and norms in float64.

Rows are gathered into blocks of a fixed size, so the result does not depend on how the rows were cut into updates: only
on their order. Counts, means and norms are over all rows. The second moment costs d operations per value, which at
d = 4096 is far more than computing the activation did, so it is taken over every ``stride``-th row of a block only
(neighbouring rows are alike: of as many rows in whole blocks the covariance was off by 17 % instead of 7).
`second_moment_stride` keeps at least 64 rows for each of its d dimensions, and all rows of a store smaller than that.
What these rows know about is their covariance; it is put about the mean of all rows, so that second moment and mean are
those of one distribution: with the rows' own second moment, the covariance of 300,000 rows of the bundled model had an
eigenvalue of -9.

At d = 512 (2.5 GHz, one core): 0.33 us a row without the second moment, 6.2 us with it.
"""

from __future__ import annotations

import numpy as np

from activation_store.bfloat16 import to_float32

BLOCK_ROWS = 1024
"""Rows per product. Part of the definition of a store's bytes: another block size changes the last bits of its sums."""

ROWS_PER_DIMENSION = 64
"""Of N = 64 d white samples, the eigenvalues of the second moment lie within 2 sqrt(d / N) = 25 % of 1."""


def second_moment_stride(rows: int, d: int) -> int:
    """Every how many rows one goes into the second moment of ``rows`` rows of width ``d``."""
    return max(1, rows // (ROWS_PER_DIMENSION * d))


class Moments:
    """Sums over rows of width ``d``: count, x, x^2, |x|, and over some of the rows x and x xT.

    Args:
        d: width of a row.
        stride: every how many rows of a block one goes into the second moment, from its first.

    Attributes:
        non_finite: index (in the order of updates) of the first row that is not finite, or None. It is looked for
            once per block, so it may lag behind by up to `BLOCK_ROWS` rows until `settle`.
    """

    def __init__(self, d: int, stride: int = 1):
        self.d = d
        self.count = 0
        self.total = np.zeros(d)
        self.squares = np.zeros(d)
        self.norms = 0.0
        self.outer = np.zeros((d, d))
        self.outer_total = np.zeros(d)
        self.outer_count = 0
        self.non_finite: int | None = None
        self._stride = stride
        self._block = np.empty((0, d))  # made when rows come; sums alone are handed from process to process
        self._filled = 0
        self._row_norms: list[np.ndarray] = []

    def update(self, rows: np.ndarray) -> None:
        """Add rows (n, d) or (n, ...) of d values: float16, float32 or float64, or bfloat16 as uint16 bits."""
        rows = rows.reshape(len(rows), self.d)
        if not len(self._block):
            self._block = np.empty((BLOCK_ROWS, self.d))
        start = 0
        while start < len(rows):
            part = rows[start : start + BLOCK_ROWS - self._filled]
            stop = self._filled + len(part)
            self._block[self._filled : stop] = to_float32(part) if part.dtype == np.uint16 else part
            self._filled, start = stop, start + len(part)
            if self._filled == BLOCK_ROWS:
                self.settle()

    def settle(self) -> None:
        """Add the rows still waiting for a full block. Ends a block early: call it where the rows end."""
        if not self._filled:
            return
        block = self._block[: self._filled]
        ones = np.ones(self._filled)
        with np.errstate(invalid="ignore", over="ignore"):  # reported by `non_finite`, not by a warning
            self.total += ones @ block
            some = np.ascontiguousarray(block[:: self._stride])
            self.outer += _outer(some)
            self.outer_total += np.ones(len(some)) @ some
            self.outer_count += len(some)
            np.multiply(block, block, out=block)
            self.squares += ones @ block
            norms = np.sqrt(block @ np.ones(self.d))
            self._row_norms.append(norms.astype(np.float32))
        if self.non_finite is None and not np.isfinite(norms).all():
            self.non_finite = self.count + int(np.argmin(np.isfinite(norms)))
        self.norms += float(norms.sum())
        self.count += self._filled
        self._filled = 0

    def take_row_norms(self) -> np.ndarray:
        """The norms (n,) float32 of the rows added since the last call. Settles, and lets go of the block."""
        self.settle()
        self._block = self._block[:0].copy()
        norms, self._row_norms = self._row_norms, []
        return np.concatenate(norms) if norms else np.empty(0, dtype=np.float32)

    def merge(self, other: Moments) -> None:
        """Add the sums of ``other``. Merge in a fixed order: floating-point sums depend on it."""
        if other.d != self.d:
            raise ValueError(f"moments of width {other.d} cannot be merged into moments of width {self.d}")
        self.settle()
        other.settle()
        if self.non_finite is None and other.non_finite is not None:
            self.non_finite = self.count + other.non_finite
        self.count += other.count
        self.norms += other.norms
        self.total += other.total
        self.squares += other.squares
        self.outer += other.outer
        self.outer_total += other.outer_total
        self.outer_count += other.outer_count

    @property
    def mean(self) -> np.ndarray:
        """Mean row (d,)."""
        self.settle()
        return self.total / self.count

    @property
    def mean_square(self) -> np.ndarray:
        """Mean square of each dimension (d,), over all rows."""
        self.settle()
        return self.squares / self.count

    @property
    def second_moment(self) -> np.ndarray:
        """Mean of x xT (d, d): the covariance of `outer_count` rows about their own mean, plus mean meanT."""
        self.settle()
        moment = self.outer / self.outer_count
        if self.outer_count == self.count:
            return moment
        own = self.outer_total / self.outer_count
        return moment - np.outer(own, own) + np.outer(self.mean, self.mean)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean length of a row."""
        self.settle()
        return self.norms / self.count

    def to_vector(self) -> np.ndarray:
        """All sums as one float64 vector of `vector_length` numbers. `from_vector` reads it back."""
        self.settle()
        numbers = [float(self.count), self.norms, float(self.outer_count)]
        return np.concatenate([numbers, self.total, self.squares, self.outer_total, self.outer.ravel()])

    @staticmethod
    def vector_length(d: int) -> int:
        return 3 + 3 * d + d * d

    @classmethod
    def from_vector(cls, d: int, vector: np.ndarray) -> Moments:
        """The sums of width ``d`` whose `to_vector` this is; to be merged into, not updated."""
        moments = cls(d)
        moments.count, moments.norms, moments.outer_count = int(vector[0]), float(vector[1]), int(vector[2])
        moments.total = vector[3 : 3 + d].copy()
        moments.squares = vector[3 + d : 3 + 2 * d].copy()
        moments.outer_total = vector[3 + 2 * d : 3 + 3 * d].copy()
        moments.outer = vector[3 + 3 * d :].reshape(d, d).copy()
        return moments


def _outer(rows: np.ndarray) -> np.ndarray:
    """xT x of rows (n, d). The number of threads that share the product changes no bit of it.

    OpenBLAS gives each thread a part of the columns, and its AVX-512 kernels add up in another order at the end of a
    part that is no multiple of 8.
    """
    d = rows.shape[1]
    if d % 8:
        rows = np.pad(rows, ((0, 0), (0, -d % 8)))
    return (rows.T @ rows)[:d, :d]  # numpy sees one operand transposed and computes half of it (syrk)
