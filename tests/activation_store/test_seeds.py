from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from activation_store.seeds import derive_seed, numpy_stream, permutation


def test_seeds_match_the_pinned_ones():
    """A change here changes every store, every order and every run."""
    assert derive_seed(0, "chunk order", 0) == 1046586684048159911
    assert permutation(10, 3, "rows of a window", 1, 2).tolist() == [6, 5, 0, 7, 9, 1, 2, 8, 4, 3]


def test_no_two_purposes_share_a_stream():
    names = [
        (seed, purpose, *indices) for seed in range(5) for purpose in ("a", "b") for indices in ((), (0,), (1,), (1, 0))
    ]
    assert len({derive_seed(*name) for name in names}) == len(names)


def test_neighbouring_seeds_and_epochs_are_unrelated():
    """With seed + epoch these two would be the same order."""
    assert not np.array_equal(permutation(50, 3, "order", 1), permutation(50, 4, "order", 0))


def test_names_are_told_apart_however_they_are_cut():
    assert derive_seed(1, "ab") != derive_seed(1, "a", 0)
    assert derive_seed(1, "x", 11) != derive_seed(1, "x", 1, 1)


def test_a_stream_repeats_itself():
    assert np.array_equal(numpy_stream(5, "x", 1).random(4), numpy_stream(5, "x", 1).random(4))


@given(st.integers(0, 300), st.integers(-5, 2**70))
def test_a_permutation_holds_each_position_once(n: int, seed: int):
    assert np.array_equal(np.sort(permutation(n, seed, "test")), np.arange(n))


def test_permutations_put_every_position_everywhere():
    """Mean place of each of 20 positions over 2000 permutations: within five standard errors of the middle."""
    places = np.mean([np.argsort(permutation(20, seed, "test")) for seed in range(2000)], axis=0)
    standard_error = np.sqrt((20**2 - 1) / 12 / 2000)
    assert np.abs(places - 9.5).max() < 5 * standard_error
