"""The app's entry point: `streamlit run main.py -- WORKSPACE`, which is what `dictlearn app` starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import streamlit as st

PACKAGE = "dictlearn_app"

if PACKAGE not in sys.modules:
    # This very folder, under its import name, whether it was installed or is run from a checkout.
    folder = Path(__file__).resolve().parent
    specification = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert specification is not None and specification.loader is not None
    package = importlib.util.module_from_spec(specification)
    sys.modules[PACKAGE] = package
    specification.loader.exec_module(package)

from dictlearn_app import router  # noqa: E402
from dictlearn_app.views.component import ASSETS, stylesheet  # noqa: E402

st.set_page_config(page_title="dictlearn", layout="wide", page_icon=str(ASSETS / "icon.png"))
st.html(f"<style>{stylesheet('page.css')}</style>")
page = st.navigation(list(router.pages().values()), position="top")
router.run(page.run)
