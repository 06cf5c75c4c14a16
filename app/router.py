"""Which page answers which address, and how a page moves to another address."""

from __future__ import annotations

from typing import TypeVar

import streamlit as st
from streamlit.navigation.page import Page

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


def asked(kind: type[AnyLink]) -> AnyLink:
    """What the address asks the page of this kind to show."""
    return links.from_query(kind, st.query_params)


def stay(link: links.Link) -> None:
    """Rewrite the address of the page that is open. From a callback, the run that follows shows it."""
    st.query_params.from_dict(links.query(link))
