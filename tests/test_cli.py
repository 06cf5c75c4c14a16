"""The command line as a user meets it: one sentence and exit code 2 for a mistake, within a second, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WATCHED = ("torch", "transformers", "transformer_lens", "streamlit", "sklearn", "datasets")


def dictlearn(*args: str, cwd: Path) -> tuple[int, str, str, list[str], float]:
    """Run the command in a process of its own: exit code, stdout, stderr, heavy modules it imported, seconds of CPU.

    CPU seconds and not the wall's: the machine may be busy, the promise is about what the command does.
    """
    program = (
        "import sys, json, time\n"
        "from dictlearn.cli import main\n"
        "code = 0\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code or 0\n"
        f"heavy = [name for name in {WATCHED!r} if name in sys.modules]\n"
        "sys.stderr.write('\\nREPORT' + json.dumps([code, heavy, time.process_time()]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    complaint, _, report = result.stderr.partition("\nREPORT")
    assert report, result.stderr
    code, heavy, seconds = json.loads(report)
    return code, result.stdout, complaint.strip(), heavy, seconds


MISTAKES = {
    "unknown verb": (["frobnicate"], "There is no verb 'frobnicate'; the verbs are demo, harvest"),
    "unknown hook": (
        ["harvest", "--hooks", "blocks.1.hook_resid_pots", "--store", "x"],
        "blocks.1.hook_resid_post",
    ),
    "layer that is not there": (["harvest", "--hooks", "blocks.40.hook_resid_post", "--store", "x"], "blocks.40"),
    "unknown model": (["harvest", "--model", "nowhere/nothing", "--hooks", "h", "--store", "x"], "nowhere/nothing"),
    "corpus that is not there": (
        ["harvest", "--corpus", "no/such.txt", "--hooks", "blocks.1.hook_resid_post", "--store", "x"],
        "no/such.txt",
    ),
    "context too long": (
        ["harvest", "--context", "100000", "--hooks", "blocks.1.hook_resid_post", "--store", "x"],
        "100000",
    ),
    "store that is not there": (
        ["train", "--name", "a", "--store", "nope", "--hook", "h"],
        "There is no store 'nope': the workspace 'workspace' holds no store yet. Harvest one with `dictlearn harvest`.",
    ),
    "configuration that is not there": (["train", "a.yaml"], "There is no configuration file 'a.yaml'."),
    "unknown kind": (
        ["train", "--kind", "tokp", "--name", "a"],
        "no dictionary of kind 'tokp'; the kinds are abstopk, batchtopk, ",
    ),
    "run that is not there": (["evaluate", "nope"], "There is no run 'nope'"),
    "index of nothing": (["index", "nope"], "There is no run 'nope'"),
    "feature of nothing": (["show", "nope", "1"], "There is no index 'nope'"),
    "store to look into": (["store", "info", "nope"], "There is no store 'nope'"),
    "circuit of nothing": (["circuit", "--prompt", "a", "--transcoder", "nope"], "There is no run 'nope'"),
    "steering of nothing": (["steer", "nope", "1", "--prompt", "a"], "There is no run 'nope'"),
    "dry run of what has none": (["evaluate", "nope", "--dry-run"], "`dictlearn evaluate` has no dry run"),
    "dry run of the app": (["app", "--dry-run"], "`dictlearn app` has no dry run"),
    "dry run of a page": (["show", "nope", "1", "--dry-run"], "`dictlearn show` has no dry run"),
    "app without workspace": (["app"], "There is no workspace"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(mistake, tmp_path):
    args, sentence = MISTAKES[mistake]
    code, _, complaint, heavy, seconds = dictlearn(*args, cwd=tmp_path)
    assert code == 2
    assert sentence in complaint
    assert "Traceback" not in complaint and len(complaint.splitlines()) == 1, complaint
    assert heavy == []
    assert seconds < 3  # of CPU; about 0.7 on a quiet machine, most of it numpy and tyro
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_a_refusal_was_raised(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "dictlearn.cli", "evaluate", "nope", "--debug"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "Traceback" in result.stderr and "There is no run 'nope'" in result.stderr


@pytest.mark.parametrize("verb", ["demo", "harvest", "train", "evaluate", "index", "show", "circuit", "steer", "app"])
def test_a_verb_offers_only_what_it_does(verb, tmp_path):
    _, out, *_ = dictlearn(verb, "--help", cwd=tmp_path)
    assert ("--dry-run" in out) is (verb in ("harvest", "train", "index"))
    assert ("--json" in out) is (verb not in ("demo", "app"))


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"]])
def test_help_and_version_answer_without_torch(args, tmp_path):
    code, out, complaint, heavy, _ = dictlearn(*args, cwd=tmp_path)
    assert (code, complaint, heavy) == (0, "", [])
    assert "harvest" in out or out.strip()[0].isdigit()


@pytest.mark.parametrize(
    "verb", ["demo", "harvest", "train", "evaluate", "index", "show", "circuit", "steer", "app", "store"]
)
def test_every_verb_explains_each_of_its_options(verb, tmp_path):
    code, out, _, heavy, _ = dictlearn(verb, "--help", cwd=tmp_path)
    assert code == 0 and heavy == []
    assert "--workspace" in out


def test_the_dry_run_of_a_harvest_says_rows_and_bytes_and_makes_nothing(tmp_path):
    corpus = tmp_path / "text"
    corpus.mkdir()
    (corpus / "a.txt").write_text("def f(x):\n    return x\n" * 50)
    args = ["--hooks", "blocks.1.hook_resid_post", "--store", "s", "--corpus", str(corpus), "--tokens", "100", "--json"]
    code, out, complaint, heavy, _ = dictlearn("harvest", *args, "--dry-run", cwd=tmp_path)
    assert code == 0, complaint
    plan = json.loads(out)
    assert plan["rows"] == 100 and plan["bytes_on_disk"] >= 100 * 256 * 2
    assert heavy == []
    assert not (tmp_path / "workspace").exists()
