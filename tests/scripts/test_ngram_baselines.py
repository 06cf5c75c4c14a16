"""Kneser-Ney models are proper distributions and equal the definition, written a second time with dictionaries.

Not checked: that Kneser-Ney is a good model of code (the model card's numbers say how good).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_baselines import KneserNey, estimate_discounts

END = 0


def random_documents(seed: int, vocabulary: int, count: int, length: int) -> list[np.ndarray]:
    """Documents with structure: each token mostly follows from the one before it."""
    rng = np.random.default_rng(seed)
    follower = rng.permutation(vocabulary)
    documents = []
    for _ in range(count):
        tokens = [int(rng.integers(1, vocabulary))]
        while len(tokens) < length:
            tokens.append(int(follower[tokens[-1]] if rng.random() < 0.7 else rng.integers(1, vocabulary)))
        documents.append(np.array(tokens))
    return documents


class ByDefinition:
    """The formulas in the module's docstring, token by token."""

    def __init__(self, documents: list[np.ndarray], order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        self.adjusted: list[dict[tuple, int]] = []
        sentences = [("start", *document.tolist(), END) for document in documents]
        for m in range(1, order + 1):
            plain: Counter[tuple] = Counter()
            in_front: dict[tuple, set] = defaultdict(set)
            for sentence in sentences:
                for end in range(1, len(sentence)):
                    begin = end - m + 1
                    if begin < 0:
                        continue
                    plain[sentence[begin : end + 1]] += 1
                    if begin > 0:
                        in_front[sentence[begin : end + 1]].add(sentence[begin - 1])
            if m == order:
                self.adjusted.append(dict(plain))
            else:
                self.adjusted.append({g: n if g[0] == "start" else len(in_front[g]) for g, n in plain.items()})
        self.discounts = [estimate_discounts(np.array(list(counts.values()))) for counts in self.adjusted]

    def probability(self, history: tuple, token: int) -> float:
        history = history[max(0, len(history) - self.order + 1) :]
        lower = 1 / self.vocabulary if not history else self.probability(history[1:], token)
        counts = {g[-1]: n for g, n in self.adjusted[len(history)].items() if g[:-1] == history}
        if not counts:
            return lower
        discount = {w: self.discounts[len(history)][min(n, 3) - 1] for w, n in counts.items()}
        total = sum(counts.values())
        own = counts[token] - discount[token] if token in counts else 0.0
        return own / total + sum(discount.values()) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_definition(order: int) -> None:
    training = random_documents(seed=1, vocabulary=9, count=6, length=40)
    evaluation = [*random_documents(seed=2, vocabulary=9, count=3, length=12), np.array([], dtype=np.int64)]
    fast = KneserNey(training, order, vocabulary=9, end_token=END).log_probabilities(evaluation)
    reference = ByDefinition(training, order, vocabulary=9)
    expected = [
        math.log(reference.probability(("start", *document[:i].tolist()), int(token)))
        for document in evaluation
        for i, token in enumerate([*document, END])
    ]
    np.testing.assert_allclose(fast, expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    order=st.integers(1, 5),
    history=st.lists(st.integers(0, 6), max_size=6),
    at_document_start=st.booleans(),
)
def test_probabilities_sum_to_one_after_any_history(
    seed: int, order: int, history: list[int], at_document_start: bool
) -> None:
    model = KneserNey(random_documents(seed, 7, count=3, length=15), order, vocabulary=7, end_token=END)
    probabilities = model.distribution(history, at_document_start)
    assert probabilities.shape == (7,)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_the_distribution_is_the_one_that_scores_documents() -> None:
    model = KneserNey(random_documents(3, 7, count=5, length=30), order=4, vocabulary=7, end_token=END)
    document = np.array([2, 5, 5, 1])
    for i, scored in enumerate(model.log_probabilities([document])):
        distribution = model.distribution(document[:i].tolist(), at_document_start=True)
        assert math.log(distribution[[*document, END][i]]) == pytest.approx(scored, rel=1e-12)


def test_a_history_does_not_reach_over_the_beginning_of_a_document() -> None:
    model = KneserNey(random_documents(4, 7, count=5, length=30), order=5, vocabulary=7, end_token=END)
    first, second = np.array([3, 4, 1, 6]), np.array([2, 2, 5])
    together = model.log_probabilities([first, second])
    np.testing.assert_array_equal(
        together, np.concatenate([model.log_probabilities([first]), model.log_probabilities([second])])
    )


def test_longer_histories_help_where_the_text_has_them() -> None:
    """Tokens that repeat with period 3 need a history of two to be known, and no more."""
    period = np.array([1, 1, 2, 1, 1, 3] * 40)
    losses = [
        -KneserNey([period[:200]], order, vocabulary=4, end_token=END).log_probabilities([period[30:90]]).mean()
        for order in (1, 2, 3, 4)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_discounts_are_chen_and_goodmans() -> None:
    counts = np.repeat([1, 2, 3, 4], [100, 40, 20, 10])
    y = 100 / 180
    assert estimate_discounts(counts) == pytest.approx((1 - 2 * y * 40 / 100, 2 - 3 * y * 20 / 40, 3 - 4 * y * 10 / 20))


def test_discounts_stay_proper_on_toy_counts() -> None:
    assert estimate_discounts(np.array([7, 7])) == (0.5, 1.0, 1.5)
    assert all(0 < d <= i for i, d in enumerate(estimate_discounts(np.repeat([1, 2, 3, 4], [10, 90, 90, 90])), start=1))


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="outside 0 .. 3"):
        KneserNey([np.array([1, 4])], order=2, vocabulary=4, end_token=END)
