"""`dictlearn store`: what a person sees, what a program reads, and what is refused.

The work itself is tested beside `activation_store`; here it is reached by name, path and URL, and drawn.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from activation_store.harvest.language_model import load_tokenizer, resolve_model, tokenizer_fingerprint
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import assert_same_files
from activation_store.writer import StoreWriter
from dictlearn import cli, store_commands, terminal
from dictlearn.workspace import Workspace
from tests.activation_store.test_saelens_cache import HOOK as CACHED_HOOK
from tests.activation_store.test_saelens_cache import activations, tokens, write_cache
from tests.test_cli import dictlearn

HOOKS = (HookSpec("blocks.0.hook_resid_post", (8,), "bfloat16"), HookSpec("blocks.1.attn.hook_z", (2, 3), "float32"))
SOURCE = 'class Reader:\n    def __init__(self, stream):\n        self.stream = stream  # the "naïve" one\n' * 6


@pytest.fixture(scope="module")
def made_from():
    """Provenance and token ids of the bundled model."""
    spec = resolve_model("bundled")
    tokenizer = load_tokenizer(spec)
    provenance = {
        "model": spec.provenance(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "corpus": {"name": "stdlib"},
    }
    return provenance, np.array(tokenizer.encode(SOURCE, add_special_tokens=False).ids)


def write_store(path, provenance, token_ids, ids=("lib/a.py", "lib/b.py"), hooks=HOOKS, seed=0, stop=False):
    """A store of a document of the same text for each id, the last held out; ``stop`` leaves before that one."""
    n = len(token_ids)
    documents = [DocumentRows(id_, "held-out" if i == len(ids) - 1 else "train", i * n, n) for i, id_ in enumerate(ids)]
    plan = StorePlan(n * len(ids), documents, {"bos": 3}, {"context": 64, "bos_token_id": 0, "seed": seed})
    with StoreWriter(path, plan, hooks, Geometry(16, 64), provenance) as writer:
        for i in range(len(ids) - stop):
            rows = {
                hook.name: np.random.default_rng(seed).integers(0, 9, (n, *hook.shape)).astype(hook.array.carrier)
                for hook in hooks
            }
            writer.append(rows, token_ids, np.arange(n) % 63 + 1, np.full(n, i))
        if not stop:
            writer.finish()
    return path


@pytest.fixture
def workspace(tmp_path, made_from, monkeypatch):
    """One with the store "code", and it is where we are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.console, "_width", 200)
    write_store(Workspace().store("code"), *made_from)
    return Workspace()


def run(capsys, *args):
    """(exit code, stdout, stderr) of ``dictlearn store ...``, in this process."""
    code = 0
    capsys.readouterr()
    try:
        cli.main(["store", *map(str, args)])
    except SystemExit as stop:
        code = stop.code
    out, complaint = capsys.readouterr()
    return code, out, complaint


def result(capsys, *args):
    code, out, complaint = run(capsys, *args, "--json")
    assert code == 0, complaint
    return json.loads(out)


def refusal(capsys, *args):
    code, _, complaint = run(capsys, *args)
    assert code == 2 and complaint.count("\n") == 1, complaint
    return complaint.strip()


# --- in general -------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_every_verb_explains_its_options(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, verb in store_commands.VERBS.items():
        assert f"  {name} " in out and verb.words in out
        code, help_, _ = run(capsys, name, "--help")
        assert code == 0 and f"usage: dictlearn store {name} " in help_
        assert "--dry-run" not in help_  # there is none
        assert " ".join(verb.config.__doc__.split()) in " ".join(help_.split())


def test_an_unknown_verb_is_answered_with_those_there_are(capsys):
    words = "There is no verb 'inof' of `dictlearn store`; there are info, verify, sample, merge, rm, to-hdf5, from-"
    assert words in refusal(capsys, "inof", "code")


@pytest.mark.parametrize(
    "args",
    [
        ["info", "nope"],
        ["verify", "nope"],
        ["sample", "nope"],
        ["merge", "nope", "code", "--into", "x"],
        ["rm", "nope"],
        ["to-hdf5", "nope", "a.h5"],
    ],
)
def test_a_store_that_is_not_there_is_refused_by_name(workspace, capsys, args):
    assert "There is no store 'nope' in 'workspace'; did you mean code?" in refusal(capsys, *args)


def test_stores_are_named_by_path_too(workspace, capsys):
    assert result(capsys, "info", "workspace/stores/code.zarr")["description"]["rows"] > 0
    assert run(capsys, "to-hdf5", "./workspace/stores/code.zarr", "a.h5")[0] == 0
    assert run(capsys, "from-hdf5", "a.h5", "elsewhere/b.zarr")[0] == 0
    assert_same_files(Workspace().root / "../elsewhere/b.zarr", Workspace().store("code"))


def test_a_url_is_passed_on_as_it_is():
    url = "s3://bucket/a folder/name"
    assert Workspace().existing_store(url) == Workspace().store_location(url) == url


@pytest.mark.parametrize("name", ["info", "sample", "verify"])
def test_looking_into_a_store_loads_no_torch(workspace, name):
    code, out, complaint, heavy, _ = dictlearn("store", name, "code", cwd=workspace.root.absolute().parent)
    assert (code, complaint, heavy) == (0, "", []) and "code.zarr" in out


# --- info and verify --------------------------------------------------------------------------------------------------


def test_info_shows_what_is_inside(workspace, capsys):
    _, out, _ = run(capsys, "info", "code")
    store = open_store(workspace.store("code"))
    lines = {line.split("│")[0].strip(): line.split("│")[-1].strip() for line in out.splitlines() if "│" in line}
    assert (lines["model"], lines["corpus"], lines["rows"]) == ("bundled", "stdlib", f"{store.rows:,}")
    assert lines["train rows"] == f"{store.rows // 2:,} of 1 documents"
    assert lines["left out: bos"] == "3 tokens"
    for hook, shape in zip(HOOKS, ("8", "2 x 3"), strict=True):
        cells = [cell.strip() for cell in next(line for line in out.splitlines() if hook.name in line).split("│")]
        statistics = store.statistics(hook.name)
        assert cells[:3] == [hook.name, shape, hook.dtype]
        assert cells[4:] == [f"{statistics.mean_norm:.4g}", f"{statistics.median_norm:.4g}"]
    assert "It begins: class Reader:↵    def __init__(self, stream):↵" in out


def test_info_for_programs_has_the_same(workspace, capsys):
    found = result(capsys, "info", "code")
    assert found["description"]["fingerprint"] == open_store(workspace.store("code")).fingerprint
    assert found["description"]["hooks"][1]["shape"] == [2, 3]
    assert found["beginning"].startswith("class Reader:↵")


def test_info_counts_norm_outliers_by_hook(workspace, capsys, made_from):
    rows = np.ones((100, 4), np.float32)
    rows[[3, 50]] *= 1000
    with StoreWriter(
        workspace.store("odd"),
        StorePlan(100, [DocumentRows("a", "train", 0, 100)]),
        [HookSpec("h", (4,), "float32")],
        Geometry(10, 50),
        {},
    ) as writer:
        writer.append({"h": rows}, *[np.zeros(100, int)] * 3)
        writer.finish()
    out = run(capsys, "info", "odd")[1]
    assert "norm over 10 x the median │" in out and "2 rows of h" in out
    assert "unknown" in out and "It begins" not in out  # nobody says of which model the tokens are


def test_info_of_a_growing_store_says_so(workspace, capsys, made_from):
    write_store(workspace.store("growing"), *made_from, ids=("a", "b", "c"), stop=True)
    store = open_store(workspace.store("growing"))
    out = run(capsys, "info", "growing")[1]
    assert 0 < store.rows < 2 * len(made_from[1])
    assert f"{store.rows:,} of {3 * len(made_from[1]):,}, still growing or interrupted" in out
    assert "not yet" in out


def test_verify_names_the_damage_and_ends_with_2(workspace, capsys):
    assert "every shard and every metadata file is as it was written" in run(capsys, "verify", "code")[1]
    shard = workspace.store("code") / "token_ids" / "c.0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "The store 'code' is damaged: token_ids/c.0: does not match its checksum" in refusal(
        capsys, "verify", "code"
    )


# --- sample -----------------------------------------------------------------------------------------------------------


def test_a_sample_shows_each_token_in_its_text(workspace, capsys):
    drawn = result(capsys, "sample", "code", "--rows", 30, "--seed", 4)
    text = SOURCE.replace("\n", "↵")
    store = open_store(workspace.store("code"))
    assert len(drawn["rows"]) == 30 and drawn["no_text"] is None
    whole = 0
    for row in drawn["rows"]:
        shown = row["before"] + row["token"] + row["after"]
        whole += shown in text  # not, where the ï was cut in two
        assert row["token_id"] == store.token_ids(row["row"], row["row"] + 1)[0]
        assert row["document"] == ("lib/a.py" if row["row"] < store.rows // 2 else "lib/b.py")
        assert row["split"] == ("train" if row["row"] < store.rows // 2 else "held-out")
        assert row["norms"][HOOKS[1].name] == pytest.approx(
            np.linalg.norm(store.read_rows(HOOKS[1].name, row["row"], row["row"] + 1)), rel=1e-6
        )
    assert whole >= 20


def test_a_sample_is_drawn_for_people(workspace, capsys):
    drawn = result(capsys, "sample", "code", "--rows", 2, "--hook", HOOKS[0].name)["rows"]
    out = run(capsys, "sample", "code", "--rows", 2, "--hook", HOOKS[0].name)[1]
    for row in drawn:
        assert f"{row['row']:,}  {row['before']}⟦{row['token']}⟧{row['after']}" in out
        norm = f"{row['norms'][HOOKS[0].name]:.4g}"
        assert f"{row['document']} ({row['split']}), position {row['position']}; norm {norm}" in out
    assert f"norms at {HOOKS[0].name}." in out


def test_the_same_seed_draws_the_same_rows(workspace, capsys):
    def rows(seed):
        return [row["row"] for row in result(capsys, "sample", "code", "--seed", seed)["rows"]]

    assert rows(1) == rows(1) != rows(2)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"model": {"name": "(unknown)", "fingerprint": None}},
            "It is not known which language model the activations are of",
        ),
        ({"model": None}, "the store does not say which model its tokens are of"),
        ({"model": {"name": "/no/such/model", "fingerprint": None}}, "There is no model '/no/such/model'"),
        ({"tokenizer": "sha256:00"}, "the tokenizer of bundled is no longer the one that the store was made with"),
    ],
)
def test_without_the_tokenizer_tokens_are_numbers_and_the_reason_is_said(workspace, capsys, made_from, changed, reason):
    write_store(workspace.store("other"), made_from[0] | changed, made_from[1])
    drawn = result(capsys, "sample", "other", "--rows", 3)
    assert reason in drawn["no_text"]
    for row in drawn["rows"]:
        assert row["token"] == str(row["token_id"])
    assert f"Tokens are shown as numbers: {reason}" in run(capsys, "sample", "other")[1]


def test_impossible_samples_are_refused(workspace, capsys):
    assert "--rows is 0; it must be between 1 and 10,000" in refusal(capsys, "sample", "code", "--rows", 0)
    assert "blocks.0.hook_resid_pots is not among them" in refusal(
        capsys, "sample", "code", "--hook", "blocks.0.hook_resid_pots"
    )


# --- out and in -------------------------------------------------------------------------------------------------------


def test_hdf5_there_and_back(workspace, capsys):
    written = result(capsys, "to-hdf5", "code", "code.h5")
    assert written["file"] == "code.h5" and written["bytes"] > 1000
    made = result(capsys, "from-hdf5", "code.h5", "again")
    assert made["hooks"] == [hook.name for hook in HOOKS]
    assert_same_files(workspace.store("again"), workspace.store("code"))
    assert "code.h5 exists already and is not overwritten" in refusal(capsys, "to-hdf5", "code", "code.h5")


def test_somebody_elses_hdf5(workspace, capsys, tmp_path):
    with h5py.File("theirs.h5", "w") as opened:
        opened["acts"] = np.ones((50, 256), np.float32)
    hook = "blocks.1.hook_resid_post"
    made = result(capsys, "from-hdf5", "theirs.h5", "t", "--dataset", "acts", "--hook", hook, "--model", "bundled")
    assert (made["rows"], made["hooks"]) == (50, [hook])
    assert open_store(workspace.store("t")).provenance["model"] == resolve_model("bundled").provenance()
    row = result(capsys, "sample", "t", "--rows", 1)["rows"][0]
    assert (row["token"], row["position"]) == ("<unknown -1>", -1)
    assert "position" not in run(capsys, "sample", "t", "--rows", 1)[1]
    assert "theirs.h5 (hdf5)" in run(capsys, "info", "t")[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "acts"], "needs both --dataset (its path) and --hook"),
        (["--hook", "h"], "needs both --dataset (its path) and --hook"),
        (["--dtype", "float32"], "--dtype is for a dataset of somebody else's"),
        (["--compression", "zstd"], "--compression is for a dataset of somebody else's"),
        (["--dataset", "acts", "--hook", "h", "--model", "/no/model"], "There is no model '/no/model'"),
        (["--dataset", "acts", "--hook", "h", "--compression", "lz4"], "lz4"),
        ([], "it was not made by `dictlearn store to-hdf5`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(workspace, capsys, options, words):
    with h5py.File("theirs.h5", "w") as opened:
        opened["acts"] = np.ones((50, 4), np.float32)
    assert words in refusal(capsys, "from-hdf5", "theirs.h5", "t", *options)
    assert not workspace.store("t").exists()


def test_a_saelens_cache_becomes_a_store(workspace, capsys, tmp_path):
    write_cache(tmp_path / "cache", activations(), tokens())
    made = result(capsys, "from-saelens", "cache", "cached", "--model", "bundled", "--compression", "zstd")
    assert (made["rows"], made["hooks"]) == (150, [CACHED_HOOK])
    store = open_store(workspace.store("cached"))
    assert store.manifest.compression == "zstd" and store.provenance["model"]["name"] == "bundled"
    assert np.array_equal(store.read_rows(CACHED_HOOK, 0, 150), activations().reshape(150, -1))
    assert "cache (SAELens cached activations)" in run(capsys, "info", "cached")[1]


def test_what_needs_a_model_or_tokens_is_refused_of_a_store_that_has_none(workspace, capsys):
    """Trained on all the same: that takes rows alone."""
    with h5py.File("theirs.h5", "w") as opened:
        opened["acts"] = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    write_cache(Path("cache"), activations(80), tokens(80), hook="h")
    assert run(capsys, "from-hdf5", "theirs.h5", "rows", "--dataset", "acts", "--hook", "h")[0] == 0
    assert run(capsys, "from-saelens", "cache", "context")[0] == 0
    for store, of_evaluate, of_index in (
        ("rows", "'rows' has no text to run the language model on", "'rows' has no tokens: it was imported"),
        ("context", "It is not known which language model", "It is not known which language model"),
    ):
        small = ["--d-sae", "16", "--k", "2", "--steps", "2", "--batch-size", "64"]
        cli.main(["train", "--name", store, "--store", store, "--hook", "h", *small])
        for verb, words in (("evaluate", of_evaluate), ("index", of_index)):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                cli.main([verb, store])
            complaint = capsys.readouterr()[1]
            assert stop.value.code == 2 and words in complaint and complaint.count("\n") == 1
            assert ("--tokens 0 measures reconstruction alone" in complaint) == (verb == "evaluate")
        cli.main(["evaluate", store, "--tokens", "0"])
        assert "fvu" in capsys.readouterr()[0]


# --- merge ------------------------------------------------------------------------------------------------------------


def test_stores_are_merged_by_name(workspace, capsys, made_from):
    write_store(workspace.store("more"), *made_from, ids=("lib/c.py", "lib/d.py"), seed=1)
    made = result(capsys, "merge", "code", "more", "--into", "both")
    assert made["rows"] == 2 * open_store(workspace.store("code")).rows
    assert "code (" in run(capsys, "info", "both")[1]
    assert run(capsys, "verify", "both")[0] == 0


def test_what_does_not_fit_is_refused_unless_asked_for(workspace, capsys, made_from):
    write_store(workspace.store("more"), *made_from, seed=1)
    words = "2 documents of more are in a store before it too (lib/a.py, lib/b.py)"
    assert words in refusal(capsys, "merge", "code", "more", "--into", "both")
    assert run(capsys, "merge", "code", "more", "--into", "both", "--keep-repeated")[0] == 0
    assert "Merging takes two stores or more" in refusal(capsys, "merge", "code", "--into", "both")


# --- rm ---------------------------------------------------------------------------------------------------------------


def made_of(workspace, name, fingerprint, finished=True, store="code"):
    """A run of a store, as far as `rm` looks into it."""
    files = workspace.run(name)
    files.folder.mkdir(parents=True)
    files.config.write_text(yaml.safe_dump({"name": name, "store": store, "control_store": None}))
    if finished:
        files.dictionary.mkdir()
        description = {"version": 1, "kind": "topk", "config": {}, "d_in": 8, "d_out": 8}
        description["provenance"] = {"store": {"name": store, "fingerprint": fingerprint}}
        (files.dictionary / "dictionary.json").write_text(json.dumps(description))


def test_rm_says_what_would_be_lost_and_asks(workspace, capsys, monkeypatch):
    fingerprint = open_store(workspace.store("code")).fingerprint
    made_of(workspace, "sae", fingerprint)
    made_of(workspace, "half", fingerprint, finished=False)
    made_of(workspace, "half-of-another", fingerprint, finished=False, store="other")
    made_of(workspace, "of-an-earlier-code", "sha256:00")
    questions = []
    monkeypatch.setattr(terminal, "ask", lambda question: bool(questions.append(question)))
    code, out, complaint = run(capsys, "rm", "code")
    assert code == 2 and questions == ["Remove it?"]
    assert "code.zarr would be removed: " in out and f"rows of {HOOKS[0].name}, {HOOKS[1].name}." in out
    assert "The runs half, sae were made from it; they stay, and could not be made again." in out
    assert "Nothing was removed" in complaint and workspace.store("code").exists()
    monkeypatch.setattr(terminal, "ask", lambda question: True)
    assert "code.zarr was removed" in run(capsys, "rm", "code")[1]
    assert workspace.stores() == [] and not any((workspace.root / "stores").iterdir())


def test_rm_where_nobody_can_be_asked_needs_yes(workspace, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert "--yes removes without asking" in refusal(capsys, "rm", "code")
    assert open_store(workspace.store("code")).complete
    assert result(capsys, "rm", "code", "--yes")["lost"]["complete"] is True
    assert not workspace.store("code").exists()


@pytest.mark.parametrize(
    ("args", "interrupted", "words"),
    [
        (
            ["to-hdf5", "code", "a.h5"],
            "activation_store.hdf5.to_hdf5",
            "a.h5 was not made, and nothing was left behind",
        ),
        (["rm", "code"], "dictlearn.terminal.ask", "Nothing was removed: workspace/stores/code.zarr is as it was."),
        (["rm", "code", "--yes"], "activation_store.remove.remove", "the same command finishes removing workspace/"),
    ],
)
def test_ctrl_c_says_what_is_left(workspace, capsys, monkeypatch, args, interrupted, words):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    code, _, complaint = run(capsys, *args)
    assert code == 130 and words in complaint


def test_rm_finishes_what_an_interrupted_rm_began(workspace, capsys):
    path = workspace.store("code")
    path.rename(path.with_name("code.zarr.removed"))
    assert workspace.stores() == []
    assert "its removal was interrupted" in run(capsys, "rm", "code", "--yes")[1]
    assert not any(path.parent.iterdir())


def test_rm_knows_the_indexes(workspace, capsys, monkeypatch):
    from dictlearn.feature_index import spec

    class OfTheStore:
        class made_from:
            store = "code"
            store_fingerprint = open_store(workspace.store("code")).fingerprint

    workspace.index("sae").mkdir(parents=True)
    monkeypatch.setattr(spec.IndexManifest, "read", classmethod(lambda cls, path: OfTheStore))
    assert result(capsys, "rm", "code", "--yes")["indexes"] == ["sae"]


def test_rm_of_a_copy_costs_no_run_and_no_index(workspace, capsys, monkeypatch):
    from dictlearn.feature_index import spec

    class OfTheStore:
        class made_from:
            store = "code"
            store_fingerprint = open_store(workspace.store("code")).fingerprint

    shutil.copytree(workspace.store("code"), workspace.store("copy"))
    workspace.index("sae").mkdir(parents=True)
    monkeypatch.setattr(spec.IndexManifest, "read", classmethod(lambda cls, path: OfTheStore))
    assert result(capsys, "rm", "copy", "--yes")["indexes"] == []
    assert result(capsys, "rm", "code", "--yes")["indexes"] == ["sae"]


def test_a_question_is_answered_with_yes_only(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, yes in {"y": True, "YES": True, "": False, "n": False, "yeah": False}.items():
        monkeypatch.setattr("builtins.input", lambda answer=answer: answer)
        assert terminal.ask("Remove it?") is yes
    monkeypatch.setattr("builtins.input", lambda: (_ for _ in ()).throw(EOFError))
    assert terminal.ask("Remove it?") is False


def test_rm_leaves_other_folders_alone(workspace, capsys, tmp_path):
    shutil.copytree(workspace.store("code") / "token_ids", tmp_path / "folder")
    assert "is not an activation store: it is left alone" in refusal(capsys, "rm", "./folder", "--yes")
    assert any((tmp_path / "folder").iterdir())
