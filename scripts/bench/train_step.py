"""A training step of a TopK autoencoder with AuxK: ours beside SAELens', dictionary_learning's and sparsify's.

    python -m venv peer-saelens; peer-saelens/bin/pip install torch==2.13.0 sae-lens==6.54.12
    python -m venv peer-dl; peer-dl/bin/pip install torch==2.13.0 dictionary-learning==0.1.0
    peer-dl/bin/pip uninstall torchvision    # which comes along and does not fit the CPU build of torch
    python -m venv peer-sparsify; peer-sparsify/bin/pip install torch==2.13.0 eai-sparsify==1.3.3
    python scripts/bench/train_step.py --rounds 7 --peer sae-lens=peer-saelens/bin/python \
        --peer dictionary-learning=peer-dl/bin/python --peer sparsify=peer-sparsify/bin/python

    python scripts/bench/train_step.py --stages     # where the time of our step goes
    python scripts/bench/train_step.py --loader     # from a store on disk, beside rows in memory

    # other kinds of ours beside TopK, any number of them
    python scripts/bench/train_step.py --kind '{"kind": "icfl", "rounds": 8, "width": 4}' \
        --d-in 256 --d-sae 2048 --k 32 --batch 2048 --threads 1

The peers do not fit into one environment, so each implementation is a process of its own (train_step_worker.py, run by
that environment's python), and takes its turn while the others sleep: in every round each takes the same few steps on
the same rows, in an order drawn anew. Rows are synthetic: low rank, plus a sparse dictionary whose atoms are used by a
power law, plus noise.

- "live": AuxK is on, but no latent is dead. With a dead share, so many latents are declared dead before every step, so
  that AuxK has work to do; they are held by the counters that each implementation keeps.
- encoder GEMM: the bare product of a batch with the encoder, into memory that is there: no TopK step can be shorter.
- ours, dense: our step through the reference operations, which is plain autograd over dense codes.
- FVU: of rows that were not trained on, after all the steps: nobody is fast by learning nothing.
- peak: growth of the resident set during two steps, over what weights, moments and rows take.

Seconds are medians over the rounds; ratios are medians of the rounds' ratios. CPU-seconds are those of a process, all
threads together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("train_step_worker.py")
OURS, DENSE, GEMM = "ours", "ours, dense", "encoder GEMM"
PEERS = {
    "sae-lens": {"SAELens": "sae-lens", "SAELens, sparse activations, no rescaling": "sae-lens-sparse"},
    "dictionary-learning": {"dictionary_learning": "dictionary-learning"},
    "sparsify": {"sparsify, Adam": "sparsify"},
}
HELD_OUT_ROWS = 4096


# --- the rows -------------------------------------------------------------------------------------------------------


def make_rows(path: Path, rows: int, d: int, seed: int = 0, rank: int = 24, atoms: int = 2048) -> None:
    """A float32 .npy file of unit mean square: rank ``rank``, plus about 20 of ``atoms`` atoms a row, plus noise."""
    rng = np.random.default_rng(seed)
    basis = (
        rng.standard_normal((rank, d), dtype=np.float32) / np.sqrt(np.arange(1, rank + 1, dtype=np.float32))[:, None]
    )
    directions = rng.standard_normal((atoms, d), dtype=np.float32)
    frequency = 1 / np.arange(1, atoms + 1, dtype=np.float32)
    frequency = np.minimum(0.5, 20 * frequency / frequency.sum())
    made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, d))
    for first in range(0, rows, 8192):
        n = min(8192, rows - first)
        used = rng.random((n, atoms), dtype=np.float32) < frequency
        codes = used * rng.standard_exponential((n, atoms), dtype=np.float32)
        block = rng.standard_normal((n, rank), dtype=np.float32) @ basis + 0.5 * codes @ directions
        made[first : first + n] = block + 0.1 * rng.standard_normal((n, d), dtype=np.float32)
    scale = np.sqrt(np.mean(np.square(made[:8192], dtype=np.float64)))
    made /= np.float32(scale)
    made.flush()


def make_store(path: Path, rows: np.ndarray, dtype: str) -> None:
    """A store of one hook with these rows."""
    from activation_store.bfloat16 import from_float32
    from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
    from activation_store.writer import StoreWriter

    context = 128
    documents = [DocumentRows(str(i), "train", i * context, context) for i in range(len(rows) // context)]
    plan = StorePlan(len(documents) * context, documents)
    hook = HookSpec("hook", rows.shape[1:], dtype)
    with StoreWriter(path, plan, [hook], Geometry(), {}) as writer:
        for i in range(len(documents)):
            values = np.array(rows[i * context : (i + 1) * context])
            about = np.full(context, i)
            stored = from_float32(values) if dtype == "bfloat16" else values
            writer.append({hook.name: stored}, about, np.arange(context), about)
        writer.finish()


# --- the processes --------------------------------------------------------------------------------------------------


class Worker:
    """One implementation in a process of its own; it answers one question at a time."""

    def __init__(self, python: str, settings: dict[str, Any]) -> None:
        threads = str(settings["threads"])
        self._process = subprocess.Popen(
            [python, str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "KINETO_LOG_LEVEL": "99"},
        )
        self.name = settings["implementation"]

    def ready(self) -> dict[str, str]:
        """Wait until it has set itself up; returns the versions it runs."""
        return self._answer()

    def ask(self, question: str, **details: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"question": question, **details}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.name!r} ended with status {self._process.wait()}; see above.")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def started(pythons: dict[str, tuple[str, dict[str, Any]]]) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
    """The workers by row, all of them ready, and the versions they run."""
    with ExitStack() as stack:
        workers = {}
        for row, (python, settings) in pythons.items():
            workers[row] = Worker(python, settings)
            stack.callback(workers[row].close)
        yield workers, {row: worker.ready() for row, worker in workers.items()}


# --- rounds ---------------------------------------------------------------------------------------------------------


def measure(workers: dict[str, Worker], dead_shares: list[float], rounds: int, steps: int) -> list[dict[str, Any]]:
    """One record for each row, dead share and round: seconds, CPU-seconds and losses of ``steps`` steps."""
    order = random.Random(0)
    records, first = [], 0
    began = time.perf_counter()
    for number in range(-1, rounds):  # the first round warms up
        print(f"round {number + 1} of {rounds}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        for share in dead_shares:
            for row in order.sample(list(workers), len(workers)):
                took = workers[row].ask("steps", first=first, steps=steps, dead_share=share)
                records.append({"row": row, "dead_share": share, "round": number, **took})
            first += steps
    return records


def peaks(workers: dict[str, Worker], dead_shares: list[float]) -> dict[tuple[str, float], int]:
    """Bytes by row and dead share, measured before anything else so that nothing freed is still held."""
    return {
        (row, share): worker.ask("peak", first=0, steps=2, dead_share=share)
        for row, worker in workers.items()
        for share in dead_shares
    }


# --- tables ---------------------------------------------------------------------------------------------------------


class Measured:
    """What the rounds gave, for one dead share, by row."""

    def __init__(self, records: list[dict[str, Any]], dead_share: float, steps: int, batch: int) -> None:
        self._records = [r for r in records if r["dead_share"] == dead_share and r["round"] >= 0]
        self._steps, self._batch = steps, batch

    def seconds(self, row: str, clock: str = "wall") -> list[float]:
        """Of a step, in each round."""
        return [record[clock] / self._steps for record in self._records if record["row"] == row]

    def times(self, row: str, other: str, clock: str) -> float:
        """How many times as long as ``other`` a row takes: the median of the rounds' ratios."""
        return ratio(self.seconds(row, clock), self.seconds(other, clock))

    def speeds(self, row: str) -> tuple[float, float]:
        """Rows a second: median and best."""
        wall = self.seconds(row)
        return self._batch / median(wall), self._batch / min(wall)


def ratio(of: list[float], to: list[float]) -> float:
    return median(a / b for a, b in zip(of, to, strict=True))


def show(header: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |\n" + "| --- " * len(header) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print(flush=True)


def show_step(
    measured: Measured, live: Measured, rows: list[str], fvu: dict[str, float | None], peak: dict[str, int]
) -> None:
    """The table of one dead share; ``live`` is where nothing is dead."""
    header = ["implementation", "s/step", "best", "CPU-s/step", "tok/s", "best", "x ours (CPU)", "x ours (wall)"]
    header += ["x encoder GEMM (CPU)", "(wall)", "x its live step (CPU)", "peak MiB", "FVU after"]
    lines = []
    for row in rows:
        wall = measured.seconds(row)
        line = [row, f"{median(wall):.3f}", f"{min(wall):.3f}", f"{median(measured.seconds(row, 'cpu')):.3f}"]
        line += [f"{speed:,.0f}" for speed in measured.speeds(row)]
        line += [f"{measured.times(row, other, clock):.2f}" for other in (OURS, GEMM) for clock in ("cpu", "wall")]
        line.append(f"{ratio(measured.seconds(row, 'cpu'), live.seconds(row, 'cpu')):.2f}")
        line.append(f"{peak[row] / 2**20:,.0f}")
        line.append("-" if fvu[row] is None else f"{fvu[row]:.3f}")
        lines.append(line)
    show(header, lines)


SMALL_STAGE = 0.01
"""Share of the step under which a stage is counted with the others of its size."""


def show_stages(stages: dict[float, list[dict[str, float]]]) -> None:
    """Medians over the steps of each stage, in milliseconds, by dead share."""
    columns: list[dict[str, float]] = []
    for steps in stages.values():
        names = {name for step in steps for name in step}
        columns.append({name: median(step.get(name, 0.0) for step in steps) for name in names})
    wholes = [sum(column.values()) for column in columns]
    largest = {
        name: max(column.get(name, 0.0) / whole for column, whole in zip(columns, wholes, strict=True))
        for name in {name for column in columns for name in column}
    }
    shown = sorted((name for name in largest if largest[name] >= SMALL_STAGE), key=lambda name: -largest[name])
    header = ["stage"] + [f"{title(share)}, {unit}" for share in stages for unit in ("ms", "share")]
    lines = [[name, *_stage_cells([column.get(name, 0.0) for column in columns], wholes)] for name in shown]
    rest = [whole - sum(column.get(name, 0.0) for name in shown) for column, whole in zip(columns, wholes, strict=True)]
    lines += [["the rest", *_stage_cells(rest, wholes)], ["step", *_stage_cells(wholes, wholes)]]
    show(header, lines)


def _stage_cells(seconds: list[float], wholes: list[float]) -> list[str]:
    return [cell for s, whole in zip(seconds, wholes, strict=True) for cell in (f"{1e3 * s:.1f}", f"{s / whole:.1%}")]


def show_loader(measured: Measured, rows: list[str]) -> None:
    header = ["rows from", "s/step", "best", "CPU-s/step", "tok/s", "best", "speed / memory (wall)", "(CPU)"]
    lines = []
    for row in rows:
        wall = measured.seconds(row)
        line = [row, f"{median(wall):.3f}", f"{min(wall):.3f}", f"{median(measured.seconds(row, 'cpu')):.3f}"]
        line += [f"{speed:,.0f}" for speed in measured.speeds(row)]
        line += [f"{1 / measured.times(row, rows[0], clock):.3f}" for clock in ("wall", "cpu")]
        lines.append(line)
    show(header, lines)


def show_kinds(measured: Measured, rows: list[str], fvu: dict[str, float | None]) -> None:
    header = ["kind", "s/step", "best", "CPU-s/step", "best", "x TopK (CPU)", "(wall)", "FVU after"]
    lines = []
    for row in rows:
        line = [row]
        for clock in ("wall", "cpu"):
            seconds = measured.seconds(row, clock)
            line += [f"{median(seconds):.4f}", f"{min(seconds):.4f}"]
        line += [f"{measured.times(row, rows[0], clock):.2f}" for clock in ("cpu", "wall")]
        lines.append([*line, f"{fvu[row]:.3f}"])
    show(header, lines)


def title(dead_share: float) -> str:
    return f"dead {dead_share:.0%}" if dead_share else "live"


# --- the command ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="in a round; 2, with --loader 16, with --stages 10 in all")
    parser.add_argument("--dead-share", type=float, nargs="+", default=[0.0, 0.25], help="of the latents; 0 is added")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each process")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--stages", action="store_true", help="only the stages of our step")
    parser.add_argument("--loader", action="store_true", help="only our step, from a store beside rows in memory")
    parser.add_argument("--kind", action="append", metavar="JSON", help="a kind of ours and its settings but d_sae")
    parser.add_argument("--json", type=Path, help="where all that was measured is written too")
    parser.add_argument("--folder", type=Path, help="where rows are written; a temporary folder if not given")
    options = parser.parse_args()
    options.dead_share = sorted({0.0, *options.dead_share})
    options.peer = dict(peer.split("=", 1) for peer in options.peer)
    for name in options.peer:
        if name not in PEERS:
            parser.error(f"there is no peer {name!r}; choose from {', '.join(PEERS)}")
    if options.rows < HELD_OUT_ROWS + options.batch:
        parser.error(f"--rows must be at least a batch and {HELD_OUT_ROWS} held-out rows")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        file = Path(place) / "rows.npy"
        make_rows(file, options.rows, options.d_in)
        settings = {name: getattr(options, name) for name in ("d_sae", "k", "batch", "threads", "learning_rate")}
        settings |= {"rows": str(file), "held_out": HELD_OUT_ROWS}
        sizes = f"{options.d_in} -> {options.d_sae}, k {options.k}, batch {options.batch}, float32"
        print(f"{sizes}, {options.threads} threads, {options.rows:,} rows")
        if options.stages:
            result = stages_mode(options, settings)
        elif options.loader:
            result = loader_mode(options, settings)
        elif options.kind:
            result = kinds_mode(options, settings)
        else:
            result = peers_mode(options, settings)
    if options.json:
        described = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": described, **result}, indent=1))


def peers_mode(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    rows = {
        OURS: (sys.executable, "ours"),
        DENSE: (sys.executable, "ours-dense"),
        GEMM: (sys.executable, "encoder-gemm"),
    }
    for peer, python in options.peer.items():
        rows |= {row: (python, implementation) for row, implementation in PEERS[peer].items()}
    pythons = {row: (python, {**settings, "implementation": name}) for row, (python, name) in rows.items()}
    steps = options.steps or 2
    with started(pythons) as (workers, versions):
        peak = peaks(workers, options.dead_share)
        records = measure(workers, options.dead_share, options.rounds, steps)
        fvu = {row: worker.ask("fvu") for row, worker in workers.items()}
    taken = (options.rounds + 1) * len(options.dead_share) * steps
    print(f"{options.rounds} rounds of {steps} steps, FVU after {taken} steps\n")
    by_share = {share: Measured(records, share, steps, options.batch) for share in options.dead_share}
    for share, measured in by_share.items():
        print(f"{title(share)}:\n")
        show_step(measured, by_share[0.0], list(rows), fvu, {row: peak[row, share] for row in rows})
    for row, packages in versions.items():
        print(f"- {row}: " + ", ".join(f"{package} {version}" for package, version in packages.items()))
    peaked = [{"row": row, "dead_share": share, "bytes": n} for (row, share), n in peak.items()]
    return {"versions": versions, "records": records, "fvu": fvu, "peak": peaked}


def stages_mode(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    with started({OURS: (sys.executable, {**settings, "implementation": "ours"})}) as (workers, _):
        worker = workers[OURS]
        measure(workers, options.dead_share, 0, 2)
        taken = {
            share: worker.ask("stages", first=0, steps=options.steps or 10, dead_share=share)
            for share in options.dead_share
        }
    print(f"medians of {options.steps or 10} steps\n")
    show_stages(taken)
    return {"stages": [{"dead_share": share, "steps": steps} for share, steps in taken.items()]}


def loader_mode(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Loaders keep what they read ahead between rounds: at most four batches, which is why a round has many steps."""
    ours = {**settings, "implementation": "ours"}
    values = np.load(settings["rows"], mmap_mode="r")
    pythons = {"memory, float32": (sys.executable, ours)}
    for dtype in ("float32", "bfloat16"):
        store = Path(settings["rows"]).with_name(dtype)
        make_store(store, values, dtype)
        pythons[f"store, {dtype}"] = (sys.executable, {**ours, "store": str(store)})
    steps = options.steps or 16
    with started(pythons) as (workers, _):
        records = measure(workers, [0.0], options.rounds, steps)
        fvu = {row: worker.ask("fvu") for row, worker in workers.items()}
    print(f"{options.rounds} rounds of {steps} steps\n")
    show_loader(Measured(records, 0.0, steps, options.batch), list(pythons))
    return {"records": records, "fvu": fvu}


def kinds_mode(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    rows = {"TopK": "ours", **{kind: kind for kind in options.kind}}
    pythons = {row: (sys.executable, {**settings, "implementation": name}) for row, name in rows.items()}
    steps = options.steps or 2
    with started(pythons) as (workers, _):
        records = measure(workers, [0.0], options.rounds, steps)
        fvu = {row: worker.ask("fvu") for row, worker in workers.items()}
    print(f"{options.rounds} rounds of {steps} steps\n")
    show_kinds(Measured(records, 0.0, steps, options.batch), list(rows), fvu)
    return {"records": records, "fvu": fvu}


if __name__ == "__main__":
    main()
