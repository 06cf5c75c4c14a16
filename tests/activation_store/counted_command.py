"""The command ``dictlearn``, with a line in a log for each forward pass of a harvest::

python -m tests.activation_store.counted_command LOG harvest --store ...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from activation_store.harvest.capture import Capture


def counted(run: Callable[..., Any], log: Path) -> Callable[..., Any]:
    """`Capture.run` that writes a line before each pass."""

    def counting(self: Capture, *arguments: Any) -> Any:
        with log.open("a") as lines:
            lines.write("pass\n")
        return run(self, *arguments)

    return counting


if __name__ == "__main__":
    Capture.run = counted(Capture.run, Path(sys.argv.pop(1)))  # type: ignore[method-assign]
    runpy.run_module("dictlearn", run_name="__main__", alter_sys=True)
