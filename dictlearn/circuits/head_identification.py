"""Which attention heads a task uses, guessed from their outputs alone: discrete SAE codes, beside what they must beat.

O'Neill & Bui 2024 ("Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models", arXiv
2405.12522). Every head's output, averaged over the positions of a prompt, is encoded by one small SAE shared by all
heads and becomes one code: the latent that is largest. A head scores by how many codes it shows in positive prompts and
never in negative ones; an edge, by how many pairs of codes two heads show together in positives and never in negatives.
Nothing is patched and no gradient is taken. Features go in and scores come out; where features come from is
head_outputs.py and tasks.py, and the script is scripts/circuits/identify_heads.py.

What the released code does otherwise than one would expect, and what is done about it here:

- Its decoder normalises each output coordinate over the codes, so the decoder's atoms have no fixed norm, and the L1
  penalty can be escaped by growing them. Here atoms have norm 1; `RELEASED` keeps the slip.
- Its squared error is a mean over coordinates and its penalty a sum over codes, on outputs as they come, so how hard
  the penalty bites depends on the scale of the model. Here features are divided by their root mean square; `RELEASED`
  does not.
- Its argmax of an all-zero row is code 0, which is then two things. Here that is a code of its own; `RELEASED` merges
  them.
- It averages over padding; here `head_outputs` leaves padding out, in both variants.
- It compares sets of codes without checking that the classes are equally large; unequal classes are refused.
- Its "edge" AUC ranks heads, not edges, by how often they are among the first H^2/2 heads named when ordered pairs are
  listed by score, two heads to a pair: a quarter of the pairs, ties in the order of the sort. Here this is called
  "heads in top edges"; it takes the top quarter of pairs, and pairs that tie at the border share what is left of it.
- Its normalised edge score divides by codes in positives plus codes in negatives; here by those in either.
- The softmax over scores and the "F1" made of rates are left out: the first changes no ranking, the second is not F1.

The baselines are not decoration. A head's code count grows with how diverse its outputs are, whatever they carry: the
same SAE without training, k-means, and labels that mean nothing show how much of a good AUC is that. How far an output
moves on average (`mean_difference`, and in units of its spread) and whether it tells the classes apart (`probe_scores`)
are cheaper and need no codes.
What was measured is in the script's docstring: planted heads are found, better by the SAE that was not trained; in
models, no AUC of the method could be told from that of shuffled labels.

Legend: N pairs (positive n and negative n belong together), H heads, D width, R rows (examples x heads), K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from activation_store.errors import UserError
from activation_store.seeds import derive_seed, numpy_stream

NO_CODE = -1
"""The code of a row in which no latent is active."""

TOP_SHARE = 0.25
"""Share of the head pairs that "heads in top edges" looks at, as in the released code (see above)."""

PROBE_FOLDS = 5


# --- the SAE --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteSAEConfig:
    """Sizes and steps are the paper's; the last three say where we differ from the released code."""

    codes: int = 200
    """Latents, shared by all heads."""
    l1: float = 0.02
    """Weight of the penalty on the sum of a row's activations (the paper's for two of its three tasks)."""
    lr: float = 1e-3
    """Adam's learning rate."""
    epochs: int = 500
    """Full-batch steps; 0 leaves the SAE as it was drawn."""
    examples: int = 10
    """Prompts whose heads it is trained on, of either class."""
    unit_atoms: bool = True
    """Decoder atoms have norm 1; otherwise each output coordinate has, over the codes."""
    rescale: bool = True
    """Divide features by their root mean square over the training rows."""
    own_no_code: bool = True
    """An all-zero row has a code of its own; otherwise it is code 0."""


RELEASED = DiscreteSAEConfig(unit_atoms=False, rescale=False, own_no_code=False)
"""The released code's SAE, slips included."""


class DiscreteSAE(nn.Module):
    """h = relu((x - b) W_enc^T + b_enc), x_hat = h W_dec + b, on x / scale; weights are latent-major, (K, D)."""

    def __init__(self, width: int, config: DiscreteSAEConfig, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive_seed(seed, "discrete SAE weights") >> 1)
        self.config, self.scale = config, scale
        self.W_enc = nn.Parameter(torch.randn(config.codes, width, generator=generator))
        self.b_enc = nn.Parameter((2 * torch.rand(config.codes, generator=generator) - 1) / width**0.5)
        self.W_dec = nn.Parameter(torch.randn(config.codes, width, generator=generator))
        self.b = nn.Parameter(torch.zeros(width))
        self.normalise()

    def encode(self, x_RD: Tensor) -> Tensor:
        return torch.relu((x_RD / self.scale - self.b) @ self.W_enc.T + self.b_enc)

    def loss(self, x_RD: Tensor) -> Tensor:
        """Mean squared error over all elements + l1 * mean over rows of the sum of activations."""
        h_RK = self.encode(x_RD)
        error_RD = h_RK @ self.W_dec + self.b - x_RD / self.scale
        return error_RD.pow(2).mean() + self.config.l1 * h_RK.sum(dim=1).mean()

    @property
    def _normalised(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """The matrices whose vectors along a dimension have norm 1."""
        return (self.W_enc, 1), (self.W_dec, 1 if self.config.unit_atoms else 0)

    @torch.no_grad()
    def normalise(self) -> None:
        for matrix, dim in self._normalised:
            matrix.copy_(nn.functional.normalize(matrix, dim=dim))

    @torch.no_grad()
    def keep_gradients_tangent(self) -> None:
        """Drop the part of each gradient that would only change a norm."""
        for matrix, dim in self._normalised:
            assert matrix.grad is not None
            matrix.grad -= (matrix.grad * matrix).sum(dim=dim, keepdim=True) * matrix


def fit_discrete_sae(rows_RD: np.ndarray, config: DiscreteSAEConfig, seed: int) -> DiscreteSAE:
    """Train on all rows at once for `epochs` steps."""
    x_RD = torch.from_numpy(rows_RD).float()
    scale = float(x_RD.pow(2).mean().sqrt()) if config.rescale else 1.0
    sae = DiscreteSAE(x_RD.shape[1], config, seed, scale if scale > 0 else 1.0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    for _ in range(config.epochs):
        optimizer.zero_grad()
        sae.loss(x_RD).backward()
        sae.keep_gradients_tangent()
        optimizer.step()
        sae.normalise()
    return sae


@torch.no_grad()
def codes_of(sae: DiscreteSAE, features_NHD: np.ndarray) -> np.ndarray:
    """(N, H) int64: the largest latent of each head in each example, the first of those that tie."""
    h_NHK = sae.encode(torch.from_numpy(features_NHD).float())
    largest_NH, codes_NH = h_NHK.max(dim=-1)
    nothing = NO_CODE if sae.config.own_no_code else 0
    return codes_NH.masked_fill(largest_NH == 0, nothing).numpy()


# --- scores from codes ----------------------------------------------------------------------------------------------


def node_scores(positive_NH: np.ndarray, negative_NH: np.ndarray, normalised: bool = False) -> np.ndarray:
    """(H,): how many codes a head has in positives and not in negatives; normalised, of all codes that it has."""
    scores_H = np.zeros(positive_NH.shape[1])
    for head in range(len(scores_H)):
        positive, negative = set(positive_NH[:, head].tolist()), set(negative_NH[:, head].tolist())
        scores_H[head] = len(positive - negative) / (len(positive | negative) if normalised else 1)
    return scores_H


def edge_scores(positive_NH: np.ndarray, negative_NH: np.ndarray, normalised: bool = False) -> np.ndarray:
    """(H, H), symmetric, zero diagonal: `node_scores` of the pairs of codes that two heads show together."""
    heads = positive_NH.shape[1]
    lowest = min(positive_NH.min(), negative_NH.min())
    span = max(positive_NH.max(), negative_NH.max()) - lowest + 1
    scores_HH = np.zeros((heads, heads))
    for first in range(heads - 1):
        later = slice(first + 1, None)
        positive, negative = (
            (codes_NH[:, [first]] - lowest) * span + codes_NH[:, later] - lowest
            for codes_NH in (positive_NH, negative_NH)
        )
        scores_HH[first, later] = node_scores(positive, negative, normalised)
    return scores_HH + scores_HH.T


def heads_in_top_edges(edges_HH: np.ndarray, share: float = TOP_SHARE) -> np.ndarray:
    """(H,): how many of the top `share` of edges each head is an end of.

    Edges that tie at the border count for an equal fraction each, so the result depends on no order.
    """
    first, second = np.triu_indices(len(edges_HH), k=1)
    scores_E = edges_HH[first, second]
    wanted = max(1, round(share * len(scores_E)))
    border = np.sort(scores_E)[-wanted]
    above_E, tied_E = scores_E > border, scores_E == border
    counted_E = above_E + tied_E * (wanted - above_E.sum()) / tied_E.sum()
    return np.bincount(first, counted_E, len(edges_HH)) + np.bincount(second, counted_E, len(edges_HH))


def scores_of_codes(positive_NH: np.ndarray, negative_NH: np.ndarray) -> dict[str, np.ndarray]:
    """The three rankings of heads that a set of codes gives, by name."""
    return {
        "nodes": node_scores(positive_NH, negative_NH),
        "nodes, normalised": node_scores(positive_NH, negative_NH, normalised=True),
        "heads in top edges": heads_in_top_edges(edge_scores(positive_NH, negative_NH)),
    }


# --- baselines ------------------------------------------------------------------------------------------------------


def kmeans_codes(rows_RD: np.ndarray, codes: int, seed: int, *features_NHD: np.ndarray) -> list[np.ndarray]:
    """The nearest of at most `codes` centres, found on the rows the SAE is trained on, for each array of features."""
    from sklearn.cluster import KMeans

    distinct = len(np.unique(rows_RD, axis=0))
    kmeans = KMeans(min(codes, distinct), n_init=1, random_state=derive_seed(seed, "k-means") % 2**32)
    kmeans.fit(np.asarray(rows_RD, dtype=np.float64))
    return [
        kmeans.predict(features.reshape(-1, features.shape[-1]).astype(np.float64)).reshape(features.shape[:2])
        for features in features_NHD
    ]


def mean_difference(positive_NHD: np.ndarray, negative_NHD: np.ndarray) -> np.ndarray:
    """(H,): distance between a head's mean output in positives and in negatives."""
    return np.linalg.norm(
        positive_NHD.mean(axis=0, dtype=np.float64) - negative_NHD.mean(axis=0, dtype=np.float64), axis=1
    )


def mean_difference_in_spreads(positive_NHD: np.ndarray, negative_NHD: np.ndarray) -> np.ndarray:
    """(H,): `mean_difference` divided by how far a head's outputs are from the mean of their class (root mean square).

    The plain distance ranks heads that write large vectors first, whatever the labels.
    """
    variances_2H = [outputs.var(axis=0, dtype=np.float64).sum(axis=1) for outputs in (positive_NHD, negative_NHD)]
    variance_H = np.mean(variances_2H, axis=0)
    return mean_difference(positive_NHD, negative_NHD) / np.sqrt(np.maximum(variance_H, 1e-30))


def probe_scores(positive_NHD: np.ndarray, negative_NHD: np.ndarray) -> np.ndarray:
    """(H,): mean held-out log-likelihood of the class under a logistic regression on a head's standardised output.

    Cross-validated over pairs: the two prompts of a pair share all words but one, so they are held out together. The
    log-likelihood ranks heads that an accuracy of 1 would leave tied.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pairs, heads, _ = positive_NHD.shape
    label_E = np.repeat([1, 0], pairs)
    pair_E = np.tile(np.arange(pairs), 2)
    scores_H = np.empty(heads)
    for head in range(heads):
        features_ED = np.concatenate([positive_NHD[:, head], negative_NHD[:, head]]).astype(np.float64)
        probabilities_E2 = cross_val_predict(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
            features_ED,
            label_E,
            groups=pair_E,
            cv=GroupKFold(PROBE_FOLDS),
            method="predict_proba",
        )
        scores_H[head] = np.log(np.maximum(probabilities_E2[np.arange(2 * pairs), label_E], 1e-12)).mean()
    return scores_H


# --- all of it ------------------------------------------------------------------------------------------------------

HeadScores = Mapping[tuple[str, str], np.ndarray]
"""(where it comes from, what is counted) -> a score for each head."""

DISCRETE, AS_RELEASED, UNTRAINED = "discrete SAE", "SAE as released", "SAE untrained"
KMEANS, MEANS, SPREADS, PROBE = "k-means codes", "mean difference", "means, per spread", "linear probe"
SHUFFLED, RELEASED_SHUFFLED = "SAE, labels shuffled", "released, shuffled"
MEANS_SHUFFLED = "means, shuffled"
"""Names of rows, short enough for a table."""


def check_features(positive_NHD: np.ndarray, negative_NHD: np.ndarray, config: DiscreteSAEConfig) -> None:
    """Refuse what would give scores that mean nothing.

    Raises:
        UserError: unequal classes or heads, too few examples, values that are not finite.
    """
    if len(positive_NHD) != len(negative_NHD):
        raise UserError(
            f"There are {len(positive_NHD)} positive and {len(negative_NHD)} negative examples, and counts of codes "
            "can be compared between equally large classes only; leave some out."
        )
    if positive_NHD.ndim != 3 or positive_NHD.shape != negative_NHD.shape:
        raise UserError(
            f"Heads' outputs are arrays of (examples, heads, width), the same heads in both classes; found shapes "
            f"{positive_NHD.shape} and {negative_NHD.shape}."
        )
    check_sizes(len(positive_NHD), positive_NHD.shape[1], config)
    if not (np.isfinite(positive_NHD).all() and np.isfinite(negative_NHD).all()):
        raise UserError("Heads' outputs hold values that are not finite (NaN or infinite), so no head can be scored.")


def check_sizes(pairs: int, heads: int, config: DiscreteSAEConfig) -> None:
    """What `check_features` says of sizes, for those who know them before there are features.

    Raises:
        UserError: too few examples or heads.
    """
    needed = max(PROBE_FOLDS, (config.examples + 1) // 2)
    if pairs < needed:
        raise UserError(
            f"At least {needed} pairs of examples are needed (the SAE is trained on {config.examples} examples, the "
            f"probe is cross-validated {PROBE_FOLDS}-fold), not {pairs}."
        )
    if heads < 2:
        raise UserError(f"Heads are ranked against each other, so there must be at least two, not {heads}.")


def score_heads(
    positive_NHD: np.ndarray, negative_NHD: np.ndarray, config: DiscreteSAEConfig | None = None, seed: int = 0
) -> HeadScores:
    """Every score of every head: the method as mended here, as released, and what either must beat.

    All codes are learned from the same rows, `config.examples` examples drawn from both classes times all heads.

    Args:
        positive_NHD, negative_NHD: outputs of heads; example n of one belongs to example n of the other.
        seed: decides the training examples, the weights drawn, and the shuffled labels.

    Raises:
        UserError: see `check_features`.
    """
    config = config or DiscreteSAEConfig()
    check_features(positive_NHD, negative_NHD, config)
    everything = np.concatenate([positive_NHD, negative_NHD])
    rng = numpy_stream(seed, "head identification")
    rows_RD = everything[rng.choice(len(everything), config.examples, replace=False)].reshape(-1, everything.shape[-1])
    shuffled = everything[rng.permutation(len(everything))]
    shuffled_positive, shuffled_negative = np.split(shuffled, 2)

    released = replace(config, unit_atoms=False, rescale=False, own_no_code=False)
    encoders = {
        DISCRETE: fit_discrete_sae(rows_RD, config, seed),
        AS_RELEASED: fit_discrete_sae(rows_RD, released, seed),
        UNTRAINED: fit_discrete_sae(rows_RD, replace(config, epochs=0), seed),
    }
    codes = {name: (codes_of(sae, positive_NHD), codes_of(sae, negative_NHD)) for name, sae in encoders.items()}
    positive, negative = kmeans_codes(rows_RD, config.codes, seed, positive_NHD, negative_NHD)
    codes[KMEANS] = positive, negative
    for null, name in ((SHUFFLED, DISCRETE), (RELEASED_SHUFFLED, AS_RELEASED)):
        codes[null] = codes_of(encoders[name], shuffled_positive), codes_of(encoders[name], shuffled_negative)

    scores = {
        (source, counted): scores_H
        for source, pair in codes.items()
        for counted, scores_H in scores_of_codes(*pair).items()
    }
    scores[MEANS, "nodes"] = mean_difference(positive_NHD, negative_NHD)
    scores[MEANS_SHUFFLED, "nodes"] = mean_difference(shuffled_positive, shuffled_negative)
    scores[SPREADS, "nodes"] = mean_difference_in_spreads(positive_NHD, negative_NHD)
    scores[PROBE, "nodes"] = probe_scores(positive_NHD, negative_NHD)
    return scores


# --- against the truth ----------------------------------------------------------------------------------------------


def roc_auc(scores_H: np.ndarray, known_H: np.ndarray) -> float:
    """Share of (known, other) pairs of heads that the scores put in order, ties counting half.

    Raises:
        UserError: when all heads are known, or none.
    """
    from sklearn.metrics import roc_auc_score

    if known_H.all() or not known_H.any():
        raise UserError(
            f"{known_H.sum()} of {len(known_H)} heads are known to matter, so a ranking of heads has no AUC."
        )
    return float(roc_auc_score(known_H, scores_H))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % interval by Student's t.

    Not clipped: an interval of AUCs that passes 1 says that the values are few and far apart.
    """

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"


def interval(values: Sequence[float]) -> Interval:
    """Of at least two values, one per seed."""
    from scipy.stats import t

    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Interval(float(np.mean(values)), float(t.ppf(0.975, len(values) - 1)) * spread)
