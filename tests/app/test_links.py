"""Addresses: what is written is read back, defaults stay out, and nothing that is pasted breaks a page."""

from __future__ import annotations

import math
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dictlearn_app import links

EXAMPLES = [
    links.HomeLink(),
    links.StoreLink(store="acts", row=70_000_000_000),
    links.RunsLink(runs="sae,transcoder-2", x="step"),
    links.CompareLink(store="acts", hooks="a.0–3.b → c + d:e", runs="a,b", sort="fvu", ascending=1, a="a", page=2),
    links.FeaturesLink(index="sae", search=" self &?=#", least=0.001, sort="density", ascending=1, page=3),
    links.FeatureLink(index="sae", latent=0, wrapped=1),
    links.CircuitLink(graph="g", node="feature/2/7/111"),
]


def reads_back(link: links.Link) -> links.Link:
    path, _, query = links.address(link).partition("?")
    assert path == (link.path or ".")
    return links.from_query(type(link), dict(parse_qsl(query)))


@pytest.mark.parametrize("link", EXAMPLES, ids=lambda link: type(link).__name__)
def test_an_address_reads_back_as_its_link(link: links.Link) -> None:
    assert reads_back(link) == link


def test_defaults_stay_out_of_the_address() -> None:
    assert links.address(links.FeaturesLink(index="sae")) == "features?index=sae"
    assert links.address(links.HomeLink()) == "."


def test_a_value_that_does_not_fit_becomes_the_default() -> None:
    asked = {"index": "sae", "latent": "abc", "wrapped": "", "nonsense": "1"}
    assert links.from_query(links.FeatureLink, asked) == links.FeatureLink(index="sae")
    assert links.from_query(links.FeaturesLink, {"least": "nan", "most": "inf"}) == links.FeaturesLink(most=math.inf)


@given(st.text(), st.text(), st.integers(-(10**12), 10**12), st.floats(0, 1))
def test_any_text_survives_the_address(search: str, index: str, page: int, least: float) -> None:
    link = links.FeaturesLink(index=index, search=search.encode(errors="ignore").decode(), page=page, least=least)
    assert reads_back(link) == link


def test_a_change_leaves_what_the_address_has_come_to_ask_for_since() -> None:
    asked = {"index": "sae", "page": "3"}
    wanted = links.query(links.FeaturesLink(index="sae", search="self", page=1))
    now = {"index": "sae", "page": "3", "sort": "density"}
    assert links.changed(asked, wanted, now) == {"index": "sae", "sort": "density", "search": "self"}


PARAMETERS = st.dictionaries(st.sampled_from("abcd"), st.text(max_size=2))


@given(PARAMETERS, PARAMETERS, PARAMETERS)
def test_a_change_of_nothing_is_none_and_of_what_is_asked_is_all(asked, wanted, now) -> None:
    assert links.changed(asked, wanted, asked) == wanted
    assert links.changed(asked, asked, now) == now
    both = links.changed(asked, wanted, now)
    for name in "abcd":
        assert both.get(name) == (wanted if asked.get(name) != wanted.get(name) else now).get(name)
