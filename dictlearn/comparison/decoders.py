"""Which latents of two dictionaries write in the same direction: decoder rows by cosine, beside what chance scores.

The *match* of a latent is the latent of the other dictionary whose decoder row has the largest cosine with its own. Two
latents that are each other's match are *partners*: none has two, and none is made to have one, as it would be where the
sum of all cosines is made largest. The mean cosine of the matches is called MMCS in the literature.

Chance is told in two ways, since two decoders that fill the same few directions agree more than those of a sphere:

- `gaussian`: rows of the other dictionary replaced by draws from a Gaussian that has the mean and the covariance of its
  rows of unit length: what comes of writing into the same part of the space, without any feature in common.
- `random`: directions drawn evenly from the sphere.

Where codes have signs, a latent stands for a direction and its opposite: cosines then count without their signs.

Reads no torch, but for kinds that do not keep their decoder as a matrix of its own.

Axes: S latents of the one (a), T of the other (b), O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream
from dictlearn.dictionaries.description import WEIGHTS, describe

BLOCK_VALUES = 1 << 22
"""Cosines in memory at a time: 16 MiB."""

SIGNED_CODES = frozenset({"abstopk"})
"""Kinds of dictionary whose latents stand for a direction and its opposite."""

DRAWN = 2048
"""Rows whose match among random ones is looked for: chance is a distribution, and so many draws show it."""


@dataclass(frozen=True)
class Matches:
    """The match of every latent of a among those of b.

    Attributes:
        latents: (S,) int64, the latent of b; -1 for a latent that writes nothing (a decoder row of zeros).
        cosines: (S,) float32, of the two rows, or its magnitude; 0 for a latent that writes nothing.
    """

    latents: np.ndarray
    cosines: np.ndarray

    def share(self, least: float) -> float:
        """The share of latents whose match has at least this cosine."""
        return share(self.cosines, least)


@dataclass(frozen=True)
class Agreement:
    """How far two dictionaries write alike.

    Attributes:
        a_in_b: the matches of a's latents; b_in_a: those of b's.
        gaussian_a, random_a: cosines of the matches that rows of a find among as many random rows as b has.
        gaussian_b, random_b: the same for b.
    """

    a_in_b: Matches
    b_in_a: Matches
    gaussian_a: np.ndarray
    gaussian_b: np.ndarray
    random_a: np.ndarray
    random_b: np.ndarray

    def partners(self, least: float = -1.0) -> np.ndarray:
        """(P, 2) int64: latents of a and b that are each other's match, largest cosine first."""
        found = self.a_in_b.latents
        own = np.flatnonzero(found >= 0)
        mutual = own[self.b_in_a.latents[found[own]] == own]
        cosines = self.a_in_b.cosines[mutual]
        order = np.argsort(-cosines, kind="stable")
        order = order[cosines[order] >= least]
        return np.stack([mutual[order], found[mutual[order]]], axis=1)


def agreement(a_SO: np.ndarray, b_TO: np.ndarray, *, signed: bool = True, seed: int = 0) -> Agreement:
    """Match the decoder rows of two dictionaries, in both directions, and draw what chance would find.

    Args:
        a_SO, b_TO: rows of any length.
        signed: whether rows that point opposite ways are unlike; not so where the codes of either have signs.

    Raises:
        UserError: rows of different widths, or numbers that are not finite.
    """
    a_SO, b_TO = directions(a_SO), directions(b_TO)
    if a_SO.shape[1] != b_TO.shape[1]:
        raise UserError(
            f"Decoder rows of {a_SO.shape[1]} and of {b_TO.shape[1]} coordinates have no cosine; compare "
            "dictionaries that write to hooks of one width."
        )
    a_in_b, b_in_a = match(a_SO, b_TO, signed)
    chance = {}
    for name, own, other in (("a", a_SO, b_TO), ("b", b_TO, a_SO)):
        # Evenly spaced: latents of some kinds are ordered, such as Matryoshka's.
        some = own[np.linspace(0, len(own) - 1, min(DRAWN, len(own)), dtype=np.int64)]
        stream = numpy_stream(seed, "random decoder rows", name == "b")
        chance[f"gaussian_{name}"] = match(some, gaussian_rows(other, stream), signed)[0].cosines
        chance[f"random_{name}"] = match(some, random_rows(other, stream), signed)[0].cosines
    return Agreement(a_in_b, b_in_a, **chance)


def match(a_SO: np.ndarray, b_TO: np.ndarray, signed: bool = True) -> tuple[Matches, Matches]:
    """The matches of a's rows among b's and of b's among a's, both of unit length or zero."""
    S, T = len(a_SO), len(b_TO)
    of_a, of_b = np.zeros(S, np.int64), np.zeros(T, np.int64)
    cosine_a, cosine_b = np.zeros(S, np.float32), np.full(T, -np.inf, np.float32)
    block = max(1, BLOCK_VALUES // T)
    for start in range(0, S, block):
        stop = min(start + block, S)
        cosines = a_SO[start:stop] @ b_TO.T
        if not signed:
            np.abs(cosines, out=cosines)
        of_a[start:stop] = cosines.argmax(axis=1)
        cosine_a[start:stop] = cosines[np.arange(stop - start), of_a[start:stop]]
        best = cosines.max(axis=0)
        better = np.flatnonzero(best > cosine_b)
        cosine_b[better] = best[better]
        of_b[better] = start + cosines[:, better].argmax(axis=0)
    for rows, latents, cosines in ((a_SO, of_a, cosine_a), (b_TO, of_b, cosine_b)):
        silent = ~rows.any(axis=1)
        latents[silent], cosines[silent] = -1, 0
    return Matches(of_a, cosine_a.clip(-1, 1)), Matches(of_b, cosine_b.clip(-1, 1))


def directions(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length in float32; zeros stay zeros.

    Raises:
        UserError: numbers that are not finite, or no row at all.
    """
    rows = np.asarray(rows, np.float32)
    if not rows.size:
        raise UserError("A decoder without rows cannot be matched; name a trained run.")
    if not np.isfinite(rows).all():
        raise UserError(
            "Decoder rows with numbers that are not finite have no direction; the training diverged: train again with "
            "a smaller learning rate."
        )
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def gaussian_rows(like: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """As many rows of unit length as ``like`` has, from the Gaussian with the mean and the covariance of its rows."""
    mean = like.mean(axis=0)
    centred = like - mean
    covariance = centred.T.astype(np.float64) @ centred / len(like)
    jitter = 1e-6 * np.trace(covariance) / len(covariance) + 1e-30  # fewer rows than coordinates: a singular one
    factor = np.linalg.cholesky(covariance + jitter * np.eye(len(covariance))).astype(np.float32)
    return directions(stream.standard_normal(like.shape, dtype=np.float32) @ factor.T + mean)


def random_rows(like: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """As many directions as ``like`` has, drawn evenly from the sphere."""
    return directions(stream.standard_normal(like.shape, dtype=np.float32))


def share(cosines: np.ndarray, least: float) -> float:
    return float((cosines >= least).mean())


def decoder_rows(dictionary: str | Path) -> np.ndarray:
    """(S, O) float32: the decoder of a saved dictionary, in raw units.

    Raises:
        UserError: no dictionary there, or damaged files.
    """
    folder = Path(dictionary)
    describe(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())
            if "W_dec" in names:
                rows: np.ndarray = file.get_tensor("W_dec")
                return rows.reshape(len(rows), -1).astype(np.float32, copy=False)
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(
            f"The dictionary in {str(folder)!r} is damaged ({str(error).splitlines()[0]}); restore it or train again."
        ) from error
    # Tied or factored decoders are put together by their own class.
    from dictlearn.dictionaries.files import load

    rows = load(folder).W_dec.detach().numpy()
    return rows.reshape(len(rows), -1)
