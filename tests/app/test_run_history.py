"""Reading a run's files: while it trains, when they are damaged, and several side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from dictlearn_app.run_history import POINTS, continued, differing, read_lines, read_run


def test_a_half_written_last_line_is_not_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    assert read_lines(file, POINTS) == ([{"step": 10, "loss": 1.0}], "", 0)


def test_damaged_lines_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10}\nnonsense\n[1]\n{"step": 40, "note": "text", "loss": null}\n')
    assert read_lines(file, POINTS) == ([{"step": 10}, {"step": 40}], "", 2)


def test_why_a_run_stopped_is_no_point_of_a_curve(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "loss": 1.0}\n{"step": 12, "stopped": "The loss is not finite."}\n')
    assert read_lines(file, POINTS) == ([{"step": 10, "loss": 1.0}], "The loss is not finite.", 0)


def test_a_long_file_is_thinned_and_its_last_lines_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 5000)) + '{"step": 50')
    lines, _, broken = read_lines(file, POINTS)
    steps = [line["step"] for line in lines]
    assert POINTS / 2 < len(lines) <= POINTS + 1 and steps[-1] == 4999 and steps == sorted(steps) and broken == 0


def test_seconds_go_on_where_a_resumed_run_counts_from_0() -> None:
    assert continued([1.0, 5.0, None, 0.5, 4.0, 1.0]) == [1.0, 5.0, None, 5.5, 9.0, 10.0]


def test_a_metric_that_begins_later_is_none_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1, "auxk": 0.5}\n')
    (tmp_path / "config.yaml").write_text("name: a\n")
    run = read_run(tmp_path)
    assert run.curves == {"step": [1, 2], "loss": [2, 1], "auxk": [None, 0.5]}
    assert not run.finished and run.problems == () and run.last == {"step": 2, "loss": 1, "auxk": 0.5}


def test_a_run_that_has_ended_is_told_from_one_that_has_not(tiny: Path, own: Path) -> None:
    folder = own / "runs" / "training"
    assert read_run(tiny / "runs" / "sae").state == "finished"
    assert read_run(folder).state == "interrupted"
    assert replace(read_run(folder), training=True).state == "training"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 171, "stopped": "The loss is not finite."}\n')
    stopped = replace(read_run(folder), training=True)  # the others of its sweep go on
    assert (stopped.state, stopped.stopped, stopped.last["step"]) == ("stopped", "The loss is not finite.", 170)
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).state == "not begun"


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
