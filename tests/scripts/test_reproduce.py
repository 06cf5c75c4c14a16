"""The scripts that reproduce published claims fill the tables they promise, and the page shows what they wrote.

What the numbers are is not tested here: `--quick` measures next to nothing.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_tables import with_tables
from reproduction import Table, differences, figure, tabulate
from reproduction_tables import verdicts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproductions.md"
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts" / "reproduce").glob("*.py") if path.stem != "reproduction")


def quick(method: str, part: str, out: Path) -> dict:
    importlib.import_module(method).main(["--quick", "--part", part, "--out", str(out)])
    result = json.loads((out / f"{method}.json").read_text())
    assert {record["seed"] for record in result["records"]} == {0, 1} and set(result["commands"]) == {part}
    for header, *rows in result["tables"].values():
        assert rows and all(len(row) == len(header) and all(isinstance(cell, str) for cell in row) for row in rows)
    return result


def first_column(rows: list[list[str]]) -> list[str]:
    return [row[0] for row in rows[1:]]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_and_its_interval_over_seeds():
    # Student's t with two degrees of freedom: 4.3027; of 1, 2, 3 the deviation is 1.
    assert figure([1.0, 2.0, 3.0], 3) == "2.000 ± 2.484"
    assert figure([1.0, float("nan")]) == "1.000" and figure([]) == "-"


def test_differences_pair_the_seeds():
    records = [{"kind": kind, "seed": seed, "fvu": value} for kind, seed, value in
               [("a", 0, 3.0), ("b", 1, 10.0), ("a", 1, 11.0), ("b", 0, 1.0), ("a", 2, 5.0)]]  # fmt: skip
    assert differences(records, "fvu", {"kind": "a"}, {"kind": "b"}) == [2.0, 1.0]


def test_a_row_of_a_table_is_a_group_of_records():
    records = [{"kind": "a", "x": 1.0}, {"kind": "b"}, {"kind": "a", "x": 1.0}]
    assert tabulate(records, {"": "kind"}, {"x": ("x", 1)}) == Table(["", "x"], [["a", "1.0 ± 0.0"], ["b", "-"]])


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_k_sparse_autoencoders_stand_beside_pixels_and_a_dense_autoencoder(tmp_path):
    tables = quick("k_sparse", "digits", tmp_path)["tables"]
    assert first_column(tables["k-sparse digits"]) == [
        "pixels", "constant k", "constant k", "dense autoencoder", "falling k"
    ]  # fmt: skip
    assert first_column(tables["k-sparse digits alpha"]) == ["5", "10"]
    module = importlib.import_module("k_sparse")
    module.main(["--tabulate", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "k_sparse.json").read_text())["tables"] == tables


KINDS = ["TopK", "BatchTopK", "Matryoshka", "JumpReLU", "Gated", "ReLU"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("planted", KINDS),
        ("tree", [*KINDS[:3], "Matryoshka, groups as the trees' levels", *KINDS[3:]]),
        ("bundled", ["4"] * 6 + ["8"] * 6),
    ],
)
def test_the_family_has_a_row_for_every_kind(part, rows, tmp_path):
    tables = quick("sae_family", part, tmp_path)["tables"]
    assert first_column(tables[f"family {part}"]) == rows
    if part == "bundled":
        assert first_column(tables["family bundled over ReLU"]) == KINDS[:-1]


def test_trees_side_by_side_do_not_touch_each_other():
    import numpy as np
    from sae_family import Trees

    trees = Trees(seed=3)
    batch = trees.draw(0, 500)
    np.testing.assert_allclose(batch.x, batch.codes @ trees.directions, atol=1e-5)
    assert (trees.parents >= 0).sum() == 27 and trees.rates.sum() == pytest.approx(3 * 1.36)
    children = np.flatnonzero(trees.parents >= 0)
    assert (batch.codes[:, trees.parents[children]] != 0)[batch.codes[:, children] != 0].all()
    assert not np.array_equal(batch.codes[:, :20], batch.codes[:, 20:40])


@pytest.mark.heavy
def test_matching_pursuit_stands_beside_kinds_with_a_fixed_number(tmp_path):
    tables = quick("mp_sae", "tree", tmp_path / "tree")["tables"]
    assert [row[:2] for row in tables["mp tree"][1:]] == [["1", "MP-SAE"], ["3", "MP-SAE"], ["3", "BatchTopK"]]
    tables = quick("mp_sae", "bundled", tmp_path / "bundled")["tables"]
    rows = [[k, name] for name in ("MP-SAE", "TopK") for k in ("4", "8", "16")]
    assert [row[:2] for row in tables["mp bundled"][1:]] == rows
    assert tables["mp bundled over TopK"][0][1:] == ["k = 4", "k = 8", "k = 16"]
    sets = ["all atoms", "active together", "as many at random"]
    assert [row[:2] for row in tables["mp coherence"][1:]] == [[r, s] for r in ("1", "4") for s in sets]
    assert first_column(quick("mp_sae", "revive", tmp_path / "revive")["tables"]["mp revive"]) == ["0.0", "0.03", "0.3"]


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["planted", "bundled"])
def test_variational_autoencoders_stand_beside_topk(part, tmp_path):
    tables = quick("vsae", part, tmp_path)["tables"]
    posteriors = (
        ["no noise", "σ = 0.3", "σ = 1", "σ learned"] if part == "planted" else ["no noise", "σ = 1", "σ learned"]
    )
    assert first_column(tables[f"vsae {part}"]) == ["TopK", *(name for name in posteriors for _ in range(2))]
    assert first_column(tables[f"vsae {part} steps"]) == posteriors
    assert tables["vsae is topk"][1:] == [["2", "0, in every run"]]


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["easy", "hard", "variants", "nuisance", "images"])
def test_iterative_codebooks_stand_beside_topk(part, tmp_path):
    tables = quick("icfl", part, tmp_path)["tables"]
    kinds = ["ICFL", "ICFL without resets", "TopK", "TopK without AuxK"]
    if part == "easy":
        assert first_column(tables["icfl easy"]) == kinds
    elif part == "hard":
        rows = [row[:2] for row in tables["icfl hard"][1:]]
        assert rows == [[whitened, kind] for whitened in ("no", "yes") for kind in kinds]
    elif part == "variants":
        assert first_column(tables["icfl variants"]) == [
            "J = 4, L = 1", "J = 1, L = 4", "J = 2, L = 2, by inner product"
        ]  # fmt: skip
    else:
        for name in ("selectivity", "probe"):
            rows = [row[:2] for row in tables[f"icfl {part} {name}"][1:]]
            truth = [["the features themselves", ""]] if (part, name) == ("nuisance", "selectivity") else []
            assert rows == truth + [[kind, whitened] for kind in ("ICFL", "TopK") for whitened in ("yes", "no")]
    if part in ("easy", "hard"):
        starts = ["easy"] if part == "easy" else ["hard", "hard, whitened"]
        assert first_column(tables["icfl over TopK"]) == starts


@pytest.mark.heavy
def test_every_kind_without_the_usual_encoder_stands_in_one_table(tmp_path):
    tables = quick("on_models", "bundled", tmp_path)["tables"]
    kinds = ["TopK", "ICFL", "MP-SAE", "vSAE"]
    assert [row[1] for row in tables["models bundled"][1:]] == [*kinds, "TopK", "SNMF"]
    assert [row[1] for row in tables["models bundled reader"][1:]] == [*kinds, "TopK after one step", "TopK", "SNMF"]


@pytest.mark.heavy
def test_transcoders_stand_beside_the_linear_path(tmp_path):
    tables = quick("transcoder", "bundled", tmp_path)["tables"]
    kinds = ["linear path alone", "transcoder", "SAE of the output", "skip transcoder"]
    assert [row[1] for row in tables["transcoder bundled"][1:]] == kinds
    assert [row[1] for row in tables["transcoder bundled differences"][1:]] == [
        "transcoder minus SAE of the output", "skip transcoder minus transcoder"
    ]  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["planted", "bundled"])
def test_cross_layer_transcoders_stand_beside_those_of_each_layer(part, tmp_path):
    tables = quick("cross_layer", part, tmp_path)["tables"]
    kinds = ["cross-layer", "layer by layer"]
    if part == "planted":
        assert [row[:2] for row in tables["clt planted"][1:]] == [[s, k] for s in ("0.0", "1.0") for k in kinds]
    else:
        assert first_column(tables["clt bundled"]) == kinds


@pytest.mark.heavy
def test_crosscoders_of_a_change_stand_beside_those_of_none(tmp_path):
    tables = quick("crosscoder", "bundled", tmp_path)["tables"]
    changes = ["`self` became `this`"] * 2 + ["nothing (null)"] * 2
    assert [row[1] for row in tables["crosscoder changed"][1:]] == changes
    for row in tables["crosscoder norms"][1:]:
        shares = [float(cell.split(" ")[0]) for cell in row[3:]]
        assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.heavy
def test_directions_of_each_origin_are_detected_and_steered_by(tmp_path):
    tables = quick("steering", "bundled", tmp_path)["tables"]
    from steering import METHODS, TARGETS

    assert first_column(tables["steering detection"]) == METHODS
    rows = [[f"{kl:g}", method] for kl in TARGETS for method in METHODS]
    assert [row[:2] for row in tables["steering effect"][1:]] == rows
    assert first_column(tables["steering concepts"]) == ["numbers", "quotes"]
    missed = [float(row[-1].split(" ")[0]) for row in tables["steering effect"][1:]]
    assert max(missed) < 100  # a KL is hit at least for some concept


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--seeds", "3"], "An interval over 3 seeds says too little; give at least 5."),
        (["--tabulate"], "with records to make tables of; leave --tabulate out."),
        (["--part", "mnist"], "DICTLEARN_SHARED should name a folder with data/mnist/mnist_train.npz"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(asked, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DICTLEARN_SHARED", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as refused:
        importlib.import_module("k_sparse").main([*asked, "--out", str(tmp_path / "out")])
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert sentence in " ".join((said.out + said.err).split()) and "Traceback" not in said.err


# --- the page ---------------------------------------------------------------------------------------------------------


def test_tables_are_put_between_their_comments_and_nothing_else_changes(tmp_path):
    result, page = tmp_path / "x.json", tmp_path / "page.md"
    result.write_text(json.dumps({"tables": {"x": [["a", "b"], ["1", "2"]]}}))
    places = "before\n<!-- table: verdicts -->\n<!-- end -->\n<!-- table: x -->\nold\n<!-- end -->\nafter\n"
    items = "- **Reproduced on MNIST: it\n  rises.** By much.\n- **Reproduced in part: that too**, said the mole.\n"
    page.write_text(f"{places}## A k-sparse one\n{items}- **Not so, by the way.**\n- **Not reproduced: this,**\n")
    command = [sys.executable, "scripts/make/reproduction_tables.py", str(page), str(result)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    text = page.read_text()
    assert "<!-- table: x -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\nafter\n" in text
    found = "| [A k-sparse one](#a-k-sparse-one) | it rises (on MNIST) | that too | this |"
    assert f"|  | reproduced | partly | not reproduced |\n| --- | --- | --- | --- |\n{found}\n<!-- end -->" in text


def test_the_first_table_of_the_page_has_every_verdict_below_it():
    text = PAGE.read_text()
    assert with_tables(text, {"verdicts": lambda: verdicts(text)}) == text, (
        "run scripts/make/reproduction_tables.py docs/reproductions.md"
    )


@pytest.mark.parametrize("method", SCRIPTS)
def test_the_page_names_the_command_of_every_script(method):
    assert f"python scripts/reproduce/{method}.py" in PAGE.read_text()


def test_every_table_of_the_page_stands_between_comments():
    text = PAGE.read_text()
    places = re.findall(r"<!-- table: ([^>]+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert len(places) == text.count("<!-- table:") == text.count("<!-- end -->") > 4
    outside = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not [line for line in outside.splitlines() if line.startswith("|")]
    for name, inside in places:
        assert inside.startswith("| ") or inside.strip() == "not run", name


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("planted", ["all", "20", "10", "5", "3", "5", "5"]),
        ("hierarchy", ["random", "random", "kmeans", "kmeans"]),
        ("neurons", ["SNMF of 8 neurons, not trained", "SNMF of 8 neurons", "SNMF of 36 neurons"]),
    ],
)
def test_features_of_few_neurons_are_looked_for_in_planted_rows_and_a_model(part, rows, tmp_path):
    table = quick("snmf", part, tmp_path)["tables"][f"snmf {part}"]
    topk = ["TopK, k = 4", "TopK, k = 12"] if part == "neurons" else []
    assert first_column(table) == rows + topk
