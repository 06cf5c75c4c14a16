"""SNMF as scikit-learn has its estimators: rows (N, D) of any origin in, features and non-negative codes out.

    model = SemiNMF(100, winners=0.05, random_state=0).fit(X)
    codes = model.transform(others)                       # (N, 100), never negative, of rows it has not seen
    dictlearn.dictionaries.files.save(model.dictionary({"hook_in": hook, "hook_out": hook}), folder)

The algorithm is that of `dictlearn.dictionaries.semi_nmf`, where it is cited; codes are exact least squares in both, so
`fit_transform` and `transform` agree. A dictionary made of a fitted estimator is one of kind "snmf" like those that
`dictlearn train` makes: saved, evaluated and indexed as they are.

`HierarchicalSemiNMF` factorises the features of one level into those of the next, as the same paper does.

What scikit-learn checks of an estimator's input (numbers, finite, enough rows, none negative) raises its ValueError,
what these two alone can be asked for UserError. Both are one sentence.

Axes: N rows, D width, S features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.dictionaries import semi_nmf
from dictlearn.dictionaries.configs import SemiNMFConfig
from dictlearn.dictionaries.semi_nmf import factorise, non_negative_codes, random_codes, svd_codes

STARTS = ("random", "kmeans", "svd")


class _Factorisation(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """What scikit-learn asks of both."""

    features: str
    components_: np.ndarray

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = self.features == "non_negative"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class SemiNMF(_Factorisation):
    """X ~ codes @ components_, with codes >= 0 and few neurons in each component.

    Args:
        n_components: number of features S.
        winners: share of a feature's coordinates that winner-take-all keeps; 1 for all.
        features: "signed", or "non_negative" for NMF.
        start: "random", "kmeans" (codes are 1 for a row's cluster), or "svd" (principal axes).
        iterations, patience: most iterations, and how many without a lower error end them.
        sweeps, tolerance: how exactly `transform` solves, see `semi_nmf.non_negative_codes`.
        random_state: an int for the same result each time.

    Attributes:
        components_: (S, D) features of unit norm.
        errors_: after each iteration, the squared error as a share of the sum of squares.
        n_iter_: how many there were.
        reconstruction_err_: Frobenius norm of what the best features leave over, with the codes of `transform`.
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        winners: float = 0.05,
        features: str = "signed",
        start: str = "random",
        iterations: int = 2000,
        patience: int = 200,
        sweeps: int = 1000,
        tolerance: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.winners = winners
        self.features = features
        self.start = start
        self.iterations = iterations
        self.patience = patience
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: object = None, *, codes: np.ndarray | None = None) -> Self:
        """Find features of the rows ``X``.

        Args:
            codes: (N, S) where to begin instead of at ``start``.

        Raises:
            UserError: settings out of range, codes that are negative or do not fit.
            ValueError: rows that are not finite, or negative for non-negative features; fewer rows than features.
        """
        config = self._config()
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=self.n_components)
        config.check(X.shape[1], X.shape[1])
        if config.features == "non_negative":
            check_non_negative(X, "SemiNMF, whose features are to be non-negative")
        rows_ND = torch.tensor(X)
        found = factorise(
            rows_ND,
            self._start(rows_ND) if codes is None else self._given(codes, rows_ND),
            winners=config.winners,
            iterations=config.iterations,
            patience=config.patience,
            non_negative=config.features == "non_negative",
        )
        lengths_S1 = torch.linalg.vector_norm(found.features, dim=1, keepdim=True)
        self.components_ = (found.features / torch.where(lengths_S1 > 0, lengths_S1, 1.0)).numpy()
        self.errors_ = np.array(found.errors)
        self.n_iter_ = len(found.errors)
        self.reconstruction_err_ = float(np.linalg.norm(X - self._codes(X) @ self.components_))
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(N, S) the non-negative codes that rebuild each row of ``X`` best."""
        check_is_fitted(self)
        return self._codes(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))

    def inverse_transform(self, X: np.ndarray) -> np.ndarray:
        """(N, D) rows of the codes ``X`` (N, S). Raises UserError when one is negative."""
        check_is_fitted(self)
        codes_NS = check_array(X, dtype=[np.float64, np.float32])
        _refuse_negative_codes(codes_NS)
        return codes_NS @ self.components_.astype(codes_NS.dtype)

    def dictionary(self, provenance: dict[str, Any] | None = None) -> semi_nmf.SemiNMF:
        """The fitted features as a dictionary of kind "snmf", which takes raw activations.

        Args:
            provenance: what it was made from, as training records it: "hook_in" and "hook_out", and "model" and
                "store" if it is to be evaluated and indexed by name.
        """
        check_is_fitted(self)
        made = _dictionary(self._config(), self.components_)
        made.provenance = {**(provenance or {}), "factorised": {"start": self.start, "iterations": self.n_iter_}}
        return made

    def _config(self) -> SemiNMFConfig:
        """What a dictionary of these settings says, whose checks are ours."""
        if self.start not in STARTS:
            raise UserError(f"start is {self.start!r}; choose one of {', '.join(STARTS)}.")
        return SemiNMFConfig(
            d_sae=self.n_components,
            winners=self.winners,
            features=self.features,  # type: ignore[arg-type]
            rows=max(self.n_components, SemiNMFConfig.rows),
            iterations=self.iterations,
            patience=self.patience,
            sweeps=self.sweeps,
            tolerance=self.tolerance,
        )

    def _start(self, rows_ND: Tensor) -> Tensor:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        if self.start == "random":
            return random_codes(rows_ND, self.n_components, generator)
        if self.start == "svd":
            return svd_codes(rows_ND, self.n_components, generator)
        clusters = KMeans(self.n_components, n_init=1, random_state=seed).fit_predict(rows_ND.numpy())
        return torch.eye(self.n_components, dtype=rows_ND.dtype)[torch.from_numpy(clusters).long()]

    def _given(self, codes: np.ndarray, rows_ND: Tensor) -> Tensor:
        codes_NS = check_array(codes, dtype=np.float64)
        if codes_NS.shape != (len(rows_ND), self.n_components):
            raise UserError(
                f"The codes to begin with have the shape {codes_NS.shape}; {len(rows_ND)} rows and {self.n_components} "
                f"features need {(len(rows_ND), self.n_components)}."
            )
        _refuse_negative_codes(codes_NS)
        return torch.from_numpy(codes_NS).to(rows_ND)

    def _codes(self, X: np.ndarray) -> np.ndarray:
        components_SD = self.components_.astype(X.dtype)
        products_NS = torch.tensor(X @ components_SD.T)
        gram_SS = torch.tensor(components_SD @ components_SD.T)
        return non_negative_codes(products_NS, gram_SS, self.sweeps, self.tolerance).numpy()


class HierarchicalSemiNMF(_Factorisation):
    """Features of features: X ~ G_0 F_0, F_0 ~ G_1 F_1, ..., every G >= 0; row c of G_1 says what child c is made of.

    The factors are found level by level. Then Adam fits X ~ G_0 G_1 ... F_last with all of them at once, as in the
    paper; unlike the authors' code, ours keeps every G non-negative, and every neuron that winner-take-all left out
    stays out.

    Args:
        ranks: number of features of each level, falling.
        winners: of `SemiNMF`, for all levels, or one for each (a parent has the neurons of all its children).
        threshold: a feature's parents are those with at least this share of its largest coefficient.
        steps, learning_rate: of Adam; 0 steps for none.
        features, start, iterations, patience, sweeps, tolerance, random_state: of `SemiNMF`, for each level.

    Attributes:
        levels_: of each level, the features (S, D), unit norm; the last ones fitted by Adam too.
        coefficients_: of each level but the first, (S of the level below, S) non-negative, for features of unit norm.
        parents_: the same thresholded, bool.
        components_: features of the first level, of which `transform` gives the codes.
        error_, error_of_levels_: squared error of X through all levels as a share of its sum of squares, after Adam and
            before.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (400, 200, 100, 50),
        *,
        winners: float | Sequence[float] = 0.05,
        threshold: float = 0.5,
        steps: int = 1000,
        learning_rate: float = 1e-3,
        features: str = "signed",
        start: str = "random",
        iterations: int = 2000,
        patience: int = 200,
        sweeps: int = 1000,
        tolerance: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.ranks = ranks
        self.winners = winners
        self.threshold = threshold
        self.steps = steps
        self.learning_rate = learning_rate
        self.features = features
        self.start = start
        self.iterations = iterations
        self.patience = patience
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.random_state = random_state

    def fit(self, X: np.ndarray, y: object = None) -> Self:
        """Find the features of all levels. Raises as `SemiNMF.fit`; and UserError when ``ranks`` do not fall."""
        estimators = self._estimators()
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=max(self.ranks))
        rows, coefficients, levels = X, [], []
        for estimator in estimators:
            coefficients.append(estimator.fit_transform(rows))
            levels.append(rows := estimator.components_)
        self._first = estimators[0]
        self.error_of_levels_ = _error(X, coefficients, rows)
        if self.steps:
            coefficients, levels[-1] = _fit_together(X, coefficients, rows, self.steps, self.learning_rate)
        self.error_ = _error(X, coefficients, levels[-1])
        self.levels_ = levels
        self.components_ = self._first.components_ = levels[0]
        self.coefficients_ = coefficients[1:]
        self.parents_ = [(G > 0) & (self.threshold * G.max(axis=1, keepdims=True) <= G) for G in self.coefficients_]
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """(N, S) codes of the first level's features."""
        check_is_fitted(self)
        return self._first._codes(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))

    def inverse_transform(self, X: np.ndarray) -> np.ndarray:
        """(N, D) rows of codes (N, S) of the first level."""
        check_is_fitted(self)
        return self._first.inverse_transform(X)

    def dictionary(self, level: int = 0, provenance: dict[str, Any] | None = None) -> semi_nmf.SemiNMF:
        """The features of one level as a dictionary, see `SemiNMF.dictionary`."""
        check_is_fitted(self)
        if not 0 <= level < len(self.levels_):
            raise UserError(f"There is no level {level}: there are {len(self.levels_)}, numbered from 0.")
        made = _dictionary(self._estimators()[level]._config(), self.levels_[level])
        made.provenance = {**(provenance or {}), "factorised": {"start": self.start, "level": level}}
        return made

    def _estimators(self) -> list[SemiNMF]:
        """One for each level, unfitted. Raises UserError for settings that contradict each other."""
        ranks = list(self.ranks)
        if not ranks or any(after >= before for before, after in pairwise(ranks)):
            raise UserError(f"ranks are {', '.join(map(str, ranks)) or 'none'}; each must be smaller than the last.")
        winners = [self.winners] * len(ranks) if isinstance(self.winners, float | int) else list(self.winners)
        if len(winners) != len(ranks):
            raise UserError(f"winners has {len(winners)} shares for {len(ranks)} ranks; give one for each, or one.")
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it must lie above 0 and at most at 1.")
        if self.steps < 0 or self.learning_rate <= 0:
            raise UserError(
                f"steps is {self.steps} and learning_rate {self.learning_rate}; the first must not be negative, the "
                "second above 0."
            )
        shared = {name: value for name, value in self.get_params().items() if name in SemiNMF().get_params()}
        return [SemiNMF(rank, **shared | {"winners": share}) for rank, share in zip(ranks, winners, strict=True)]


def _error(X: np.ndarray, coefficients: list[np.ndarray], features: np.ndarray) -> float:
    rebuilt = features
    for G in reversed(coefficients):
        rebuilt = G @ rebuilt
    return float(np.square(X - rebuilt).sum() / max(np.square(X).sum(), semi_nmf.LEAST))


def _fit_together(
    X: np.ndarray, coefficients: list[np.ndarray], features: np.ndarray, steps: int, learning_rate: float
) -> tuple[list[np.ndarray], np.ndarray]:
    """All factors of X by Adam, projected after each step: coefficients to what is not negative, features to the
    neurons (and, where they have one sign, the sign) that they had."""
    scale = float(np.sqrt(np.square(X).mean())) or 1.0
    target_ND = torch.tensor(X / scale)
    factors = [torch.tensor(G) for G in [*coefficients, features]]
    factors[0] /= scale
    has_SD, non_negative = factors[-1] != 0, bool((factors[-1] >= 0).all())
    for factor in factors:
        factor.requires_grad_(True)
    optimiser = torch.optim.Adam(factors, lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        rebuilt = factors[-1]
        for factor in reversed(factors[:-1]):
            rebuilt = factor @ rebuilt
        (rebuilt - target_ND).square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            for factor in factors[:-1] + ([factors[-1]] if non_negative else []):
                factor.clamp_(min=0)
            factors[-1].mul_(has_SD)
    with torch.no_grad():
        lengths_S = torch.linalg.vector_norm(factors[-1], dim=1)
        lengths_S = torch.where(lengths_S > 0, lengths_S, 1.0)
        factors[-1] /= lengths_S[:, None]
        factors[-2] *= lengths_S
        factors[0] *= scale
    *fitted, last = [factor.detach().numpy() for factor in factors]
    return fitted, last


def _dictionary(config: SemiNMFConfig, features_SD: np.ndarray) -> semi_nmf.SemiNMF:
    """Without scaling, as one that was loaded."""
    made = semi_nmf.SemiNMF(config, features_SD.shape[1])
    made.drop_scaling()
    with torch.no_grad():
        made.features.copy_(torch.from_numpy(features_SD))
    return made.eval().requires_grad_(False)


def _refuse_negative_codes(codes_NS: np.ndarray) -> None:
    if (codes_NS < 0).any():
        raise UserError(f"Codes are never negative, and the least of these is {codes_NS.min():.3g}; set them to 0.")
