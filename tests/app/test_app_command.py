"""`dictlearn app`: what it refuses, and the command it runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from activation_store.errors import UserError
from dictlearn import app_command
from dictlearn.app_command import AppConfig, run_app
from dictlearn.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def test_a_missing_workspace_is_refused_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no workspace '.*nowhere'; make one with `dictlearn demo`"):
        run_app(AppConfig(), Workspace(tmp_path / "nowhere"))


def test_a_taken_port_is_refused_by_number(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"Port {port} of .* cannot be used .* choose another with --port"):
            run_app(AppConfig(port=port), Workspace(tmp_path))


@pytest.mark.parametrize("port", [-1, 0, 70_000])
def test_what_is_no_port_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(UserError, match=f"port is {port}; it must lie between 1 and 65535"):
        run_app(AppConfig(port=port), Workspace(tmp_path))


def test_without_streamlit_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dictlearn-lab\[app\]'"):
        run_app(AppConfig(), Workspace(tmp_path))


def test_the_server_listens_here_alone_and_reports_nothing() -> None:
    command = app_command.app_command(AppConfig(port=1234, browser=False))
    assert Path(command[4]).name == "main.py" and Path(command[4]).is_file()
    assert {"--server.address=127.0.0.1", "--server.port=1234", "--server.headless=true"} <= set(command)
    assert {"--browser.gatherUsageStats=false", "--server.showEmailPrompt=false"} <= set(command)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dictlearn.cli", "app", "--no-browser", "--port", str(port), "--workspace", "."]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    # A test run started in the background ignores SIGINT, and what it starts would too.
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, preexec_fn=heeding)
    assert eventually(lambda: listens(port))
    process.send_signal(number)
    assert process.wait(timeout=20) in (0, 130, 128 + number)
    assert eventually(lambda: not listens(port))


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def eventually(claim: Callable[[], bool], seconds: float = 40) -> bool:
    until = time.monotonic() + seconds
    while not claim() and time.monotonic() < until:
        time.sleep(0.1)
    return claim()


def test_the_app_needs_no_torch() -> None:
    """Pages only read: the first one must not wait for a library that none of them uses."""
    code = (
        "import sys\nsys.path.insert(0, 'tests/app')\nimport conftest\n"
        "from dictlearn_app import router\nrouter.pages()\n"
        "print(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip().endswith("[]"), ran.stdout + ran.stderr
