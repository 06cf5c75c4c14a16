"""The process that gpu_step.py starts to do its sections in: one after another, until one fails.

Takes a line of JSON for each section, {"section", "sizes", "rates", "rounds", "steps", "seconds", "interpret"}, and
answers with a line for each row that it finds, {"table", "row"}, and a last one, {"done", "error"}. After an error that
may have cost it its device it ends.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # nothing of ours is installed on a bare image

import gpu_checks
import gpu_times
import torch
from gpu_arithmetic import Rates, Size
from gpu_card import Ask, Card, free, in_words

from dictlearn import ops

SECTIONS: dict[str, Callable[[Ask], None]] = {
    "ceilings": gpu_times.ceilings,
    "selection": gpu_checks.selection,
    "products": gpu_checks.products,
    "operations": gpu_checks.operations,
    "steps": gpu_checks.whole_step,
    "kernels": gpu_times.kernels,
    "whole step": gpu_times.against_peers,
    "uniform": gpu_times.against_peers_on_uniform_latents,
    "ways": gpu_times.ways_of_ours,
    "stages": gpu_times.stages_of_step,
    "graphs": gpu_times.graph_of_step,
    "precision": gpu_times.precision,
}


def versions() -> dict[str, str]:
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["card"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
        found["CUDA"] = str(torch.version.cuda)
    return found


def do(asked: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], None]) -> str | None:
    """One section; returns what went wrong, in a line."""
    device = torch.device("cpu" if asked["interpret"] else "cuda")
    ops.run_ahead(True if asked["interpret"] else None)  # as on a GPU
    ask = Ask(
        Card(device),
        tuple(Size(**size) for size in asked["sizes"]),
        Rates(**asked["rates"]),
        asked["rounds"],
        asked["steps"],
        time.monotonic() + asked["seconds"],
        lambda table, row: answer({"table": table, "row": row}),
    )
    try:
        torch.manual_seed(0)
        SECTIONS[asked["section"]](ask)
        ask.card.synchronise()
    except Exception as error:
        traceback.print_exc()
        return in_words(error)
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints goes to the error stream

    def answer(line: Mapping[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    answer({"versions": versions()})
    for line in sys.stdin:
        error = do(json.loads(line), answer)
        answer({"done": True, "error": error})
        if error is not None:
            return
        free()


if __name__ == "__main__":
    main()
