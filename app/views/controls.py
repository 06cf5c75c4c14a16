"""Streamlit widgets that show a part of the address and rewrite it: they hold no state of their own.

Streamlit keeps a state for each widget all the same, on both sides, and the browser sends all of its own with whatever
it asks for. Three things keep a quick reader on a slow machine from being answered with something else than was asked:

* a widget's value is also its default, which the browser has before any other;
* a callback changes the address as it is by then, not as it was when the page was drawn (`router.stay`);
* a widget that the page has just given another value may still be sent with the one before, which is nobody's wish.
"""

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
        index=options.index(value),
        key=key,
        on_change=_commit,
        args=(key, router.parameters(), change),
        width=width,
        format_func=lambda option: (written or {}).get(option, option),
    )


def several(
    label: str, options: Sequence[str], values: Sequence[str], change: Change, key: str, placeholder: str
) -> None:
    """Any of several names."""
    _show(key, list(values))
    st.multiselect(
        label,
        options,
        default=values,
        key=key,
        on_change=_commit,
        args=(key, router.parameters(), change),
        placeholder=placeholder,
        width=520,
    )


def words(label: str, value: str, change: Change, key: str, placeholder: str = "", width: int = 260) -> None:
    """A line of text, taken while it is typed."""
    _show(key, value)
    st.text_input(
        label,
        value,
        key=key,
        on_change=_commit,
        args=(key, router.parameters(), change),
        placeholder=placeholder,
        width=width,
        type="search",
    )


def whole(label: str, value: int, change: Change, key: str, least: int, most: int, width: int = 130) -> None:
    """A whole number within bounds."""
    value = min(max(value, least), most)
    _show(key, value)
    st.number_input(
        label,
        min_value=least,
        max_value=most,
        value=value,
        step=1,
        key=key,
        on_change=_commit,
        args=(key, router.parameters(), change),
        width=width,
    )


def switch(label: str, value: bool, change: Change, key: str, why: str | None = None) -> None:
    """Yes or no."""
    _show(key, value)
    st.toggle(label, value, key=key, on_change=_commit, args=(key, router.parameters(), change), help=why)


def share(label: str, value: float, change: Change, key: str) -> None:
    """A share between 0 and 1, shown and entered in per cent."""
    per_cent = min(max(value, 0.0), 1.0) * 100
    _show(key, per_cent)
    st.number_input(
        label,
        min_value=0.0,
        max_value=100.0,
        value=per_cent,
        step=0.1,
        format="%.4g",
        key=key,
        on_change=_commit,
        args=(key, router.parameters(), lambda per_cent: change(per_cent / 100)),
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
        text = st.session_state[key]
        try:
            if text != read():
                write(text)
                st.toast(f"{label} kept")
            st.session_state.pop(refused, None)
        except UserError as error:
            st.session_state[refused] = str(error)

    if key not in st.session_state:
        st.session_state.pop(refused, None)
    value = st.session_state[key] if refused in st.session_state else read()
    _show(key, value)
    st.text_input(label, value, key=key, on_change=keep, placeholder="what is this?", width=480)
    return st.session_state.get(refused)


def step(label: str, link: links.Link | None, key: str, shortcut: str, why: str) -> None:
    """A button that goes to another address of the same page; greyed out when there is none."""
    st.button(
        label,
        key=key,
        on_click=router.stay,
        args=(link, router.parameters()),
        disabled=link is None,
        shortcut=shortcut,
        help=why,
    )


def _show(key: str, value: Any) -> None:
    held = st.session_state.get(key, value)
    # Only when it differs: assigning an equal value would overwrite what is being typed at this moment.
    if held != value:
        st.session_state[key] = value
        st.session_state[_before(key)] = held
    else:
        st.session_state.pop(_before(key), None)


def _commit(key: str, asked_then: Mapping[str, str], change: Change) -> None:
    value = st.session_state[key]
    unchanged = _before(key) in st.session_state and st.session_state[_before(key)] == value
    if not (unchanged and router.may_be_behind()):
        router.stay(change(value), asked_then)


def _before(key: str) -> str:
    """Where it is kept what a widget had before the last run gave it another value."""
    return f"{key}.before"
