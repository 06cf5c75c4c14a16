"""Programs that run where the disk is small: a file system of a few MB of its own, which goes away with the process.

It is a tmpfs, mounted in a mount namespace of the child process alone (``unshare``), so that nothing is left behind on
the machine whatever happens. Root may do that, and on most systems everybody may; where it is forbidden the test is
skipped by name. The program finds the path in its first argument; ``BALLAST`` beside it is a file that takes space.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BALLAST = "ballast"


def run_on_a_small_disk(program: str, folder: Path, megabytes: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python code; in it ``sys.argv[1]`` is the folder on the small disk, and then come the other arguments."""
    reason = _why_not()
    if reason:
        pytest.skip(reason)
    script = f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && exec "$@"'
    command = ["unshare", *_namespaces(), "sh", "-c", script, str(folder), sys.executable, "-c", program, str(folder)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": "."},
    )


def _namespaces() -> list[str]:
    return ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]


@functools.cache
def _why_not() -> str | None:
    """Why no small disk can be had here, if so."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        return "a disk of a few MB needs Linux and unshare(1)"
    tried = subprocess.run(
        ["unshare", *_namespaces(), "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"], capture_output=True, text=True
    )
    return None if tried.returncode == 0 else f"no file system may be mounted here: {tried.stderr.strip()}"
