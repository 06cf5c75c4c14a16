"""S3 servers for tests, each in a process of its own, and a network to them that can be cut.

`conftest` makes fixtures of these. A test that takes one is marked ``needs("s3")``: it is skipped where the packages
are missing, and fails there when ``DICTLEARN_REQUIRE`` insists.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from activation_store.testing import files_of
from tests.activation_store.cut_proxy import reserve_port
from tests.activation_store.s3_process import ACCESS_KEY, BUCKET, REGION, SECRET_KEY

PACKAGES = ("obstore", "moto", "flask", "flask_cors")


def skip_without_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[dev,s3]'")


class ObjectServer:
    """An S3 server with one bucket and one user: `tests.activation_store.s3_process`.

    Args:
        journal: a file in which it keeps what it holds, so that it can be killed and started again. Without: in memory.
        unconditional: it ignores the conditions of conditional writes.

    Attributes:
        port: on 127.0.0.1, the same after a restart.
    """

    def __init__(self, journal: Path | None = None, unconditional: bool = False):
        skip_without_packages()
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        program = Path(__file__).with_name("s3_process.py")
        self._command = [sys.executable, program, str(self.port)]
        self._command += ["--journal", journal] if journal else []
        self._command += ["--unconditional"] if unconditional else []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Start it (again), and wait until it answers."""
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=_environment_of_server()
        )
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self._log.seek(0)
            raise RuntimeError(f"the S3 server did not start:\n{self._log.read()[-2000:].decode()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        self.kill()
        self._reserved.close()
        self._log.close()

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def environment(self, port: int | None = None) -> dict[str, str]:
        """The variables with which a client finds it; ``port``: by way of a proxy."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, port: int | None = None) -> None:
        """Let this process, and those it starts, find the server there."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment(port).items():
            monkeypatch.setenv(name, value)


def new_url(name: str = "store") -> str:
    """A place in the bucket that nobody else uses."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/{name}"


def client(url: str, environment: Mapping[str, str] = os.environ) -> Any:
    """A bare obstore client of what is below ``url``, which repeats nothing: what a test looks with."""
    from obstore.store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return S3Store(
        bucket,
        prefix=prefix,
        endpoint=environment["AWS_ENDPOINT_URL"],
        access_key_id=environment["AWS_ACCESS_KEY_ID"],
        secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region=environment["AWS_REGION"],
        client_options={"allow_http": True, "timeout": "10s"},
        retry_config={"max_retries": 0},
    )


def objects_of(url: str, environment: Mapping[str, str] = os.environ) -> dict[str, bytes]:
    """Every object below a URL, by its key relative to it: what `activation_store.testing.files_of` is for a folder."""
    store = client(url, environment)
    keys = sorted(entry["path"] for page in store.list() for entry in page)
    return {key: bytes(store.get(key).bytes()) for key in keys}


def assert_same_objects(url: str, folder: Path) -> None:
    """The objects below a URL are the files of a folder; the error names those that differ."""
    found, wanted = objects_of(url), files_of(folder)
    differing = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    assert not differing, f"{url} differs from {folder} in {', '.join(differing)}"


def _environment_of_server() -> dict[str, str]:
    """Ours, without what would make moto's own libraries look for a server of somebody's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
