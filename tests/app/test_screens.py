"""Every page run headless: what it says of a whole workspace, of an empty one, and of a damaged one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from activation_store.store import open_store
from dictlearn.feature_index.spec import IndexManifest
from dictlearn.training.records import training
from dictlearn.workspace import Workspace
from tests.app.conftest import Screen
from tests.app.tiny_workspace import HOOKS, HOSTILE, HOSTILE_DOCUMENT

Open = Callable[..., Screen]

ALL = ("home", "store", "runs", "compare", "features", "feature", "circuit")


# --- a whole workspace ------------------------------------------------------------------------------------------------


def test_home_lists_everything_with_the_command_that_makes_the_next(screen: Open, tiny: Path) -> None:
    home = screen("home")
    names = [[row[0] for row in home.table(number)] for number in range(4)]
    assert names == [
        ["growing", "stdlib"],
        ["sae", "sae-wide", "training", "transcoder-2"],
        ["sae", "transcoder-2"],
        ["import-sys"],
    ]
    next_of_run = {row[0]: row[3] for row in home.table(1)}
    suffix = f" --workspace {tiny}"
    assert next_of_run["sae-wide"] == f"dictlearn evaluate sae-wide{suffix}"
    assert next_of_run["training"] == f"dictlearn train {tiny}/runs/training/config.yaml{suffix}"
    assert next_of_run["transcoder-2"].startswith("dictlearn circuit --prompt")
    assert home.table(0)[0][1].startswith("2,048 of ")
    assert home.table(0)[0][3] == "run its dictlearn harvest again to finish it"


def test_a_store_shows_hooks_statistics_and_text(screen: Open) -> None:
    store = screen("store", store="stdlib")
    assert store.title == "stdlib"
    assert [row[0] for row in store.table()] == list(HOOKS)
    for *_, mean, median, rms, outliers, of_mean in store.table():
        assert all(float(length) > 0 for length in (mean, median, rms, of_mean))
        assert int(outliers.replace(",", "")) >= 0
    first = store.payloads["store.passages"]["groups"][0]
    assert first["title"] == HOSTILE_DOCUMENT
    assert HOSTILE[0] in first["strips"][0]["tokens"]
    assert first["strips"][0]["positions"][:3] == [1, 2, 3]


def test_a_store_opens_at_the_page_of_the_row_in_the_address(screen: Open) -> None:
    store = screen("store", store="stdlib", row="3000")
    strips = [group["strips"][0] for group in store.payloads["store.passages"]["groups"]]
    assert strips[0]["first_row"] == 2048
    assert sum(len(strip["tokens"]) for strip in strips) == 1024
    store.test.button(key="store.later").click()
    store.run()
    assert store.address == {"store": "stdlib", "row": "3072"}


def test_a_growing_store_says_so_and_shows_what_is_there(screen: Open) -> None:
    store = screen("store", store="growing")
    assert "2,048 of" in store.notices[0] and "`dictlearn harvest`" in store.notices[0]
    assert store.table()[0][4:] == ["not yet"] * 5
    assert store.payloads["store.passages"]["groups"]


def test_runs_are_laid_over_one_another(screen: Open) -> None:
    runs = screen("runs")
    assert [run["name"] for run in runs.payloads["runs.curves"]["runs"]] == [
        "sae",
        "sae-wide",
        "training",
        "transcoder-2",
    ]
    final = {row[0]: row[1:] for row in runs.table(1)}
    assert final["explained variance"] == ["0.8000", "0.6000"]
    differences = {row[0]: row[1:] for row in runs.table(2)}
    assert differences["dictionary.k"] == ["8", "12", "8", "6"]


def test_chosen_runs_alone_are_compared(screen: Open) -> None:
    runs = screen("runs", runs="sae,sae-wide", x="step")
    assert [run["name"] for run in runs.payloads["runs.curves"]["runs"]] == ["sae", "sae-wide"]
    assert runs.payloads["runs.curves"]["x_label"] == "steps"


def make_sweep(workspace: Path, count: int) -> list[str]:
    """Copies of a finished run as members of the sweep "widths"; the last has stopped, the one before was killed."""
    names = [f"widths-seed{seed}" for seed in range(count)]
    for seed, name in enumerate(names):
        folder = Path(shutil.copytree(workspace / "runs" / "sae", workspace / "runs" / name))
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {"name": name, "seed": seed, "sweep": "widths"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in names[-2:]:
        shutil.rmtree(workspace / "runs" / name / "dictionary")
    with (workspace / "runs" / names[-1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "stopped": "The loss of widths is not finite."}\n')
    return names


@pytest.mark.parametrize("count", [3, 9])
def test_the_runs_of_a_sweep_are_chosen_together(screen: Open, own: Path, count: int) -> None:
    names = make_sweep(own, count)
    runs = screen("runs", workspace=own)
    runs.test.selectbox(key="runs.sweep").select("widths")
    runs.run()
    assert runs.address == {"sweep": "widths"}
    assert sorted(run["name"] for run in runs.payloads["runs.curves"]["runs"]) == names
    assert runs.test.multiselect(key="runs.names").options == names
    states = {row[0]: row[5] for row in runs.table()}
    assert states[names[0]] == "finished"
    assert states[names[-2]] == "interrupted, at step 400 of 400"
    assert states[names[-1]] == "stopped after step 400 of 400"
    assert runs.notices == ["The loss of widths is not finite."]
    commands = [block["text"] for block in runs.blocks("command")]
    assert commands == [f"dictlearn train {own}/sweeps/widths/sweep.yaml --workspace {own}"]
    differences = runs.table(2)
    if count == 3:
        assert differences == [["seed", "0", "1", "2"]]
    else:
        assert [line[:2] for line in differences] == [[name, str(seed)] for seed, name in enumerate(names)]
        assert all(float(fvu) > 0 and float(l0) > 0 for _, _, fvu, l0, _ in differences)


def test_one_run_of_a_sweep_can_be_looked_at(screen: Open, own: Path) -> None:
    names = make_sweep(own, 3)
    runs = screen("runs", workspace=own, sweep="widths", runs=names[1])
    assert [run["name"] for run in runs.payloads["runs.curves"]["runs"]] == [names[1]]


def test_a_sweep_that_is_not_there_is_said_and_all_runs_are_shown(screen: Open, tiny: Path) -> None:
    runs = screen("runs", sweep="widths")
    assert runs.notices == ["No run of this workspace belongs to a sweep 'widths'; all runs are shown."]
    assert len(runs.payloads["runs.curves"]["runs"]) == 4


def test_a_run_that_is_training_says_where_it_is(screen: Open, own: Path) -> None:
    runs = screen("runs", workspace=own)
    cells = {row["cells"][0]["text"]: row["cells"][5] for row in runs.blocks("table")[0]["rows"]}
    assert cells["training"] == "interrupted, at step 170 of 400"
    with training(Workspace(own).run("training")):
        runs.run()
        cells = {row["cells"][0]["text"]: row["cells"][5] for row in runs.blocks("table")[0]["rows"]}
        assert cells["training"]["text"] == "training, at step 170 of 400"
        assert re.fullmatch(r"3\d,\d{3} tokens/s, 2[0-9] s left", cells["training"]["sub"])
        home = screen("home", workspace=own)
        about = {row[0]: (row[1], row[3]) for row in home.table(1)}["training"]
        assert about[0].endswith("; training, at step 170") and about[1] == ""


def test_without_steps_in_its_configuration_a_run_takes_one_pass(screen: Open, own: Path) -> None:
    file = own / "runs" / "training" / "config.yaml"
    config = yaml.safe_load(file.read_text()) | {"steps": None, "batch_size": 100}
    file.write_text(yaml.safe_dump(config))
    rows = sum(stop - start for start, stop in open_store(own / "stores" / "stdlib.zarr").split_rows("train"))
    state = {row[0]: row[5] for row in screen("runs", workspace=own).table()}["training"]
    assert state == f"interrupted, at step 170 of {rows // 100}"
    file.write_text(yaml.safe_dump(config | {"row_filter": {"max_norm_ratio": 3.0}}))
    state = {row[0]: row[5] for row in screen("runs", workspace=own).table()}["training"]
    assert state == "interrupted, at step 170"


def test_features_are_listed_with_links_to_their_pages(screen: Open) -> None:
    features = screen("features", index="sae", sort="density")
    block = features.blocks("table")[0]
    assert len(block["rows"]) == 100
    assert block["rows"][0]["href"].startswith("feature?index=sae&latent=")
    assert [column["sorted"] for column in block["columns"] if column.get("sorted")] == ["descending"]
    assert block["columns"][3]["href"] == "features?index=sae&sort=density&ascending=1"


def test_a_search_is_written_to_the_address(screen: Open) -> None:
    features = screen("features", index="sae", page="2")
    features.test.text_input(key="features.search").input("import")
    features.run()
    assert features.address == {"index": "sae", "search": "import"}
    assert 0 < len(features.blocks("table")[0]["rows"]) < 100


def test_a_feature_page_shows_its_numbers_and_examples(screen: Open) -> None:
    feature = screen("feature", index="sae", latent="5")
    assert feature.title == "Latent 5"
    strips = feature.payloads["feature.strips"]
    top = strips["groups"][0]["strips"][0]
    assert strips["groups"][0]["title"] == "Largest activations" and len(strips["groups"]) == 6
    assert top["values"][top["peak"]] == pytest.approx(strips["scale"], abs=1e-3)
    assert feature.facts["max"] == top["head"]
    assert top["href"].startswith("store?store=stdlib&row=")
    histogram = feature.blocks("histogram")[0]
    assert sum(histogram["counts"]) == int(feature.facts["fires in"].split()[0].replace(",", ""))


def test_the_neurons_of_a_latent_are_listed_where_there_are_any(tiny: Path) -> None:
    """Of mlp.hook_post, which the tiny store has not."""
    from dictlearn.feature_index.index import open_index
    from dictlearn.feature_index.read import Neuron, feature_page
    from dictlearn_app.links import FeatureLink
    from dictlearn_app.screens import feature

    page = feature_page(open_index(tiny / "indexes" / "sae.zarr"), 5)
    assert feature.neurons(page) == []
    of_neurons = replace(page, neurons=(Neuron(31, -0.8), Neuron(2, 0.5)))
    _, note, table = feature.neurons(of_neurons)
    assert "89.0% of the row's squared length" in json.dumps(note)
    cells = [row["cells"] for row in table["rows"]]
    assert cells == [["31", {"text": "-0.80", "bar": -0.8}], ["2", {"text": "+0.50", "bar": 0.5}]]
    assert table in feature.side(of_neurons, FeatureLink(index="sae", latent=5))


def test_the_next_feature_is_a_new_address(screen: Open) -> None:
    feature = screen("feature", index="sae", latent="5")
    feature.test.button(key="feature.next").click()
    feature.run()
    assert feature.address == {"index": "sae", "latent": "6"} and feature.title == "Latent 6"
    last = screen("feature", index="sae", latent="255")
    assert last.test.button(key="feature.next").disabled


def test_without_a_latent_the_page_shows_one_that_is_not_dense(screen: Open) -> None:
    feature = screen("feature", index="sae")
    assert feature.title.startswith("Latent ") and float(feature.facts["density"].rstrip("%")) <= 5


def test_recognisable_features_say_which_token_explains_them(screen: Open) -> None:
    features = screen("features", index="sae", show="recognisable")
    assert features.test.selectbox(key="features.show").value == "recognisable"
    cells = [row["cells"][1] for row in features.blocks("table")[0]["rows"]]
    assert cells and all("on held-out rows" in cell["title"] for cell in cells)


def test_a_note_is_kept_and_listed(screen: Open, own: Path) -> None:
    feature = screen("feature", workspace=own, index="sae", latent="5")
    field = next(widget for widget in feature.test.text_input if widget.key.startswith("feature.note"))
    field.input("**fires** on <b>dots</b>")
    feature.run()
    assert (own / "notes.sqlite").exists()
    assert [toast.value for toast in feature.test.toast] == ["Note kept"]
    listed = screen("features", workspace=own, index="sae", search="fires** on")
    assert [(row[0], row[-1]) for row in listed.table()] == [("5", "**fires** on <b>dots</b>")]


def test_a_note_that_cannot_be_kept_stays_in_its_field(screen: Open, own: Path) -> None:
    feature = screen("feature", workspace=own, index="sae", latent="5")

    def field() -> Any:
        return next(widget for widget in feature.test.text_input if widget.key.startswith("feature.note"))

    (own / "notes.sqlite").write_bytes(b"this is no database" * 100)
    field().input("dots")
    feature.run()
    assert [toast.value for toast in feature.test.toast] == []
    assert feature.notices == [
        f"The note is not kept. The notes in '{own}/notes.sqlite' cannot be used (file is not a database); restore "
        "the file, or move it away and begin anew."
    ]
    assert field().value == "dots"
    (own / "notes.sqlite").unlink()
    field().input("dots, again")
    feature.run()
    assert [toast.value for toast in feature.test.toast] == ["Note kept"]
    assert (feature.notices, field().value) == ([], "dots, again")


def test_every_widget_has_what_it_shows_as_its_default_too(screen: Open) -> None:
    """The browser has a widget's default before it is told any other value, and may send it at once."""
    shown = {
        "features": {"index": "sae", "search": "e", "show": "all", "most": "0.5"},
        "feature": {"index": "sae", "latent": "7", "wrapped": "1"},
        "store": {"store": "stdlib", "row": "2000"},
        "runs": {"runs": "sae", "x": "seconds"},
    }
    seen = set()
    for name, asked in shown.items():
        test = screen(name, **asked).test
        for box in test.selectbox:
            assert box.options[box.proto.default] == box.value or box.proto.default == box.index
        for number in test.number_input:
            assert number.proto.default == number.value
        for field in test.text_input:
            assert field.proto.default == field.value
        for switch in test.toggle:
            assert switch.proto.default == switch.value
        for several in test.multiselect:
            assert [several.options[i] for i in several.proto.default] == several.value
        seen |= {type(widget).__name__ for kind in KINDS for widget in getattr(test, kind)}
    assert len(seen) == len(KINDS)


KINDS = ("selectbox", "number_input", "text_input", "toggle", "multiselect")


def test_a_circuit_shows_scores_beside_their_nulls_and_the_residues(screen: Open) -> None:
    circuit = screen("circuit", graph="import-sys")
    scores = circuit.blocks("table")[0]
    assert [column["label"] for column in scores["columns"]][1:] == [
        "this graph",
        "untrained transcoders",
        "permuted decoder rows",
    ]
    residues = circuit.blocks("table")[2]
    assert [column["label"] for column in residues["columns"]][3:] == ["bias", "left out by pruning"]
    assert residues["rows"][0]["cells"][0]["href"].startswith("circuit?graph=import-sys&node=logit")
    assert circuit.notices == []


def test_a_pinned_feature_shows_its_examples(screen: Open, tiny: Path) -> None:
    nodes = json.loads((tiny / "graphs" / "import-sys.json").read_text())["nodes"]
    node = next(node for node in nodes if node["kind"] == "feature" and node["kept"])
    circuit = screen("circuit", graph="import-sys", node=node["id"])
    assert circuit.payloads["circuit.graph"]["pinned"] == node["id"]
    assert f"latent {node['latent']} of layer 2" in circuit.payloads["circuit.strips"]["groups"][0]["title"]


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_empty_workspace_is_one_sentence_and_a_command(screen: Open, tmp_path: Path, name: str) -> None:
    empty = screen(name, workspace=tmp_path)
    assert len(empty.notices) == 1
    assert empty.blocks("command")[0]["text"].startswith("dictlearn ")


@pytest.mark.parametrize(
    ("name", "parameter", "verb"),
    [
        ("store", "store", "harvest"),
        ("features", "index", "index"),
        ("feature", "index", "index"),
        ("circuit", "graph", "circuit"),
        ("runs", "runs", "train"),
        ("compare", "store", "train"),
        ("compare", "hooks", "train"),
    ],
)
def test_a_name_that_is_not_there_is_said_and_not_replaced(screen: Open, name: str, parameter: str, verb: str) -> None:
    asked = screen(name, **{parameter: "<b>nowhere</b>"})
    assert len(asked.notices) == 1
    assert "'<b>nowhere</b>'" in asked.notices[0] and f"`dictlearn {verb}`" in asked.notices[0]


def test_a_latent_beyond_the_last_names_the_range(screen: Open) -> None:
    lost = screen("feature", index="sae", latent="5000")
    assert lost.notices == ["There is no latent 5000 in the index 'sae': it has 256, numbered 0 to 255."]
    lost.test.number_input(key="feature.other").set_value(7)
    lost.run()
    assert lost.title == "Latent 7"


def test_a_node_that_is_not_in_the_graph_is_said(screen: Open) -> None:
    assert "has no node 'feature/9/9/9'" in screen("circuit", graph="import-sys", node="feature/9/9/9").notices[0]


# --- what is damaged --------------------------------------------------------------------------------------------------


def test_a_damaged_index_is_named_and_the_rest_works(screen: Open, own: Path) -> None:
    (own / "indexes" / "sae.zarr" / "zarr.json").write_text("{}")
    for name in ("features", "feature"):
        damaged = screen(name, workspace=own, index="sae")
        assert (
            len(damaged.notices) == 1 and "sae.zarr" in damaged.notices[0] and "dictlearn index" in damaged.notices[0]
        )
        assert screen(name, workspace=own, index="transcoder-2").notices == []
    home = screen("home", workspace=own)
    assert "sae.zarr" in home.table(2)[0][1]


def test_a_damaged_store_is_named_and_the_rest_works(screen: Open, own: Path) -> None:
    file = own / "stores" / "stdlib.zarr" / "zarr.json"
    file.write_text(file.read_text().replace('"rows":', '"rows" :', 1).replace("float32", "float16", 1))
    damaged = screen("store", workspace=own, store="stdlib")
    assert len(damaged.notices) == 1 and "is damaged" in damaged.notices[0]
    assert screen("store", workspace=own, store="growing").payloads["store.passages"]["groups"]
    feature = screen("feature", workspace=own, index="sae", latent="5")
    assert feature.payloads["feature.strips"]["groups"][0]["strips"][0]["href"] is None


def test_an_index_whose_store_is_gone_says_so_and_shows_its_features(screen: Open, own: Path) -> None:
    shutil.rmtree(own / "stores" / "stdlib.zarr")
    features = screen("features", workspace=own, index="sae")
    assert "There is no store 'stdlib'" in features.notices[0]
    assert len(features.blocks("table")[0]["rows"]) == 100


def test_an_index_of_a_run_that_was_trained_again_says_so(screen: Open, own: Path) -> None:
    weights = "dictionary/dictionary.safetensors"
    shutil.copy(own / "runs" / "sae-wide" / weights, own / "runs" / "sae" / weights)
    features = screen("features", workspace=own, index="sae")
    assert features.notices == [
        "The run 'sae' has been trained again since it was indexed; make the index again with `dictlearn index sae`."
    ]


def test_a_damaged_run_costs_its_own_part(screen: Open, own: Path) -> None:
    (own / "runs" / "sae" / "evaluation.json").write_text("{")
    runs = screen("runs", workspace=own)
    assert len(runs.notices) == 1 and "evaluation.json" in runs.notices[0]
    assert len(runs.payloads["runs.curves"]["runs"]) == 4


def test_a_damaged_graph_is_one_sentence(screen: Open, own: Path) -> None:
    file = own / "graphs" / "import-sys.json"
    file.write_text(file.read_text()[:500])
    damaged = screen("circuit", workspace=own)
    assert len(damaged.notices) == 1 and "`dictlearn circuit`" in damaged.notices[0]


def test_a_graph_without_an_index_names_the_command(screen: Open, own: Path) -> None:
    shutil.rmtree(own / "indexes" / "transcoder-2.zarr")
    circuit = screen("circuit", workspace=own)
    assert circuit.notices == [
        "The run 'transcoder-2' has no feature index, so the features of layer 2 have no pages; "
        f"make one with `dictlearn index transcoder-2 --workspace {own}`."
    ]
    assert circuit.payloads["circuit.graph"]["nodes"]


def test_a_graph_of_another_dictionary_than_the_indexed_one_has_no_pages(screen: Open, own: Path) -> None:
    file = own / "graphs" / "import-sys.json"
    graph = json.loads(file.read_text())
    layers = [record["layer"] for record in graph["transcoders"]]
    for record in graph["transcoders"]:
        made = IndexManifest.read(own / "indexes" / f"{record['run']}.zarr").made_from
        same = record["layer"] != layers[-1]
        record["dictionary_fingerprint"] = made.dictionary_fingerprint if same else "sha256:before"
    file.write_text(json.dumps(graph))
    circuit = screen("circuit", workspace=own)
    (notice,) = circuit.notices
    assert "has been trained again since this graph was traced" in notice and f"of layer {layers[-1]} have no" in notice


def test_a_model_that_is_gone_costs_the_text_of_a_store_alone(screen: Open, own: Path, monkeypatch) -> None:
    from activation_store.errors import UserError
    from dictlearn_app import loading

    def gone(model: str) -> None:
        raise UserError(f"There is no model {model!r}.")

    monkeypatch.setattr(loading, "token_texts", gone)
    store = screen("store", workspace=own, store="stdlib")
    assert "There is no model" in store.notices[-1]
    assert len(store.table()) == 3


def test_strange_files_in_the_workspace_do_no_harm(screen: Open, own: Path) -> None:
    (own / "runs" / ".DS_Store").write_text("")
    (own / "runs" / "a b").mkdir()
    (own / "stores" / "file.zarr").write_text("")
    home = screen("home", workspace=own)
    assert len(home.table(1)) == 6
    assert screen("runs", workspace=own).payloads["runs.curves"]["runs"]
