"""Streamlit widgets that show a part of the address and rewrite it: they hold no state of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import streamlit as st

from activation_store.errors import UserError
from dictlearn_app import links, router

Change = Callable[[Any], links.Link]
"""From a widget's new value to the address that asks for it."""


def choice(
    label: str,
    options: Sequence[str],
    value: str,
    change: Change,
    key: str,
    width: int = 220,
    written: Mapping[str, str] | None = None,
) -> None:
    """One of several names; ``written`` says how they read where that is not the name itself."""
    _show(key, value)
    st.selectbox(
        label,
        options,
        key=key,
        on_change=_commit,
        args=(key, change),
        width=width,
        format_func=lambda option: (written or {}).get(option, option),
    )


def several(
    label: str, options: Sequence[str], values: Sequence[str], change: Change, key: str, placeholder: str
) -> None:
    """Any of several names."""
    _show(key, list(values))
    st.multiselect(label, options, key=key, on_change=_commit, args=(key, change), placeholder=placeholder, width=520)


def words(label: str, value: str, change: Change, key: str, placeholder: str = "", width: int = 260) -> None:
    """A line of text, taken while it is typed."""
    _show(key, value)
    st.text_input(
        label, key=key, on_change=_commit, args=(key, change), placeholder=placeholder, width=width, type="search"
    )


def whole(label: str, value: int, change: Change, key: str, least: int, most: int, width: int = 130) -> None:
    """A whole number within bounds."""
    _show(key, min(max(value, least), most))
    st.number_input(
        label, min_value=least, max_value=most, step=1, key=key, on_change=_commit, args=(key, change), width=width
    )


def switch(label: str, value: bool, change: Change, key: str, why: str | None = None) -> None:
    """Yes or no."""
    _show(key, value)
    st.toggle(label, key=key, on_change=_commit, args=(key, change), help=why)


def share(label: str, value: float, change: Change, key: str) -> None:
    """A share between 0 and 1, shown and entered in per cent."""
    _show(key, value * 100)
    st.number_input(
        label,
        min_value=0.0,
        max_value=100.0,
        step=0.1,
        format="%.4g",
        key=key,
        on_change=_commit,
        args=(key, lambda per_cent: change(per_cent / 100)),
        width=140,
    )


def note(label: str, read: Callable[[], str], write: Callable[[str], None], key: str) -> str | None:
    """A line that a person writes, saved when the field is left. ``key`` must name what it is about.

    The page says once a text is kept: until then, closing it may lose what was typed a moment ago. A text that
    ``write`` refuses stays in the field.

    Returns:
        Why the text in the field could not be kept; None when it was.
    """
    refused = f"{key}.refused"

    def keep() -> None:
        try:
            write(st.session_state[key])
        except UserError as error:
            st.session_state[refused] = str(error)
        else:
            st.session_state.pop(refused, None)
            st.toast(f"{label} kept")

    if key not in st.session_state:
        st.session_state.pop(refused, None)
    if refused not in st.session_state:
        _show(key, read())
    st.text_input(label, key=key, on_change=keep, placeholder="what is this?", width=480)
    return st.session_state.get(refused)


def step(label: str, link: links.Link | None, key: str, shortcut: str, why: str) -> None:
    """A button that goes to another address of the same page; greyed out when there is none."""
    st.button(
        label,
        key=key,
        on_click=router.stay,
        args=(link,),
        disabled=link is None,
        shortcut=shortcut,
        help=why,
    )


def _show(key: str, value: Any) -> None:
    # Only when it differs: assigning an equal value would overwrite what is being typed at this moment.
    if st.session_state.get(key) != value:
        st.session_state[key] = value


def _commit(key: str, change: Change) -> None:
    router.stay(change(st.session_state[key]))
