"""A workspace to look at, pages run headless, and the app served to a real browser."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

if importlib.util.find_spec("dictlearn_app") is None:
    # A checkout that was never installed: the folder under its import name, as main.py does it.
    specification = importlib.util.spec_from_file_location(
        "dictlearn_app", ROOT / "app" / "__init__.py", submodule_search_locations=[str(ROOT / "app")]
    )
    package = importlib.util.module_from_spec(specification)
    sys.modules["dictlearn_app"] = package
    specification.loader.exec_module(package)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores, four runs, two indexes and a graph; not to be changed."""
    from tests.app.tiny_workspace import make_workspace

    return make_workspace(tmp_path_factory.mktemp("app") / "workspace").root


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny workspace to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "workspace"))


class Screen:
    """One page run headless: what its components were given, by key, and its widgets."""

    def __init__(self, name: str, parameters: dict[str, str]) -> None:
        from streamlit.testing.v1 import AppTest

        self.test = AppTest.from_string(
            f"from dictlearn_app import router\nfrom dictlearn_app.screens import {name}\nrouter.run({name}.draw)",
            default_timeout=60,
        )
        for key, value in parameters.items():
            self.test.query_params[key] = value
        self.run()

    def run(self) -> None:
        self.test.run()
        assert not self.test.exception, [exception.message for exception in self.test.exception]

    @property
    def address(self) -> dict[str, str]:
        return {key: value[0] if isinstance(value, list) else value for key, value in self.test.query_params.items()}

    @property
    def payloads(self) -> dict[str, Any]:
        """Component key -> its data."""
        return {
            element.key: json.loads(element.proto.json)
            for element in elements(self.test.main)
            if element.type == "bidi_component"
        }

    def blocks(self, kind: str) -> list[dict[str, Any]]:
        """Every block of this kind on the page, also those within grids."""
        sheets = [payload["blocks"] for payload in self.payloads.values() if "blocks" in payload]
        return [block for sheet in sheets for block in flat(sheet) if block["kind"] == kind]

    @property
    def title(self) -> str:
        return self.blocks("heading")[0]["title"]

    @property
    def notices(self) -> list[str]:
        """The sentences that say what is wrong or missing, code between backticks."""
        return [
            "".join(f"`{part['code']}`" if "code" in part else part["text"] for part in block["parts"])
            for block in self.blocks("notice")
        ]

    @property
    def facts(self) -> dict[str, str]:
        return {item["label"]: item["value"] for block in self.blocks("facts") for item in block["items"]}

    def table(self, number: int = 0) -> list[list[str]]:
        """The texts of a table's rows."""
        return [[text_of(cell) for cell in row["cells"]] for row in self.blocks("table")[number]["rows"]]


def elements(block: Any) -> Iterator[Any]:
    for child in block.children.values():
        if hasattr(child, "children"):
            yield from elements(child)
        else:
            yield child


def flat(blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for block in blocks:
        if block["kind"] == "grid":
            for cell in block["cells"]:
                yield from flat(cell)
        else:
            yield block


def text_of(cell: Any) -> str:
    if not isinstance(cell, dict):
        return str(cell)
    if "tokens" in cell and "strip" not in cell:
        return " ".join(cell["tokens"])
    if "parts" in cell:
        return "".join(part.get("text", part.get("code", "")) for part in cell["parts"])
    return cell.get("text") or cell.get("code") or ""


@pytest.fixture
def screen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Screen]:
    """`screen("feature", index="sae", latent="5")`; `workspace=` names another than the tiny one."""

    def open_screen(name: str, workspace: Path = tiny, **parameters: str) -> Screen:
        monkeypatch.setenv("DICTLEARN_WORKSPACE", str(workspace))
        return Screen(name, parameters)

    return open_screen


# --- a server and a browser -------------------------------------------------------------------------------------------

BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def served(chromium: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app on the tiny workspace."""
    with serving(tiny, tmp_path_factory.mktemp("served")) as address:
        yield address


@contextmanager
def serving(workspace: Path, folder: Path) -> Iterator[str]:
    """Serve a workspace as `dictlearn app` does, with an empty home in ``folder``; gives the address."""
    from dictlearn.app_command import AppConfig, app_command

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        app_command(AppConfig(port=port, browser=False)),
        env=os.environ | {"DICTLEARN_WORKSPACE": str(workspace), "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=1):
                return
        except OSError:
            time.sleep(0.15)
    pytest.fail(f"the app did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def browser(chromium: Path) -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=15_000)  # a busy machine is no fault of a page
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(chromium), args=list(BROWSER_FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, served: str) -> Iterator[Any]:
    """A fresh tab; `tab.show("feature?index=sae")` opens a page.

    When a test is done, nothing has been asked of other hosts, no script has failed, and no hostile token has run.
    """
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    asked: list[str] = []
    broken: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.on("dialog", lambda dialog: broken.append(dialog.message))
    page.show = lambda address="", server=served: page.goto(f"{server}/{address}")
    page.set_default_timeout(30_000)
    yield page
    strangers = [url for url in asked if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))]
    pwned = page.evaluate("window.pwned")
    page.close()
    assert strangers == []
    assert broken == []
    assert pwned is None
