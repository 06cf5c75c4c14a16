"""A host that runs ahead of its device: it asks for nothing within a step, and nothing of what it computes is another.

On a GPU that is the rule. Here it is forced on the CPU, where what would wait for a GPU can be forbidden, and on the
device "meta", which has no numbers to tell. What only a GPU can show is in the last test, which skips without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dictlearn import ops
from dictlearn.dictionaries import configs, dictionary_class
from dictlearn.ops.ahead import LAG, Arriving
from dictlearn.training.checkpoint import state_of
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Average, Optimiser
from dictlearn.training.step import Member, backward, clip, take_step

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
}
SEVERAL = {
    "skip": configs.SkipConfig(d_sae=200, k=3, **DEAD),
    "clt": configs.CrossLayerConfig(d_sae=200, k=3, **DEAD),
    "crosscoder": configs.CrosscoderConfig(d_sae=200),
}
ASKS = {"batchtopk": 1, "matryoshka": 2}
"""What kinds with a number of active latents that no row knows by itself ask their device for in a step."""
D, ROWS, STEPS = 12, 64, 60


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
    dictionary.initialise(x, target, generator, None)
    with torch.no_grad():  # some latents that hardly fire
        dictionary.b_enc[::3] -= 3
    optimiser = optimiser or OptimiserConfig(learning_rate=3e-3)
    average = Average(optimiser.averaging, dictionary) if optimiser.averaging else None
    dictionary.to(device)
    return Member(case, dictionary, Optimiser(optimiser, dictionary), generator, average=average, **settings)


def batch(case: str, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = rows(seed, 2 if case in ("clt", "crosscoder") else 1)
    return x, x.roll(1, dims=1).tanh() if case in ("skip", "clt") else None


def trained(one: Member, steps: int = STEPS, first: int = 0) -> list[dict[str, float]]:
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
def dense() -> Iterator[None]:
    """The operations as plain torch: those for a CPU have ways of their own."""
    ops.set_backend("reference")
    yield
    ops.set_backend("auto")


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
    x, target = batch(case, 0)
    loss = backward(one, x.to("meta"), None if target is None else target.to("meta"))
    one.dictionary.project_gradients()
    clip(one)
    one.dictionary.constrain()
    monkeypatch.setattr("dictlearn.dictionaries.dead_latents.Arriving", lambda number: None)
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
                for step, (x, y) in ((step, batch(case, step)) for step in range(20))
            ]
            results.append((state(one), [{name: float(term) for name, term in of.items()} for of in terms]))
    (found, terms), (expected, terms_expected) = results
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    for of_step, of_step_expected in zip(terms, terms_expected, strict=True):
        assert {"auxk": 0.0} | of_step == pytest.approx({"auxk": 0.0} | of_step_expected, rel=1e-7, abs=1e-9)
