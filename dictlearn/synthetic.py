"""Planted dictionaries: activations made from known features, and the truth about them.

Three kinds, each a frozen dataclass whose fields are its settings:

- `SparseFeatures`: more features than coordinates on random directions, some common and most rare (a power law).
- `FeatureTree`: 20 features in a tree; a child is on only where its parent is. The benchmark for absorption.
- `CrossLayerFeatures`: several layers, and features that are read at one layer and written to it and to later ones.

Their truth: `directions`, `rates`, `parents`, `expected_l0`, and of each batch the codes it was made from. Batch
``number`` of a ``purpose`` follows from the settings alone, whatever was drawn before it. Its activity, its magnitudes
and its noise come from random streams of their own, so that rows with more noise still have the same codes.

Axes: B rows, D width, F features, L layers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from activation_store.seeds import numpy_stream
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter

HOOK = "blocks.0.hook_resid_post"
"""The hook of the kinds that have but one."""


@dataclass(frozen=True)
class PlantedBatch:
    """Rows, and what they were made from.

    Attributes:
        activations: hook name -> (B, D) float32.
        codes: (B, F) float32, the magnitude of each feature that is on and 0 of those that are off.
        labels: name -> (B,) int64, what else is known of each row; empty for kinds without labels.
    """

    activations: Mapping[str, np.ndarray]
    codes: np.ndarray
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def x(self) -> np.ndarray:
        """(B, D) the activations of the first hook."""
        return next(iter(self.activations.values()))


class Planted(Protocol):
    """What every planted dictionary offers. Its fields are its settings."""

    @property
    def seed(self) -> int: ...

    @property
    def widths(self) -> dict[str, int]:
        """Hook name -> width of its rows."""

    @property
    def directions(self) -> np.ndarray:
        """(F, D) float64 unit rows; of cross-layer features where they are read."""

    @property
    def rates(self) -> np.ndarray:
        """(F,) float64, the share of rows in which each feature is on."""

    @property
    def parents(self) -> np.ndarray:
        """(F,) int64, the feature without which each one cannot be on, or -1."""

    def draw(self, number: int, rows: int, purpose: str = "train") -> PlantedBatch:
        """Batch ``number`` of ``rows`` rows. Another number of rows is another batch, not a part of this one."""


# --- sparse features in superposition ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseFeatures:
    """Features on random unit directions, each on by itself, the i-th at a rate proportional to (i + 1)^-exponent.

    Two things may be planted besides, both named by a label of each row:

    - ``topics``: a row is about one of so many topics, drawn evenly. A feature of a topic is on more often there, and
      less often elsewhere, so features of one topic go together; its rate over all rows stays what it was.
    - ``nuisances``: a row comes from one of so many conditions, drawn evenly, which adds an offset of its own. The
      offsets are random combinations of ``nuisance_directions`` orthonormal directions, which are no features.

    Raises UserError for settings that contradict each other.
    """

    seed: int = 0
    d: int = 64
    """Width of the rows."""
    features: int = 256
    """Number of features; more than d is superposition."""
    exponent: float = 1.0
    """Of the power law of the rates; 0 makes all features equally common."""
    mean_l0: float = 5.0
    """Features on in a row, on average."""
    magnitude_mean: float = 1.0
    """Mean of the magnitude of a feature that is on."""
    magnitude_std: float = 0.25
    """Its standard deviation; magnitudes follow a gamma distribution (none is negative), and 0 makes them constant."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise in each coordinate."""
    topics: int = 0
    """Number of topics; 0 for none."""
    topic_strength: float = 0.8
    """0: topics mean nothing; 1: a topic's features are on in its rows only."""
    nuisances: int = 0
    """Number of conditions that shift their rows; 0 for none."""
    nuisance_directions: int = 4
    """Dimension of the space in which they shift them."""
    nuisance_strength: float = 2.0
    """Standard deviation over conditions of the shift along each of these directions."""

    def __post_init__(self) -> None:
        check_counts(self, "d", "features", "nuisance_directions")
        check_not_negative(
            self, "exponent", "magnitude_std", "noise", "topics", "topic_strength", "nuisances", "nuisance_strength"
        )
        if self.magnitude_mean <= 0:
            raise UserError(f"magnitude_mean is {self.magnitude_mean}; it must be positive.")
        if self.topic_strength > 1:
            raise UserError(f"topic_strength is {self.topic_strength}; it must lie between 0 and 1.")
        if self.nuisances and self.nuisance_directions > self.d:
            raise UserError(
                f"There are no {self.nuisance_directions} orthogonal nuisance_directions in d = {self.d} coordinates; "
                "lower the first."
            )
        power_law(self.features, self.exponent, self.mean_l0)

    @property
    def widths(self) -> dict[str, int]:
        return {HOOK: self.d}

    @cached_property
    def directions(self) -> np.ndarray:
        """(F, D) float64, unit rows."""
        return unit_rows(self.seed, "planted directions", self.features, self.d)

    @cached_property
    def rates(self) -> np.ndarray:
        """(F,) float64, falling."""
        return power_law(self.features, self.exponent, self.mean_l0)

    @cached_property
    def parents(self) -> np.ndarray:
        """(F,) int64, all -1."""
        return np.full(self.features, -1)

    @property
    def expected_l0(self) -> float:
        return float(self.rates.sum())

    @cached_property
    def topic_of_feature(self) -> np.ndarray:
        """(F,) int64: the topic of each feature; -1 for those too common to be more so in one, and without topics."""
        if not self.topics:
            return np.full(self.features, -1)
        within = self.rates * (1 + self.topic_strength * (self.topics - 1))
        return np.where(within <= 1, np.arange(self.features) % self.topics, -1)

    @cached_property
    def nuisance_offsets(self) -> np.ndarray:
        """(conditions, D) float64, what each condition adds to its rows."""
        stream = numpy_stream(self.seed, "planted nuisances")
        basis, _ = np.linalg.qr(stream.normal(size=(self.d, self.nuisance_directions)))
        strengths = self.nuisance_strength * stream.normal(size=(self.nuisances, self.nuisance_directions))
        return strengths @ basis.T

    def draw(self, number: int, rows: int, purpose: str = "train") -> PlantedBatch:
        """Batch ``number``; its labels are "topic" and "nuisance", where there are any."""
        return self._draw(number, rows, purpose, controls=False)

    def draw_controls(self, number: int, rows: int, purpose: str = "controls") -> PlantedBatch:
        """Rows about no topic (-1), in which the features of topics are off: what is there without the effect."""
        return self._draw(number, rows, purpose, controls=True)

    def _draw(self, number: int, rows: int, purpose: str, controls: bool) -> PlantedBatch:
        labels: dict[str, np.ndarray] = {}
        rates_BF = np.broadcast_to(self.rates, (rows, self.features))
        if self.topics:
            drawn_B = numpy_stream(self.seed, f"planted topics: {purpose}", number).integers(self.topics, size=rows)
            labels["topic"] = topic_B = np.full(rows, -1) if controls else drawn_B
            rates_BF = self.rates * self._rate_factors(topic_B)
        on_BF = numpy_stream(self.seed, f"planted activity: {purpose}", number).random((rows, self.features)) < rates_BF
        codes_BF = on_BF * self._magnitudes(number, purpose, on_BF.shape)
        x_BD = codes_BF @ self.directions + gaussian(self.noise, (rows, self.d), self.seed, purpose, number)
        if self.nuisances:
            stream = numpy_stream(self.seed, f"planted conditions: {purpose}", number)
            labels["nuisance"] = stream.integers(self.nuisances, size=rows)
            x_BD += self.nuisance_offsets[labels["nuisance"]]
        return PlantedBatch({HOOK: x_BD.astype(np.float32)}, codes_BF.astype(np.float32), labels)

    def _rate_factors(self, topic_B: np.ndarray) -> np.ndarray:
        """(B, F): how much more often than over all rows each feature is on. Over all topics the mean is 1."""
        s, of_topic_F = self.topic_strength, self.topic_of_feature
        same_BF = topic_B[:, None] == of_topic_F
        factors_BF = np.where(same_BF, 1 + s * (self.topics - 1), 1 - s)
        factors_BF[topic_B < 0] = 0
        factors_BF[:, of_topic_F < 0] = 1
        return factors_BF

    def _magnitudes(self, number: int, purpose: str, shape: tuple[int, int]) -> np.ndarray:
        if self.magnitude_std == 0:
            return np.full(shape, self.magnitude_mean)
        scale = self.magnitude_std**2 / self.magnitude_mean
        stream = numpy_stream(self.seed, f"planted magnitudes: {purpose}", number)
        return stream.gamma(self.magnitude_mean / scale, scale, size=shape)


# --- the tree ---------------------------------------------------------------------------------------------------------

TREE_PARENTS, TREE_CHILDREN, TREE_LEAVES = 3, 3, 8
PARENT_SHARE, CHILD_SHARE, LEAF_SHARE = 0.2, 0.2, 0.05


@dataclass(frozen=True)
class FeatureTree:
    """The hierarchical benchmark of Costa et al. 2025 (arXiv 2506.03093): 20 features in 20 coordinates.

    The root, which is no feature, has eleven branches, of which each row takes exactly one: one of three parents (0.2
    each) or one of eight leaves (0.05 each). Below a parent at most one of its three children is on (0.2 each, none
    with 0.4). Features 0 to 2 are the parents, 3 to 10 the leaves, 11 to 13 the children of feature 0, and so on.
    1.36 features are on in a row, on average.

    Directions begin orthonormal. Then each takes up a share of every sibling's, d_i + eps sum_j d_j, and is scaled to
    length 1, eps being the number that makes the cosine of two siblings ``correlation``. The branches are siblings, and
    so are the children of one parent; features of different families stay orthogonal.
    """

    seed: int = 0
    correlation: float = 0.0
    """Cosine between any two siblings; the benchmark has 0, 0.3, 0.6 and 0.9."""
    magnitude: tuple[float, float] = (1.5, 0.25)
    """Mean and standard deviation of the Gaussian magnitude of a branch that is on."""
    child_magnitude: tuple[float, float] = (1.5, 0.25)
    """The same of a child."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise in each coordinate; the benchmark has none."""

    def __post_init__(self) -> None:
        check_not_negative(self, "noise")
        if not 0 <= self.correlation < 1:
            raise UserError(f"The correlation of siblings is {self.correlation}; it must lie from 0 to below 1.")
        for name in ("magnitude", "child_magnitude"):
            mean, std = getattr(self, name)
            if mean <= 0 or std < 0:
                raise UserError(f"{name} is ({mean}, {std}); it needs a mean above 0 and a deviation not below 0.")

    @property
    def widths(self) -> dict[str, int]:
        return {HOOK: 20}

    @cached_property
    def parents(self) -> np.ndarray:
        """(20,) int64: the parent of each feature, -1 for the eleven branches."""
        branches = np.full(TREE_PARENTS + TREE_LEAVES, -1)
        return np.concatenate([branches, np.repeat(np.arange(TREE_PARENTS), TREE_CHILDREN)])

    @cached_property
    def rates(self) -> np.ndarray:
        """(20,) float64."""
        of_children = np.full(TREE_PARENTS * TREE_CHILDREN, PARENT_SHARE * CHILD_SHARE)
        return np.concatenate([self._branch_shares, of_children])

    @property
    def expected_l0(self) -> float:
        return float(self.rates.sum())

    @cached_property
    def directions(self) -> np.ndarray:
        """(20, 20) float64, unit rows."""
        basis, _ = np.linalg.qr(numpy_stream(self.seed, "planted directions").normal(size=(20, 20)))
        directions = np.empty_like(basis)
        for parent in np.unique(self.parents):
            family = np.flatnonzero(self.parents == parent)
            eps = sibling_share(self.correlation, len(family))
            mixed = (1 - eps) * basis[family] + eps * basis[family].sum(axis=0)
            directions[family] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        return directions

    def draw(self, number: int, rows: int, purpose: str = "train") -> PlantedBatch:
        stream = numpy_stream(self.seed, f"planted activity: {purpose}", number)
        branch_B = np.searchsorted(np.cumsum(self._branch_shares)[:-1], stream.random(rows), side="right")
        child_B = (stream.random(rows) / CHILD_SHARE).astype(np.int64)
        on_BF = np.zeros((rows, 20), dtype=bool)
        on_BF[np.arange(rows), branch_B] = True
        has_child_B = (branch_B < TREE_PARENTS) & (child_B < TREE_CHILDREN)
        child_B += len(self._branch_shares) + branch_B * TREE_CHILDREN
        on_BF[has_child_B, child_B[has_child_B]] = True

        means_F = np.where(self.parents < 0, self.magnitude[0], self.child_magnitude[0])
        stds_F = np.where(self.parents < 0, self.magnitude[1], self.child_magnitude[1])
        normal_BF = numpy_stream(self.seed, f"planted magnitudes: {purpose}", number).normal(size=on_BF.shape)
        codes_BF = on_BF * (means_F + stds_F * normal_BF)
        x_BD = codes_BF @ self.directions + gaussian(self.noise, (rows, 20), self.seed, purpose, number)
        return PlantedBatch({HOOK: x_BD.astype(np.float32)}, codes_BF.astype(np.float32))

    @cached_property
    def _branch_shares(self) -> np.ndarray:
        return np.array([PARENT_SHARE] * TREE_PARENTS + [LEAF_SHARE] * TREE_LEAVES)


def sibling_share(correlation: float, siblings: int) -> float:
    """eps for which the directions d_i + eps sum_{j != i} d_j of so many orthonormal d have this cosine.

    The cosine is (2 eps + (n - 2) eps^2) / (1 + (n - 1) eps^2); this is the smaller root, in a form that 0 does not
    break.
    """
    n, c = siblings, correlation
    return c / (1 + np.sqrt((1 - c) * (1 + (n - 1) * c)))


# --- across layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrossLayerFeatures:
    """Layers whose MLPs read features from their inputs and write them to their own and to later layers' outputs.

        input of layer l  =  sum of the features read at l, along `directions`, and of those that stay, + noise
        output of layer l =  sum of the features written to l, along `written_directions[:, l]`, + noise

    Feature i is read at layer i mod L, so that every layer reads common and rare ones, and is written to that layer and
    to the next ones, ``written_layers`` in all or as many as there are. The rates are a power law, as of
    `SparseFeatures`. At the default ``stays`` of 0 a later layer's input does not show the feature, so a transcoder of
    that layer alone cannot explain what it writes there.
    """

    seed: int = 0
    layers: int = 4
    """Number of layers."""
    d: int = 64
    """Width of each layer's input and output."""
    features: int = 256
    """Number of features in all layers together."""
    written_layers: int = 3
    """Layers that a feature is written to, from the one it is read at on."""
    exponent: float = 1.0
    """Of the power law of the rates."""
    mean_l0: float = 5.0
    """Features on in a row, on average, in all layers together."""
    magnitude_mean: float = 1.0
    """Mean of the magnitude of a feature that is on."""
    magnitude_std: float = 0.25
    """Its standard deviation; magnitudes follow a gamma distribution, and 0 makes them constant."""
    stays: float = 0.0
    """Share of a feature's magnitude that is still along its direction in the inputs of later layers."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise in each coordinate of inputs and outputs."""

    def __post_init__(self) -> None:
        check_counts(self, "layers", "d", "features", "written_layers")
        check_not_negative(self, "exponent", "magnitude_std", "noise", "stays")
        if self.written_layers > self.layers:
            raise UserError(f"A feature cannot be written to {self.written_layers} of {self.layers} layers.")
        power_law(self.features, self.exponent, self.mean_l0)
        if self.magnitude_mean <= 0:
            raise UserError(f"magnitude_mean is {self.magnitude_mean}; it must be positive.")

    @property
    def widths(self) -> dict[str, int]:
        return {hook: self.d for layer in range(self.layers) for hook in (input_hook(layer), output_hook(layer))}

    @property
    def directions(self) -> np.ndarray:
        """(F, D) float64 unit rows: where each feature is read."""
        return self._features.directions

    @property
    def rates(self) -> np.ndarray:
        """(F,) float64, falling."""
        return self._features.rates

    @property
    def parents(self) -> np.ndarray:
        """(F,) int64, all -1."""
        return self._features.parents

    @property
    def expected_l0(self) -> float:
        return float(self.rates.sum())

    @cached_property
    def read_layer(self) -> np.ndarray:
        """(F,) int64: the layer at which each feature is read."""
        return np.arange(self.features) % self.layers

    @cached_property
    def written(self) -> np.ndarray:
        """(F, L) bool: the layers to whose outputs each feature is written."""
        after = np.arange(self.layers) - self.read_layer[:, None]
        return (after >= 0) & (after < self.written_layers)

    @cached_property
    def written_directions(self) -> np.ndarray:
        """(F, L, D) float64: unit rows where a feature is written, zeros elsewhere."""
        rows = unit_rows(self.seed, "planted written directions", self.features * self.layers, self.d)
        return rows.reshape(self.features, self.layers, self.d) * self.written[:, :, None]

    def draw(self, number: int, rows: int, purpose: str = "train") -> PlantedBatch:
        codes_BF = self._features.draw(number, rows, purpose).codes.astype(np.float64)
        activations = {}
        for layer in range(self.layers):
            shown_F = np.where(self.read_layer == layer, 1.0, self.stays * (self.read_layer < layer))
            for hook, directions in (
                (input_hook(layer), shown_F[:, None] * self.directions),
                (output_hook(layer), self.written_directions[:, layer]),
            ):
                noise = gaussian(self.noise, (rows, self.d), self.seed, f"{purpose}, {hook}", number)
                activations[hook] = (codes_BF @ directions + noise).astype(np.float32)
        return PlantedBatch(activations, codes_BF.astype(np.float32))

    @cached_property
    def _features(self) -> SparseFeatures:
        """The same features in one layer: their rates, their magnitudes and where they are read."""
        return SparseFeatures(
            seed=self.seed,
            d=self.d,
            features=self.features,
            exponent=self.exponent,
            mean_l0=self.mean_l0,
            magnitude_mean=self.magnitude_mean,
            magnitude_std=self.magnitude_std,
            noise=0.0,
        )


def input_hook(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_in"


def output_hook(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


# --- what the kinds are made of ---------------------------------------------------------------------------------------


def power_law(features: int, exponent: float, mean_l0: float) -> np.ndarray:
    """(F,) float64 rates proportional to (i + 1)^-exponent whose sum is ``mean_l0``.

    Raises:
        UserError: the most common feature would have to be on in more than all rows.
    """
    weights = np.arange(1, features + 1) ** -float(exponent)
    if not 0 < mean_l0 * weights[0] / weights.sum() <= 1:
        raise UserError(
            f"A mean_l0 of {mean_l0:g} cannot be had from {features} features whose rates fall with exponent "
            f"{exponent:g}: it must lie above 0 and at most at {weights.sum() / weights[0]:.3g}, where the most common "
            "one is always on."
        )
    return mean_l0 * weights / weights.sum()


def unit_rows(seed: int, purpose: str, rows: int, d: int) -> np.ndarray:
    """(rows, d) float64, evenly spread over the unit sphere."""
    drawn = numpy_stream(seed, purpose).normal(size=(rows, d))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def gaussian(std: float, shape: tuple[int, int], seed: int, purpose: str, number: int) -> np.ndarray | float:
    """Noise of one batch; a plain 0 without any."""
    return std * numpy_stream(seed, f"planted noise: {purpose}", number).normal(size=shape) if std else 0.0


def check_counts(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be at least 1.")


def check_not_negative(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) >= 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it must not be negative.")


# --- into a store -----------------------------------------------------------------------------------------------------

ROWS_PER_DRAW = 4096
ROWS_PER_DOCUMENT = 100
HELD_OUT_EVERY = 10
MODEL_NAME = "planted features"
"""No name of a model on the hub, so what needs a language model or its tokenizer refuses at once."""


def write_store(
    location: str | os.PathLike[str],
    planted: Planted,
    rows: int,
    geometry: Geometry | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Make a store of planted rows, or continue one: the same settings give the same bytes.

    Rows are those of ``planted.draw(number, 4096, "store")`` one batch after the other; the last is cut. 100 rows make
    a document, every tenth of which is held out. A row's token is 1 + the feature with the largest magnitude, 0 where
    none is on. Rows can be trained on and evaluated (``--tokens 0``); what needs text, such as a feature index, cannot.

    Raises:
        UserError: as of `StoreWriter`; or ``rows`` below 1.
    """
    if rows < 1:
        raise UserError(f"A store of {rows} rows was asked for; it needs at least one.")
    starts = range(0, rows, ROWS_PER_DOCUMENT)
    documents = [
        DocumentRows(
            f"planted-{number}",
            "held-out" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train",
            first,
            min(ROWS_PER_DOCUMENT, rows - first),
        )
        for number, first in enumerate(starts)
    ]
    made_by = {"kind": type(planted).__name__, "settings": settings_of(planted)}
    fingerprint = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    provenance = {
        "model": {"name": MODEL_NAME, "fingerprint": f"sha256:{fingerprint}"},
        "corpus": {"name": "none"},
        "planted": made_by,
    }
    batches = {"seed": planted.seed, "rows_per_draw": ROWS_PER_DRAW, "context": ROWS_PER_DOCUMENT, "bos_token_id": None}
    hooks = [HookSpec(hook, (d,), "float32") for hook, d in planted.widths.items()]
    writer = StoreWriter(location, StorePlan(rows, documents, {}, batches), hooks, geometry or Geometry(), provenance)
    with writer, (progress or NoProgress()).task("writing planted rows", total=rows, unit="rows") as task:
        task.advance(writer.next_row)
        while not writer.complete and writer.next_row < rows:
            number = writer.next_row // ROWS_PER_DRAW
            first = number * ROWS_PER_DRAW
            batch = planted.draw(number, ROWS_PER_DRAW, "store")
            numbers = np.arange(first, min(first + ROWS_PER_DRAW, rows))
            tokens = np.where((batch.codes != 0).any(axis=1), 1 + batch.codes.argmax(axis=1), 0)
            before = writer.next_row
            writer.append(
                {hook: values[: len(numbers)] for hook, values in batch.activations.items()},
                tokens[: len(numbers)],
                numbers % ROWS_PER_DOCUMENT,
                numbers // ROWS_PER_DOCUMENT,
                first_row=first,
            )
            task.advance(writer.next_row - before)
        writer.finish()


def settings_of(planted: Planted) -> dict[str, Any]:
    """The fields of a planted dictionary as plain JSON values: with them it can be built again."""
    return json.loads(json.dumps(asdict(planted)))  # type: ignore[call-overload]
