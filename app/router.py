"""Which page answers which address, and how a page moves to another address.

The browser asks for a run of the page at every click, with its address and with what its widgets hold. Where it asks
before it has drawn what the run before told it, both are older than what the reader has already asked for. So it is
remembered what that run had come to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import streamlit as st
from streamlit.navigation.page import Page
from streamlit.runtime.scriptrunner import get_script_run_ctx

from dictlearn_app import links

AnyLink = TypeVar("AnyLink", bound=links.Link)


def pages() -> dict[type[links.Link], Page]:
    """Every page by the kind of link that opens it, in the order of the navigation."""
    # Not at the top: pages import this module to say where their links go.
    from dictlearn_app.screens import circuit, compare, feature, features, home, runs, store

    return {
        links.HomeLink: st.Page(home.draw, title="Home", url_path=links.HomeLink.path, default=True),
        links.StoreLink: st.Page(store.draw, title="Store", url_path=links.StoreLink.path),
        links.RunsLink: st.Page(runs.draw, title="Runs", url_path=links.RunsLink.path),
        links.CompareLink: st.Page(compare.draw, title="Compare", url_path=links.CompareLink.path),
        links.FeaturesLink: st.Page(features.draw, title="Features", url_path=links.FeaturesLink.path),
        links.FeatureLink: st.Page(feature.draw, title="Feature", url_path=links.FeatureLink.path),
        links.CircuitLink: st.Page(circuit.draw, title="Circuit", url_path=links.CircuitLink.path),
    }


def run(draw: Callable[[], None]) -> None:
    """Draw the page for the address that the reader has asked for last."""
    _catch_up()
    st.session_state[_ENDED] = math.inf
    draw()
    st.session_state[_ENDED] = time.monotonic()


def asked(kind: type[AnyLink]) -> AnyLink:
    """What the address asks the page of this kind to show."""
    return links.from_query(kind, st.query_params)


def stay(link: links.Link, asked_then: Mapping[str, str]) -> None:
    """Rewrite the address of the open page. From a callback, the run that follows shows it.

    Only what ``link`` changes in ``asked_then``, the parameters that the page was drawn for, is changed: the reader may
    have followed a link since, and need not wait until the page is drawn anew.
    """
    _catch_up()
    before = parameters()
    after = links.changed(asked_then, links.query(link), before)
    st.session_state[_LEFT] = ([*_left(), before], after, _page())
    st.session_state[_ENDED] = math.inf
    st.query_params.from_dict(after)


def parameters() -> dict[str, str]:
    """Those of the address, as they are spelt."""
    return st.query_params.to_dict()


def may_be_behind() -> bool:
    """Before a run or in a callback: whether the browser may have asked before it drew what the run before told it."""
    return time.monotonic() - st.session_state.get(_ENDED, math.inf) < SECONDS_TO_DRAW


SECONDS_TO_DRAW = 1.0
"""How long a browser may take for it; on a quiet machine, a tenth of that."""

_ENDED = "router.ended"
"""When the last run came to its end; infinite from a callback on until the run for it does."""

_LEFT = "router.left"
"""The addresses that were left since the browser was last surely not behind, the one for which, and of which page."""


def _catch_up() -> None:
    """Where the browser asks with an address that it has been told to leave, go to the one it was told."""
    if _went_through_history():
        st.session_state.pop(_LEFT, None)
    if parameters() in _left():
        st.query_params.from_dict(st.session_state[_LEFT][1])


def _left() -> list[dict[str, str]]:
    """The addresses of this page that the browser may not know to be left."""
    left, _, page = st.session_state.get(_LEFT, ([], {}, ""))
    return left if page == _page() and may_be_behind() else []


def _page() -> str:
    run = get_script_run_ctx()
    return run.page_script_hash if run is not None else ""


def _went_through_history() -> bool:
    """Whether the reader went back or forward, or followed a link: then the browser's address is what is meant."""
    return bool(getattr(get_script_run_ctx(), "is_history_navigation", False))
