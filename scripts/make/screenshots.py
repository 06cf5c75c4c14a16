"""Pictures of every page of the app on one workspace, light and dark, for the documentation.

    python scripts/make/screenshots.py workspace --latent 123

Needs a Chromium and the playwright package. Pictures are reduced to 256 colours: 40 to 150 kB each.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from dictlearn.app_command import WORKSPACE_VARIABLE, AppConfig, app_command

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = {
    "home": "table, .command",
    "store": ".t, .command",
    "runs": ".panels, .command",
    "compare": ".histogram, .command",
    "features": "table, .command",
    "feature": ".strip, .command",
    "circuit": ".stage, .command",
}
"""What is there when a page has been drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    parser.add_argument("--store", default="", help="store to show; the first when not given")
    parser.add_argument("--sweep", default="", help="sweep to show the runs of; all runs when not given")
    parser.add_argument("--index", default="", help="index to show; the first when not given")
    parser.add_argument("--latent", default="", help="latent to show; the first of the table when not given")
    parser.add_argument("--graph", default="", help="circuit to show; the first when not given")
    parser.add_argument("--node", default="", help="node of the circuit to pin; none when not given")
    parser.add_argument(
        "--pages", nargs="+", default=list(READY), choices=list(READY), help="pages to show; all of them"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1400, 900), help="of the window, in pixels")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    asked = {
        "home": {},
        "store": {"store": arguments.store},
        "runs": {"sweep": arguments.sweep},
        "compare": {"store": arguments.store},
        "features": {"index": arguments.index},
        "feature": {"index": arguments.index, "latent": arguments.latent},
        "circuit": {"graph": arguments.graph, "node": arguments.node},
    }
    width, height = arguments.size
    with served(arguments.workspace) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(CHROMIUM_FLAGS))
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            for name in arguments.pages:
                picture = show(page, f"{server}/{'' if name == 'home' else name}", asked[name], READY[name])
                file = arguments.to / f"{name}-{scheme}.png"
                picture.save(file, optimize=True)
                print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
            page.close()
        browser.close()


def show(page: Page, address: str, parameters: dict[str, str], ready: str) -> Image.Image:
    """Open an address, wait until it is drawn and still, and take a picture of few colours."""
    query = urllib.parse.urlencode({name: value for name, value in parameters.items() if value})
    page.goto(f"{address}?{query}" if query else address)
    page.locator(ready).first.wait_for(timeout=60_000)
    page.locator("[data-test-script-state=notRunning]").wait_for(timeout=60_000)
    page.wait_for_timeout(700)
    whole = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return whole.quantize(colors=256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


@contextmanager
def served(workspace: Path) -> Iterator[str]:
    """The app on a workspace, in a home of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            app_command(AppConfig(port=port, browser=False)),
            env=os.environ | {WORKSPACE_VARIABLE: str(workspace), "HOME": home},
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/_stcore/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until something answers there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("The app did not start; run `dictlearn app` to see why.")


def chromium() -> str:
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        raise SystemExit("There is no Chromium on this machine; on Debian, `apt install chromium`.")
    return found


if __name__ == "__main__":
    main()
