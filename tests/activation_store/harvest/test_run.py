"""A harvest from end to end, with real (tiny) models: what is in the store, what a rerun does, what is refused.

Kill -9 at every named point of a commit is the writer's test; here one real harvest is killed and rerun, and the
forward passes are counted, so that starting over does not pass for continuing.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from activation_store.errors import UserError
from activation_store.harvest import compute, disk_space, request
from activation_store.harvest.corpus import is_held_out, open_corpus
from activation_store.harvest.language_model import load_language_model, load_tokenizer, resolve_model
from activation_store.harvest.request import Request
from activation_store.harvest.run import HarvestConfig, HarvestInterrupted, describe, harvest
from activation_store.progress import NoProgress
from activation_store.store import open_store

HOOKS = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Nobody pulls the plug here, and a thousand fsyncs are most of what these tests would take."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def config(tiny_llama, corpus_folder, tmp_path) -> HarvestConfig:
    """Some 2,000 rows in 25 batches and 8 shards."""
    return HarvestConfig(
        model=str(tiny_llama),
        corpus=str(corpus_folder),
        hooks=HOOKS,
        tokens=2000,
        context=16,
        batch_size=5,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=tmp_path / "store.zarr",
        device="cpu",
    )


def bytes_of(location: str | Path) -> dict[str, str]:
    """Every file of a store with a hash of its content."""
    store = Path(location)
    files = sorted(file for file in store.rglob("*") if file.is_file())
    return {file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def said(config: HarvestConfig, what=harvest) -> str:
    with pytest.raises(UserError) as caught:
        what(config)
    return str(caught.value)


def count_forward_passes(monkeypatch) -> list[int]:
    from activation_store.harvest.capture import Capture

    passes, original = [], Capture.run

    def counted(self, tokens, kept=None):
        passes.append(len(passes))
        return original(self, tokens, kept)

    monkeypatch.setattr(Capture, "run", counted)
    return passes


# --- what is in the store ---


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "stories260k"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_the_activations_the_bridge_computes(fixture, dtype, request, config):
    """Against TransformerLens' own cache, on windows put together here from the documents, not by our plan."""
    import torch

    config = replace(config, model=str(request.getfixturevalue(fixture)), dtype=dtype)
    store = open_store(harvest(config))
    assert store.rows == 2000 and store.complete and list(store.hooks) == list(HOOKS)

    spec = resolve_model(config.model)
    texts = {document.id: document.text for document in open_corpus(config.corpus).documents}
    tokenizer = load_tokenizer(spec)
    stream, owners = [], []
    for index, document in enumerate(store.document_table):
        for token in [spec.bos_token_id, *tokenizer.encode(texts[document.id], add_special_tokens=False).ids]:
            front = [spec.bos_token_id] if len(stream) % 16 == 0 and token != spec.bos_token_id else []
            stream += [*front, token]
            owners += [index] * (len(front) + 1)
    windows = -(-len(stream) // 16)
    tokens = torch.tensor(stream + [0] * (windows * 16 - len(stream))).reshape(windows, 16)
    with torch.no_grad():
        cache = load_language_model(spec).run_with_cache(tokens)[1]

    places = [place for place, token in enumerate(stream) if token != spec.bos_token_id][:2000]
    assert store.token_ids(0, 2000).tolist() == [stream[place] for place in places]
    assert store.positions(0, 2000).tolist() == [place % 16 for place in places]
    assert store.documents(0, 2000).tolist() == [owners[place] for place in places]
    for hook in HOOKS:
        expected = cache[hook].flatten(0, 1)[places].to(getattr(torch, dtype))
        found = store.tensor(hook, 0, 2000).reshape(expected.shape)
        # Our batches are of 5 windows, this one of all: the last bits may differ, and with them a rounding.
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_rows_are_bit_for_bit_those_of_the_batch_they_were_computed_in(config):
    import torch

    config = replace(config, dtype="float32", tokens=400, capture="bridge")
    store = open_store(harvest(config))
    asked = Request.of(config)
    plan = asked.plan(NoProgress())
    bridge = load_language_model(asked.spec)
    for index in range(plan.batches):
        batch = plan.batch(index)
        with torch.no_grad():
            cache = bridge.run_with_cache(torch.from_numpy(batch.tokens_BC))[1]
        for hook in HOOKS:
            found = store.tensor(hook, batch.first_row, batch.first_row + batch.rows)
            expected = cache[hook].flatten(0, 1)[torch.from_numpy(batch.kept_N)]
            assert torch.equal(found.reshape(expected.shape), expected)


def test_rows_of_the_modules_are_bit_for_bit_what_transformers_computes(config):
    import torch
    from transformers import AutoModelForCausalLM

    hook = "blocks.1.hook_resid_post"
    config = replace(config, dtype="float32", tokens=400, capture="modules", hooks=(hook,))
    store = open_store(harvest(config))
    plan = Request.of(config).plan(NoProgress())
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    for index in range(plan.batches):
        batch = plan.batch(index)
        with torch.inference_mode():
            states = model(torch.from_numpy(batch.tokens_BC), output_hidden_states=True).hidden_states
        found = store.tensor(hook, batch.first_row, batch.first_row + batch.rows)
        assert torch.equal(found, states[2].flatten(0, 1)[torch.from_numpy(batch.kept_N)])


def test_the_store_says_what_it_was_made_from(config):
    store = open_store(harvest(config))
    made = store.provenance
    assert made["model"]["name"] == config.model
    assert made["model"]["fingerprint"] == resolve_model(config.model).fingerprint
    assert made["corpus"]["fingerprint"] == open_corpus(config.corpus).fingerprint
    assert made["computed"] == {"device": "cpu", "dtype": "float32", "capture": "modules"}
    assert set(made["versions"]) == {"torch", "transformers", "transformer-lens", "tokenizers"}
    assert all(made["versions"].values())
    manifest = store.manifest
    assert manifest.batches["context"] == 16 and manifest.batches["bos_token_id"] == 0
    assert manifest.excluded["bos"] >= len(store.document_table)
    assert all(
        document.split == ("held-out" if is_held_out(document.id) else "train") for document in store.document_table
    )
    assert {document.split for document in store.document_table} == {"train", "held-out"}
    text = json.dumps(manifest.identity())
    assert str(os.getpid()) not in text.split() and os.uname().nodename not in text


@pytest.mark.parametrize("model", ["the tiny one", "bundled"])
def test_token_ids_are_those_of_the_tokenizer_text_by_text(config, model):
    request = Request.of(config if model == "the tiny one" else replace(config, model=model))
    texts = ["", "def f(x):\n\treturn x  # naïve — ünï\n", " \n\n", "<s>class Second:</s>", "日本語 🎈\r\n" * 50]
    tokenizer = load_tokenizer(request.spec)
    assert request.token_ids(texts) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_corpus_smaller_than_asked_for_gives_what_it_has(config):
    store = open_store(harvest(replace(config, tokens=1_000_000)))
    assert store.complete and 2000 < store.rows < 1_000_000
    assert store.rows == describe(replace(config, tokens=1_000_000)).rows


# --- doing it again ---


def test_the_same_harvest_twice_gives_the_same_bytes(config, tmp_path):
    first = bytes_of(harvest(config))
    second = bytes_of(harvest(replace(config, store=tmp_path / "second.zarr")))
    assert first == second and len(first) > 40


def test_a_complete_store_is_taken_as_it_is(config, monkeypatch):
    harvest(config)
    before = bytes_of(config.store)
    passes = count_forward_passes(monkeypatch)
    monkeypatch.setattr(request, "plan_batches", None)  # not even tokenized
    assert harvest(config) == str(config.store)
    assert passes == [] and bytes_of(config.store) == before


def test_paths_may_be_spelled_another_way(config, monkeypatch, tmp_path):
    harvest(config)
    passes = count_forward_passes(monkeypatch)
    monkeypatch.chdir(tmp_path)
    harvest(replace(config, corpus="corpus", store=Path("store.zarr"), model=os.path.relpath(config.model)))
    assert passes == []


def test_a_complete_store_is_also_good_with_another_torch(config, monkeypatch):
    harvest(config)
    monkeypatch.setattr(request, "_version", lambda package: "0.0.1")
    passes = count_forward_passes(monkeypatch)
    harvest(config)
    assert describe(config).complete and passes == []


def test_an_unfinished_store_is_not_continued_with_another_torch(config, monkeypatch):
    harvest(config, stop_after=8)
    monkeypatch.setattr(request, "_version", lambda package: "0.0.1")
    assert '"0.0.1" now' in said(config)


@pytest.mark.parametrize("stops", [[1], [4], [3, 3, 5], [26]])
def test_a_stopped_harvest_continues_and_ends_with_the_same_bytes(config, tmp_path, monkeypatch, stops):
    undisturbed = bytes_of(harvest(replace(config, store=tmp_path / "undisturbed.zarr")))
    plan = Request.of(config).plan(NoProgress())
    passes = count_forward_passes(monkeypatch)
    for stop in stops:
        harvest(config, stop_after=stop)
    assert len(passes) == sum(stops)
    committed = open_store(config.store).rows
    first_batch = sum(bool(last_row <= committed) for last_row in plan.first_rows[1:])
    harvest(config)
    assert bytes_of(config.store) == undisturbed
    assert len(passes) - sum(stops) == plan.batches - first_batch


def test_a_store_whose_last_step_is_missing_needs_no_model(config, tmp_path, monkeypatch):
    """Killed between the last commit and the statistics: what is left to do takes no forward pass."""
    from activation_store.writer import StoreWriter

    undisturbed = bytes_of(harvest(replace(config, store=tmp_path / "undisturbed.zarr")))

    class Killed(Exception):
        pass

    def killed(self):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "_complete", killed)
        with pytest.raises(Killed):
            harvest(config)
    assert not open_store(config.store).complete
    passes = count_forward_passes(monkeypatch)
    harvest(config)
    assert passes == [] and bytes_of(config.store) == undisturbed


RUN_IT = """
import os, sys, json, time
from pathlib import Path
from activation_store.harvest import capture
from activation_store.harvest.run import HarvestConfig, harvest
settings = json.loads(sys.argv[1])
log = open(sys.argv[2], "a")
os.fsync = lambda file: None
original = capture.Capture.run
def counted(self, tokens, kept=None):
    log.write("pass\\n"); log.flush()
    time.sleep(0.02)
    return original(self, tokens, kept)
capture.Capture.run = counted
try:
    harvest(HarvestConfig(**{**settings, "hooks": tuple(settings["hooks"]), "store": Path(settings["store"])}))
except KeyboardInterrupt as stopped:
    print(stopped)
    sys.exit(130)
"""


def start(config: HarvestConfig, log: Path, **environment: str) -> subprocess.Popen:
    settings = json.dumps({**config.__dict__, "store": str(config.store)})
    return subprocess.Popen(
        [sys.executable, "-c", RUN_IT, settings, str(log)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run started in the background ignores SIGINT, and what it starts would too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )


def wait_for_passes(process: subprocess.Popen, log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the harvest does not get going"
        time.sleep(0.005)


@pytest.mark.heavy  # tests/activation_store/test_kills.py does as much to the real command
def test_kill_9_in_the_middle_and_the_same_command_again(config, tmp_path):
    undisturbed = bytes_of(harvest(replace(config, store=tmp_path / "undisturbed.zarr")))
    batches = describe(config).batches
    log = tmp_path / "passes"
    process = start(config, log)
    wait_for_passes(process, log, 14)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    killed_after, committed = len(log.read_text().splitlines()), open_store(config.store).rows
    assert 0 < committed < 2000
    again = start(config, log)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert bytes_of(config.store) == undisturbed
    passes = len(log.read_text().splitlines())
    assert passes - killed_after < batches  # it did not start over
    assert passes <= batches + 256 // (16 * 5) + 2  # at most one commit was computed again


def test_ctrl_c_says_what_is_safe_and_how_to_go_on(config, monkeypatch):
    from activation_store.harvest.capture import Capture

    passes, original = [], Capture.run

    def interrupted(self, tokens, kept=None):
        passes.append(tokens)
        if len(passes) == 10:
            raise KeyboardInterrupt
        return original(self, tokens, kept)

    monkeypatch.setattr(Capture, "run", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        harvest(config)
    assert isinstance(caught.value, HarvestInterrupted)
    committed = open_store(config.store).rows
    assert committed == 2 * 256
    assert (
        str(caught.value)
        == f"Stopped with 512 of 2,000 rows safe in {config.store}; the same command continues from there."
    )
    assert not (config.store / ".owner").exists()
    harvest(config)
    assert open_store(config.store).complete


def test_ctrl_c_while_the_corpus_is_tokenized_says_so_too(config, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "plan_batches", interrupted)
    with pytest.raises(HarvestInterrupted) as caught:
        harvest(config)
    assert str(caught.value) == f"Stopped with 0 rows safe in {config.store}; the same command continues from there."


def test_what_a_kill_in_the_last_step_left_is_swept_by_the_same_command(config, monkeypatch):
    whole = bytes_of(harvest(config))
    (config.store / ".staging").mkdir()
    (config.store / ".staging" / "sums-8").write_bytes(b"x")
    (config.store / ".owner").write_text("999999\n")
    passes = count_forward_passes(monkeypatch)
    harvest(config)
    assert bytes_of(config.store) == whole and passes == []


@pytest.mark.heavy
def test_a_real_ctrl_c_ends_the_process_in_order(config, tmp_path):
    log = tmp_path / "passes"
    process = start(config, log)
    wait_for_passes(process, log, 10)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    committed = open_store(config.store).rows
    assert committed > 0
    assert f"Stopped with {committed:,} of 2,000 rows safe in {config.store}; the same command continues" in printed


# --- what is refused, and before what ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hooks": ("blocks.1.hook_resid_pots",)}, "the nearest are blocks.1.hook_resid_post"),
        ({"hooks": ("blocks.7.hook_resid_post",)}, "has 3 layers, numbered 0 to 2"),
        ({"hooks": ("blocks.0.attn.hook_pattern",)}, "its width changes with the context"),
        ({"hooks": ("blocks.0.attn.hook_attn_scores",)}, "harvest blocks.0.attn.hook_z, which is what each head moves"),
        ({"hooks": ()}, "No hook was asked for; name at least one"),
        ({"hooks": (HOOKS[0], HOOKS[0])}, "was asked for 2 times; name it once"),
        ({"model": "/no/such/model"}, "There is no model '/no/such/model'"),
        ({"context": 33}, "A context of 33 tokens was asked for, but"),
        ({"context": 0}, "--context is 0; it must be at least 1"),
        ({"tokens": -5}, "--tokens is -5; it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"threads": 0}, "--threads is 0; it must be at least 1"),
        ({"dtype": "int8"}, "cannot be stored as 'int8'"),
        ({"model_dtype": "float64"}, "The model cannot compute in 'float64'"),
        ({"capture": "cache"}, "cannot be captured from 'cache'; use auto, bridge or modules"),
        ({"rows_per_shard": 100}, "cannot be cut into chunks of 32 rows"),
        ({"corpus": "/no/such/text"}, "There is no corpus '/no/such/text'"),
    ],
)
def test_refused_in_one_sentence(config, monkeypatch, change, expected):
    def too_late(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(compute, "capture_of", too_late)
    for what in (harvest, describe):
        sentence = said(replace(config, **change), what)
        assert expected in sentence and "\n" not in sentence
    assert not config.store.exists()


def test_too_little_disk_says_how_much_is_needed(config, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
    sentence = said(replace(config, tokens=10**12))
    assert (
        "1,000,000,000,000 rows of 4 hooks need 225,671.9 GB on the disk of" in sentence
        and "where 0.1 MB are free" in sentence
    )
    assert "need 0.5 MB on the disk of" in said(config)


def test_a_corpus_without_text_is_refused(config, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "a.txt").write_text(" \n")
    assert "holds no text (left out: 1 empty)" in said(replace(config, corpus=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, "plan.batches.seed is 0 there and 1 now"),
        ({"hooks": HOOKS[:1]}, "hook blocks.1.attn.hook_z"),
        ({"dtype": "float32"}, "bfloat16"),
        ({"tokens": 1900}, "2000 there and 1900 now"),
        ({"context": 8}, "context is 16 there and 8 now"),
    ],
)
@pytest.mark.parametrize("stop_after", [None, 8])
def test_a_store_made_otherwise_is_refused_and_left_alone(config, monkeypatch, change, expected, stop_after):
    harvest(config, stop_after=stop_after)
    before = bytes_of(config.store)
    monkeypatch.setattr(compute, "capture_of", None)
    sentence = said(replace(config, **change))
    assert "was made otherwise" in sentence and expected in sentence
    assert bytes_of(config.store) == before


def test_a_store_of_another_model_is_refused(config, tiny_gpt2):
    harvest(replace(config, hooks=HOOKS[:1]))
    sentence = said(replace(config, hooks=HOOKS[:1], model=str(tiny_gpt2)))
    assert "provenance.model.name is" in sentence and "gpt2" in sentence


def test_a_folder_that_holds_something_else_is_refused(config):
    config.store.mkdir()
    (config.store / "precious.txt").write_text("do not touch")
    assert "is no activation store (it holds precious.txt); name another folder" in said(config)
    file = config.store / "precious.txt"
    assert f"{file} is a file; name a folder" in said(replace(config, store=file))


def test_a_damaged_manifest_is_refused(config):
    harvest(config)
    manifest = config.store / "zarr.json"
    manifest.write_bytes(manifest.read_bytes()[:-50])
    assert "is damaged" in said(config)


def test_values_that_are_not_finite_are_refused_with_hook_and_batch(config, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(config.model).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    sentence = said(replace(config, model=str(broken)))
    assert sentence.startswith("Batch 0 of ") and "blocks.1.hook_mlp_out" in sentence
    assert not config.store.exists()


def test_refusals_and_the_dry_run_import_no_torch(config):
    script = f"""
import sys
from dataclasses import replace
from pathlib import PosixPath
from activation_store.errors import UserError
from activation_store.harvest import HarvestConfig, describe, harvest
config = {config!r}
assert describe(config).rows == 2000
for change in (dict(hooks=("blocks.1.nothing",)), dict(model="no/such-model"), dict(context=99),
               dict(corpus="/nowhere"), dict(tokens=10**15)):
    try:
        harvest(replace(config, **change))
    except UserError as error:
        print(error)
    else:
        raise SystemExit("not refused")
heavy = [name for name in ("torch", "transformers", "transformer_lens", "datasets", "pyarrow") if name in sys.modules]
raise SystemExit(f"imported {{heavy}}" if heavy else 0)
"""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert time.perf_counter() - started < 3  # six questions, on a machine that may be busy


# --- the dry run ---


def test_the_dry_run_tells_the_size_and_does_nothing(config):
    planned = describe(config)
    assert not config.store.exists()
    assert (planned.rows, planned.rows_asked, planned.rows_committed, planned.complete) == (2000, 2000, 0, False)
    assert planned.hooks["blocks.1.attn.hook_z"] == (4, 6)
    assert planned.rows + sum(planned.excluded.values()) == planned.batches * 5 * 16
    assert planned.seconds > 0 and "an estimate: " in planned.seconds_are
    assert planned.peak_memory > 10**8
    harvest(config)
    size = sum(file.stat().st_size for file in config.store.rglob("c.*"))
    table = sum(file.stat().st_size for file in (config.store / "document_table").rglob("c.*"))
    assert 0.9 * size < planned.bytes_on_disk <= size - table + 1000


def test_the_dry_run_sees_what_is_already_there(config):
    harvest(config, stop_after=8)
    planned = describe(config)
    assert 0 < planned.rows_committed < 2000 and not planned.complete
    harvest(config)
    assert describe(config).complete


def test_progress_counts_every_row_once(config):
    class Recorder:
        def __init__(self):
            self.tasks = {}

        def task(self, title, total=None, unit=""):
            self.title = title
            self.tasks[title] = [total, 0, []]
            return self

        def advance(self, n=1, **shown):
            self.tasks[self.title][1] += n
            self.tasks[self.title][2].append(shown)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    first, second = Recorder(), Recorder()
    harvest(config, first, stop_after=8)
    assert set(first.tasks) == {"Tokenizing", "Loading the model", "Harvesting"}
    harvest(config, second)
    title = next(title for title in second.tasks if title.startswith("Harvesting from row "))
    total, counted, shown = second.tasks[title]
    assert total == counted == 2000 - int(title.split()[-1].replace(",", ""))
    assert "tokens_per_s" in shown[-1]


def test_threads_are_given_back(config):
    import torch

    before = torch.get_num_threads()
    harvest(replace(config, threads=1, tokens=100))
    assert torch.get_num_threads() == before


def test_bfloat16_bits_are_torchs():
    import torch

    values = torch.randn(64, 3).to(torch.bfloat16)
    assert np.array_equal(compute._as_stored(values), values.view(torch.int16).numpy().view(np.uint16))
