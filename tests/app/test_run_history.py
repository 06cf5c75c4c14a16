"""Reading a run's files: while it trains, when they are damaged, and several side by side."""

from __future__ import annotations

import json
from pathlib import Path

from dictlearn_app.run_history import POINTS, differing, read_lines, read_run, thinned


def test_a_half_written_last_line_is_not_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert read_lines(file) == ([{"step": 10, "loss": 1.0}], 0)


def test_damaged_lines_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10}\nnonsense\n[1]\n{"step": 40, "note": "text"}\n')
    assert read_lines(file) == ([{"step": 10}, {"step": 40}], 2)


def test_thinning_keeps_the_last_line_and_the_order() -> None:
    lines = [{"step": float(step)} for step in range(1, 5000)]
    kept = thinned(lines, POINTS)
    steps = [line["step"] for line in kept]
    assert len(kept) <= POINTS and steps[-1] == 4999 and steps == sorted(steps)


def test_a_metric_that_begins_later_is_none_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1, "auxk": 0.5}\n')
    (tmp_path / "config.yaml").write_text("name: a\n")
    run = read_run(tmp_path)
    assert run.curves == {"step": [1, 2], "loss": [2, 1], "auxk": [None, 0.5]}
    assert not run.finished and run.problems == ()


def test_each_damaged_file_costs_only_its_own_part(own: Path) -> None:
    folder = own / "runs" / "sae"
    (folder / "config.yaml").write_text("a: [1,\n")
    (folder / "evaluation.json").write_text("{")
    (folder / "dictionary" / "dictionary.json").write_text("[]")
    run = read_run(folder)
    assert len(run.problems) == 3
    assert all("restore" in problem for problem in run.problems)
    assert len(run.curves["loss"]) == 40


def test_only_settings_that_differ_are_listed(tiny: Path) -> None:
    runs = [read_run(tiny / "runs" / name) for name in ("sae", "sae-wide")]
    assert differing(runs) == {"dictionary.d_sae": [256, 512], "dictionary.k": [8, 12], "seed": [1, 2]}


def test_an_evaluation_of_another_shape_does_not_break_the_page(own: Path) -> None:
    (own / "runs" / "sae" / "evaluation.json").write_text(
        json.dumps({"reconstruction": {"fvu": 0.5}, "downstream": None})
    )
    assert read_run(own / "runs" / "sae").final == {"fvu": 0.5}
