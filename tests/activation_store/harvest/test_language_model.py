"""What is known of a model before its weights are loaded: names, shapes, and the sentences for mistakes.

That the table of hooks tells the truth about the Bridge is test_hooks_fire.py's business.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from activation_store.errors import UserError
from activation_store.harvest import language_model
from activation_store.harvest.language_model import load_tokenizer, resolve_model, tokenizer_fingerprint

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "n_inner": None,
}


@pytest.fixture
def folder_of(tmp_path):
    def write(config: dict, name: str = "model", weights: bytes = b"weights"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(weights)
        return str(folder)

    return write


def sentence(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def test_widths_are_read_from_a_llama_config(folder_of):
    spec = resolve_model(folder_of(LLAMA))
    assert (spec.n_layers, spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head) == (4, 24, 4, 2, 6)
    assert (spec.d_mlp, spec.vocab_size, spec.n_ctx, spec.bos_token_id) == (40, 97, 32, 1)


def test_widths_are_read_from_a_gpt2_config(folder_of):
    spec = resolve_model(folder_of(GPT2))
    assert (spec.n_layers, spec.n_kv_heads, spec.d_mlp, spec.n_ctx, spec.bos_token_id) == (3, 4, 96, 32, None)


@pytest.mark.parametrize(
    ("hook", "shape"),
    [
        ("blocks.2.hook_resid_post", (24,)),
        ("blocks.0.mlp.hook_in", (24,)),
        ("blocks.3.mlp.hook_post", (40,)),
        ("blocks.1.attn.hook_z", (4, 6)),
        ("blocks.1.attn.hook_v", (2, 6)),
        ("ln_final.hook_normalized", (24,)),
        ("hook_embed", (24,)),
    ],
)
def test_shape_of_a_hook(folder_of, hook, shape):
    assert resolve_model(folder_of(LLAMA)).hook_shape(hook) == shape


def test_an_unknown_hook_is_refused_with_the_nearest_names(folder_of):
    spec = resolve_model(folder_of(LLAMA))
    said = sentence(spec.hook_shape, "blocks.2.hook_resid_pots")
    assert "has no hook 'blocks.2.hook_resid_pots'; the nearest are blocks.2.hook_resid_post" in said


@pytest.mark.parametrize(
    "hook", ["", "x", "blocks.", "blocks.02.hook_in", "blocks.١.hook_in", "blocks.{layer}.hook_in", "\n"]
)
def test_odd_hook_names_are_refused(folder_of, hook):
    assert "has no hook" in sentence(resolve_model(folder_of(LLAMA)).hook_shape, hook)


def test_a_layer_the_model_does_not_have_is_refused(folder_of):
    said = sentence(resolve_model(folder_of(LLAMA)).hook_shape, "blocks.9.hook_resid_post")
    assert "has 4 layers, numbered 0 to 3; the nearest are blocks." in said


def test_hooks_that_are_no_rows_are_refused_with_the_reason(folder_of):
    spec = resolve_model(folder_of(LLAMA))
    assert "one number per pair of positions" in sentence(spec.hook_shape, "blocks.0.attn.hook_pattern")
    assert "blocks.2.attn.hook_z" in sentence(spec.hook_shape, "blocks.2.attn.hook_result")
    assert "wide as the vocabulary" in sentence(spec.hook_shape, "unembed.hook_out")


def test_a_hook_of_another_layout_is_refused_with_what_is_missing(folder_of):
    said = sentence(resolve_model(folder_of(GPT2)).hook_shape, "blocks.0.mlp.hook_pre_linear")
    assert said.endswith("(gpt2 models have no gated MLP).")
    said = sentence(resolve_model(folder_of({**LLAMA, "model_type": "phi"})).hook_shape, "blocks.0.hook_resid_mid")
    assert said.endswith("(phi models have no residual stream between attention and MLP).")


def test_last_layer_needed(folder_of):
    spec = resolve_model(folder_of(LLAMA))
    assert spec.last_layer_needed(["hook_embed"]) == -1
    assert spec.last_layer_needed(["blocks.2.hook_resid_pre"]) == 1
    assert spec.last_layer_needed(["blocks.2.hook_resid_pre", "blocks.2.attn.hook_z", "hook_embed"]) == 2
    assert spec.last_layer_needed(["blocks.3.hook_resid_post"]) == 3
    assert spec.last_layer_needed(["ln_final.hook_out"]) == 4


def test_fingerprint_changes_with_weights_and_config_and_with_nothing_else(folder_of):
    first = resolve_model(folder_of(LLAMA)).fingerprint
    assert resolve_model(folder_of(LLAMA, "elsewhere")).fingerprint == first
    assert resolve_model(folder_of(LLAMA, weights=b"Weights")).fingerprint != first
    assert resolve_model(folder_of({**LLAMA, "rms_norm_eps": 1e-6})).fingerprint != first


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": None}, "gives no d_model"),
        ({"hidden_size": "24"}, "gives no d_model"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder"),
    ],
)
def test_configs_that_cannot_be_used(folder_of, change, expected):
    assert expected in sentence(resolve_model, folder_of({**LLAMA, **change}))


def test_the_text_half_of_a_multimodal_config_is_read(folder_of):
    assert resolve_model(folder_of({"model_type": "other", "text_config": LLAMA})).d_model == 24


def test_damaged_configs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    assert "is not JSON" in sentence(resolve_model, str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "holds a list where an object is expected" in sentence(resolve_model, str(tmp_path))


def test_a_folder_that_is_no_model(tmp_path):
    assert "holds no config.json" in sentence(resolve_model, str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", "/no/such/folder", "a b", "a/b/c", "x" * 5000 + "/y/z", "nul\0", "unheard-of:thing"]
)
def test_names_that_can_be_nothing_are_refused_with_what_is_possible(name):
    said = sentence(resolve_model, name)
    assert "There is no model" in said
    assert "'bundled', a folder in Hugging Face layout, or a hub name" in said


def test_a_hub_name_without_a_hub_is_refused_with_the_reason():
    said = sentence(resolve_model, "nobody/such-a-model")
    assert "config.json of the model 'nobody/such-a-model' is neither in the local cache nor to be had" in said
    assert "HF_HUB_OFFLINE" in said


def test_a_hub_name_is_resolved_from_the_cache(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = resolve_model("someone/small")
    assert (spec.name, spec.revision, spec.folder, spec.d_model) == ("someone/small", commit, None, 24)
    assert "tokenizer.json of the model 'someone/small'" in sentence(load_tokenizer, spec)


def test_a_model_folder_without_weights_or_tokenizer(folder_of, tmp_path):
    spec = resolve_model(folder_of(LLAMA))
    assert "has no tokenizer.json" in sentence(load_tokenizer, spec)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in sentence(load_tokenizer, spec)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "has a config.json but no weights" in sentence(lambda: resolve_model(str(tmp_path / "model")).fingerprint)


def test_a_tokenizer_is_loaded_without_its_truncation(tiny_llama, tmp_path):
    from tokenizers import Tokenizer

    spec = resolve_model(str(tiny_llama))
    tokenizer = load_tokenizer(spec)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(spec))
    limited = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    limited.enable_truncation(5)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny_llama / file).read_bytes())
    limited.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(resolve_model(str(tmp_path))).encode("def first(x): return x").ids) > 5


def test_another_kind_of_model_can_be_registered(folder_of, monkeypatch):
    class Toys:
        def resolve(self, argument):
            from dataclasses import replace

            return replace(resolve_model(folder_of(LLAMA)), name=f"toy:{argument}", loader="toy")

        def load(self, spec, device, dtype):
            return ("loaded", spec.name, device, dtype)

        def tokenizer(self, spec):
            return "its tokenizer"

    monkeypatch.setattr(language_model, "_registered", {})
    language_model.register_loader("toy", Toys())
    spec = resolve_model("toy:three")
    assert spec.name == "toy:three"
    assert load_tokenizer(spec) == "its tokenizer"
    assert language_model.load_language_model(spec) == ("loaded", "toy:three", "cpu", "float32")


def test_a_kind_that_is_not_installed_is_named(folder_of):
    from dataclasses import replace

    spec = replace(resolve_model(folder_of(LLAMA)), loader="absent")
    assert "of the kind 'absent', which nothing installed here can load" in sentence(load_tokenizer, spec)


def test_refusals_import_no_torch_and_take_less_than_a_second(folder_of):
    script = f"""
import sys
from activation_store.errors import UserError
from activation_store.harvest.language_model import resolve_model
spec = resolve_model({folder_of(LLAMA)!r})
for call in (lambda: spec.hook_shape("blocks.0.hook_residual"), lambda: resolve_model("/no/such/model"),
             lambda: resolve_model("no/such-model")):
    try:
        call()
    except UserError as error:
        print(error)
    else:
        raise SystemExit("not refused")
heavy = [name for name in ("torch", "transformers", "transformer_lens", "datasets") if name in sys.modules]
raise SystemExit(f"imported {{heavy}}" if heavy else 0)
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert time.perf_counter() - started < 2  # a second here is a second of a quiet machine
