"""`dictlearn steer`: what it refuses before anything loads, and what it finds and prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from activation_store.errors import UserError
from activation_store.harvest.language_model import load_tokenizer, resolve_model
from dictlearn.dictionaries.configs import CrosscoderConfig, TopKConfig
from dictlearn.dictionaries.crosscoder import Crosscoder
from dictlearn.dictionaries.files import save
from dictlearn.dictionaries.topk import TopK
from dictlearn.steering.command import SteerConfig, check, run_steer
from dictlearn.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
RESID, MLP = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def workspace(tiny_llama, tmp_path_factory) -> Workspace:
    """Runs: an SAE, one of resid_mid, one of two hooks, one of a model that changed, one unfinished, one of unknown
    origin; and two files of texts."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    model = resolve_model(str(tiny_llama)).provenance()

    def add(name: str, dictionary=None, **provenance) -> None:
        dictionary = dictionary or TopK(TopKConfig(d_sae=8, k=2), 24)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            dictionary.W_dec.copy_(torch.randn(dictionary.W_dec.shape, generator=generator))
        save(dictionary, workspace.run(name).dictionary, provenance)
        workspace.run(name).config.write_text(f"name: {name}\n")

    add("sae", hook_in=RESID, hook_out=RESID, model=model)
    add("mid", hook_in="blocks.1.hook_resid_mid", hook_out="blocks.1.hook_resid_mid", model=model)
    both = [RESID, MLP]
    add("both", Crosscoder(CrosscoderConfig(d_sae=8), (24, 24)), hook_in=both, hook_out=both, model=model)
    tuned = [RESID, f"tuned:{RESID}"]
    add(
        "aligned",
        Crosscoder(CrosscoderConfig(d_sae=8), (24, 24)),
        hook_in=tuned,
        hook_out=tuned,
        model=model | {"name": "another", "fingerprint": "sha256:1"},
        aligned_stores=[{"name": "elsewhere/tuned.zarr", "fingerprint": "sha256:2", "model": model}],
    )
    add("changed", hook_in=RESID, hook_out=RESID, model=model | {"fingerprint": "sha256:0"})
    add("silent")
    unfinished = workspace.run("unfinished")
    unfinished.folder.mkdir()
    unfinished.config.write_text("name: unfinished\n")
    (workspace.root / "with.txt").write_text("return x\n\nreturn value\n")
    (workspace.root / "without.txt").write_text("class Second\nsome words\n")
    (workspace.root / "empty.txt").write_text("\n")
    return workspace


def config(**changes) -> SteerConfig:
    asked = dict(run="sae", latent=3, prompt=("def first(x):",), kl=(0.002,), tokens=4)
    return SteerConfig(**asked | changes)


REFUSALS = {
    "no prompt": (dict(prompt=()), "No prompt was given"),
    "an empty prompt": (dict(prompt=("a", "")), "No prompt was given, or an empty one"),
    "no room to write": (dict(prompt=("x" * 40,)), "tokens, and 4 are to follow, but .* reads 32 at most"),
    "temperature zero": (dict(temperature=0.0), "temperature is 0.0; it must be above 0"),
    "temperature below": (dict(temperature=-1.0), "temperature is -1.0"),
    "temperature no number": (dict(temperature=math.nan), "temperature is nan"),
    "kl zero": (dict(kl=(0.1, 0.0)), "kl is 0.1 0.0; give numbers above 0"),
    "kl below": (dict(kl=(-0.1,)), "kl is -0.1"),
    "no kl": (dict(kl=()), "kl is empty"),
    "top_p zero": (dict(top_p=0.0), "top_p is 0.0"),
    "top_k below": (dict(top_k=-1), "top_k is -1"),
    "no tokens": (dict(tokens=0), "tokens is 0; it must be at least 1"),
    "nothing to steer with": (dict(run=None, latent=None), "Name what to steer with"),
    "two things to steer with": (dict(toward=Path("a")), "and not both"),
    "no latent": (dict(latent=None), "Name a latent of 'sae' too"),
    "a latent too far": (dict(latent=8), "There is no latent 8; the dictionary has 8, numbered 0 to 7"),
    "a latent below": (dict(latent=-1), "There is no latent -1"),
    "several hooks": (dict(run="both"), "rebuilds blocks.1.hook_resid_post, blocks.1.hook_mlp_out; choose one"),
    "a hook not rebuilt": (dict(hook=MLP), "does not rebuild 'blocks.1.hook_mlp_out'"),
    "a hook not to be edited": (dict(run="mid"), "misses the skip connection"),
    "an unfinished run": (dict(run="unfinished"), "'unfinished' has not finished training"),
    "an unknown run": (dict(run="sea"), "There is no run 'sea'"),
    "a model that changed": (dict(run="changed"), "has changed since 'changed' was trained on it"),
    "an unknown origin": (dict(run="silent"), "does not say which model"),
    "a model beside a run": (dict(model="bundled"), "knows its own model"),
    "nothing to watch": (dict(watch=("",)), "A text to --watch is empty"),
}
TEXT_REFUSALS = {
    "no hook": (dict(hook=None), "needs --toward FILE, --away FILE and --hook"),
    "one side": (dict(away=None), "give all three"),
    "an unknown hook": (dict(hook="blocks.1.hook_resid_pots"), "has no hook .*; the nearest are"),
    "a hook that cannot be edited": (dict(hook="blocks.1.hook_resid_mid"), "misses the skip connection"),
    "an unknown model": (dict(model="no such model"), "There is no model 'no such model'"),
    "no such file": (dict(away="gone.txt"), "gone.txt' cannot be read"),
    "an empty file": (dict(away="empty.txt"), "empty.txt' has no text"),
}


def of_texts(workspace: Workspace, folder: Path, **changes) -> SteerConfig:
    asked = dict(run=None, latent=None, toward="with.txt", away="without.txt", hook=MLP, model=str(folder)) | changes
    files = {name: asked[name] and workspace.root / asked[name] for name in ("toward", "away")}
    return config(**asked | files)


def refused(asked: SteerConfig, workspace: Workspace, words: str, monkeypatch) -> None:
    import activation_store.harvest.language_model as language_model

    monkeypatch.setattr(language_model, "load_language_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=words) as refusal:
        run_steer(asked, workspace)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith((".", "?"))


@pytest.mark.parametrize("wrong", REFUSALS)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(workspace, wrong, monkeypatch):
    changes, words = REFUSALS[wrong]
    refused(config(**changes), workspace, words, monkeypatch)


@pytest.mark.parametrize("wrong", TEXT_REFUSALS)
def test_so_is_that_of_a_difference_of_means(workspace, tiny_llama, wrong, monkeypatch):
    changes, words = TEXT_REFUSALS[wrong]
    refused(of_texts(workspace, tiny_llama, **changes), workspace, words, monkeypatch)


def test_refusals_load_no_torch(workspace):
    code = (
        "import sys\n"
        "from dictlearn.cli import main\n"
        "try:\n"
        f"    main(['steer', 'mid', '3', '--prompt', 'def', '--workspace', {str(workspace.root)!r}])\n"
        "except SystemExit as stop:\n"
        "    print(stop.code, *sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "misses the skip connection" in done.stderr and done.stdout.split() == ["2"], done.stderr


def test_a_latent_steers_where_it_writes_and_all_is_told(workspace):
    prompts = ("def first(x):", "class Second:")
    found = run_steer(config(prompt=prompts, samples=2, watch=("return", " x")), workspace)
    assert found.direction == "latent 3 of sae" and found.hook == RESID and found.mean_length > 0
    assert [(each.strength.alpha > 0, each.strength.hit) for each in found.steered] == [(True, True), (False, True)]
    for each in (found.unsteered, *(steered.continuations for steered in found.steered)):
        assert [written.prompt for written in each] == [prompts[0], prompts[0], prompts[1], prompts[1]]
        assert all(written.log_probability < 0 and written.text for written in each)
    for steered in found.steered:
        assert len(steered.changes.watched) == 2 and len(steered.changes.raised) == 5
        risen = [change.probability_after - change.probability_before for change in steered.changes.raised]
        assert risen == sorted(risen, reverse=True) and risen[-1] > 0
        assert all(change.probability_after < change.probability_before for change in steered.changes.lowered)
    assert run_steer(config(prompt=prompts, samples=2, watch=("return", " x")), workspace) == found


def test_what_is_written_with_a_strength_is_steered_by_it(workspace, tiny_llama):
    from activation_store.harvest.language_model import load_language_model
    from dictlearn.loading import load
    from dictlearn.steering import Sampling, continuations, of_latent, padded

    spec = resolve_model(str(tiny_llama))
    model, tokenizer = load_language_model(spec), load_tokenizer(spec)
    rows = padded([[0, *tokenizer.encode("def first(x):", add_special_tokens=False).ids]])
    direction = of_latent(load(workspace.run("sae").folder), 3)
    found = run_steer(config(kl=(0.01,), tokens=12, top_k=0, top_p=1.0), workspace)
    for steered in found.steered:
        drawn = continuations(model, rows, Sampling(1, 12, 1.0, 0, 1.0), direction, steered.strength.alpha)
        assert steered.continuations[0].text == tokenizer.decode(drawn[0, 0].tolist(), skip_special_tokens=False)
        assert steered.continuations[0].text != found.unsteered[0].text


def test_a_hook_of_an_aligned_store_is_steered_in_that_store_s_model(workspace, tiny_llama):
    plan = check(config(run="aligned", hook=f"tuned:{RESID}"), workspace)
    assert plan.spec.name == str(tiny_llama) and plan.hook == RESID
    found = run_steer(config(run="aligned", hook=f"tuned:{RESID}", samples=0), workspace)
    assert found.hook == RESID and all(each.strength.hit for each in found.steered)
    with pytest.raises(UserError, match="another"):
        check(config(run="aligned", hook=RESID), workspace)


def test_a_difference_of_means_is_that_of_the_lines_tokens_without_bos(workspace, tiny_llama):
    from activation_store.harvest.language_model import load_language_model
    from dictlearn.steering.command import _direction

    asked = of_texts(workspace, tiny_llama)
    spec = resolve_model(str(tiny_llama))
    model, tokenizer = load_language_model(spec), load_tokenizer(spec)
    means = []
    for lines in (["return x", "return value"], ["class Second", "some words"]):
        rows = []
        for line in lines:
            ids = torch.tensor([[0, *tokenizer.encode(line, add_special_tokens=False).ids]])
            rows.append(model.run_with_cache(ids)[1][MLP][0, 1:])
        means.append(torch.cat(rows).mean(dim=0))
    found = _direction(asked, check(asked, workspace), model)
    expected = means[0] - means[1]
    torch.testing.assert_close(found.unit, expected / expected.norm(), atol=1e-5, rtol=1e-4)
    assert all(each.strength.hit for each in run_steer(of_texts(workspace, tiny_llama, samples=0), workspace).steered)


def test_the_command_prints_a_report_or_its_json(workspace, capsys):
    from dictlearn.cli import main

    asked = ["steer", "sae", "3", "--prompt", "def first(x):", "--kl", "0.002", "99", "--sign", "plus", "--tokens", "3"]
    main([*asked, "--watch", "return", "--workspace", str(workspace.root)])
    said = capsys.readouterr().out
    assert "Adding latent 3 of sae at blocks.1.hook_resid_post" in said
    assert "A KL of 99 is not reached" in said and "log-probability of 'r" in said
    assert "unsteered (" in said and said.count("def first(x):⟦") == 3
    main([*asked, "--json", "--workspace", str(workspace.root)])
    printed = json.loads(capsys.readouterr().out)
    assert [each["strength"]["hit"] for each in printed["steered"]] == [True, False]
    assert printed["unsteered"][0]["prompt"] == "def first(x):"
