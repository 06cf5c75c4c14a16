"""One step: what it computes, in whichever way it computes it, and what it refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from activation_store.errors import UserError
from dictlearn.dictionaries.configs import ICFLConfig, TopKConfig
from dictlearn.dictionaries.icfl import ICFL
from dictlearn.dictionaries.topk import TopK
from dictlearn.training.command import run_train
from dictlearn.training.configs import TrainConfig
from dictlearn.training.memory import Memory, estimate, what_to_lower
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Average, Optimiser
from dictlearn.training.step import Member, NotFinite, backward, clip, take_step
from dictlearn.training.together import Together
from tests.training.planted import IN, SAE, metrics, weights

RATE = OptimiserConfig(learning_rate=1e-2)


def rows(count: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3


def member(optimiser: OptimiserConfig = RATE, **settings) -> Member:
    dictionary = TopK(TopKConfig(d_sae=40, k=3, dead_after_rows=600), 12)
    generator = torch.Generator().manual_seed(1)
    dictionary.initialise(rows(1024), None, generator, None)
    average = Average(optimiser.averaging, dictionary) if optimiser.averaging else None
    return Member("m", dictionary, Optimiser(optimiser, dictionary), generator, average=average, **settings)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_computed_in_parts_gives_the_gradients_of_the_whole(parts):
    whole, in_parts = member(), member(accumulate=parts)
    losses = [backward(one, rows(), None) for one in (whole, in_parts)]
    for name, parameter in whole.dictionary.named_parameters():
        of_parts = dict(in_parts.dictionary.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad, of_parts, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[0].total.detach(), losses[1].total)
    torch.testing.assert_close(losses[0].output, losses[1].output)
    torch.testing.assert_close(losses[0].codes.dense(), losses[1].codes.dense())


def test_clipping_scales_the_whole_gradient_and_reports_its_norm():
    free, clipped = member(gradient_clip=0.0), member(gradient_clip=0.01)
    for one in (free, clipped):
        backward(one, rows(), None)
    norm = clip(free)
    assert float(norm) == pytest.approx(float(clip(clipped))) and float(norm) > 0.01
    grads = [p.grad for p in clipped.dictionary.parameters()]
    assert math.sqrt(sum(float(g.square().sum()) for g in grads)) == pytest.approx(0.01, rel=1e-3)
    for before, after in zip(free.dictionary.parameters(), grads, strict=True):
        torch.testing.assert_close(before.grad * (0.01 / norm), after)


def test_a_rate_warms_up_stays_and_falls_to_zero():
    optimiser = Optimiser(OptimiserConfig(learning_rate=1.0, warm_up_steps=10, decay_share=0.2), member().dictionary)
    rates = [optimiser.set_rate(step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:160] == [1.0] * 150
    assert rates[160:] == pytest.approx([(200 - i) / 40 for i in range(160, 200)])


def test_the_rate_not_given_falls_with_the_square_root_of_the_width():
    for d_sae, rate in ((2**14, 2e-4), (2**12, 4e-4)):
        dictionary = TopK(TopKConfig(d_sae=d_sae, k=1), 2)
        assert Optimiser(OptimiserConfig(), dictionary).peak == pytest.approx(rate)


@pytest.mark.parametrize("rule", ["adam", "muon"])
def test_every_update_rule_learns_and_its_state_can_be_put_back(rule):
    config = OptimiserConfig(rule=rule, learning_rate=3e-3)
    one = member(config)
    losses = [take_step(one, rows(seed=i), None, i, 1000).loss.total.item() for i in range(150)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    other = member(config)
    other.dictionary.load_state_dict(one.dictionary.state_dict())
    other.optimiser.load_tensors({name: tensor.clone() for name, tensor in one.optimiser.tensors().items()})
    for step in range(150, 153):
        for trained in (one, other):
            take_step(trained, rows(seed=step), None, step, 1000)
    for (name, a), b in zip(one.dictionary.state_dict().items(), other.dictionary.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_muon_moves_the_matrices_and_adam_the_biases():
    optimiser = Optimiser(OptimiserConfig(rule="muon", learning_rate=1e-3), (one := member().dictionary))
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    assert set(optimiser.tensors()) == {"W_enc.momentum_buffer", "W_dec.momentum_buffer"} | {
        f"{bias}.{moment}" for bias in ("b_enc", "b_dec") for moment in ("step", "exp_avg", "exp_avg_sq")
    }


def test_an_average_follows_the_weights_and_is_what_is_saved(workspace):
    averaged = replace(SAE, optimiser=OptimiserConfig(learning_rate=3e-3, averaging=0.95))
    run_train(averaged, workspace)
    run_train(replace(SAE, name="last"), workspace)
    found, last = weights(workspace, "sae"), weights(workspace, "last")
    assert metrics(workspace, "sae") == metrics(workspace, "last"), "the average takes no part in training"
    assert not torch.equal(found["W_dec"], last["W_dec"])
    directions = torch.cosine_similarity(found["W_dec"], last["W_dec"])
    assert directions.median() > 0.95


def test_an_average_of_equal_weights_is_those_weights():
    one = member(OptimiserConfig(averaging=0.9))
    for step in range(30):
        one.average.update(one.dictionary, step)
    for name, parameter in one.average.applied(one.dictionary).named_parameters():
        torch.testing.assert_close(parameter, dict(one.dictionary.named_parameters())[name])


def test_autocast_trains_to_about_the_same_loss():
    exact, low = member(), member(precision="bfloat16")
    losses = [
        [take_step(one, rows(seed=i), None, i, 1000).loss.total.item() for i in range(100)] for one in (exact, low)
    ]
    assert losses[0] != losses[1]
    assert sum(losses[1][-20:]) == pytest.approx(sum(losses[0][-20:]), rel=0.05)


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named_and_nothing_is_updated(value):
    one = member()
    take_step(one, rows(), None, 0, 100)
    before = {name: tensor.clone() for name, tensor in one.dictionary.state_dict().items()}
    bad = rows()
    bad[[7, 200], 3] = value
    with pytest.raises(NotFinite, match="mse (nan|inf), gradient norm nan; the input is not finite") as found:
        take_step(one, bad, None, 1, 100)
    assert found.value.rows.tolist() == [7, 200]
    for name, tensor in one.dictionary.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_gradient_that_overflows_is_not_applied():
    one = member()
    huge = rows() * 1e18
    with pytest.raises(NotFinite, match="inf|nan"):
        take_step(one, huge, None, 0, 100)


def test_a_run_names_the_rows_of_the_store_and_keeps_its_checkpoints(workspace, monkeypatch):
    loss, calls = TopK.loss, []

    def poisoned(self, x, target=None):
        calls.append(x)
        return loss(self, torch.where(torch.arange(len(x))[:, None] == 5, float("nan"), x) if len(calls) == 20 else x)

    monkeypatch.setattr(TopK, "loss", poisoned)
    read = []
    take = Together.take_step
    monkeypatch.setattr(Together, "take_step", lambda self, *a: read.append(a[2][IN]) or take(self, *a))
    with pytest.raises(
        UserError, match=r"run 'sae' is not finite at step 19 \(mse nan.* in rows (\d+) of the store"
    ) as said:
        run_train(SAE, workspace)
    from activation_store.store import open_store

    row = int(str(said.value).split("in rows ")[1].split()[0])
    assert torch.equal(torch.tensor(open_store(workspace.store("s")).take(IN, [row]))[0], read[19][5])
    assert sorted(path.name for path in workspace.run("sae").checkpoints.iterdir()) == [
        "step-000000007",
        "step-000000014",
    ]
    assert metrics(workspace, "sae")[-1]["stopped"] == str(said.value)
    monkeypatch.undo()
    run_train(SAE, workspace)  # with the cause gone, the same command continues, and the record is as if never stopped
    assert [line["step"] for line in metrics(workspace, "sae")] == list(range(5, 61, 5))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_says_what_to_lower_and_by_how_much(workspace, monkeypatch):
    def full(self, x, target=None):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(TopK, "loss", full)
    with pytest.raises(UserError, match="not enough memory: weights and moments take .* set accumulate to 2, which"):
        run_train(SAE, workspace)


@pytest.mark.parametrize(
    ("memory", "there", "sentence"),
    [
        (
            Memory(10**9, 10**6, 4096),
            4 * 10**9,
            "set accumulate to 2, .* parts of 2,048 rows, or .* batch_size to 2,048",
        ),
        (Memory(10**9, 10**6, 4096), 2 * 10**9, "set accumulate to 8, .* parts of 512 rows, or .* batch_size to 512"),
        (Memory(8 * 10**9, 10**6, 4096), 4 * 10**9, "lower d_sae to at most 40% of what it is"),
    ],
)
def test_the_advice_leaves_room(memory, there, sentence):
    assert re.search(sentence, what_to_lower(memory, there, 4096))


@pytest.mark.parametrize(("batch_size", "data_parts"), [(6100, 1), (6100, 4), (4096, 2), (61, 1)])
def test_the_advice_can_be_followed(batch_size, data_parts):
    said = what_to_lower(Memory(10**9, 10**6, batch_size), 2 * 10**9, batch_size, data_parts)
    accumulate, rows = (
        int(number.replace(",", "")) for number in re.findall(r"accumulate to ([\d,]+),.*parts of ([\d,]+)", said)[0]
    )
    assert batch_size == data_parts * accumulate * rows and 10**6 * rows <= 0.8 * 2 * 10**9 - 10**9


def test_the_estimate_counts_weights_gradients_and_moments():
    config = TrainConfig(name="a", store="s", hook="h", dictionary=TopKConfig(d_sae=1000, k=10))
    one, averaged = (
        estimate([replace(config, optimiser=OptimiserConfig(averaging=a))], [((64,), (64,))]) for a in (0.0, 0.9)
    )
    parameters = 1000 * (2 * 64 + 1) + 64
    assert averaged.fixed - one.fixed == 4 * parameters
    assert one.fixed > 16 * parameters and one.rows == 4096
    assert estimate([config, config], [((64,), (64,))] * 2).total == 2 * (one.fixed + one.rows * one.per_row)


def test_on_a_gpu_the_estimate_counts_what_its_operations_write():
    """With kernels no gradients, and one matrix of pre-activations."""
    config = TrainConfig(name="a", store="s", hook="h", dictionary=TopKConfig(d_sae=1000, k=10), device="cuda")
    parameters = 1000 * (2 * 64 + 1) + 64

    def of(**changes):
        return estimate([replace(config, **changes)], [((64,), (64,))])

    kernels, portable = of(), of(ops="portable")
    assert kernels.fixed == (12 + 2) * parameters and portable.fixed == 16 * parameters
    assert portable.per_row - kernels.per_row == 2 * 1000
    assert of(accumulate=2).fixed == of(optimiser=OptimiserConfig(rule="muon")).fixed == (16 + 2) * parameters
    full = of(precision="float32")
    assert full.fixed == 12 * parameters and full.per_row - kernels.per_row == 2 * 1000


def test_a_kind_without_gradients_in_its_codes_takes_steps_like_any_other():
    dictionary = ICFL(ICFLConfig(d_sae=30, rounds=2, width=2, whiten=False), 12)
    control = type("Control", (), {"mean": rows().mean(dim=0).numpy(), "second_moment": None})()
    dictionary.initialise(rows(), None, torch.Generator().manual_seed(0), control)
    one = Member("icfl", dictionary, Optimiser(RATE, dictionary), torch.Generator().manual_seed(0))
    losses = [take_step(one, rows(seed=i), None, i, 1000).loss.total.item() for i in range(100)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        ({"warm_up_steps": -1}, "must not be negative"),
        ({"decay_share": 1.5}, "decay_share is 1.5; it is a share of the run"),
        ({"averaging": 1.0}, "averaging is 1.0; it must be at least 0"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(workspace, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run_train(replace(SAE, optimiser=OptimiserConfig(**changes)), workspace)
    assert not (workspace.root / "runs").exists()
