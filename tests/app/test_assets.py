"""What the components are made of: nothing in them turns text into markup, and nothing is fetched from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[2] / "app" / "assets"
SCRIPTS = sorted(ASSETS.glob("*.js"))
STYLES = sorted(ASSETS.glob("*.css"))

MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|ContextualFragment|\beval\b")
ELSEWHERE = re.compile(r"https?://(?!www\.w3\.org/)|@import|\burl\(|\bfetch\(|XMLHttpRequest|import\s*\(")


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_no_script_makes_markup_out_of_text(file: Path) -> None:
    assert MARKUP.findall(file.read_text()) == []


@pytest.mark.parametrize("file", [*SCRIPTS, *STYLES], ids=lambda file: file.name)
def test_nothing_is_loaded_from_elsewhere(file: Path) -> None:
    assert ELSEWHERE.findall(file.read_text()) == []


def test_no_page_hands_text_to_markdown() -> None:
    """Streamlit sets labels, captions and markdown as markup; what may come from a file goes through components."""
    calls = re.compile(
        r"\bst\.(markdown|write|caption|title|header|subheader|error|warning|info|success|html|badge|metric)\("
    )
    app = ASSETS.parent
    found = {
        str(file.relative_to(app)): calls.findall(file.read_text())
        for file in app.rglob("*.py")
        if calls.search(file.read_text())
    }
    assert found == {"main.py": ["html"]}  # the style sheet, a constant


@pytest.mark.parametrize("file", STYLES, ids=lambda file: file.name)
def test_a_style_cannot_be_taken_for_a_file_name(file: Path) -> None:
    """Streamlit takes a one-line style with a slash or an asterisk in it for a path."""
    assert "\n" in file.read_text().strip()


def test_both_colour_schemes_are_spelt_out() -> None:
    import tomllib

    config = tomllib.loads((ASSETS.parent / ".streamlit" / "config.toml").read_text())
    assert config["theme"]["light"].keys() == config["theme"]["dark"].keys()
    assert config["browser"]["gatherUsageStats"] is False
    assert config["server"]["showEmailPrompt"] is False
