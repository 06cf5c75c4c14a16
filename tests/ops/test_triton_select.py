"""The k largest of each row as Triton's kernels find them are those that a stable sort finds, place for place.

Without a GPU the kernels run in Triton's interpreter, which says what they compute and nothing of how fast; what is
compiled out of them is looked at in `test_compiles_for_hopper.py`. Every comparison is exact, NaN and ties included:
nothing here is summed.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.needs("interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
RULES = ("relu", "magnitude", "linear")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    from dictlearn.ops import triton_select

    return triton_select


def sorted_first(pre_BS, k, rule):
    """Values and places of the k largest, from left to right: NaN before all else, what ties from the left."""
    by_BS = pre_BS.abs() if rule == "magnitude" else pre_BS
    by_BS = by_BS.double()
    # two stable sorts, the more important last
    order_BS = (
        by_BS.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        .sort(dim=1, descending=True, stable=True)
        .indices
    )
    nan_first_BS = by_BS.gather(1, order_BS).isnan().int().sort(dim=1, descending=True, stable=True).indices
    places_BK = order_BS.gather(1, nan_first_BS)[:, :k].sort(1).values
    values_BK = pre_BS.gather(1, places_BK)
    return values_BK.relu() if rule == "relu" else values_BK, places_BK


def check(kernels, pre_BS, k, rule):
    pre_BS = pre_BS.to(DEVICE)
    values_BK, places_BK = sorted_first(pre_BS, k, rule)
    found_BK, indices_BK = kernels.select(pre_BS, kernels.group_maxima(pre_BS, rule), k, rule)
    assert found_BK.dtype == pre_BS.dtype and indices_BK.dtype == torch.int64
    assert torch.equal(indices_BK, places_BK)
    torch.testing.assert_close(found_BK, values_BK, rtol=0, atol=0, equal_nan=True)
    kept_BS = torch.zeros_like(pre_BS).scatter(1, places_BK, values_BK)
    torch.testing.assert_close(kernels.keep_topk(pre_BS, k, rule), kept_BS, rtol=0, atol=0, equal_nan=True)


def extremes(B, S, generator):
    """Every kind of number that there is, each several times in a row."""
    numbers = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 1, -1, 3e38, -3e38])
    return numbers[torch.randint(len(numbers), (B, S), generator=generator)]


CONTENTS = {
    "random": lambda B, S, g: torch.randn(B, S, generator=g),
    "ties": lambda B, S, g: torch.randint(-3, 3, (B, S), generator=g).float(),
    "all equal": lambda B, S, g: torch.full((B, S), -1.5),
    "nothing above zero": lambda B, S, g: -torch.rand(B, S, generator=g),
    "minus infinity": lambda B, S, g: torch.full((B, S), -torch.inf),
    "all NaN": lambda B, S, g: torch.full((B, S), torch.nan),
    "ascending": lambda B, S, g: torch.arange(S).float().repeat(B, 1),
    "descending": lambda B, S, g: -torch.arange(S).float().repeat(B, 1),
    "extremes": extremes,
}


@pytest.mark.parametrize(
    ("content", "dtype"),
    [*itertools.product(CONTENTS, DTYPES[:2]), ("random", torch.float64), ("extremes", torch.float64)],
)
def test_selects_what_a_stable_sort_puts_first(kernels, content, dtype):
    generator = torch.Generator().manual_seed(0)
    for rule, k in zip(RULES, (150, 1, 9), strict=True):
        check(kernels, CONTENTS[content](1, 150, generator).to(dtype), k, rule)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from(sorted(CONTENTS)), st.data())
def test_any_shape(kernels, B, S, dtype, content, data):
    k = data.draw(st.integers(1, S))
    pre_BS = CONTENTS[content](B, S, torch.Generator().manual_seed(S)).to(dtype)
    check(kernels, pre_BS, k, data.draw(st.sampled_from(RULES)))


def test_the_threshold_falls_between_equal_maxima_of_groups(kernels):
    """Four groups share the maximum that is the k-th: the first ones of them are read, and those above it wherever."""
    pre_BS = torch.full((1, 64 * 6), -1.0)
    pre_BS[0, [5, 64 + 63, 130, 200, 5 * 64]] = torch.tensor([2.0, 2.0, 2.0, 2.0, 7.0])
    pre_BS[0, 6] = 2.0
    for k in (1, 2, 4, 6):
        check(kernels, pre_BS, k, "linear")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_group_maxima_are_the_largest_of_each_64(kernels, rule, dtype):
    """Several programs to a row, the last group with 11 elements; one that holds a NaN says so."""
    generator = torch.Generator().manual_seed(1)
    pre_BS = torch.randn(3, 144 * 64 + 11, generator=generator).to(dtype).to(DEVICE)
    pre_BS[0, 70], pre_BS[1, -11:], pre_BS[2, :64] = torch.nan, -torch.inf, -torch.rand(64, generator=generator)
    by_BS = pre_BS.abs() if rule == "magnitude" else pre_BS
    padded_BS = torch.cat([by_BS, by_BS.new_full((3, 53), -torch.inf)], dim=1)
    expected_BG = padded_BS.view(3, 145, 64).amax(dim=2)
    assert expected_BG[0, 1].isnan() and expected_BG[1, -1].isinf()
    torch.testing.assert_close(kernels.group_maxima(pre_BS, rule), expected_BG, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ["linear", "magnitude"])
@pytest.mark.parametrize("S", [128, 139])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_maxima_are_the_same_by_comparing_floats(kernels, dtype, S, rule):
    """As a card does it. The interpreter is given integers that sort like them, which it is faster at."""
    pre_BS = torch.randn(2, S, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    pre_BS[0, 70], pre_BS[1, 64:] = torch.nan, -torch.inf
    expected_BG = kernels.group_maxima(pre_BS, rule)
    G, found_BG = expected_BG.shape[1], torch.empty_like(expected_BG)
    kernels._group_maxima[(2,)](pre_BS, found_BG, S, G, 1, 4, rule == "magnitude", S % 64 != 0, False)
    torch.testing.assert_close(found_BG, expected_BG, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("B", "D", "S", "dtype"),
    [
        (20, 24, 136, torch.bfloat16),  # rows begin at multiples of 16 bytes; several tiles both ways
        (5, 7, 70, torch.bfloat16),  # they do not; the last group has 6 latents
        (1, 1, 1, torch.bfloat16),
        (18, 20, 200, torch.float32),
        (3, 5, 64, torch.float32),
    ],
)
def test_product_is_the_matrix_product_and_its_maxima_are_those_of_its_groups(kernels, B, D, S, dtype):
    generator = torch.Generator().manual_seed(B)
    x, W, b = (torch.randn(*size, generator=generator).to(DEVICE) for size in ((B, D), (S, D), (S,)))
    x, W = x.to(dtype), W.to(dtype)
    pre, maxima = kernels.product_with_maxima(x, W, b, kernels.Tiling(16, 64, 16) if S == 64 else None)
    # the interpreter cuts off what a card rounds: less than 2^-7 of a bfloat16
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    exact = x.double() @ W.double().T + b.double()
    torch.testing.assert_close(pre.double(), exact, rtol=tolerance, atol=1e-5)
    assert torch.equal(maxima, kernels.group_maxima(pre, "linear"))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where the interpreter multiplies infinity by zero
@pytest.mark.parametrize("S", [70, 72])
def test_what_is_not_finite_is_the_largest_in_its_own_group_alone(kernels, S):
    """Latents that are not there, beside the last ones in a tile, are the sum of infinity times zero."""
    x, W, b = torch.ones(3, 8), torch.ones(S, 8), torch.zeros(S)
    x[0, 0], x[1, 0], W[1] = torch.inf, -torch.inf, torch.nan
    x, W = (tensor.to(torch.bfloat16).to(DEVICE) for tensor in (x, W))
    pre, maxima = kernels.product_with_maxima(x, W, b.to(DEVICE))
    assert pre[:, 1].isnan().all() and maxima[:, 0].isnan().all()
    assert maxima[:, 1].tolist() == [torch.inf, -torch.inf, 8]


def test_the_same_bits_every_time(kernels):
    pre_BS = CONTENTS["ties"](4, 500, torch.Generator().manual_seed(2)).to(torch.bfloat16).to(DEVICE)
    first, second = (kernels.select(pre_BS, kernels.group_maxima(pre_BS, "relu"), 9, "relu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_says_how_many_it_can_select(kernels):
    """The sizes that a program's registers hold, from both sides; the benchmark's three sizes are far inside. Half
    precision with five bits of exponent is not among the types whose order is known."""
    assert kernels.fits(32768, torch.bfloat16) and not kernels.fits(32769, torch.float32)
    assert kernels.fits(16384, torch.float64) and not kernels.fits(16385, torch.float64)
    assert not kernels.fits(1, torch.float16) and not kernels.selects(64, 1, torch.float16)
    for latents, k in ((24576, 32), (65536, 64), (131072, 64), (2**20, 512), (100, 100)):
        assert kernels.selects(latents, k, torch.float32)
    assert not kernels.selects(65536, 513, torch.float32)
    assert not kernels.selects(2**22, 1, torch.float32)
