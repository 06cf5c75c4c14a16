"""`dictlearn circuit`: what it refuses before anything loads, and that a whole run leaves a readable graph."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_store.errors import UserError
from activation_store.harvest.language_model import resolve_model
from dictlearn.circuits import read, summary
from dictlearn.circuits.command import CircuitConfig, check, run_circuit
from dictlearn.dictionaries.description import dictionary_fingerprint
from dictlearn.dictionaries.files import save
from dictlearn.workspace import Workspace

from .conftest import make_transcoder, save_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = "w5 w7 w2 w9"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def workspace(model_folder, tmp_path_factory) -> Workspace:
    """Runs: transcoders of layers 0 and 2, a second one of layer 0, an SAE, one of another model, one unfinished."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    model = resolve_model(str(model_folder)).provenance()

    def add(name: str, layer: int, **changes: Any) -> None:
        transcoder = make_transcoder(layer, seed=len(name)).float()
        provenance = transcoder.provenance | {"model": model, "bos_left_out": True, "store": {"name": "s"}} | changes
        files = workspace.run(name)
        save(transcoder, files.dictionary, provenance)
        files.config.write_text("name: " + name + "\n")

    add("tc0", 0)
    add("tc2", 2)
    add("tc0-again", 0)
    add("sae", 0, hook_in="blocks.0.hook_mlp_out")
    add("resid", 0, hook_in="blocks.0.hook_resid_mid")
    add("foreign", 1, model=model | {"name": "gpt2", "fingerprint": "sha256:0"})
    unfinished = workspace.run("unfinished")
    unfinished.folder.mkdir()
    unfinished.config.write_text("name: unfinished\n")
    silent = workspace.run("silent")
    save(make_transcoder(0, seed=0), silent.dictionary, {})
    return workspace


def config(model_folder: Path, **changes: Any) -> CircuitConfig:
    asked: dict[str, Any] = dict(prompt=TEXT, transcoders=("tc0", "tc2"), model=str(model_folder), name="mine")
    return CircuitConfig(**asked | changes)


def test_a_run_leaves_a_graph_that_adds_up(model_folder, workspace) -> None:
    path = run_circuit(config(model_folder), workspace)
    assert path == workspace.existing_graph("mine")
    graph = read(path)
    assert max(graph.gaps().values()) < 1e-3  # float32; relative to the value, which may be a small difference
    assert graph.prompt == TEXT
    assert graph.tokens[0] == "<bos>"
    assert [record["run"] for record in graph.transcoders] == ["tc0", "tc2"]
    folders = [workspace.run(name).dictionary for name in ("tc0", "tc2")]
    expected = list(map(dictionary_fingerprint, folders))
    assert [record["dictionary_fingerprint"] for record in graph.transcoders] == expected
    assert graph.model["fingerprint"] == resolve_model(str(model_folder)).fingerprint
    assert graph.settings["dropped_positions"] == [0]
    assert summary(graph).scores == graph.scores
    first = path.read_bytes()
    assert run_circuit(config(model_folder), workspace).read_bytes() == first


REFUSALS = {
    "an empty prompt": (dict(prompt=""), "The prompt is empty"),
    "a prompt longer than the context": (dict(prompt="w5 " * 16), "has 17 tokens with BOS, but .* reads 16 at most"),
    "an export that is a folder": (dict(export=ROOT), "it should be a file in a folder that is there"),
    "an export into nowhere": (dict(export=ROOT / "nowhere" / "a.json"), "it should be a file in a folder that is"),
    "no transcoder": (dict(transcoders=()), "No transcoder was named"),
    "an unknown run": (dict(transcoders=("tc1",)), "There is no run 'tc1'.*did you mean tc"),
    "an autoencoder": (dict(transcoders=("sae",)), "'sae' is an autoencoder of blocks.0.hook_mlp_out"),
    "hooks of no MLP": (dict(transcoders=("resid",)), "'resid' goes from blocks.0.hook_resid_mid to"),
    "a transcoder of another model": (dict(transcoders=("foreign",)), "'foreign' was trained on the model 'gpt2'"),
    "two for one layer": (dict(transcoders=("tc0", "tc0-again")), "'tc0' and 'tc0-again' are both .* of layer 0"),
    "the same twice": (dict(transcoders=("tc0", "tc0")), "'tc0' was named twice"),
    "an unfinished run": (dict(transcoders=("unfinished",)), "'unfinished' has not finished training"),
    "a dictionary from elsewhere": (dict(transcoders=("silent",)), "does not say which model"),
    "an unknown model": (dict(model="no such model"), "There is no model 'no such model'"),
    "no name": (dict(name="a b"), "'a b' is no name"),
    "no logits": (dict(max_logits=0), "max_logits is 0"),
    "a share above one": (dict(node_threshold=1.5), "node_threshold is 1.5"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_bad_input_is_one_sentence(model_folder, workspace, wrong, monkeypatch) -> None:
    import activation_store.harvest.language_model as language_model

    monkeypatch.setattr(language_model, "load_language_model", lambda *a, **k: pytest.fail("a model was loaded"))
    changes, words = REFUSALS[wrong]
    with pytest.raises(UserError, match=words) as refusal:
        run_circuit(config(model_folder, **changes), workspace)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith((".", "?"))


def test_an_empty_workspace_says_what_to_do(model_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no run yet. Train one"):
        check(config(model_folder), Workspace(tmp_path / "nothing"))


def test_a_prompt_as_long_as_the_context_is_traced(model_folder, workspace) -> None:
    prompt = "w5" + " w7" * 14
    assert len(check(config(model_folder, prompt=prompt), workspace).token_ids) == 16


def test_refusals_load_nothing_slow(model_folder, workspace) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from activation_store.errors import UserError\n"
        "from dictlearn.circuits.command import CircuitConfig, run_circuit\n"
        "from dictlearn.workspace import Workspace\n"
        "import dictlearn.circuits.graph, dictlearn.circuits.graph_summary\n"
        f"config = CircuitConfig('w5', ('tc0', 'sae'), model={str(model_folder)!r})\n"
        "try:\n"
        f"    run_circuit(config, Workspace(Path({str(workspace.root)!r})))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print('slow:', *sorted({'torch', 'transformers', 'transformer_lens'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "'sae' is an autoencoder" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "slow:"


def test_the_script_does_the_same(model_folder, workspace, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "graph.json"
    arguments = ["--prompt", TEXT, "--model", str(model_folder), "--out", str(out)]
    for name in ("tc0", "tc2"):
        arguments += ["--transcoder", str(workspace.run(name).folder)]
    monkeypatch.setattr(sys, "argv", ["attribution_graph.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "circuits" / "attribution_graph.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Heads: influence" in printed and "permuted decoder rows" in printed and f"wrote {out}" in printed
    made, scripted = read(run_circuit(config(model_folder), workspace)), read(out)
    assert scripted.nodes == made.nodes and scripted.edges == made.edges and scripted.nulls == made.nulls


def test_the_script_is_short() -> None:
    assert len((ROOT / "scripts" / "circuits" / "attribution_graph.py").read_text().splitlines()) < 100


def test_tokens_read_as_text(shared) -> None:
    """SentencePiece marks the space in front of a word; a byte token is its character."""
    from activation_store.harvest.language_model import load_tokenizer
    from dictlearn.token_text import text_of

    tokenizer = load_tokenizer(resolve_model(str(shared / "models" / "stories260K")))
    text = text_of(tokenizer)
    ids = tokenizer.encode("Once upon a time, there", add_special_tokens=False).ids
    assert "".join(map(text, ids)) == " Once upon a time, there"
    assert text(1) == "<s>" and text(99_999) == "<99999>"


def fit(transcoder, inputs, targets, steps: int = 120) -> None:
    """A quick fit: enough that its features beat those of an untrained one."""
    from dictlearn.dictionaries.base import Update

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (transcoder.W_enc, transcoder.W_dec):
            rows = torch.randn(weight.shape, generator=generator)
            weight.copy_(rows / rows.norm(dim=1, keepdim=True))
        transcoder.b_enc.copy_(-transcoder.W_enc @ inputs.mean(dim=0))
        transcoder.b_dec.copy_(targets.mean(dim=0))
    optimiser = torch.optim.Adam(transcoder.parameters(), lr=3e-3)
    for step in range(steps):
        loss = transcoder.loss(inputs, targets)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        transcoder.after_update(Update(optimiser, step, steps, generator, inputs, targets, loss))


@pytest.mark.filterwarnings("ignore")
def test_a_real_model_with_quickly_fitted_transcoders(shared) -> None:
    """stories260K: after "a little girl named" comes a name; the sums hold in float32, and the nulls score lower."""
    from activation_store.harvest.language_model import load_language_model, load_tokenizer
    from dictlearn.circuits import attribute
    from dictlearn.dictionaries.configs import TopKConfig
    from dictlearn.dictionaries.topk import TopK
    from dictlearn.token_text import text_of

    spec = resolve_model(str(shared / "models" / "stories260K"))
    model, tokenizer = load_language_model(spec), load_tokenizer(spec)
    prompt = "Once upon a time, there was a little girl named"
    ids = [spec.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    with torch.no_grad():  # the model's own stories are the training text
        stories = torch.tensor([[spec.bos_token_id]] * 40)
        generator = torch.Generator().manual_seed(0)
        while stories.shape[1] < 40:
            likely = model(stories)[:, -1].softmax(dim=-1)
            stories = torch.cat([stories, torch.multinomial(likely, 1, generator=generator)], dim=1)
        _, cache = model.run_with_cache(stories)
    transcoders = {}
    for layer in range(spec.n_layers):
        hooks = {"hook_in": f"blocks.{layer}.mlp.hook_in", "hook_out": f"blocks.{layer}.hook_mlp_out"}
        rows = {name: cache[hook][:, 1:].flatten(0, 1) for name, hook in hooks.items()}
        transcoder = TopK(TopKConfig(d_sae=256, k=12), spec.d_model, spec.d_model)
        fit(transcoder, rows["hook_in"], rows["hook_out"])
        transcoders[layer] = transcoder.fold().requires_grad_(False)
        transcoders[layer].provenance = {**hooks, "bos_left_out": True}

    graph = attribute(model, transcoders, ids, prompt=prompt, text_of=text_of(tokenizer))
    assert graph.logits[0].token == " Lily"
    by_scale = [gap / max(scale, 1e-12) for _, gap, _, scale in graph.sums()]
    assert max(by_scale) < 1e-5
    for scores in graph.nulls.values():
        assert graph.scores.replacement > scores.replacement
        assert graph.scores.completeness > scores.completeness
    found = summary(graph)
    assert found.features and found.errors
    # The prediction reads the last word and the girl.
    assert {" named", " girl"} & {row.token for row in found.features[:10]}
