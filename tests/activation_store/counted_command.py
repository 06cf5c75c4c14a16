"""The command ``dictlearn``, with a line in a log for each forward pass of a harvest::

python -m tests.activation_store.counted_command LOG harvest --store ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from activation_store.harvest.capture import Capture

if __name__ == "__main__":
    log = Path(sys.argv.pop(1))
    run = Capture.run

    def counted(self: Capture, *arguments: Any) -> Any:
        with log.open("a") as lines:
            lines.write("pass\n")
        return run(self, *arguments)

    Capture.run = counted  # type: ignore[method-assign]
    runpy.run_module("dictlearn", run_name="__main__", alter_sys=True)
