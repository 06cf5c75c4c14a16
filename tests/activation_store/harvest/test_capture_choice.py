"""Which way a harvest reads its activations, and that it keeps to it: chosen on the first batch, recorded, continued.

That the modules give what the Bridge gives is test_modules.py. Here a model is altered between the two, in ways in
which a model could really differ, and the harvest has to notice.
"""

from __future__ import annotations

import gc
import hashlib
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from activation_store.errors import UserError
from activation_store.harvest import compute, modules, run
from activation_store.harvest.language_model import register_loader, resolve_model
from activation_store.harvest.run import HarvestConfig, describe, harvest
from activation_store.store import open_store

torch = pytest.importorskip("torch")

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def config(tiny_llama, corpus_folder, tmp_path) -> HarvestConfig:
    """Some 1,000 rows in 13 batches and 4 shards."""
    return HarvestConfig(
        model=str(tiny_llama),
        corpus=str(corpus_folder),
        hooks=HOOKS,
        tokens=1000,
        context=16,
        batch_size=5,
        rows_per_chunk=32,
        rows_per_shard=256,
        store=tmp_path / "store.zarr",
        device="cpu",
    )


def bytes_of(location: str | Path) -> dict[str, str]:
    store = Path(location)
    files = sorted(file for file in store.rglob("*") if file.is_file())
    return {file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def said(config: HarvestConfig) -> str:
    with pytest.raises(UserError) as caught:
        harvest(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def way_of(store: str | Path) -> str:
    return open_store(store).provenance["computed"]["capture"]


class Listener:
    """A progress that remembers what it was told about the model."""

    def __init__(self):
        self.through = None

    def task(self, title, total=None, unit=""):
        return self

    def advance(self, n=1, **shown):
        self.through = shown.get("through", self.through)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None


@pytest.fixture
def alter(monkeypatch):
    """Change the plain model after it is loaded; the Bridge's stays as it is."""
    loads = []

    def arrange(change=lambda model: None):
        original = modules.load_modules

        def load(*arguments):
            loads.append(arguments)
            model = original(*arguments)
            change(model)
            return model

        monkeypatch.setattr(modules, "load_modules", load)
        return loads

    return arrange


def count_peeks(monkeypatch) -> list[object]:
    from activation_store.harvest.capture import Capture

    peeks, original = [], Capture.peek

    def counted(self, *arguments):
        peeks.append(self.bridge)
        return original(self, *arguments)

    monkeypatch.setattr(Capture, "peek", counted)
    return peeks


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_modules_are_taken_where_they_agree(config, fixture, dtype, request):
    listener = Listener()
    model = str(request.getfixturevalue(fixture))
    store = harvest(replace(config, model=model, model_dtype=dtype), listener)
    assert way_of(store) == "modules" and listener.through == "the Hugging Face modules"


def test_the_bridge_is_taken_when_asked_for(config, alter):
    loads = alter()
    listener = Listener()
    assert way_of(harvest(replace(config, capture="bridge"), listener)) == "bridge"
    assert listener.through == "the Bridge" and loads == []


def another_activation(model):
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()


def attention_without_its_mask(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def a_gain_off_by_a_thousandth(model):
    model.model.layers[0].post_attention_layernorm.weight.mul_(1.001)


@pytest.mark.parametrize(
    ("change", "hook"),
    [
        (another_activation, "blocks.1.mlp.hook_post"),
        (attention_without_its_mask, "blocks.0.hook_resid_post"),
        (a_gain_off_by_a_thousandth, "blocks.0.hook_resid_post"),
    ],
)
def test_modules_that_differ_are_found_and_the_bridge_makes_all_rows(config, alter, tmp_path, change, hook):
    expected = bytes_of(harvest(replace(config, capture="bridge", store=tmp_path / "bridge.zarr")))
    alter(change)
    listener = Listener()
    harvest(config, listener)
    assert listener.through.startswith(
        f"the Bridge, because the Hugging Face modules differ from the Bridge's at {hook} by "
    )
    assert way_of(config.store) == "bridge" and bytes_of(config.store) == expected


def test_modules_that_differ_are_refused_when_they_were_asked_for(config, alter):
    alter(another_activation)
    sentence = said(replace(config, capture="modules"))
    assert (
        "modules was asked for, but the Hugging Face modules differ from the Bridge's at blocks.1.mlp.hook_post"
        in sentence
    )
    assert sentence.endswith("use --capture bridge.") and not config.store.exists()


def test_modules_that_fail_are_no_end_of_the_harvest(config, alter):
    def broken(model):
        def refuse(*arguments, **named):
            raise RuntimeError("this model wants an image\nand more lines")

        model.model.layers[0].forward = refuse

    alter(broken)
    listener = Listener()
    harvest(config, listener)
    assert listener.through == "the Bridge, because the Hugging Face modules cannot be read: this model wants an image"
    assert way_of(config.store) == "bridge"


def test_a_hook_without_a_module_brings_all_hooks_to_the_bridge(config, alter):
    loads = alter()
    listener = Listener()
    hooks = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_rot_q")
    harvest(replace(config, hooks=hooks), listener)
    assert listener.through == (
        "the Bridge, because blocks.1.attn.hook_rot_q is no module's input or output in this model"
    )
    assert way_of(config.store) == "bridge" and loads == []
    sentence = said(replace(config, hooks=hooks, capture="modules", store=config.store.with_name("other.zarr")))
    assert "blocks.1.attn.hook_rot_q is no module's input or output" in sentence


def test_the_bridge_is_gone_before_the_modules_are_loaded(config, monkeypatch):
    """Or the weights would be in memory twice."""
    bridges, alive = [], []
    load_bridge, load_modules = modules.load_language_model, modules.load_modules

    def remember(*arguments):
        bridge = load_bridge(*arguments)
        bridges.append(weakref.ref(bridge.original_model.get_input_embeddings().weight))
        return bridge

    def look(*arguments):
        alive.extend(bridge() is not None for bridge in bridges)
        return load_modules(*arguments)

    monkeypatch.setattr(modules, "load_language_model", remember)
    monkeypatch.setattr(modules, "load_modules", look)
    gc.disable()  # by luck it could run just then
    try:
        harvest(config)
    finally:
        gc.enable()
    assert alive == [False]


@pytest.mark.parametrize("way", ["bridge", "modules"])
def test_a_model_that_computes_in_bfloat16_gives_the_same_rows_but_for_its_rounding(config, tmp_path, way):
    exact = open_store(harvest(replace(config, capture=way, dtype="float32")))
    location = harvest(
        replace(config, capture=way, dtype="float32", model_dtype="bfloat16", store=tmp_path / "half.zarr")
    )
    rounded = open_store(location)
    assert rounded.provenance["computed"]["dtype"] == "bfloat16"
    for hook in HOOKS:
        # Measured on the bundled model, stories260K and a random GPT-2: 0.006 to 0.025.
        far = modules.difference(rounded.tensor(hook, 0, 1000), exact.tensor(hook, 0, 1000))
        assert 1e-3 < far < 0.05, hook


# --- doing it again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["bridge", "modules"])
@pytest.mark.parametrize("asked", ["auto", "the same"])
def test_a_continued_store_is_read_as_it_was_begun(config, alter, tmp_path, monkeypatch, way, asked):
    undisturbed = bytes_of(harvest(replace(config, capture=way, store=tmp_path / "undisturbed.zarr")))
    assert bytes_of(harvest(replace(config, capture=way, store=tmp_path / "again.zarr"))) == undisturbed
    harvest(replace(config, capture=way), stop_after=5)
    assert 0 < open_store(config.store).rows < 1000
    loads, peeks = alter(), count_peeks(monkeypatch)
    passes = []
    monkeypatch.setattr(
        compute, "_as_stored", lambda rows, original=compute._as_stored: passes.append(1) or original(rows)
    )
    harvest(config if asked == "auto" else replace(config, capture=way))
    assert bytes_of(config.store) == undisturbed
    assert len(loads) == (way == "modules")
    assert len(peeks) == len(passes) / len(HOOKS)  # nothing was compared: every pass gave rows


@pytest.mark.parametrize(("made", "asked"), [("bridge", "modules"), ("modules", "bridge")])
@pytest.mark.parametrize("stop_after", [None, 5])
def test_another_way_than_the_store_was_begun_in_is_refused_before_a_model_is_loaded(
    config, monkeypatch, made, asked, stop_after
):
    harvest(replace(config, capture=made), stop_after=stop_after)
    before = bytes_of(config.store)
    monkeypatch.setattr(run, "compute", None)
    sentence = said(replace(config, capture=asked))
    assert f'provenance.computed.capture is "{made}" there and "{asked}" now' in sentence
    assert bytes_of(config.store) == before


@pytest.mark.parametrize("way", ["bridge", "modules"])
def test_a_complete_store_needs_no_answer(config, monkeypatch, way):
    harvest(replace(config, capture=way))
    monkeypatch.setattr(run, "compute", None)
    assert describe(config).complete
    assert harvest(config) == str(config.store)


# --- other kinds of model -------------------------------------------------------------------------------------------


class BridgesOnly:
    """A registered loader, whose models have no Hugging Face modules that transformers could load."""

    def __init__(self, folder: Path):
        self.folder = folder

    def resolve(self, argument):
        return replace(resolve_model(str(self.folder)), name=f"kind:{argument}", loader="kind")

    def load(self, spec, device, dtype):
        from activation_store.harvest.language_model import load_language_model

        return load_language_model(resolve_model(str(self.folder)), device, dtype)

    def tokenizer(self, spec):
        from activation_store.harvest.language_model import load_tokenizer

        return load_tokenizer(resolve_model(str(self.folder)))


def test_another_kind_of_model_is_read_through_its_bridge(config, tiny_llama, monkeypatch):
    monkeypatch.setattr("activation_store.harvest.language_model._registered", {})
    register_loader("kind", BridgesOnly(tiny_llama))
    config = replace(config, model="kind:one")
    assert "kind:one is no Hugging Face model" in said(replace(config, capture="modules"))
    listener = Listener()
    harvest(config, listener)
    assert way_of(config.store) == "bridge" and listener.through == "the Bridge"
