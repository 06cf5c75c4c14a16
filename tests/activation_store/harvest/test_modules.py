"""What is read from a model's own modules is what the Bridge gives, at every hook that a module shows.

Nineteen layouts, all tiny and random, over three seeds. Where a hook has no module is pinned, too: a hook that loses
its module would still be right, through the Bridge, and only slow.
"""

from __future__ import annotations

import pytest

from activation_store.harvest.language_model import load_language_model, load_modules, resolve_model
from activation_store.harvest.modules import HookedModules, difference, find_places
from tests.tiny_models import OTHER_LAYOUTS, save_layout

torch = pytest.importorskip("torch")

from activation_store.harvest.capture import Capture  # noqa: E402

TOKENS = torch.arange(1, 65).reshape(2, 32)

NORMALIZED = {"ln1.hook_normalized", "ln2.hook_normalized", "ln_final.hook_normalized"}
ROTATED = {"attn.hook_rot_q", "attn.hook_rot_k"}
JOINT_QKV = {f"attn.{name}" for q in "qkv" for name in (f"hook_{q}", f"{q}.hook_out")}
POSITIONS = {"hook_pos_embed", "pos_embed.hook_out"}
WITHOUT_A_MODULE = {
    **dict.fromkeys(("bloom", "gpt2", "gpt_neox", "falcon"), NORMALIZED | JOINT_QKV),
    **dict.fromkeys(("gpt_neo", "gptj", "opt"), NORMALIZED),
    "phi3": NORMALIZED | JOINT_QKV | {"mlp.hook_pre", "mlp.hook_pre_linear"},
}
"""Hooks inside a computation that is one module's: all else is read. Other layouts lack NORMALIZED and ROTATED."""


def both(folder, dtype="float32"):
    """The activations at all hooks that have a module, by the modules and by the Bridge; and the places."""
    spec = resolve_model(str(folder))
    bridge = load_language_model(spec, dtype=dtype)
    places = find_places(bridge, spec.hooks())
    hooks = {hook: spec.hook_shape(hook) for hook in places if hook not in POSITIONS}
    plain = HookedModules(load_modules(spec, type(bridge.original_model), dtype=dtype), places, hooks)
    rows = []
    for model in (plain, bridge):
        with Capture(model, hooks, getattr(torch, dtype)) as capture:
            rows.append(capture.run(TOKENS))
    return *rows, places, spec


def check(folder) -> None:
    found, expected, places, spec = both(folder)
    for hook, rows in expected.items():
        assert found[hook].shape == rows.shape
        # Measured over these and forty-layer models: 1.5e-6 at most.
        assert difference(found[hook], rows) < 5e-6, hook
    lacking = {
        hook.split(".", 2)[-1] if hook.startswith("blocks") else hook for hook in set(spec.hooks()) - set(places)
    }
    pinned = WITHOUT_A_MODULE.get(spec.layout, NORMALIZED | ROTATED)
    accepted = {hook.removeprefix("blocks.0.") for hook in spec.hooks()}
    assert lacking == pinned & accepted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", sorted(OTHER_LAYOUTS))
def test_modules_give_what_the_bridge_gives(layout, seed, tiny_llama, tmp_path):
    check(save_layout(tmp_path, layout, tokenizer_of=tiny_llama, seed=seed))


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "stories260k"])
def test_modules_give_what_the_bridge_gives_here_too(fixture, request):
    check(request.getfixturevalue(fixture))


# --- the pass -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tiny_llama):
    spec = resolve_model(str(tiny_llama))
    bridge = load_language_model(spec)
    hooks = {hook: spec.hook_shape(hook) for hook in ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_in")}
    model = load_modules(spec, type(bridge.original_model))
    return HookedModules(model, find_places(bridge, hooks), hooks), hooks


def test_the_pass_ends_at_the_last_hook(plain):
    """The MLP whose input is read is not computed, nor what comes after it, nor the unembedding."""
    hooked, hooks = plain
    computed = []
    for path in ("model.layers.1.self_attn", "model.layers.1.mlp", "model.layers.2", "model.norm", "lm_head"):
        hooked.model.get_submodule(path).register_forward_hook(lambda *_, path=path: computed.append(path))
    with Capture(hooked, hooks, torch.float32) as capture:
        capture.run(TOKENS)
    assert computed == ["model.layers.1.self_attn"]


def test_stopping_and_leaving_change_nothing_in_the_model(plain):
    hooked, hooks = plain
    with torch.no_grad():
        before = hooked.model(TOKENS).logits
    with Capture(hooked, hooks, torch.float32) as capture:
        first, second = capture.run(TOKENS), capture.run(TOKENS)
    assert all(torch.equal(first[hook], second[hook]) for hook in hooks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked.model.modules())
    with torch.no_grad():
        assert torch.equal(hooked.model(TOKENS).logits, before)


def test_what_is_read_is_a_copy(plain):
    """A later module may write into what an earlier one gave out, as Falcon's and Bloom's do."""
    hooked, hooks = plain
    with Capture(hooked, hooks, torch.float32) as capture:
        expected = capture.run(TOKENS)["blocks.0.hook_resid_post"].clone()
        hooked.model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].zero_(),))
        assert torch.equal(capture.run(TOKENS)["blocks.0.hook_resid_post"], expected)


def test_a_gelu_written_out_in_python_is_computed_in_one(tiny_gpt2):
    spec = resolve_model(str(tiny_gpt2))
    model = load_modules(spec, type(load_language_model(spec).original_model))
    activations = {type(module).__name__ for module in model.modules() if "GELU" in type(module).__name__}
    assert activations == {"GELU"} and model.transformer.h[0].mlp.act.approximate == "tanh"


# --- the measure ----------------------------------------------------------------------------------------------------


def test_difference_is_a_share_of_the_length():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 4, 6, generator=generator)
    assert difference(rows, rows) == 0
    assert difference(rows * 1.01, rows) == pytest.approx(0.01, rel=0.3)
    assert difference(1000 * rows * 1.01, 1000 * rows) == pytest.approx(difference(rows * 1.01, rows), rel=1e-3)
    assert difference(torch.randn(500, 4, 6, generator=generator), rows) == pytest.approx(2**0.5, rel=0.1)


def test_difference_sees_one_token_among_many_and_is_not_blinded_by_a_large_one():
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(4))
    rows[0] *= 1000  # an attention sink
    wrong = rows.clone()
    wrong[1] = -wrong[1]
    assert difference(wrong, rows) > 0.02


def test_values_that_are_not_numbers_differ():
    rows = torch.ones(8, 4)
    broken = rows.clone()
    broken[3, 2] = torch.nan
    assert not difference(broken, rows) <= 1
