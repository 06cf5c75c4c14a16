"""The table of hooks against the Bridge: every name a model accepts fires, with the shape the config promised, and
what is captured is what TransformerLens' own cache holds.

Nineteen layouts, all tiny and random. Not checked here:
that the activations are those of the real architecture, which is TransformerLens' business.
"""

from __future__ import annotations

import pytest

from activation_store.errors import UserError
from activation_store.harvest.language_model import LAYOUTS, load_language_model, resolve_model
from tests.tiny_models import OTHER_LAYOUTS, save_layout

torch = pytest.importorskip("torch")

TOKENS = torch.arange(1, 33).reshape(2, 16)


def cached(bridge):
    with torch.no_grad():
        return bridge.run_with_cache(TOKENS)


def check_every_hook(bridge, spec) -> None:
    from activation_store.harvest.capture import Capture

    logits, cache = cached(bridge)
    shapes = {hook: spec.hook_shape(hook) for hook in spec.hooks()}
    for hook, shape in shapes.items():
        with Capture(bridge, {hook: shape}, torch.float32) as capture:
            rows = capture.run(TOKENS)[hook]
        assert torch.equal(rows, cache[hook].reshape(32, *shape)), hook
        with torch.no_grad():  # stopping inside a block must leave nothing behind
            assert torch.equal(bridge(TOKENS), logits), hook
    with Capture(bridge, shapes, torch.float32) as capture:
        together = capture.run(TOKENS)
    assert list(together) == list(shapes)
    for hook, shape in shapes.items():
        assert torch.equal(together[hook], cache[hook].reshape(32, *shape)), hook


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "stories260k"])
def test_every_accepted_hook_fires_with_its_shape_and_value(fixture, request):
    spec = resolve_model(str(request.getfixturevalue(fixture)))
    check_every_hook(load_language_model(spec), spec)


@pytest.mark.parametrize("layout", sorted(OTHER_LAYOUTS))
def test_every_accepted_hook_fires_in_other_layouts(layout, tiny_llama, tmp_path):
    spec = resolve_model(str(save_layout(tmp_path, layout, tokenizer_of=tiny_llama)))
    assert spec.layout == layout
    check_every_hook(load_language_model(spec), spec)


def test_every_layout_of_the_table_is_tried():
    assert set(LAYOUTS) == set(OTHER_LAYOUTS) | {"llama", "gpt2"}


# --- stopping early ---


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_the_pass_ends_at_the_last_hook(fixture, request):
    """The MLP after its own input is not computed, nor the blocks above, nor the unembedding."""
    from activation_store.harvest.capture import Capture

    spec = resolve_model(str(request.getfixturevalue(fixture)))
    bridge = load_language_model(spec)
    computed = []
    for name in (
        "blocks.1.mlp.hook_in",
        "blocks.1.mlp.hook_out",
        "blocks.2.hook_in",
        "ln_final.hook_in",
        "unembed.hook_out",
    ):
        bridge.hook_dict[name].add_hook(lambda value, hook, name=name: computed.append(name))
    hooks = ["blocks.1.mlp.hook_in", "blocks.0.hook_resid_post"]
    with Capture(bridge, dict.fromkeys(hooks, (24,)), torch.float32) as capture:
        capture.run(TOKENS)
    assert computed == ["blocks.1.mlp.hook_in"]

    computed.clear()
    with Capture(bridge, {"blocks.2.hook_resid_post": (24,)}, torch.float32) as capture:
        capture.run(TOKENS)
    assert "unembed.hook_out" not in computed and "ln_final.hook_in" not in computed


def test_leaving_the_capture_removes_its_hooks(tiny_llama):
    from activation_store.harvest.capture import Capture

    bridge = load_language_model(resolve_model(str(tiny_llama)))
    with Capture(bridge, {"blocks.1.attn.hook_z": (4, 6)}, torch.float32):
        assert bridge.hook_dict["blocks.1.attn.hook_z"].has_hooks()
    assert not bridge.hook_dict["blocks.1.attn.hook_z"].has_hooks()


# --- what a capture refuses ---


@pytest.fixture(scope="module")
def bridge(tiny_llama):
    return load_language_model(resolve_model(str(tiny_llama)))


def refusal(bridge, hooks, dtype=torch.float32) -> str:
    from activation_store.harvest.capture import Capture

    with pytest.raises(UserError) as caught, Capture(bridge, hooks, dtype) as capture:
        capture.run(TOKENS)
    return str(caught.value)


def test_a_hook_the_bridge_does_not_have(bridge):
    assert "gives this model no hook 'blocks.1.hook_nothing'" in refusal(bridge, {"blocks.1.hook_nothing": (24,)})


def test_a_hook_that_never_fires(bridge):
    """In this layout the Bridge has the hook point, but nothing passes through it."""
    hooks = {"blocks.1.hook_resid_post": (24,), "blocks.2.attn.hook_hidden_states": (24,)}
    said = refusal(bridge, hooks)
    assert said.startswith("The hook 'blocks.2.attn.hook_hidden_states' never fired in a forward pass of this model")


def test_a_hook_that_is_switched_off(bridge):
    said = refusal(bridge, {"blocks.2.attn.hook_result": (4, 24)})
    assert said.startswith("TransformerLens cannot read these hooks: Cannot add hook blocks.2.attn.hook_result because")
    assert not bridge.hook_dict["blocks.2.attn.hook_result"].has_hooks()


def test_a_shape_that_is_not_the_promised_one(bridge):
    said = refusal(bridge, {"blocks.1.attn.hook_v": (4, 6)})
    assert "has shape (2, 16, 2, 6) for 2 windows of 16 tokens, where the model's config makes it (2, 16, 4, 6)" in said


def test_values_that_are_not_finite(bridge):
    handle = bridge.hook_dict["blocks.1.hook_resid_pre"].add_hook(
        lambda value, hook: value.index_fill(1, torch.tensor(3), torch.nan)
    )
    try:
        said = refusal(bridge, {"blocks.1.hook_resid_post": (24,)})
    finally:
        bridge.reset_hooks()
    del handle
    assert "The activation at 'blocks.1.hook_resid_post' has " in said and "not finite (NaN or infinite)" in said


def test_values_too_large_for_the_type_on_disk(bridge):
    bridge.hook_dict["blocks.1.hook_resid_pre"].add_hook(lambda value, hook: value + 70_000)
    try:
        said = refusal(bridge, {"blocks.1.hook_resid_pre": (24,)}, torch.float16)
    finally:
        bridge.reset_hooks()
    assert "is 7e+04, too large for float16; store bfloat16 or float32" in said


# --- loading ---


def test_weights_are_the_checkpoints_own_and_need_no_gradient(tiny_llama):
    from safetensors.torch import load_file

    spec = resolve_model(str(tiny_llama))
    bridge = load_language_model(spec)
    assert not bridge.training and not any(parameter.requires_grad for parameter in bridge.parameters())
    own = dict(bridge.original_model.named_parameters())
    saved = load_file(tiny_llama / "model.safetensors")
    values = {name.replace("._original_component", ""): value for name, value in own.items()}
    assert all(torch.equal(values[name], saved[name]) for name in saved if name in values)
    assert "model.layers.1.mlp.gate_proj.weight" in values
    assert not bridge.compatibility_mode and not any(spec.provenance()["weight_processing"].values())


def test_loading_a_folder_is_silent_and_asks_no_network(tiny_gpt2, monkeypatch, capfd):
    import socket

    attempts = []

    def refused(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load_language_model(resolve_model(str(tiny_gpt2)))
    assert attempts == []
    assert capfd.readouterr() == ("", "")
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE is False


def test_damaged_weights_are_one_sentence(tiny_llama, tmp_path):
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="TransformerLens cannot load .* \\(llama\\): ") as caught:
        load_language_model(resolve_model(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda' was asked for, but torch sees no GPU here; use --device cpu"):
        load_language_model(resolve_model(str(tiny_llama)), device="cuda")
