"""How a file of assets/ becomes a component.

The .js and .css are read and passed as text: Streamlit looks for asset folders of installed packages only, so an
editable checkout would have none. Every script begins with dom.js, which is where text becomes nodes,
tokens.js and axes.js; every style begins with base.css.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def stylesheet(name: str) -> str:
    return (ASSETS / name).read_text()


@cache
def component(name: str) -> Callable[..., Any]:
    """The component drawn by assets/``name``.js; ``name``.css is optional."""
    style = ASSETS / f"{name}.css"
    return st.components.v2.component(
        f"dictlearn_{name}",
        html='<div class="root"></div>',
        css=stylesheet("base.css") + (style.read_text() if style.exists() else ""),
        js="".join((ASSETS / f"{part}.js").read_text() for part in ("dom", "tokens", "axes", name)),
    )


def mount(name: str, payload: dict[str, Any], key: str) -> None:
    """Draw a component. Its links change the browser's address, and the run that follows reads it."""
    component(name)(data=payload, key=key)
