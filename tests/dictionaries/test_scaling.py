"""Scaling: what each makes of rows, what of it is left in a saved dictionary, and what cannot be done with it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from activation_store.errors import UserError
from dictlearn.codes import Codes
from dictlearn.dictionaries.configs import ICFLConfig, KSparseConfig, ReLUConfig, TopKConfig, check_hooks
from dictlearn.dictionaries.description import hooks_of
from dictlearn.dictionaries.files import load, save
from dictlearn.dictionaries.scaling import Scaling, scalings, whitening
from dictlearn.dictionaries.topk import TopK

D, D_OUT = 6, 5
NAMES = ("mean_square", "none", "per_token", "layer_norm", "whiten")


def rows(count: int = 5000, seed: int = 0, width: int = D) -> Tensor:
    """Correlated float64 rows far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 10


def statistics(x: Tensor) -> SimpleNamespace:
    return SimpleNamespace(mean=x.mean(dim=0).numpy(), second_moment=(x.T @ x / len(x)).numpy())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and second moment."""
    return x.mean(dim=0), x.T @ x / len(x)


def fitted(name: str, x: Tensor, shrinkage: float = 0.0) -> Scaling:
    scaling = scalings(name, (x.shape[1],), None, shrinkage)[0].double()
    scaling.fit(x, statistics(x))
    return scaling


def trained(name: str, transcoder: bool) -> tuple[TopK, Tensor]:
    x = rows(256)
    target = torch.tanh(x[:, :D_OUT] - 10) * 4 + 2 if transcoder else None
    dictionary = TopK(TopKConfig(d_sae=20, k=3, scaling=name), D, D_OUT if transcoder else None).double()
    dictionary.initialise(x, target, torch.Generator().manual_seed(0), statistics(x))
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
    for _ in range(10):
        optimiser.zero_grad()
        dictionary.loss(x, target).total.backward()
        optimiser.step()
        dictionary.constrain()
    return dictionary, x


def test_whitening_gives_control_rows_zero_mean_and_unit_covariance():
    x = rows()
    white = fitted("whiten", x)(x)
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(D, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(D, dtype=torch.float64), atol=1e-8, rtol=0)
    whiten, unwhiten = whitening(*moments(x), shrinkage=0.1)
    torch.testing.assert_close(whiten @ unwhiten, torch.eye(D, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_other_scalings_give_what_they_say():
    x = rows()
    scaled = {name: fitted(name, x)(x) for name in NAMES}
    assert torch.equal(scaled["none"], x)
    deviation = scaled["mean_square"] - scaled["mean_square"].mean(dim=0)
    assert float(deviation.square().mean()) == pytest.approx(1)
    torch.testing.assert_close(scaled["mean_square"] / x, torch.full_like(x, float((scaled["mean_square"] / x)[0, 0])))
    ones = torch.ones(len(x), dtype=torch.float64)
    torch.testing.assert_close(scaled["per_token"].square().mean(dim=1), ones)
    torch.testing.assert_close(torch.cosine_similarity(scaled["per_token"], x), ones)
    torch.testing.assert_close(scaled["layer_norm"].square().mean(dim=1), ones)
    torch.testing.assert_close(scaled["layer_norm"].mean(dim=1), 0 * ones, atol=1e-12, rtol=0)
    for name in NAMES:
        torch.testing.assert_close(fitted(name, x).undo(scaled[name], x), x, msg=name)


def test_whitening_of_rows_in_a_subspace_needs_shrinkage():
    flat = rows()
    flat[:, 0] = flat[:, 1]
    with pytest.raises(UserError, match="do not vary in all 6 directions.*set shrinkage above 0"):
        whitening(*moments(flat), shrinkage=0.0)
    assert torch.isfinite(whitening(*moments(flat), shrinkage=0.01)[0]).all()


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_folded_dictionary_is_its_four_weights_unless_rows_have_their_own_scale(name, transcoder):
    dictionary, x = trained(name, transcoder)
    folded = dictionary.fold()
    assert set(folded.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "rows_since_fired"}
    pre = x @ folded.W_enc.T + folded.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0)
    by_hand = (pre.relu() * kept) @ folded.W_dec + folded.b_dec
    equal = torch.allclose(by_hand, dictionary(x), rtol=1e-9, atol=1e-9)
    assert equal == (name not in ("per_token", "layer_norm"))


@pytest.mark.parametrize("name", NAMES)
def test_an_active_latent_adds_its_value_times_its_folded_decoder_row_to_the_raw_output(name):
    """What the feature index and its logit effects take for granted."""
    dictionary, x = trained(name, transcoder=False)
    folded = dictionary.fold()
    codes = folded.encode(x)
    without = Codes(codes.indices[:, 1:], codes.values[:, 1:], 20, codes.offset)
    first = codes.values[:, :1] * folded.W_dec[codes.indices[:, 0]]
    torch.testing.assert_close(folded.decode(codes) - folded.decode(without), first, rtol=1e-9, atol=1e-9)
    norms = folded.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms)) == (name != "whiten")


@pytest.mark.parametrize(("name", "shift"), [("per_token", 0.0), ("layer_norm", 2.0)])
def test_rows_with_a_scale_of_their_own_are_rebuilt_at_any_size(name, shift):
    dictionary, x = trained(name, transcoder=False)
    for made in (dictionary, dictionary.fold()):
        torch.testing.assert_close(made(3 * x + shift), 3 * made(x) + shift, rtol=1e-9, atol=1e-9)


def test_codes_that_do_not_know_their_rows_scale_are_refused_and_a_transcoders_need_none():
    dictionary, x = trained("layer_norm", transcoder=False)
    codes = dictionary.encode(x)
    with pytest.raises(ValueError, match="have no offset.*decode what encode returned"):
        dictionary.decode(Codes(codes.indices, codes.values, codes.d_sae))
    assert trained("layer_norm", transcoder=True)[0].encode(x).offset is None


def test_a_dictionary_saved_before_scalings_had_names_still_loads(tmp_path):
    """Format version 1: the scales, 1 in what is saved, stood among the weights; the configuration had seven fields."""
    dictionary, x = trained("mean_square", transcoder=False)
    folder = save(dictionary, tmp_path, {"hook_in": "a", "hook_out": "a"})
    weights, description = folder / "dictionary.safetensors", folder / "dictionary.json"
    save_file(load_file(weights) | {name: torch.ones(()) for name in ("input_scale", "target_scale")}, weights)
    record = json.loads(description.read_text())
    record["version"] = 1
    del record["autoencoder"]
    old = ("d_sae", "k", "auxk_weight", "k_aux", "dead_after_rows")
    record["config"] = {field: record["config"][field] for field in old}
    description.write_text(json.dumps(record))
    loaded = load(folder)
    assert torch.equal(loaded.double()(x), dictionary.fold().float().double()(x))
    assert loaded.autoencoder
    description.write_text(json.dumps(record | {"version": 3}))
    with pytest.raises(UserError, match="has format version 3; this dictlearn reads version 2 and before"):
        load(folder)


# --- several hooks side by side ---------------------------------------------------------------------------------------

PARTS = (2, 4)


def two_hooks(count: int = 5000) -> Tensor:
    """Rows of two hooks, the second a hundred times larger."""
    return torch.cat([rows(count, width=2), 100 * rows(count, seed=1, width=4) + 300], dim=1)


def test_each_of_several_hooks_has_unit_variance():
    x = two_hooks()
    scaling = scalings("mean_square", PARTS, None)[0].double()
    scaling.fit(x, statistics(x))
    scaled = scaling(x)
    for part, raw in zip(scaled.split(PARTS, dim=1), x.split(PARTS, dim=1), strict=True):
        assert float((part - part.mean(dim=0)).square().mean()) == pytest.approx(1)
        ratio = raw / part
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))
    torch.testing.assert_close(scaling.undo(scaled), x)


def test_each_of_several_hooks_is_whitened_by_itself():
    """What a store does not know, how two hooks vary together, changes nothing."""
    x = two_hooks()
    known, unknown = statistics(x), statistics(x)
    unknown.second_moment = unknown.second_moment.copy()
    unknown.second_moment[:2, 2:] = 1e6
    whitened = []
    for control in (known, unknown):
        scaling = scalings("whiten", PARTS, None)[0].double()
        scaling.fit(x, control)
        whitened.append(scaling(x))
    assert torch.equal(*whitened)
    for part in whitened[0].split(PARTS, dim=1):
        identity = torch.eye(part.shape[1], dtype=torch.float64)
        torch.testing.assert_close(part.T @ part / len(x), identity, atol=1e-8, rtol=0)
    torch.testing.assert_close(scaling.undo(whitened[1]), x)


@pytest.mark.parametrize("name", ["mean_square", "none", "whiten"])
@pytest.mark.parametrize(("outputs", "kind"), [(None, "autoencoder"), ((3, 2), "transcoder")])
def test_a_folded_dictionary_of_several_hooks_is_its_four_weights(name, outputs, kind):
    x = two_hooks(256)
    target = None if outputs is None else torch.cat([x[:, :3].sin(), 1000 * x[:, 3:5].cos()], dim=1)
    dictionary = TopK(TopKConfig(d_sae=20, k=3, scaling=name), PARTS, outputs).double()
    dictionary.initialise(x, target, torch.Generator().manual_seed(0), statistics(x))
    folded = dictionary.fold()
    pre = x @ folded.W_enc.T + folded.b_enc
    kept = torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0)
    by_hand = (pre.relu() * kept) @ folded.W_dec + folded.b_dec
    torch.testing.assert_close(by_hand, dictionary(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(20).double())
    raw = folded.W_dec.norm(dim=1)
    assert torch.allclose(raw, torch.ones_like(raw)) == (name == "none"), kind


@pytest.mark.parametrize("config", [TopKConfig, ReLUConfig])
@pytest.mark.parametrize("name", ["per_token", "layer_norm"])
def test_a_rows_own_scale_is_refused_where_there_are_several_hooks(name, config):
    with pytest.raises(UserError, match=f"scaling is '{name}'.*there are 2 hooks.*use mean_square"):
        check_hooks(config(scaling=name), PARTS, None)
    check_hooks(config(scaling=name), (D,), PARTS)  # the target of a transcoder has one number in any case


@pytest.mark.parametrize("config", [ICFLConfig(rounds=1), KSparseConfig()])
def test_kinds_of_one_hook_say_so(config):
    with pytest.raises(UserError, match=f"kind '{config.kind}' is of one hook alone"):
        check_hooks(config, PARTS, None)
    with pytest.raises(UserError, match=f"kind '{config.kind}' rebuilds its own input and has no target hook"):
        check_hooks(config, (D,), (D,))


def test_a_saved_dictionary_says_the_widths_of_its_hooks_where_there_are_several(tmp_path):
    config = TopKConfig(d_sae=20, k=3)
    for name, widths, said in [
        ("one", (D, None), set()),
        ("two", (PARTS, None), {"input_parts", "output_parts"}),
        ("from two", (PARTS, (D_OUT,)), {"input_parts"}),
        ("to two", (D, PARTS), {"output_parts"}),
    ]:
        folder = save(TopK(config, *widths), tmp_path / name)
        record = json.loads((folder / "dictionary.json").read_text())
        assert {key for key in record if key.endswith("_parts")} == said
        loaded = load(folder)
        assert loaded.input_parts == (widths[0] if isinstance(widths[0], tuple) else (D,))
        assert loaded.d_in == D and loaded.autoencoder == (widths[1] is None)


def test_hooks_are_read_from_either_form_of_a_provenance():
    assert hooks_of({"hook_in": "a", "hook_out": "b"}) == (("a",), ("b",))
    assert hooks_of({"hook_in": ["a", "b"], "hook_out": "c"}) == (("a", "b"), ("c",))
