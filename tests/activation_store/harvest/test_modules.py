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
