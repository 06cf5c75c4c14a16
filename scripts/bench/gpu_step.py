"""A k-sparse training step on a GPU: is it right, how long does it take, beside what it costs at least and its peers.

    python scripts/bench/gpu_step.py --out DIR                 # on a machine with a GPU, under eight minutes
    python scripts/bench/gpu_step.py --interpret --out DIR     # without one: everything runs once, small, untimed
    python scripts/bench/gpu_step.py --arithmetic              # only what a step costs at least

It needs Python, torch, triton, numpy and safetensors, and nothing of ours installed. sparsify and SAELens take part
where they can be imported: put their folders on PYTHONPATH. The end-to-end measurement is gpu_end_to_end.py.

What is done, the most important first, each section with a time of its own, all on one card:

- ceilings: a copy and a matrix product, for the bounds of gpu_arithmetic.py;
- operations, selection, products, steps: is everything right (gpu_checks.py);
- whole step: ours, ours with portable operations, and the peers, in turn, live and with a tenth of the latents dead, on
  rows whose latents follow a power law; uniform: on rows whose latents do not. All begin at the same weights and see
  the same rows; the FVU is of rows not trained on, after as many steps;
- ways: ours clipped, with stored gradients, in float32; stages and kernels: where the time goes; graphs: the step
  replayed from a CUDA graph; precision: what bfloat16 changes.

A section that fails prints its error, and the rest goes on in a new process. Everything found so far is in DIR after
each section: results.json, and as tables in results.md. The exit status is 1 if a check or a section failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu_arithmetic import SIZES, Rates, Size, table

WORKER = Path(__file__).with_name("gpu_step_worker.py")
SECONDS = 450
"""Of all sections together, so that all ends within eight minutes."""
GRACE = 15
"""Seconds that a section may be late before its process is ended."""
START = 20
"""Seconds that a process may take to begin, beside those of its section."""
NO_GPU = (
    "There is no GPU here, so nothing is measured. Run this on a machine with one, or with --interpret to see that all "
    "of it runs."
)
STEPS = {768: 20, 2304: 6, 4096: 3}
"""Steps in a round, by width: as many as last long beside a launch."""
TINY = (Size(12, 66, 2, 3),)
"""In the interpreter."""


class Section(NamedTuple):
    name: str
    sizes: tuple[Size, ...]
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.name}, {self.sizes[0].name}" if len(self.sizes) == 1 else self.name


Lane = list[Section]
"""Sections that one process does, one after another."""


def plan(sizes: tuple[Size, ...]) -> list[list[Lane]]:
    """Lanes that run side by side, and after them the next ones. Checks mostly wait for the compiler, on one core.

    What matters most comes first: a section for which no time is left is left out.
    """

    def each(name: str, *seconds: float) -> Lane:
        return [Section(name, (size,), limit) for size, limit in zip(sizes, seconds, strict=False)]

    return [
        [[Section("ceilings", sizes, 20)]],
        [
            [Section("operations", sizes, 60)],
            [Section("selection", sizes, 60), Section("products", sizes, 35)],
            each("steps", 60, 40, 50),
        ],
        [
            [
                *each("whole step", 60, 40, 60),  # in the first the peers are imported
                *each("stages", 12, 12, 15),
                *each("ways", 15, 20, 25),
                *each("kernels", 20, 20, 25),
                *each("graphs", 10, 10, 10),
                *each("precision", 15, 25, 40),
                *each("uniform", 12, 15, 20),
            ]
        ],
    ]


def names_of(phases: list[list[Lane]]) -> list[str]:
    return list(dict.fromkeys(section.name for lanes in phases for lane in lanes for section in lane))


# --- the process that does the sections -------------------------------------------------------------------------------


class Worker:
    """A process for sections; it is of no use any more once it has answered with an error."""

    def __init__(self, interpret: bool) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.works = True

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def versions(self) -> dict[str, str] | None:
        """What it runs; None if it could not begin."""
        answer = self._answer(8 * START)
        return answer["versions"] if answer and "versions" in answer else None

    def do(self, question: Mapping[str, Any], found: Callable[[str, dict[str, Any]], None]) -> str | None:
        """Have a section done; ``found`` takes the table of each row and the row. Returns what went wrong."""
        assert self._process.stdin is not None
        until = time.monotonic() + question["seconds"] + GRACE
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            self.works = False
            return "its process had ended"
        while True:
            answer = self._answer(until - time.monotonic())
            if answer is None:
                self.works = False
                status = self._process.poll()
                return "it took too long and was ended" if status is None else f"its process ended, status {status}"
            if answer.get("done"):
                self.works = answer["error"] is None
                return answer["error"]
            found(answer["table"], answer["row"])

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None when the process has ended, or none came in time."""
        try:
            line = self._lines.get(timeout=max(0.01, seconds))
        except queue.Empty:
            return None
        if line is None:
            self._process.wait()
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(0.1 if not self.works else 10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # stuck in the driver: not worth the rest of the run
                self._process.wait(10)


# --- what was found ---------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """All that is written.

    Attributes:
        versions: of what ran, and the card.
        tables: rows by table.
        errors: what went wrong, by section.
        seconds: that each section took.
        lock: of whoever writes.
    """

    versions: dict[str, str]
    rates: Rates = field(default_factory=Rates)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, table: str, row: dict[str, Any]) -> None:
        with self.lock:
            self.tables[table].append(row)

    def take_ceilings(self) -> None:
        """From now on bounds are computed with the rates of this card, where they were measured."""
        rows = {column: row[column] for row in self.tables["ceilings"][:2] for column in row if row[column] is not None}
        assumed = Rates()
        self.rates = Rates(
            1e12 * rows["TFLOP/s"] if "TFLOP/s" in rows else assumed.flops,
            1e12 * rows["TB/s"] if "TB/s" in rows else assumed.bytes,
        )

    def failed(self) -> list[dict[str, Any]]:
        return [row for rows in self.tables.values() for row in rows if row.get("passed") is False]

    def write(self, folder: Path, sizes: tuple[Size, ...]) -> None:
        said = {name: value for name, value in vars(self).items() if name != "lock"} | {"rates": asdict(self.rates)}
        (folder / "results.json").write_text(json.dumps(said, indent=1))
        (folder / "results.md").write_text(self.markdown(sizes))

    def markdown(self, sizes: tuple[Size, ...]) -> str:
        parts = [
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            arithmetic(sizes, self.rates),
        ]
        for name in ("ceilings", "checks", "steps", "stages", "kernels", "graphs", "precision", "whole step"):
            if rows := self.tables.get(name):
                parts.append(f"## {name}\n\n" + markdown(checks_by_kind(rows) if name == "checks" else rows))
        if failed := self.failed():
            parts.append(f"## {len(failed)} checks failed\n\n" + "\n\n".join(markdown([row]) for row in failed[:20]))
        if self.errors:
            parts.append(
                "## sections with errors\n\n" + markdown([{"section": s, "error": e} for s, e in self.errors.items()])
            )
        return "\n\n".join(parts) + "\n"


def checks_by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many of each kind passed, and the largest error."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["what"]].append(row)
    return [
        {
            "what": what,
            "checks": len(of),
            "passed": sum(row["passed"] for row in of),
            "largest error": max((row["error"] for row in of if isinstance(row["error"], float)), default=None),
            "limit": max(row["limit"] for row in of),
        }
        for what, of in kinds.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row[column]) if column in row else "-" for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "/")


def arithmetic(sizes: tuple[Size, ...], rates: Rates) -> str:
    """What a step costs at least, with a column for each size."""
    columns = table(sizes, rates)
    rows = [
        {"a step": name, **{str(column["size"]): column[name] for column in columns}} for name in list(columns[0])[1:]
    ]
    at = f"{rates.flops / 1e12:,.0f} TFLOP/s and {rates.bytes / 1e12:.2f} TB/s"
    return f"A batch of {sizes[0].batch:,} rows, at {at}:\n\n{markdown(rows)}"


# --- the command ------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    parser.add_argument("--interpret", action="store_true", help="on the CPU, in Triton's interpreter, untimed")
    parser.add_argument("--arithmetic", action="store_true", help="only what a step costs at least")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="any number of times")
    parser.add_argument("--width", type=int, action="append", default=[], help="of the sizes 768, 2304, 4096")
    parser.add_argument("--rounds", type=int, default=5, help="in which implementations take turns")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all sections together")
    options = parser.parse_args()
    names = names_of(plan(SIZES))
    for name in options.only:
        if name not in names:
            parser.error(f"there is no section {name!r}; choose from {', '.join(names)}")
    if not set(options.width) <= {size.d for size in SIZES}:
        parser.error(f"there is no such width; choose from {', '.join(str(size.d) for size in SIZES)}")
    if options.out is None and not options.arithmetic:
        parser.error("--out is missing: the folder for results.json and results.md")
    return options


def main() -> None:
    options = parse()
    sizes = tuple(size for size in SIZES if not options.width or size.d in options.width)
    if options.arithmetic:
        print(arithmetic(sizes, Rates()))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = TINY if options.interpret else sizes
    results = run(options, sizes)
    text = results.markdown(sizes)
    results.write(options.out, sizes)
    print(text)
    failed = len(results.failed())
    print(f"{failed} checks failed, {len(results.errors)} sections had errors; all of it is in {options.out}.")
    if failed or results.errors:
        sys.exit(1)


def run(options: argparse.Namespace, sizes: tuple[Size, ...]) -> Results:
    began = time.monotonic()
    worker = Worker(options.interpret)
    versions = worker.versions()
    if versions is None or ("card" not in versions and not options.interpret):
        worker.close()
        sys.exit("The process that measures could not begin; see above." if versions is None else NO_GPU)
    results, spare = Results(versions), [worker]
    for lanes in plan(sizes):
        wanted = [[section for section in lane if section.name in (options.only or [section.name])] for lane in lanes]
        run_one = partial(run_lane, spare=spare, results=results, options=options, sizes=sizes, began=began)
        with ThreadPoolExecutor(len(wanted)) as pool:
            running = {pool.submit(run_one, lane): lane for lane in wanted if lane}
        for ended, lane in running.items():
            if (error := ended.exception()) is not None:  # a line cut in half by a dying process, say: the rest goes on
                results.errors[f"after {lane[0].title}"] = repr(error)
    for worker in spare:
        worker.close()
    return results


def run_lane(
    lane: Lane,
    spare: list[Worker],
    results: Results,
    options: argparse.Namespace,
    sizes: tuple[Size, ...],
    began: float,
) -> None:
    """One section after another; after one that failed in a new process.

    Args:
        spare: processes that have begun and have nothing to do.
    """
    worker: Worker | None = None
    for section in lane:
        if worker is None and spare:
            worker = spare.pop()
        elif worker is None:
            worker = Worker(options.interpret)
            worker.versions()
        left = options.seconds - (time.monotonic() - began)
        if left < START:
            results.errors[section.title] = "left out: no time was left"
            continue
        started = time.monotonic()
        question = {
            "section": section.name,
            "sizes": [asdict(size) for size in section.sizes],
            "rates": asdict(results.rates),
            "rounds": 1 if options.interpret else options.rounds,
            "steps": 1 if options.interpret else STEPS[section.sizes[0].d],
            "seconds": left if options.interpret else min(section.seconds, left),
            "interpret": options.interpret,
        }
        error = worker.do(question, results.add)
        with results.lock:
            if error is not None:
                results.errors[section.title] = error
            if section.name == "ceilings":
                results.take_ceilings()
            results.seconds[section.title] = time.monotonic() - started
            results.write(options.out, sizes)
        said = f": {error}" if error else ""
        print(f"{time.monotonic() - began:5.0f} s  {section.title}{said}", file=sys.stderr, flush=True)
        if error is not None:
            worker.close()
            worker = None
    if worker is not None:
        spare.append(worker)


if __name__ == "__main__":
    main()
