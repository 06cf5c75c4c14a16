"""Which runs compare, the numbers of each, and the curves that their sparsities make."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from dictlearn_app.run_comparison import (
    as_csv,
    at_hook,
    curves,
    groups,
    hooks_measured,
    measured,
    metric_names,
    numbers,
    ordered,
    other_target,
    told_apart,
    two,
    unlike,
)
from dictlearn_app.run_history import RunHistory
from dictlearn_app.views.tradeoffs import tradeoffs_payload


def run(
    name: str,
    kind: str = "topk",
    l0: float | None = 8.0,
    fvu: float = 0.2,
    seed: int = 0,
    *,
    hook: Any = "a",
    target: Any = None,
    store: str = "acts",
    evaluation: dict[str, Any] | None = None,
    finished: bool = True,
    measured_on: dict[str, Any] | None = None,
    steps: int = 100,
    **dictionary: Any,
) -> RunHistory:
    """A run as it is read from disk; ``l0`` None leaves it without an evaluation."""
    if evaluation is None and l0 is not None:
        evaluation = {
            "store": store,
            "store_fingerprint": "sha256:1234",
            "split": "held-out",
            "asked": {"rows": 4096, "tokens": 1024, "batch_size": 512},
            "reconstruction": {"rows": 4000, "fvu": fvu, "l0": l0, "dead_share": 0.25},
            "downstream": {"tokens": 1000, "ce_clean": 2.0, "ce_spliced": 2.5},
            **(measured_on or {}),
        }
    config = {"name": name, "seed": seed, "steps": steps, "dictionary": {"kind": kind, "d_sae": 64, **dictionary}}
    provenance = {"hook_in": hook, "hook_out": target or hook, "store": {"name": store}}
    return RunHistory(name, config=config, evaluation=evaluation, provenance=provenance, finished=finished)


def test_a_run_of_several_hooks_is_told_in_words_before_and_after_it_is_saved() -> None:
    made = run("x", hook=["blocks.0.x", "blocks.1.x"], target=["blocks.0.y", "blocks.1.y"])
    assert made.hooks == "blocks.0,1.x → blocks.0,1.y" and made.is_transcoder
    training = RunHistory("y", config={"hook": ["blocks.0.x", "blocks.1.x"], "target_hook": None})
    assert training.hooks == "blocks.0,1.x" and not training.is_transcoder
    assert RunHistory("z").hooks == ""


# --- which runs compare -----------------------------------------------------------------------------------------------


def test_runs_of_one_input_target_and_store_make_a_group() -> None:
    runs = [
        run("b"),
        run("a", l0=None),
        run("other-hook", hook="b"),
        run("transcoder", target="c"),
        run("crosscoder", hook=["a", "b"]),
        run("elsewhere", store="others"),
        run("training", finished=False),
    ]
    found = groups(runs)
    assert [(group.store, group.hooks, [run.name for run in group.runs]) for group in found] == [
        ("acts", "a", ["a", "b"]),
        ("acts", "a + b", ["crosscoder"]),
        ("acts", "a → c", ["transcoder"]),
        ("acts", "b", ["other-hook"]),
        ("others", "a", ["elsewhere"]),
    ]
    assert [run.name for run in found[0].evaluated] == ["b"]
    assert [run.name for run in found[0].waiting] == ["a"]
    assert groups([]) == []


def test_a_run_evaluated_on_another_store_is_in_the_group_of_that_store() -> None:
    moved = run("moved", measured_on={"store": "others"})
    assert groups([moved])[0].store == "others"


@pytest.mark.parametrize(
    "changes",
    [
        {"store_fingerprint": "sha256:9"},
        {"reconstruction": {"rows": 10, "fvu": 0.1}},
        {"downstream": {"tokens": 10}},
        {"split": "train"},
    ],
)
def test_runs_measured_on_something_else_are_named(changes: dict[str, Any]) -> None:
    odd = run("odd", measured_on=changes)
    most, others = unlike([run("a"), run("b"), odd])
    assert most == measured(run("a"))
    assert {on: [run.name for run in some] for on, some in others.items()} == {measured(odd): ["odd"]}
    assert str(measured(odd)) != str(most) or changes == {"split": "train"}


def test_what_was_asked_does_not_matter_where_the_rows_were_the_same() -> None:
    more = run("more", measured_on={"asked": {"rows": 10**9, "tokens": 10**9, "batch_size": 1}})
    assert unlike([run("a"), more])[1] == {}


def test_a_run_without_the_spliced_model_compares_where_its_rows_do() -> None:
    without = run("without", measured_on={"downstream": None})
    assert unlike([run("a"), without])[1] == {}
    assert unlike([without])[0] == measured(without)
    assert unlike([]) == (None, {})


def test_an_evaluation_of_another_version_is_not_taken_for_comparable() -> None:
    old = run("old", evaluation={"reconstruction": {"fvu": 0.5, "l0": 3.0}})
    most, others = unlike([run("a"), run("b"), old])
    assert [run.name for some in others.values() for run in some] == ["old"] and "unknown" in str(next(iter(others)))
    assert most is not None and str(most) == "4,000 rows and 1,000 tokens of 1234"


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_shares_and_differences_stand_beside_what_they_follow_from() -> None:
    found = numbers(run("a"))
    assert list(found) == [
        "rows",
        "fvu",
        "l0",
        "dead_share",
        "alive_share",
        "tokens",
        "ce_clean",
        "ce_spliced",
        "ce_increase",
    ]
    assert (found["alive_share"], found["ce_increase"]) == (0.75, 0.5)
    assert numbers(run("b", l0=None)) == {}


def test_what_is_no_number_is_left_out() -> None:
    odd = {"fvu": 0.5, "nested": {"a": 0.25}, "note": "text", "list": [1], "none": None}
    assert numbers(run("a", evaluation={"reconstruction": odd, "downstream": [1]})) == {"fvu": 0.5}
    assert run("a", measured_on={"by_hook": 5}).by_hook == {}
    assert run("a", measured_on={"by_hook": {"b": 5, "c": {"fvu": 1, "note": ""}}}).by_hook == {
        "b": {},
        "c": {"fvu": 1},
    }


def test_of_several_hooks_one_can_be_looked_at_alone() -> None:
    by_hook = {"a": {"fvu": 0.1, "tokens": 990, "ce_clean": 2.0, "ce_spliced": 2.25}, "b": {"fvu": 0.3}}
    several = run("several", hook=["a", "b"], measured_on={"by_hook": by_hook, "downstream": None})
    assert hooks_measured([run("x"), several]) == ["a", "b"]
    assert measured(several).tokens == 990
    alone = numbers(at_hook(several, "a"))
    assert (alone["fvu"], alone["ce_increase"], alone["l0"], alone["alive_share"]) == (0.1, 0.25, 8, 0.75)
    assert numbers(at_hook(several, "b")).keys() == {"rows", "fvu", "l0", "dead_share", "alive_share"}
    assert numbers(several)["fvu"] == 0.2
    assert "fvu" not in numbers(at_hook(several, "gone"))
    (line,) = csv.DictReader(io.StringIO(as_csv([at_hook(several, "b")], at="b")))
    assert (line["at"], line["hook_in"], line["fvu"]) == ("b", "a+b", "0.3")


def test_runs_are_ordered_by_a_number_and_those_without_come_last() -> None:
    runs = [run("b", fvu=0.3), run("none", evaluation={"reconstruction": {"l0": 3.0}}), run("a", fvu=float("nan"))]
    runs.append(run("c", fvu=0.1))
    assert [one.name for one in ordered(runs, "fvu", ascending=True)] == ["c", "b", "none", "a"]
    assert [one.name for one in ordered(runs, "fvu", ascending=False)][:2] == ["b", "c"]
    assert [one.name for one in ordered(runs, "run", ascending=True)] == ["a", "b", "c", "none"]
    assert sorted(one.name for one in ordered(runs, "no such", ascending=True)) == ["a", "b", "c", "none"]


def test_the_csv_has_every_number_with_all_of_its_digits() -> None:
    runs = [run("a", fvu=1 / 3), run("b", evaluation={"reconstruction": {"fvu": 0.5, "cosine": 0.125}}, seed=4)]
    lines = list(csv.DictReader(io.StringIO(as_csv(runs))))
    assert [float(line["fvu"]) for line in lines] == [1 / 3, 0.5]
    assert set(metric_names(runs)) < set(lines[0])
    assert (lines[0]["cosine"], lines[1]["cosine"], lines[1]["l0"]) == ("", "0.125", "")
    assert (lines[1]["run"], lines[1]["kind"], lines[1]["seed"], lines[1]["hook_in"]) == ("b", "topk", "4", "a")


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_curve_joins_the_sparsities_of_a_kind_and_a_point_its_seeds() -> None:
    runs = [run(f"{kind}-{k}-{seed}", kind, l0=k, seed=seed, k=k) for kind in ("topk", "relu") for k in (32, 8) for seed in (0, 1)]  # fmt: skip  # noqa: E501
    found = curves(runs)
    assert [curve.label for curve in found] == ["relu", "topk"]
    assert [[[one.name for one in point] for point in curve.points] for curve in found] == [
        [["relu-8-0", "relu-8-1"], ["relu-32-0", "relu-32-1"]],
        [["topk-8-0", "topk-8-1"], ["topk-32-0", "topk-32-1"]],
    ]


def test_curves_of_one_kind_are_called_by_what_differs() -> None:
    runs = [run("a", k=8), run("b", k=8, steps=200), run("c", "relu")]
    assert [curve.label for curve in curves(runs)] == ["relu", "topk, steps 100", "topk, steps 200"]
    many = [run(str(i), shape=i, width_of=i, third=i // 2) for i in range(4)]
    labels = [curve.label for curve in curves(many)]
    assert len(set(labels)) == 4 and all(label.count(",") == 2 for label in labels)


def test_curves_whose_names_would_be_the_same_are_numbered() -> None:
    runs = [run(str(i), one=1, two=2, three=i) if i else run("0", one=0, two=0, three=0) for i in range(3)]
    labels = [curve.label for curve in curves(runs)]
    assert len(set(labels)) == 3 and any(label.endswith(("(2)", "(3)")) for label in labels)


def test_a_dictionary_that_was_not_trained_here_is_a_curve_of_its_own() -> None:
    imported = RunHistory("imported", finished=True, evaluation={"reconstruction": {"fvu": 0.1, "l0": 3.0}})
    assert [curve.label for curve in curves([imported])] == ["dictionary"]


def test_settings_that_follow_from_the_kind_are_left_out() -> None:
    runs = [run("a", k=8, auxk=0.1), run("b", k=16, auxk=0.1), run("c", "relu", l1=0.5), run("d", "relu", l1=0.5)]
    assert told_apart(runs) == {"dictionary.kind": ["topk"] * 2 + ["relu"] * 2, "dictionary.k": [8, 16, None, None]}
    assert told_apart([*runs[:1], run("e", k=8)]) == {"dictionary.auxk": [0.1, None]}
    assert told_apart(runs[2:]) == {}


def test_panels_have_every_run_that_has_both_numbers_and_the_spread_of_seeds() -> None:
    runs = [run("a", fvu=0.2, seed=0), run("b", fvu=0.4, seed=1), run("c", "relu", l0=30, fvu=0.1)]
    runs.append(run("d", "relu", evaluation={"reconstruction": {"l0": 9.0, "fvu": float("nan")}}))
    payload = tradeoffs_payload(curves(runs))
    assert payload["lines"] == ["relu", "topk"]
    panels = {panel["title"]: panel for panel in payload["panels"]}
    assert list(panels) == ["FVU", "alive", "CE increase"]
    relu, topk = panels["FVU"]["series"]
    assert [seed["name"] for point in relu["points"] for seed in point["seeds"]] == ["c"]
    (point,) = topk["points"]
    assert (point["x"], point["y"]) == (8, pytest.approx(0.3)) and point["spread"] == [8, 8, 0.2, 0.4]
    assert point["seeds"][0]["href"] == "runs?runs=a"
    assert tradeoffs_payload([])["panels"] == []


# --- two of them ------------------------------------------------------------------------------------------------------


def test_two_seeds_of_one_setting_are_what_is_matched_first() -> None:
    lone = [run("a", k=8, fvu=0.01), run("b", k=16, fvu=0.02)]
    good = [run("c0", k=32, seed=0, fvu=0.1), run("c1", k=32, seed=1, fvu=0.1)]
    worse = [run("d0", k=64, seed=0, fvu=0.3), run("d1", k=64, seed=1, fvu=0.3)]
    assert two(lone) == ("a", "b")
    assert two([*good, *worse]) == two([worse[0], good[0], worse[1], good[1]]) == ("c0", "c1")
    assert two([*good, *worse], indexed={"d0", "d1"}) == ("d0", "d1")
    assert two([*lone, *good], indexed={"a", "b"}) == ("a", "b")
    assert two(lone[:1]) is None and two([]) is None


def test_rows_that_are_written_elsewhere_are_said_to_be() -> None:
    assert other_target(run("a"), run("b")) == ""
    assert "a writes to a and b to c: cosines" in other_target(run("a"), run("b", target="c"))
