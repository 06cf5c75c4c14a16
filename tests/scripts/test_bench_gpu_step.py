"""The measurement on a GPU runs without one, its checks notice what is wrong, and its page says what it computes.

What it finds on a card is for that card; here nothing is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_checks
import gpu_step
import gpu_times
import pytest
import torch
from gpu_arithmetic import SIZES, Rates, Size, bound, fewest_bytes, operations, stages
from gpu_card import Ask, Card, is_lost
from gpu_implementations import PORTABLE
from train_step_worker import Implementation

from dictlearn.ops import portable

ROOT = Path(__file__).parents[2]
SMALL = Size(48, 256, 4, 64)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_step.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def test_the_page_has_the_table_that_the_script_makes():
    assert run("--arithmetic").stdout in (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_no_bound_is_below_the_floor(size):
    rates = Rates()
    assert bound(size, rates) > 1e3 * operations(size) / rates.flops > 1e3 * fewest_bytes(size) / rates.bytes
    assert stages(size, rates)["update"] > 1e3 * 6 * 4 * size.weights / rates.bytes, "three float32, read and written"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    ran = run("--out", str(tmp_path))
    assert ran.returncode == 1 and ran.stderr.strip().endswith(gpu_step.NO_GPU)


@pytest.mark.needs("interpreter")
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(["ceilings", "whole step"], id="some"),
        pytest.param([], id="all", marks=pytest.mark.heavy),
    ],
)
def test_sections_run_in_the_interpreter_and_are_not_timed(sections, tmp_path):
    pytest.importorskip("triton")
    ran = run("--interpret", "--out", str(tmp_path), *(part for name in sections for part in ("--only", name)))
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["errors"]
    named = gpu_step.names_of(gpu_step.plan(gpu_step.TINY))
    assert {title.partition(", ")[0] for title in results["seconds"]} == set(sections or named)
    for rows in results["tables"].values():
        for row in rows:
            assert row.get("passed", True) and row.get("error", "not installed") in ("not installed", *gpu_numbers(row))
            assert all(row[column] is None for column in row if column in ("ms", "tokens/s", "TB/s", "TFLOP/s"))
    # only the section "whole step" has dead latents
    fvu = {row["step"]: row["FVU"] for row in results["tables"]["whole step"] if row.get("dead") == 0.1}
    assert fvu["ours"] == pytest.approx(fvu["ours, portable operations"], rel=0.02), "the same rows, the same start"
    assert (tmp_path / "results.md").read_text().count("not measured") > 10


def gpu_numbers(row):
    """The error of a check is a number, not a sentence."""
    return [row["error"]] if isinstance(row.get("error"), float) else []


WORKERS = {
    "fails": 'answer({"table": "t", "row": {"ms": 1.0}}); answer({"done": True, "error": "it broke"}); break',
    "dies": "sys.exit(3)",
    "hangs": "time.sleep(60)",
}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fails", "it broke"),
        ("dies", "its process ended, status 3"),
        ("hangs", "it took too long and was ended"),
    ],
)
def test_a_section_that_fails_is_reported_and_the_next_has_a_new_process(how, said, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "def answer(line):\n    print(json.dumps(line), flush=True)\n"
        'answer({"versions": {"card": "none"}})\n'
        "for line in sys.stdin:\n"
        f'    if json.loads(line)["section"] == "products":\n        {WORKERS[how]}\n'
        '    answer({"table": json.loads(line)["section"], "row": {"what": "done", "TB/s": None, "TFLOP/s": None}})\n'
        '    answer({"done": True, "error": None})\n'
    )
    monkeypatch.setattr(gpu_step, "WORKER", script)
    monkeypatch.setattr(gpu_step, "GRACE", 0.5)
    sections = [gpu_step.Section(name, SIZES[:1], 1.0) for name in ("ceilings", "products", "graphs")]
    monkeypatch.setattr(gpu_step, "plan", lambda sizes: [[sections]])
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_step.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["errors"] == {sections[1].title: said}
    assert results["tables"]["graphs"] == results["tables"]["ceilings"]
    assert ("t" in results["tables"]) == (how == "fails"), "what was found before is kept"


# --- turns ------------------------------------------------------------------------------------------------------------


class OutOfMemory(Implementation):
    """Takes the first steps, and no more."""

    taken = 0

    def __init__(self, *arguments):
        pass

    def begin(self, *arguments):
        pass

    def step(self, x):
        self.taken += 1
        if self.taken > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_implementation_that_runs_out_of_memory_leaves_the_race(monkeypatch):
    monkeypatch.setattr(gpu_times, "PEERS", {"large": ("json", OutOfMemory), "none": ("no_such_module", OutOfMemory)})
    rows = []
    card, until = Card(torch.device("cpu")), time.monotonic() + 100
    ask = Ask(card, (SMALL,), Rates(), 2, 2, until, lambda table, row: rows.append(row))
    gpu_times.race(ask, "uniform", {"ours": PORTABLE}, True, [0.0, 0.25])
    assert [row["step"] for row in rows] == ["none", "large", "ours", "ours"]
    assert rows[0]["error"] == "not installed" and rows[1]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert [row["after steps"] for row in rows[2:]] == [2 + 2 * 2, 2 + 2 * 2 + 1 + 2 * 2]
    assert rows[2]["rounds"] == 2 and rows[2]["FVU"] > rows[3]["FVU"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("no CUDA"), False),
    ],
)
def test_only_what_costs_the_device_ends_a_process(error, lost):
    assert is_lost(error) is lost


# --- the checks -------------------------------------------------------------------------------------------------------


def failures(way, dead_share=0.0):
    errors = gpu_checks.step_differs(SMALL, way, dead_share, torch.device("cpu"))
    limits = {**gpu_checks.LIMITS[way.precision], "bits": 0.0, "counters": 0.0}
    return [name for name, limit in limits.items() if errors[name] > limit]


@pytest.mark.parametrize("precision", gpu_checks.LIMITS)
@pytest.mark.parametrize("change", [{}, {"clip": 1.0}, {"accumulate": 2}], ids=["plain", "clipped", "in parts"])
def test_a_step_that_is_right_passes(precision, change):
    assert failures(replace(PORTABLE, precision=precision, **change)) == []


@pytest.mark.parametrize("precision", gpu_checks.LIMITS)
def test_a_step_with_dead_latents_passes(precision):
    assert failures(replace(PORTABLE, precision=precision), 0.4 * SMALL.d / SMALL.latents) == []


def test_what_is_wrong_is_noticed(monkeypatch):
    encode, calls = portable.encode_topk, []

    def gradient_times(factor):
        def wrong(*arguments):
            codes = encode(*arguments)
            calls.append(1)
            times = factor(len(calls))
            return codes._replace(values=codes.values * times - (codes.values * (times - 1)).detach())

        return wrong

    def wrong_latents(x, W, *arguments):
        codes = encode(x, W, *arguments)
        indices = codes.indices.clone()
        indices[:, -1] = (indices.amax(dim=1) + 1) % len(W)
        return codes._replace(indices=indices)

    for broken, noticed in (
        (gradient_times(lambda call: 1.1), {"gradients"}),
        (gradient_times(lambda call: 1 + 1e-3 * (call % 7)), {"gradients", "bits"}),
        (wrong_latents, {"missed", "output"}),
    ):
        monkeypatch.setattr(portable, "encode_topk", broken)
        assert noticed <= set(failures(replace(PORTABLE, precision="float32"))), noticed


def test_what_is_not_a_number_has_an_infinite_error():
    assert gpu_checks.error_of(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert gpu_checks.error_of(torch.tensor([1.0, 2.0]), torch.ones(2)) == pytest.approx(0.5**0.5)
    assert gpu_checks.differing(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])) == 0


def test_of_equal_pre_activations_the_first_are_expected():
    values, latents = gpu_checks.largest(torch.tensor([[1.0, 3, 2, 3, 3, -4]]), 2, "relu")
    assert latents.tolist() == [[1, 3]] and values.tolist() == [[3, 3]]
    values, latents = gpu_checks.largest(torch.tensor([[1.0, 3, 2, 3, 3, -4]]), 2, "magnitude")
    assert latents.tolist() == [[1, 5]] and values.tolist() == [[3, -4]]
