"""`dictlearn app`: start the app on a workspace.

The app runs in a process of its own, started by the path of its main file, so that this package knows neither the app
nor what draws it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from activation_store.errors import UserError
from dictlearn.workspace import Workspace

PACKAGE = "dictlearn_app"
WORKSPACE_VARIABLE = "DICTLEARN_WORKSPACE"
"""Names the workspace to the app's process."""


@dataclass(frozen=True)
class AppConfig:
    """Browse the workspace: stores, runs, features and circuits, in a browser on this machine."""

    port: int = 8501
    """Port to listen on."""
    host: str = "127.0.0.1"
    """Address to listen on. The app has no login: on any other address, whoever can reach it can read the workspace."""
    browser: bool = True
    """Whether to open a browser."""


def run_app(config: AppConfig, workspace: Workspace) -> None:
    """Serve until interrupted.

    Raises:
        UserError: no such workspace, Streamlit is not installed, the port is taken, or the server fails.
    """
    if not workspace.root.is_dir():
        raise UserError(
            f"There is no workspace {str(workspace.root)!r}; make one with `dictlearn demo` or `dictlearn harvest`, "
            "or name another with --workspace."
        )
    command = app_command(config)
    _refuse_taken_port(config)
    environment = os.environ | {WORKSPACE_VARIABLE: str(workspace.root)}
    process = subprocess.Popen(command, env=environment)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(process)
    if code not in (0, -signal.SIGINT, -signal.SIGTERM):
        raise UserError(f"The app's server ended with exit code {code}; its own message stands above.")


def _stop(number: int, frame: object) -> None:
    """Unwind on SIGTERM, so that the server does not outlive us."""
    raise SystemExit(128 + number)


def _end(process: subprocess.Popen[bytes], seconds: float = 10) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def app_command(config: AppConfig) -> list[str]:
    """The command that serves the app.

    Raises:
        UserError: Streamlit or the app itself is not installed.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise UserError(
            "The app needs Streamlit, which is not installed; install it with `pip install 'dictlearn-lab[app]'`."
        )
    options = {
        "server.port": str(config.port),
        "server.address": config.host,
        "server.headless": "false" if config.browser else "true",
        # Also in the app's own config.toml; here so that a user's global settings cannot bring them back.
        "server.showEmailPrompt": "false",
        "browser.gatherUsageStats": "false",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(find_app() / "main.py"), *flags]


def find_app() -> Path:
    """The folder of the app: where it is installed, or beside this package in a checkout.

    Raises:
        UserError: it is in neither place.
    """
    checkout = Path(__file__).resolve().parents[1]
    # Not by the folder alone: beside an installed package, "app" would be somebody else's.
    if (checkout / "pyproject.toml").is_file() and (checkout / "app" / "main.py").is_file():
        return checkout / "app"
    found = importlib.util.find_spec(PACKAGE)
    if found is not None and found.origin is not None and (Path(found.origin).parent / "main.py").is_file():
        return Path(found.origin).parent
    raise UserError("The app's files are not installed; install them with `pip install 'dictlearn-lab[app]'`.")


def _refuse_taken_port(config: AppConfig) -> None:
    """Streamlit would say so too, in a log line; here it is one sentence."""
    if not 0 < config.port < 65536:
        raise UserError(f"port is {config.port}; it must lie between 1 and 65535.")
    try:
        with socket.create_server((config.host, config.port), family=_family(config.host)):
            pass
    except OSError as error:
        raise UserError(
            f"Port {config.port} of {config.host} cannot be used ({error.strerror}); choose another with --port."
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
