"""Which latents a reader would recognise: those that one token, here or just before, explains.

The rule, for every latent that is neither rare nor dense:

1. Three patterns are tried: the row's own token, the one before it, the one before that (within the document). For
   each, the token that carries most of the latent's |activation| over *training* rows is its guess.
2. A guess is scored by precision (the share of the latent's summed |activation| on rows that match), recall (the share
   of matching rows in which the latent fired) and their harmonic mean. The best on training rows is kept.
3. Latents are listed by that training score, one for each pattern. A latent that scores less than half of it on
   *held-out* rows is left out: its pattern was that of a document or two. Precision and recall are the held-out ones.

What this cannot see: features of a longer context (inside a docstring), or of many tokens at once. Those a person finds
by looking.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dictlearn.feature_index.index import FeatureIndex

OFFSETS = (0, -1, -2)


@dataclass(frozen=True)
class Selective:
    """A latent and the pattern that explains it.

    Attributes:
        offset: where the token stands: 0 for the row itself, -1 for one before.
        token: its text, safe to show as text.
        score: harmonic mean of precision and recall on training rows, by which latents are ranked.
        precision, recall: the same two on held-out rows.
        count: rows in which the latent fired.
    """

    latent: int
    offset: int
    token: str
    token_id: int
    score: float
    precision: float
    recall: float
    count: int

    @property
    def pattern(self) -> str:
        """The pattern in words."""
        place = {0: "on", -1: "after", -2: "two tokens after"}[self.offset]
        return f"{place} {self.token!r}"


def recognisable(
    index: FeatureIndex, limit: int = 50, *, least_rows: int = 30, most_density: float = 0.05
) -> list[Selective]:
    """The ``limit`` most selective latents by the rule above, best first, no pattern twice.

    Args:
        least_rows: fewest rows in which a latent must have fired in each split.
        most_density: share of rows above which a latent is left out.
    """
    tokens = index.read("text/token_ids", 0, index.rows)
    held_out = index.is_held_out(np.arange(index.rows))
    count, count_held_out = index.array("latents/count"), index.array("latents/held_out_count")
    eligible = (count_held_out >= least_rows) & (count - count_held_out >= least_rows)
    eligible &= count <= most_density * index.rows
    found: dict[int, Selective] = {}
    for offset in OFFSETS:
        shifted = _shifted(index, tokens, offset)
        # -1 (no such token) becomes 0, and is counted apart.
        occurs = [
            np.bincount(shifted[split] + 1, minlength=index.manifest.sizes.V + 1) for split in (~held_out, held_out)
        ]
        for latent in np.flatnonzero(eligible).tolist():
            rows, values = index.activations(latent)
            there, weights, test = shifted[rows], np.abs(values), held_out[rows]
            token = _heaviest(there[~test], weights[~test])
            if token < 0:
                continue
            precision, recall = _score(there[~test], weights[~test], token, occurs[0])
            score = _harmonic_mean(precision, recall)
            if latent not in found or score > found[latent].score:
                precision, recall = _score(there[test], weights[test], token, occurs[1])
                text = index.token_text(token)
                found[latent] = Selective(latent, offset, text, token, score, precision, recall, len(rows))
    listed: dict[tuple[int, int], Selective] = {}
    for selective in sorted(found.values(), key=lambda one: (-one.score, one.latent)):
        if _harmonic_mean(selective.precision, selective.recall) < selective.score / 2:
            continue
        listed.setdefault((selective.offset, selective.token_id), selective)
    return list(listed.values())[:limit]


def _harmonic_mean(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _shifted(index: FeatureIndex, tokens: np.ndarray, offset: int) -> np.ndarray:
    """The token ``-offset`` rows before each row, -1 where that is in another document."""
    if offset == 0:
        return tokens
    shifted = np.concatenate([np.full(-offset, -1, tokens.dtype), tokens[:offset]])
    first_rows = index.array("documents/first_rows")
    for step in range(-offset):
        places = first_rows + step
        shifted[places[places < len(tokens)]] = -1
    return shifted


def _heaviest(tokens: np.ndarray, weights: np.ndarray) -> int:
    """The token with the largest sum of weights."""
    present, which = np.unique(tokens, return_inverse=True)
    return int(present[np.bincount(which, weights=weights).argmax()])


def _score(tokens: np.ndarray, weights: np.ndarray, token: int, occurs: np.ndarray) -> tuple[float, float]:
    """``(precision, recall)`` of "fires where this token is" among the rows in which a latent fired."""
    matches = tokens == token
    occurrences = int(occurs[token + 1])
    recall = float(matches.sum() / occurrences) if occurrences else 0.0
    return float(weights[matches].sum() / weights.sum()), recall
