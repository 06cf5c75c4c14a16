"""The Compare page run headless: runs side by side, what cannot be compared, and two runs by their latents."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.app.conftest import Screen
from tests.app.tiny_workspace import HOOKS

Open = Callable[..., Screen]


def add_run(workspace: Path, name: str, k: int = 8, seed: int = 1, fvu: float | None = 0.2, **changes: Any) -> Path:
    """A copy of the run "sae" with other numbers; ``fvu`` None leaves it without an evaluation."""
    folder = Path(shutil.copytree(workspace / "runs" / "sae", workspace / "runs" / name))
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"name": name, "seed": seed}
    config["dictionary"]["k"] = k
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    evaluation = json.loads((folder / "evaluation.json").read_text()) | {"run": name}
    evaluation["reconstruction"] |= {"fvu": fvu, "l0": float(k)}
    (folder / "evaluation.json").write_text(json.dumps(evaluation | changes))
    if fvu is None:
        (folder / "evaluation.json").unlink()
    return folder


def names(screen: Screen) -> list[str]:
    """The runs in the table of numbers."""
    return [row[0] for row in screen.table()]


def commands(screen: Screen) -> list[str]:
    return [block["text"] for block in screen.blocks("command")]


# --- numbers side by side ---------------------------------------------------------------------------------------------


def test_evaluated_runs_of_one_input_and_target_are_drawn_and_listed(screen: Open, own: Path) -> None:
    for k, fvu in ((4, 0.4), (16, 0.1)):
        for seed in (1, 2):
            add_run(own, f"k{k}-{seed}", k, seed, fvu + seed / 100)
    compare = screen("compare", workspace=own)
    assert compare.title == "Compare"
    assert compare.test.selectbox(key="compare.store").value == "stdlib"
    assert compare.test.selectbox(key="compare.hooks").value == HOOKS[0]
    assert compare.test.multiselect(key="compare.runs").options == ["k16-1", "k16-2", "k4-1", "k4-2", "sae"]
    drawn = compare.payloads["compare.curves"]
    assert drawn["lines"] == ["topk"]
    assert [panel["title"] for panel in drawn["panels"]] == ["FVU", "alive", "loss recovered", "CE increase", "KL"]
    points = drawn["panels"][0]["series"][0]["points"]
    assert [(point["x"], len(point["seeds"])) for point in points] == [(4, 2), (8, 1), (16, 2)]
    assert names(compare) == ["k4-1", "k4-2", "sae", "k16-1", "k16-2"]
    head = [column["label"] for column in compare.blocks("table")[0]["columns"]]
    numbers = dict(zip(head, compare.table()[2], strict=True))
    assert (numbers["FVU"], numbers["alive share"], numbers["CE increase"]) == ("0.2000", "0.9500", "0.3000")
    row = compare.blocks("table")[0]["rows"][2]["cells"]
    assert row[0]["href"] == "runs?runs=sae" and row[3]["href"] == "features?index=sae"


def test_a_heading_sorts_by_its_column_and_turns_it(screen: Open, own: Path) -> None:
    for k, fvu in ((4, 0.4), (16, 0.1)):
        add_run(own, f"k{k}", k, fvu=fvu)
    compare = screen("compare", workspace=own, sort="fvu")
    assert names(compare) == ["k4", "sae", "k16"]
    (head,) = (one for one in compare.blocks("table")[0]["columns"] if one.get("sorted"))
    assert (head["label"], head["sorted"]) == ("FVU", "descending") and "ascending=1" in head["href"]
    assert names(screen("compare", workspace=own, sort="fvu", ascending="1")) == ["k16", "sae", "k4"]
    assert names(screen("compare", workspace=own, sort="no such number")) == ["k4", "sae", "k16"]


def test_chosen_runs_are_the_address_and_only_what_differs_is_listed(screen: Open, own: Path) -> None:
    add_run(own, "k4", 4)
    add_run(own, "k16", 16, seed=3)
    compare = screen("compare", workspace=own)
    compare.test.multiselect(key="compare.runs").set_value(["sae", "k4"])
    compare.run()
    assert compare.address["runs"] == "sae,k4" and names(compare) == ["k4", "sae"]
    assert compare.table(1) == [["dictionary.k", "4", "8"]]
    assert "sae-wide" in compare.notices[0] and "not shown" in compare.notices[0]


def test_of_many_runs_each_kind_has_a_line_of_its_values(screen: Open, own: Path) -> None:
    for k in (2, 4, 16, 32):
        for seed in (0, 1):
            add_run(own, f"k{k}-{seed}", k, seed)
    assert screen("compare", workspace=own).table(1) == [["dictionary.k", "2, 4, 8, 16, 32"], ["seed", "0, 1"]]


def test_of_several_hooks_the_numbers_of_one_can_be_shown(screen: Open, own: Path) -> None:
    hooks = [f"blocks.{layer}.hook_mlp_out" for layer in range(3)]
    for seed in (0, 1):
        by_hook = {hook: {"fvu": 0.1 * (1 + i), "loss_recovered": 0.9} for i, hook in enumerate(hooks)}
        folder = add_run(own, f"across-{seed}", seed=seed, downstream=None, by_hook=by_hook)
        description = json.loads((folder / "dictionary" / "dictionary.json").read_text())
        description["provenance"] |= {"hook_in": hooks, "hook_out": hooks}
        (folder / "dictionary" / "dictionary.json").write_text(json.dumps(description))
    compare = screen("compare", workspace=own, store="stdlib", hooks="blocks.0–2.hook_mlp_out")
    assert names(compare) == ["across-0", "across-1"]
    assert compare.test.selectbox(key="compare.at").options == ["all 3 hooks together", *hooks]
    compare.test.selectbox(key="compare.at").select(hooks[2])
    compare.run()
    assert compare.address["at"] == hooks[2]
    points = compare.payloads["compare.curves"]["panels"][0]["series"][0]["points"]
    assert [seed["y"] for seed in points[0]["seeds"]] == [pytest.approx(0.3)] * 2
    gone = screen("compare", workspace=own, hooks="blocks.0–2.hook_mlp_out", at="blocks.9.hook_mlp_out")
    assert any("rebuild no hook 'blocks.9.hook_mlp_out'" in notice for notice in gone.notices)
    home = screen("home", workspace=own)
    assert {row[0]: row[1] for row in home.table(1)}["across-0"].startswith("topk of blocks.0–2.hook_mlp_out")
    runs = screen("runs", workspace=own, runs="across-0")
    assert runs.table(0)[0][2] == "blocks.0–2.hook_mlp_out"
    assert {row[0]: row[1] for row in runs.table(1)}["fvu at blocks.2.hook_mlp_out"] == "0.3000"


def test_the_table_can_be_taken_along(screen: Open) -> None:
    compare = screen("compare")
    button = next(one for one in elements_of(compare) if one.type == "download_button")
    assert button.proto.label == "Download as CSV" and button.proto.url


def elements_of(screen: Screen) -> list[Any]:
    from tests.app.conftest import elements

    return list(elements(screen.test.main))


# --- what cannot be compared ------------------------------------------------------------------------------------------


def test_runs_that_are_not_evaluated_are_named_with_their_commands(screen: Open, tiny: Path) -> None:
    compare = screen("compare")
    assert compare.notices[0] == "Not evaluated yet, and not shown: sae-wide."
    assert commands(compare) == [f"dictlearn evaluate sae-wide --workspace {tiny}"]
    assert names(compare) == ["sae"]


def test_without_any_evaluation_there_is_a_sentence_and_the_commands(screen: Open, own: Path) -> None:
    (own / "runs" / "sae" / "evaluation.json").unlink()
    compare = screen("compare", workspace=own, store="stdlib", hooks=HOOKS[0])
    assert compare.notices[0].startswith("No run of this input and target is evaluated yet")
    assert commands(compare) == [f"dictlearn evaluate {name} --workspace {own}" for name in ("sae", "sae-wide")]
    assert "compare.curves" not in compare.payloads


def test_many_unevaluated_runs_share_one_line_of_shell(screen: Open, own: Path) -> None:
    waiting = [add_run(own, f"more-{seed}", seed=seed, fvu=None).name for seed in range(7)]
    (command,) = commands(screen("compare", workspace=own))
    said = " ".join([*waiting, "sae-wide"])
    assert command == f'for run in {said}; do dictlearn evaluate "$run" --workspace {own}; done'


def test_runs_measured_on_something_else_are_named_with_what_mends_it(screen: Open, own: Path) -> None:
    add_run(own, "more", 16)
    add_run(own, "other", 4, reconstruction={"rows": 100, "fvu": 0.3, "l0": 4.0}, downstream=None)
    compare = screen("compare", workspace=own)
    (notice,) = (one for one in compare.notices if one.startswith("Not comparable"))
    assert notice.startswith("Not comparable: other was measured on 100 rows of ")
    assert "the others on 4,096 rows and 2,040 tokens of " in notice
    assert f"dictlearn evaluate other --rows 4096 --tokens 2048 --workspace {own}" in commands(compare)
    assert "Not comparable" not in " ".join(screen("compare", workspace=own, runs="more,sae").notices)


def test_a_store_that_is_another_now_or_gone_is_said(screen: Open, own: Path) -> None:
    add_run(own, "old", store_fingerprint="sha256:0000")
    compare = screen("compare", workspace=own, runs="old")
    assert any("The store stdlib has changed since" in notice for notice in compare.notices)
    shutil.rmtree(own / "stores" / "stdlib.zarr")
    compare = screen("compare", workspace=own)
    assert any("There is no store 'stdlib'" in notice for notice in compare.notices)
    assert names(compare) == ["old", "sae"]


def test_a_damaged_evaluation_costs_its_run_alone(screen: Open, own: Path) -> None:
    for number, text in enumerate(("{", "[]", '{"reconstruction": 5}', '{"reconstruction": {"l0": 3}}')):
        (add_run(own, f"damaged-{number}") / "evaluation.json").write_text(text)
    compare = screen("compare", workspace=own)
    assert sum("evaluation.json" in notice for notice in compare.notices) == 2
    waiting = "Not evaluated yet, and not shown: damaged-0, damaged-1, damaged-2, sae-wide."
    assert waiting in compare.notices
    assert sorted(names(compare)) == ["damaged-3", "sae"]


def test_a_run_that_is_gone_or_elsewhere_is_said_and_the_others_are_shown(screen: Open) -> None:
    compare = screen("compare", runs="<b>gone</b>,sae,transcoder-2,sae-wide,training")
    said = " ".join(compare.notices)
    assert "There is no run '<b>gone</b>' in this workspace" in said
    assert "'transcoder-2', 'training' cannot be compared with these" in said
    assert "'sae-wide' is not evaluated yet" in said
    assert names(compare) == ["sae"]


def test_a_run_deleted_meanwhile_is_missed_at_the_next_look(screen: Open, own: Path) -> None:
    folder = add_run(own, "meanwhile", 4)
    compare = screen("compare", workspace=own, runs="meanwhile,sae", a="meanwhile", b="sae")
    assert names(compare) == ["meanwhile", "sae"]
    shutil.rmtree(folder)
    compare.run()
    said = " ".join(compare.notices)
    assert "There is no run 'meanwhile'" in said and "There is no finished run 'meanwhile'" in said
    assert names(compare) == ["sae"]


def test_runs_that_all_train_still_are_said_to(screen: Open, own: Path) -> None:
    for name in ("sae", "sae-wide", "transcoder-2"):
        shutil.rmtree(own / "runs" / name)
    compare = screen("compare", workspace=own)
    assert compare.notices == ["No run of this workspace has finished training."]
    assert commands(compare) == ["dictlearn train --help"]


# --- two runs by their latents ----------------------------------------------------------------------------------------


def test_latents_are_matched_beside_chance_and_lead_to_their_pages(screen: Open, own: Path) -> None:
    folder = add_run(own, "shuffled", seed=2)
    weights = folder / "dictionary" / "dictionary.safetensors"
    tensors = load_file(weights)
    order = np.random.default_rng(0).permutation(256)
    tensors["W_dec"] = tensors["W_dec"][order]
    save_file(tensors, weights)
    compare = screen("compare", workspace=own, a="sae", b="shuffled")
    chance = {row[0]: row[1:] for row in compare.table(2)}
    assert chance["0.95"] == ["256", "100.0%", "0%", "100.0%", "0%"]
    assert float(chance["mean cosine"][2]) < 0.9 < float(chance["mean cosine"][1]) == 1
    histogram = compare.blocks("histogram")[0]
    assert histogram["counts"][-1] == sum(histogram["counts"]) == 256
    assert [other["name"] for other in histogram["beside"]] == [
        "Gaussian of B's mean and covariance",
        "random directions",
    ]
    assert all(abs(sum(other["counts"]) - 256) <= 20 for other in histogram["beside"])
    rows = compare.blocks("table")[3]["rows"]
    assert len(rows) == 25
    for row in rows:
        one, token, cosine, other = row["cells"][:4]
        assert order[int(other["text"])] == int(one["text"]) and float(cosine["text"]) == 1
        assert one["href"] == f"feature?index=sae&latent={one['text']}" and other["href"] is None
        assert token == "" or token["tokens"]
    assert "The run 'shuffled' has no feature index" in compare.notices[-1]
    pages = compare.blocks("pager")[0]["pages"]
    assert pages[-1]["text"] == "11" and pages[-1]["href"].endswith("page=11")


def test_indexed_runs_show_what_fires_together(screen: Open) -> None:
    compare = screen("compare", a="sae", b="transcoder-2")
    heads = [column["label"] for column in compare.blocks("table")[-1]["columns"]]
    assert heads[-1] == "Jaccard"
    cells = compare.blocks("table")[-1]["rows"][0]["cells"]
    assert 0 <= float(cells[-1]["text"]) <= 1 and "by chance" in cells[-1]["title"]
    assert cells[3]["href"].startswith("feature?index=transcoder-2&latent=")
    assert any("writes to" in notice and "residual stream" in notice for notice in compare.notices)


@pytest.mark.parametrize("show", ["far", "a", "b", "nonsense"])
def test_what_is_listed_is_the_address(screen: Open, show: str) -> None:
    compare = screen("compare", a="sae", b="sae-wide", show=show, page="99")
    cosines = [float(row["cells"][2]["text"]) for row in compare.blocks("table")[-1]["rows"]]
    assert cosines == sorted(cosines, reverse=show == "nonsense")
    current = [page["text"] for page in compare.blocks("pager")[0]["pages"] if page["current"]]
    found = {"a": 256, "b": 512}.get(show)
    if found:
        assert compare.blocks("section")[-1]["note"].startswith(f"{found} in all")
    assert current == [compare.blocks("pager")[0]["pages"][-1]["text"]]


def test_two_runs_that_cannot_be_matched_are_said_to(screen: Open, own: Path) -> None:
    assert screen("compare", a="sae", b="sae").notices[-1] == "Every latent of a run is its own match; choose two runs."
    assert "There is no finished run 'nowhere'" in screen("compare", a="sae", b="nowhere").notices[-1]
    assert "There is no finished run 'training'" in screen("compare", a="training", b="sae").notices[-1]
    weights = own / "runs" / "sae-wide" / "dictionary" / "dictionary.safetensors"
    save_file({"W_dec": np.ones((4, 7), np.float32)}, weights)
    assert "of 24 and of 7 coordinates" in screen("compare", workspace=own, a="sae", b="sae-wide").notices[-1]
    weights.write_bytes(b"nonsense")
    assert "is damaged" in screen("compare", workspace=own, a="sae", b="sae-wide").notices[-1]


def test_codes_with_signs_match_opposite_directions(screen: Open, own: Path) -> None:
    folder = add_run(own, "signed")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["dictionary"]["kind"] = "abstopk"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    description = folder / "dictionary" / "dictionary.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"kind": "abstopk"}))
    weights = folder / "dictionary" / "dictionary.safetensors"
    save_file({**load_file(weights), "W_dec": -load_file(weights)["W_dec"]}, weights)
    compare = screen("compare", workspace=own, a="sae", b="signed")
    assert {row[0]: row[1] for row in compare.table(2)}["0.95"] == "256"
    assert any("without their signs" in notice for notice in compare.notices)
    assert not any("without their signs" in notice for notice in screen("compare", a="sae", b="sae-wide").notices)


def test_more_latents_than_a_page_may_wait_for_are_not_matched(screen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from dictlearn_app import loading

    monkeypatch.setattr(loading, "MOST_PRODUCTS", 256 * 24 * 512 - 1)
    loading._agreement.clear()
    compare = screen("compare", a="sae", b="sae-wide")
    assert compare.notices[-1].startswith("To match 256 latents with 512 takes longer than a page may")
    assert names(compare) == ["sae"]
    assert screen("compare", a="sae", b="transcoder-2").blocks("histogram")


def test_an_index_of_a_run_that_was_trained_again_is_not_linked(screen: Open, own: Path) -> None:
    weights = "dictionary/dictionary.safetensors"
    shutil.copy(own / "runs" / "sae-wide" / weights, own / "runs" / "sae" / weights)
    compare = screen("compare", workspace=own, a="sae", b="sae-wide")
    assert any("'sae' has been trained again since it was indexed" in notice for notice in compare.notices)
    assert compare.blocks("table")[-1]["rows"][0]["cells"][0]["href"] is None


# --- how long it takes ------------------------------------------------------------------------------------------------


def test_many_runs_are_drawn_within_a_second_once_they_are_read(screen: Open, own: Path) -> None:
    for k in range(1, 21):
        for seed in (0, 1):
            add_run(own, f"k{k}-{seed}", k, seed)
    compare = screen("compare", workspace=own)
    began = time.process_time()
    compare.run()
    assert len(names(compare)) == 41
    assert time.process_time() - began < 1
