"""A host that runs ahead of its device: it asks for nothing within a step, and nothing of what it computes is another.

On a GPU that is the rule. Here it is forced on the CPU, where what would wait for a GPU can be forbidden, and on the
device "meta", which has no numbers to tell. What only a GPU can show is in the last test, which skips without one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from activation_store.errors import UserError
from dictlearn import ops
from dictlearn.dictionaries import REGISTRY, configs, dictionary_class
from dictlearn.dictionaries.base import Update
from dictlearn.dictionaries.dead_latents import DeadLatents
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops.ahead import LAG, Arriving
from dictlearn.training.checkpoint import put_back, state_of
from dictlearn.training.command import run_train
from dictlearn.training.finite import Found
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Average, Optimiser
from dictlearn.training.step import Member, NotFinite, backward, clip, take_step
from dictlearn.training.together import Together
from tests.training.planted import SAE, metrics, weights

DEAD = {"dead_after_rows": 300}
SINGLE = {
    "topk": configs.TopKConfig(d_sae=200, k=3, **DEAD),
    "topk, no AuxK": configs.TopKConfig(d_sae=200, k=3, auxk_weight=0.0),
    "multi-topk": configs.TopKConfig(d_sae=200, k=3, multi_topk_weight=0.1, scaling="per_token", **DEAD),
    "abstopk": configs.AbsTopKConfig(d_sae=200, k=3, **DEAD),
    "ksparse": configs.KSparseConfig(d_sae=200, k=3, k_start=5),
    "vsae": configs.VariationalConfig(d_sae=200, k=3, **DEAD),
    "relu": configs.ReLUConfig(d_sae=200),
    "jumprelu": configs.JumpReLUConfig(d_sae=200),
    "gated": configs.GatedConfig(d_sae=200),
    "batchtopk": configs.BatchTopKConfig(d_sae=200, k=20, **DEAD),
    "matryoshka": configs.MatryoshkaConfig(d_sae=200, k=20, **DEAD),
    "mp": configs.MatchingPursuitConfig(d_sae=200, k=3, revive_weight=0.1, **DEAD),
    "icfl": configs.ICFLConfig(d_sae=200, rounds=2, width=2, whiten=False),
}
SEVERAL = {
    "skip": configs.SkipConfig(d_sae=200, k=3, **DEAD),
    "clt": configs.CrossLayerConfig(d_sae=200, k=3, **DEAD),
    "crosscoder": configs.CrosscoderConfig(d_sae=200),
}
ASKS = {"batchtopk": 1, "matryoshka": 2}
"""What kinds with a number of active latents that no row knows by itself ask their device for in a step."""
WAITS = {"snmf"}
"""Sweeps over rows until none moves; it is there for a factorisation of few rows, on a CPU."""
D, ROWS = 12, 64


@pytest.fixture
def ahead() -> Iterator[None]:
    ops.run_ahead(True)
    yield
    ops.run_ahead(None)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    ops.run_ahead(False)
    yield
    ops.run_ahead(True)


def rows(seed: int = 0, parts: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(ROWS, D * parts, generator=generator) @ torch.randn(D * parts, D * parts, generator=generator)
    return mixed + 3


def member(case: str = "topk", optimiser: OptimiserConfig | None = None, device: str = "cpu", **settings) -> Member:
    config = (SINGLE | SEVERAL)[case]
    widths = {"clt": ([D, D], [D, D]), "crosscoder": ([D, D], None), "skip": (D, D)}.get(case, (D, None))
    dictionary = dictionary_class(config.kind)(config, *widths)
    generator = torch.Generator().manual_seed(1)
    x, target = batch(case, 1000)
    control = SimpleNamespace(mean=x.mean(dim=0).numpy(), second_moment=None)
    dictionary.initialise(x, target, generator, control)
    with torch.no_grad():  # some latents that hardly fire
        getattr(dictionary, "b_enc", torch.zeros(1))[::3] -= 3
    optimiser = optimiser or OptimiserConfig(learning_rate=3e-3)
    average = Average(optimiser.averaging, dictionary) if optimiser.averaging else None
    dictionary.to(device)
    return Member(case, dictionary, Optimiser(optimiser, dictionary), generator, average=average, **settings)


def batch(case: str, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = rows(seed, 2 if case in ("clt", "crosscoder") else 1)
    return x, x.roll(1, dims=1).tanh() if case in ("skip", "clt") else None


def trained(one: Member, steps: int, first: int = 0) -> list[dict[str, float]]:
    """The terms of every step's loss."""
    taken = [take_step(one, *batch(one.name, step), step, 1000) for step in range(first, first + steps)]
    one.unread.settle()
    return [{name: float(term) for name, term in found.loss.terms.items()} for found in taken]


def state(one: Member) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state_of(one).items() if name != "dead_latents"}


# --- nothing is waited for --------------------------------------------------------------------------------------------


class WouldWait(Exception):
    """On a GPU this would wait."""


class NoWaiting(TorchDispatchMode):
    """Forbids what makes the host wait for a GPU: numbers read, and results with as many elements as numbers say."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in self.FORBIDDEN or masks:
            raise WouldWait(name)
        return func(*args, **(kwargs or {}))


class NoCopies(TorchDispatchMode):
    """Forbids what copies a number from the host to the device "meta": a GPU would be waited for, but for kernels that
    take a number of the host as it is."""

    COPIES = ("_to_copy", "copy_", "where", "index_put_", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        results, sources = tree_leaves(found), tree_leaves((args, kwargs))
        if func.overloadpacket.__name__ in self.COPIES:
            on_meta = any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in results)
            if on_meta and any(isinstance(tensor, torch.Tensor) and tensor.is_cpu for tensor in sources):
                raise WouldWait(func.overloadpacket.__name__)
        return found


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[str]]:
    """What numbers were read by, but for those that were asked for long before."""
    found: list[str] = []
    read, permitted = Arriving.read, []
    originals = {
        name: getattr(torch.Tensor, name)
        for name in ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero")
    }

    def permitting(self):
        permitted.append(1)
        try:
            with _disable_current_modes():
                return read(self)
        finally:
            permitted.pop()

    def noting(name):
        def noted(self, *args, **kwargs):
            if not permitted:
                found.append(name)
            permitted.append(1)  # what it calls itself is the same question
            try:
                return originals[name](self, *args, **kwargs)
            finally:
                permitted.pop()

        return noted

    monkeypatch.setattr(Arriving, "read", permitting)
    for name in originals:
        monkeypatch.setattr(torch.Tensor, name, noting(name))
    yield found
    monkeypatch.setattr(Arriving, "read", read)


@pytest.fixture
def dense(monkeypatch) -> Iterator[None]:
    """The operations as plain torch: those for a CPU have ways of their own."""
    ops.set_backend("reference")
    monkeypatch.setattr("dictlearn.dictionaries.icfl.FEW", 0)
    yield
    ops.set_backend("auto")


def test_no_kind_is_left_out():
    assert {config.kind for config in (SINGLE | SEVERAL).values()} | WAITS == set(REGISTRY)


@pytest.mark.parametrize("case", [*SINGLE, *SEVERAL])
def test_a_step_asks_its_device_for_nothing(case, ahead, dense, asked):
    one = member(case)
    trained(one, LAG)  # in which dead latents are counted
    for step in range(LAG, 2 * LAG):
        x, target = batch(case, step)
        asked.clear()
        if case in ASKS:
            take_step(one, x, target, step, 1000)
        else:
            with NoWaiting():
                take_step(one, x, target, step, 1000)
        assert len(asked) == ASKS.get(case, 0), asked
    if "AuxK" not in case and hasattr(one.dictionary.config, "auxk_weight"):
        assert any("auxk" in terms for terms in trained(one, 4, first=8)), "there were dead latents to be listed"


def test_what_would_wait_is_noticed(ahead, dense, asked):
    there = torch.ones(3, device="meta")
    for copies in (lambda: torch.where(there > 0, there, torch.ones(())), lambda: torch.zeros(()).to("meta")):
        with NoCopies(), pytest.raises(WouldWait):
            copies()
    with NoCopies():
        there.masked_fill(there > 0, 1.0) * 2 + there.new_zeros(())
    one = member()
    with NoWaiting(), pytest.raises(WouldWait, match="_local_scalar_dense|nonzero"):
        take_step(one, *batch("topk", 0), 0, 1000)  # the first step counts the dead latents
    with waiting():
        asked.clear()
        trained(member(), 1)
        assert "__bool__" in asked


@pytest.mark.parametrize("case", [*SINGLE, *SEVERAL])
def test_on_a_device_without_numbers_a_step_is_computed_all_the_same(case, ahead, monkeypatch):
    """Loss, gradients, clipping and counting in the way that a GPU takes, by the portable operations."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    if case in ASKS:
        pytest.skip("asks for the slots that the busiest row needs")
    monkeypatch.setattr("dictlearn.dictionaries.dead_latents.DeadLatents._most", lambda self, *a: 20)
    one = member(case)
    one.dictionary.to("meta")
    monkeypatch.setattr("dictlearn.dictionaries.dead_latents.Arriving", lambda number: None)
    x, target = (None if rows is None else rows.to("meta") for rows in batch(case, 0))
    with NoCopies():
        loss = backward(one, x, target)
        one.dictionary.project_gradients()
        norm = clip(one)
        Found.of(0, loss, norm, x, target)
        one.dictionary.after_update(Update(one.optimiser, 0, 1000, one.generator, x, target, loss, norm))
        one.dictionary.observe(loss.codes)
    assert loss.total.device.type == "meta"
    assert all(p.grad.device.type == "meta" for p in one.dictionary.parameters() if p.requires_grad)


# --- and nothing comes out differently --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", [*SINGLE, *SEVERAL])
def test_running_ahead_changes_nothing_but_rounding(case, accumulate, ahead):
    """Lists of dead latents are padded, so that their products may round differently; nothing else is."""
    results = []
    for way in (contextlib.nullcontext(), waiting()):
        with way:
            one = member(case, accumulate=accumulate)
            one.dictionary.double()
            one.optimiser = Optimiser(OptimiserConfig(learning_rate=3e-3), one.dictionary)
            one.average = Average(0.9, one.dictionary)
            terms = [
                take_step(one, x.double(), None if y is None else y.double(), step, 1000).loss.terms
                for step, (x, y) in ((step, batch(case, step)) for step in range(12))
            ]
            results.append((state(one), [{name: float(term) for name, term in of.items()} for of in terms]))
    (found, terms), (expected, terms_expected) = results
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    for of_step, of_step_expected in zip(terms, terms_expected, strict=True):
        assert {"auxk": 0.0} | of_step == pytest.approx({"auxk": 0.0} | of_step_expected, rel=1e-7, abs=1e-9)


def test_where_all_latents_are_dead_nothing_is_padded_and_every_bit_is_the_same(ahead):
    found = []
    for way in (contextlib.nullcontext(), waiting()):
        with way:
            one = member()
            one.dictionary.rows_since_fired.fill_(10**6)
            loss = backward(one, *batch("topk", 0))
            clip(one)
            found.append([loss.total.detach(), *(p.grad for p in one.dictionary.parameters())])
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)


def test_clipping_on_the_device_is_clipping(ahead):
    for limit in (0.01, 1e3):
        grads = []
        for way in (contextlib.nullcontext(), waiting()):
            with way:
                one = member("topk, no AuxK", gradient_clip=limit)
                backward(one, *batch("topk", 0))
                norm = clip(one)
                grads.append([norm, *(p.grad for p in one.dictionary.parameters())])
        assert all(torch.equal(mine, expected) for mine, expected in zip(*grads, strict=True))
        assert (norm > limit) == (limit == 0.01)


# --- the list of dead latents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_list_holds_all_dead_latents_first_and_others_once(ahead, seed, groups, monkeypatch):
    """Latents that fire at random, in batches of which the last ones are larger than could be foreseen."""
    monkeypatch.setattr("dictlearn.dictionaries.dead_latents.FEWEST", 8)
    random = torch.Generator().manual_seed(seed)
    latents, dead_after = 400, 500
    counters, lists = torch.zeros(latents, dtype=torch.int64), DeadLatents(groups)
    often = torch.rand(latents, generator=random) ** 4 / 2
    padded = 0
    for step in range(60):
        dead = (counters > dead_after).view(groups, -1)
        found = lists.of(counters, dead_after)
        assert found is not None or not dead.any()
        listed = torch.zeros(groups, 0).long() if found is None else found.latents.split(found.lengths)
        for group, (of_group, is_dead) in enumerate(zip(listed, dead, strict=True)):
            count = int(is_dead.sum())
            assert torch.equal(of_group[:count] - group * len(is_dead), is_dead.nonzero().squeeze(1))
            assert len(of_group.unique()) == len(of_group)
            padded += len(of_group) - count
        if found is not None:
            assert torch.equal(found.alive, ~dead.flatten()[found.latents])
            assert found.lengths[0] % 8 == 0
        rows = 70 if step < 40 else 70 + 30 * (step - 40)
        counters += rows
        counters[torch.rand(latents, generator=random) < often] = 0
        lists.foresee(counters, rows)
    assert dead.any() and padded


def test_counters_that_somebody_else_sets_are_counted_anew(ahead):
    lists, counters = DeadLatents(), torch.zeros(300, dtype=torch.int64)
    for _ in range(2 * LAG):
        assert lists.of(counters, 1000) is None
        counters += 1
        lists.foresee(counters, 1)
    counters[5] = 10**6
    found = lists.of(counters, 1000)
    assert found.latents[0] == 5 and found.alive.tolist() == [False] + [True] * 63


def test_without_dead_latents_a_padded_list_costs_nothing(ahead, monkeypatch):
    monkeypatch.setattr(DeadLatents, "_most", lambda self, *a: 7)
    one = member()
    loss = backward(one, *batch("topk", 0))
    with waiting():
        other = member()
        expected = backward(other, *batch("topk", 0))
    assert loss.terms["auxk"] == 0 and "auxk" not in expected.terms
    assert torch.equal(loss.total.detach(), expected.total.detach())
    for mine, theirs in zip(one.dictionary.parameters(), other.dictionary.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["topk", "clt"])
def test_a_resumed_member_goes_on_as_it_would_have(case, ahead, monkeypatch):
    """With lists of the same lengths, and so to the bit."""
    monkeypatch.setattr("dictlearn.dictionaries.dead_latents.FEWEST", 1)
    lengths, list_dead = [], DeadLatents.of

    def noted(self, *arguments):
        found = list_dead(self, *arguments)
        lengths.append(None if found is None else found.lengths)
        return found

    monkeypatch.setattr(DeadLatents, "of", noted)
    whole = member(case)
    trained(whole, 12)
    saved = state_of(whole)
    trained(whole, 8, first=12)
    expected = lengths[-8:]
    resumed = member(case)
    put_back(resumed, saved)
    trained(resumed, 8, first=12)
    assert lengths[-8:] == expected
    without = member(case)
    put_back(without, {name: tensor for name, tensor in saved.items() if name != "dead_latents"})
    trained(without, 8, first=12)
    assert lengths[-8:] != expected, "lengths would show it"
    for name, tensor in state_of(whole).items():
        assert torch.equal(tensor, state_of(resumed)[name]), name


# --- what is not finite is learnt late --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_a_step_that_is_not_finite_and_those_after_it_come_to_nothing(rule, ahead):
    """Muon cannot leave a step out on a device, so that it is waited for."""
    one = member(optimiser=OptimiserConfig(rule=rule, learning_rate=3e-3))
    trained(one, 6)
    before = state(one)
    bad = rows(6)
    bad[[7, 20], 3] = float("inf")
    steps = iter(range(6, 20))
    with pytest.raises(NotFinite, match="mse (nan|inf).*gradient norm nan; the input is not finite") as found:
        [take_step(one, bad if step == 6 else rows(step), None, step, 1000) for step in steps]
    assert found.value.step == 6 and found.value.rows.tolist() == [7, 20]
    assert next(steps) == 1 + (6 + LAG if rule == "adam" else 6)
    for name, tensor in state(one).items():
        if name.endswith("W_dec"):  # rows are brought back to unit norm
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)
        elif name != "dictionary.rows_since_fired":
            assert torch.equal(tensor, before[name]), name
    trained(one, 6, first=6)
    assert not torch.equal(state(one)["dictionary.W_enc"], before["dictionary.W_enc"]), "it can go on"


def test_dead_latents_are_not_redrawn_after_a_step_that_was_left_out(ahead):
    config = replace(SINGLE["topk"], resample_every=2)
    one = member()
    one.dictionary.config = config
    one.dictionary.rows_since_fired.fill_(10**6)
    assert take_step(one, rows(0) * float("nan"), None, 1, 1000).extras == {}
    with pytest.raises(NotFinite):
        one.unread.settle()
    one.dictionary.rows_since_fired.fill_(10**6)
    assert take_step(one, rows(0), None, 1, 1000).extras["resampled"] > 0


def poisoned(monkeypatch, step: int) -> None:
    """Row 5 of the batch of this step is no number."""
    loss, calls = TopK.loss, []

    def of_bad_rows(self, x, target=None):
        calls.append(x)
        bad = torch.arange(len(x))[:, None] == 5
        return loss(self, x.masked_fill(bad, float("nan")) if len(calls) == step + 1 else x)

    monkeypatch.setattr(TopK, "loss", of_bad_rows)


@pytest.mark.parametrize(("step", "log_every"), [(8, 100), (12, 100), (13, 100), (58, 100), (11, 5)])
def test_a_run_stops_as_if_it_had_waited(workspace, monkeypatch, ahead, step, log_every):
    """With the same sentence about the same rows, the same metrics and the same checkpoints, wherever it shows."""
    left = []
    for way in (waiting(), contextlib.nullcontext()):
        with way, monkeypatch.context() as patch:
            poisoned(patch, step)
            with pytest.raises(UserError, match=f"is not finite at step {step} .*, in rows .* of the store") as said:
                run_train(replace(SAE, log_every=log_every), workspace)
        run = workspace.run("sae")
        checkpoints = sorted(path.name for path in run.checkpoints.iterdir())
        left.append((str(said.value), metrics(workspace, "sae"), checkpoints))
        shutil.rmtree(run.folder)
    assert left[0] == left[1]
    assert left[0][1][-1] == {"step": step + 1, "stopped": left[0][0]}
    assert left[0][2] == [f"step-{saved:09d}" for saved in range(7, step + 1, 7)][-2:]


def test_a_run_that_is_interrupted_after_a_step_that_was_not_finite_stops_for_that(workspace, monkeypatch, ahead):
    take = Together.take_step

    def interrupted(self, *arguments):
        if arguments[3] == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *arguments)

    with monkeypatch.context() as patch:
        poisoned(patch, 9)
        patch.setattr(Together, "take_step", interrupted)
        with pytest.raises(UserError, match="is not finite at step 9"):
            run_train(replace(SAE, log_every=100), workspace)
    assert metrics(workspace, "sae")[-1]["step"] == 10
    assert [path.name for path in workspace.run("sae").checkpoints.iterdir()] == ["step-000000007"]
    run_train(replace(SAE, log_every=100), workspace)  # begins before it


def test_a_killed_run_that_runs_ahead_ends_as_if_never_killed(workspace, monkeypatch, ahead):
    run_train(replace(SAE, name="whole"), workspace)
    for step in (6, 30, 45):
        with monkeypatch.context() as patch:
            take = Together.take_step
            patch.setattr(Together, "take_step", lambda self, *a: 1 / (a[3] != step) and take(self, *a))  # noqa: B023
            with pytest.raises(ZeroDivisionError):
                run_train(replace(SAE, name=f"killed-{step}"), workspace)
        run_train(replace(SAE, name=f"killed-{step}"), workspace)
        assert metrics(workspace, f"killed-{step}") == metrics(workspace, "whole")
        found, expected = weights(workspace, f"killed-{step}"), weights(workspace, "whole")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*SINGLE, *SEVERAL])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_is_not_waited_for(case):
    if case in ASKS:
        pytest.skip("asks for the slots that the busiest row needs")
    one = member(case, device="cuda", precision="bfloat16")
    batches = [batch(case, step) for step in range(2 * LAG)]
    on_gpu = [(x.cuda(), None if target is None else target.cuda()) for x, target in batches]
    try:
        for step, (x, target) in enumerate(on_gpu):
            torch.cuda.set_sync_debug_mode("error" if step >= LAG else "default")
            take_step(one, x, target, step, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    one.unread.settle()
