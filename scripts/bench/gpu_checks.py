"""Whether the kernels and the whole step are right on this device: against float64, and the same bits twice.

- The selection is compared with a stable sort: the same latents, also where pre-activations tie, are not numbers, or
  are all the same.
- The operations, in float64, are compared with `dictlearn.ops.reference`: each output and the gradients of all inputs.
- A step is compared with plain autograd in float64 over the latents that it selected, and its selection by what it
  missed; the gradients are read out of Adam's first moments, and the update is computed again from the moments.

Errors are |found - expected| / |expected|, over all elements of a tensor; what is not a number counts as infinite.

Axes: B rows, D width, S latents, K active per row, A dead latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from gpu_arithmetic import Size
from gpu_card import Ask, free, in_words, is_lost
from gpu_implementations import FUSED, PORTABLE, Ours, Way, dead_latents, planted_rows
from torch import Tensor

from dictlearn import ops
from dictlearn.dictionaries.dead_latents import rounded_up
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops import reference
from dictlearn.ops.ahead import LAG
from dictlearn.ops.reference import Rule, TopKCodes
from dictlearn.training.step import Step

RULES: tuple[Rule, ...] = ("relu", "magnitude", "linear")
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
BETAS, EPSILON = (0.9, 0.999), 1e-8
NO_TIME = "left out: no time was left"


def error_of(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    size = float(expected.norm())
    error = float((found - expected).norm()) / size if size else float(found.norm())
    return error if error == error else float("inf")


def poison(device: torch.device) -> None:
    """What is allocated next was full of NaN: an element that no kernel writes shows."""
    for elements in (2**25, 2**17, 2**9):
        torch.full((elements,), float("nan"), device=device)


def checked(ask: Ask, what: str, on: str, limit: float, error: Callable[..., float], *arguments: Any) -> None:
    """Emit one row; an error that leaves the device usable is a failed check, not the end of the section.

    So is a check for which no time was left: what was not looked at has not passed.
    """
    if ask.left() < 0:
        ask.emit("checks", {"what": what, "on": on, "error": NO_TIME, "limit": limit, "passed": False})
        return
    try:
        poison(ask.card.device)
        found = error(*arguments)
        ask.card.synchronise()
        ask.emit("checks", {"what": what, "on": on, "error": found, "limit": limit, "passed": found <= limit})
    except Exception as exception:
        if is_lost(exception):
            raise
        ask.emit("checks", {"what": what, "on": on, "error": in_words(exception), "limit": limit, "passed": False})


# --- the selection ----------------------------------------------------------------------------------------------------


def awkward_rows(B: int, S: int, k: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Pre-activations (B, S) float32."""
    generator = torch.Generator(device).manual_seed(S + k)
    random = torch.randn(B, S, generator=generator, device=device)
    yield "random", random
    yield "ties", (2 * random).round()
    yield "all equal", torch.full_like(random, 0.5)
    yield "below 0", -random.abs() - 1
    holes = random.clone()
    holes[torch.rand(B, S, generator=generator, device=device) < 0.9] = -torch.inf
    yield "mostly -inf", holes
    strange = random.clone()
    strange[:, :: max(2, S // 5)] = torch.nan
    strange[:, 1 :: max(3, S // 7)] = torch.inf
    yield "NaN and inf", strange
    crowded = random.clone()
    crowded[:, : min(S, 4 * k)] = 3.0  # the k largest stand next to each other, in few groups
    yield "k-th value repeated", crowded
    yield "0 and -0", torch.where(random > 0, 0.0, -0.0)


def largest(pre_BS: Tensor, k: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Values as the rule makes them, and latents, in ascending order; of equal ones the first."""
    by_BS = pre_BS.abs() if rule == "magnitude" else pre_BS
    latents_BK = by_BS.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    values_BK = pre_BS.gather(1, latents_BK)
    return values_BK.relu() if rule == "relu" else values_BK, latents_BK


def differing(found: Tensor, expected: Tensor) -> float:
    """Share of elements that are not equal; NaN equals NaN."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    return 1.0 - float(same.double().mean())


def selection_differs(pre_BS: Tensor, k: int, rule: Rule) -> float:
    from dictlearn.ops import triton_select

    def selected() -> tuple[Tensor, Tensor]:
        poison(pre_BS.device)
        return triton_select.select(pre_BS, triton_select.group_maxima(pre_BS, rule), k, rule)

    (values_BK, latents_BK), again = selected(), selected()
    twice = max(differing(values_BK, again[0]), differing(latents_BK, again[1]))
    order_BK = latents_BK.sort(dim=1).indices
    found = values_BK.gather(1, order_BK), latents_BK.gather(1, order_BK)
    expected = largest(pre_BS, min(k, pre_BS.shape[1]), rule)
    return max(twice, *(differing(a, b) for a, b in zip(found, expected, strict=True)))


def kept_differs(pre_BA: Tensor, k: int, rule: Rule) -> float:
    from dictlearn.ops import triton_select

    values_BK, places_BK = largest(pre_BA, k, rule)
    expected = torch.zeros_like(pre_BA).scatter_(1, places_BK, values_BK)
    return differing(triton_select.keep_topk(pre_BA, k, rule), expected)


def maxima_differ(x_BD: Tensor, W_SD: Tensor, b_S: Tensor) -> float:
    """The product against float64, plus whether the maxima are not exactly those of the product."""
    from dictlearn.ops import triton_select

    pre_BS, maxima_BG = triton_select.product_with_maxima(x_BD, W_SD, b_S)
    groups = F.pad(pre_BS, (0, -pre_BS.shape[1] % triton_select.GROUP), value=-torch.inf)
    exact = groups.unflatten(1, (-1, triton_select.GROUP)).amax(dim=2)
    pre = torch.addmm(b_S.double(), x_BD.double(), W_SD.double().T)
    return error_of(pre_BS, pre) + differing(maxima_BG, exact)


def selection(ask: Ask) -> None:
    """The sizes themselves, AuxK's selection with a tenth dead, and then shapes with one row, one latent, a last group
    that is not full, k of 1 and of all. Kernels are compiled for each shape and type, so not all go with all."""
    if ask.quick:
        selections(ask, 2, 130, 2, "float32", RULES[0])
        kept_selections(ask, 2, 50, 3)
        return
    for size in ask.sizes:
        selections(ask, 64, size.latents, size.k, "bfloat16", RULES[0])
        kept_selections(ask, 64, rounded_up(size.latents // 10, size.latents), size.d // 2)
    for first, (B, S, k) in enumerate([(3, 130, 1), (2, 130, 130), (1, 64, 5), (5, 1000, 7)]):
        for number, type_name in enumerate(TYPES):
            selections(ask, B, S, k, type_name, RULES[(first + number) % len(RULES)])
        kept_selections(ask, B, S, k)


def selections(ask: Ask, B: int, S: int, k: int, type_name: str, rule: Rule) -> None:
    for name, rows in awkward_rows(B, S, k, ask.card.device):
        on = f"{B} x {S}, k {k}, {name}, {type_name}, {rule}"
        checked(ask, "selection", on, 0.0, selection_differs, rows.to(TYPES[type_name]), k, rule)


def kept_selections(ask: Ask, B: int, A: int, k: int) -> None:
    for name, rows in awkward_rows(B, A, k, ask.card.device):
        checked(ask, "keep_topk", f"{B} x {A}, k {k}, {name}, float32", 0.0, kept_differs, rows, k, "relu")


def products(ask: Ask) -> None:
    """The encoder's product with the maxima in its epilogue, at widths and lengths that fill no tile as well."""
    device, generator = ask.card.device, torch.Generator(ask.card.device).manual_seed(0)
    shapes = [(5, 40, 130), *((size.batch, size.d, size.latents) for size in ask.sizes if not ask.quick)]
    for B, D, S in shapes:
        x_BD, W_SD, b_S = (torch.randn(*shape, generator=generator, device=device) for shape in ((B, D), (S, D), (S,)))
        # the float64 product of all rows would not fit at the largest size
        rows = min(B, 1000)
        for name, dtype, limit in (("bfloat16", torch.bfloat16, 1e-2), ("float32", torch.float32, 1e-5)):
            inputs = [x_BD[:rows].to(dtype), W_SD.to(dtype), b_S.to(dtype)]
            checked(ask, "product_with_maxima", f"{rows} x {D} x {S}, {name}", limit, maxima_differ, *inputs)


# --- the operations ---------------------------------------------------------------------------------------------------


def operations_differ(shape: tuple[int, int, int, int, int], rule: Rule, also: bool, device: torch.device) -> float:
    """The largest error of any output and of any gradient of the six inputs."""
    B, D, width, S, k = shape
    generator = torch.Generator(device).manual_seed(S)

    def normal(*of: int) -> Tensor:
        return torch.randn(of, generator=generator, device=device, dtype=torch.float64)

    inputs = [normal(B, D), normal(S, D), normal(S), normal(S, width), normal(D), normal(width)]
    target_BO = normal(B, width)
    also_A = torch.randperm(S, generator=generator, device=device)[: max(1, S // 3)] if also else None
    weights: list[Tensor] = []

    def run(module: Any) -> tuple[list[Tensor], list[Tensor]]:
        x, W_enc, b_enc, W_dec, b_pre, b_dec = leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        poison(device)
        codes = module.encode_topk(x, W_enc, b_enc, k, b_pre, also_A, rule)
        dense_BS = codes.values.new_zeros(B, S).scatter_add(1, codes.indices, codes.values)
        pairs = codes.values, codes.indices, W_dec
        if also_A is None:
            outputs = [dense_BS, module.decode(*pairs), *module.rebuild(*pairs, b_dec, target_BO)[:2]]
        else:
            kept = module.keep_topk(codes.also, max(1, len(also_A) // 2), rule)
            outputs = [dense_BS, kept, *module.decode_also(*pairs, kept, also_A)]
            outputs += module.rebuild(*pairs, b_dec, target_BO, kept, also_A)
        if not weights:
            weights.extend(normal(*output.shape) for output in outputs)
        total = sum(((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), x.sum() * 0)
        return outputs, list(torch.autograd.grad(total, leaves))

    found, expected = run(ops.load(FUSED.backend)), run(reference)
    return max(error_of(a, b) for of, to in zip(found, expected, strict=True) for a, b in zip(of, to, strict=True))


def operations(ask: Ask) -> None:
    """Latents that all rows select, one row, k of all, widths that fill no block; kernels are compiled for each."""
    shapes = [(300, 40, 24, 200, 1), (9, 5, 4, 12, 3), (700, 300, 520, 3000, 33), (1, 7, 7, 70, 70)]
    for rule in RULES[:1] if ask.quick else RULES:
        for shape in shapes[1:2] if ask.quick else shapes:
            for also in (False, True):
                on = "B {}, D {}, O {}, S {}, K {}, ".format(*shape) + rule + (", with others" if also else "")
                differ = operations_differ, shape, rule, also, ask.card.device
                checked(ask, "operations, float64", on, 1e-10, *differ)


# --- a whole step -----------------------------------------------------------------------------------------------------


class Replayed:
    """An operations backend: the reference, with a selection that was made elsewhere."""

    def __init__(self, indices_BK: Tensor) -> None:
        self.indices_BK = indices_BK
        self.missed = 0.0
        """The most by which a latent that was not chosen is above one that was, over the root mean square chosen."""

    def encode_topk(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_pre: Tensor | None, also: Tensor | None, rule: Rule
    ) -> TopKCodes:
        pre_BS = (x if b_pre is None else x - b_pre) @ W_enc.T + b_enc
        chosen_BK = pre_BS.gather(1, self.indices_BK)
        with torch.no_grad():
            others_B = pre_BS.scatter(1, self.indices_BK, -torch.inf).amax(dim=1)
            missed_B = (others_B - chosen_BK.amin(dim=1)).clamp_min(0.0)
            self.missed = float(missed_B.max() / chosen_BK.square().mean().sqrt())
        return TopKCodes(chosen_BK.relu(), self.indices_BK, None if also is None else pre_BS[:, also])

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)


def state_of(ours: Ours) -> dict[str, Tensor]:
    """A copy of all that the next step depends on."""
    ours.member.unread.settle()
    tensors = {**ours.dictionary.state_dict(), **ours.member.optimiser.tensors()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def put_back(ours: Ours, state: dict[str, Tensor]) -> None:
    names = ours.dictionary.state_dict().keys()
    ours.dictionary.load_state_dict({name: state[name] for name in names})
    ours.member.optimiser.load_tensors({name: tensor for name, tensor in state.items() if name not in names})


def exact_gradients(
    ours: Ours, taken: Step, before: dict[str, Tensor], x: Tensor, dead_S: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, float]:
    """In float64: the gradients that the update was made with, the output, the loss, and what the selection missed."""
    with torch.device(x.device):
        exact = TopK(ours.dictionary.config, ours.dictionary.d_in).double()
    exact.load_state_dict({name: before[name] for name in exact.state_dict()})
    exact.subtracts_b_dec = True
    exact.rows_since_fired.copy_(dead_S * (exact.config.dead_after_rows + 1))
    replayed = Replayed(taken.loss.codes.indices)
    ops.BACKENDS["replayed"] = lambda: cast(ops.Backend, replayed)
    try:
        ops.set_backend("replayed")
        loss = exact.loss(x.double())
        loss.total.backward()
    finally:
        ops.set_backend("auto")
        del ops.BACKENDS["replayed"]
    exact.project_gradients()
    gradients = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    norm = float(sum((g.square().sum() for g in gradients.values()), torch.zeros((), device=x.device)).sqrt())
    clip = ours.member.gradient_clip
    factor = clip / norm if 0 < clip < norm else 1.0
    return {name: g * factor for name, g in gradients.items()}, loss.output, loss.total.detach(), replayed.missed


def updated(
    before: dict[str, Tensor], after: dict[str, Tensor], name: str, gradient: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """In float64, from a gradient: the second moments and the change of the weights that Adam makes with it."""
    first, second = after[f"{name}.exp_avg"].double(), before[f"{name}.exp_avg_sq"].double()
    steps = float(after[f"{name}.step"])
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
    denominator = (second / (1 - BETAS[1] ** steps)).sqrt() + EPSILON
    weights = before[name].double()
    moved = weights - rate * first / (1 - BETAS[0] ** steps) / denominator
    if name == "W_dec":
        moved = moved / moved.norm(dim=1, keepdim=True)
    return second, moved - weights


LIMITS = {
    "bfloat16": {"missed": 3e-2, "output": 1e-2, "loss": 1e-2, "gradients": 2e-2, "moments": 1e-3, "update": 1e-3},
    "float32": {"missed": 1e-5, "output": 1e-5, "loss": 1e-5, "gradients": 1e-4, "moments": 1e-3, "update": 1e-3},
    "float64": {"missed": 1e-12, "output": 1e-10, "loss": 1e-10, "gradients": 1e-8, "moments": 1e-8, "update": 1e-8},
}
"""By precision: of what the selection missed, the output, the loss, the gradients, and of second moments and weights
given the gradients. TF32 products miss those of float32, and portable operations on a CPU, at small sizes, keep a
fifth of those of bfloat16."""


def step_differs(size: Size, way: Way, dead_share: float, device: torch.device, steps: int = 3) -> dict[str, float]:
    """Errors of a step after ``steps`` others, by name; and under "bits" and "counters" 1 if they differ, else 0."""
    rows = planted_rows(size, "power law", steps + 1, device)
    dead_S = dead_latents(size.latents, dead_share, device)
    batches = [batch.to(TYPES["float64"] if way.precision == "float64" else torch.float32) for batch in rows.batches]
    ours = Ours(size, rows.start, batches[0], way)
    x = batches[-1].clone()
    x += 3 * ours.dictionary.W_enc.detach()[7]  # a latent that all rows select
    x[0], x[1] = 0.0, x[2]
    for batch in batches[:-1]:
        ours.hold_dead(dead_S)
        ours.step(batch)
    if way.clip and ours.taken is not None:
        ours.member.gradient_clip = 0.5 * float(ours.taken.gradient_norm)
    ours.hold_dead(dead_S)
    before = state_of(ours)
    ours.step(x)
    after, taken = state_of(ours), ours.taken
    assert taken is not None
    put_back(ours, before)
    ours.step(x)
    again = {**ours.dictionary.state_dict(), **ours.member.optimiser.tensors()}
    errors = {"bits": float(any(not torch.equal(after[name], again[name]) for name in after))}
    exact, output, loss, errors["missed"] = exact_gradients(ours, taken, before, x, dead_S)
    errors["output"] = error_of(taken.loss.output, output)
    errors["loss"] = error_of(taken.loss.total, loss)
    for name, gradient in exact.items():
        first = after[f"{name}.exp_avg"].double() - BETAS[0] * before[f"{name}.exp_avg"].double()
        found = first / (1 - BETAS[0])
        second, moved = updated(before, after, name, found, taken.learning_rate)
        for of, error in (
            ("gradients", error_of(found, gradient)),
            ("moments", error_of(after[f"{name}.exp_avg_sq"], second)),
            ("update", error_of(after[name].double() - before[name].double(), moved)),
        ):
            errors[of] = max(errors.get(of, 0.0), error)
    fired_S = torch.zeros(size.latents, dtype=torch.bool, device=device)
    fired_S[taken.loss.codes.indices[taken.loss.codes.values > 0]] = True
    fired_S &= ~dead_S.bool()
    counted_S = (before["rows_since_fired"] + len(x)).masked_fill(fired_S, 0)
    errors["counters"] = float(not torch.equal(after["rows_since_fired"], counted_S))
    return errors


def waits_for_device(size: Size, way: Way, dead_share: float, device: torch.device) -> float:
    """0 if a step asks its device for nothing; AssertionError, with what torch says, where one does."""
    rows = planted_rows(size, "power law", LAG + 2, device)
    dead_S = dead_latents(size.latents, dead_share, device) if dead_share else None
    ours = Ours(size, rows.start, rows.batches[0], way)
    for number, batch in enumerate(rows.batches):
        if dead_S is not None:
            ours.hold_dead(dead_S)
        if number > LAG:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step(batch)
        except RuntimeError as error:
            if "synchronizing" in str(error):
                raise AssertionError(str(error)) from error  # nothing is wrong with the device
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0


def whole_step(ask: Ask) -> None:
    """Each way on the section's sizes; the exact step holds dense codes in float64, hence fewer rows at once."""
    for size in ask.sizes:
        smaller = replace(size, batch=min(size.batch, 2048))
        few_dead = 0.4 * size.d / size.latents  # all of them are kept by AuxK, whose own selection is checked elsewhere
        for way, dead_share in ((FUSED, 0.0), (replace(FUSED, clip=1.0), few_dead)) if ask.card.measures else ():
            on = f"{size.name}, " + ("clipped, some dead" if dead_share else "bfloat16")
            checked(ask, "no waiting", on, 0.0, waits_for_device, smaller, way, dead_share, ask.card.device)
        ways = [
            ("fused, float32", replace(FUSED, precision="float32"), 0.0),
            ("fused, bfloat16", FUSED, 0.0),
            ("fused, float32, clipped", replace(FUSED, precision="float32", clip=1.0), 0.0),
            ("fused, float64, some dead", replace(FUSED, precision="float64"), few_dead),
            ("fused, bfloat16, clipped", replace(FUSED, clip=1.0), 0.0),
            ("fused, bfloat16, some dead", FUSED, few_dead),
            ("stored gradients, bfloat16", replace(FUSED, accumulate=2), 0.0),
            ("portable, bfloat16", PORTABLE, 0.0),
        ]
        for name, way, dead_share in ways[2:4] if ask.quick else ways:
            if way.precision == "float64" and size.d > 1000:
                continue  # the same kernels, at twice the memory
            if ask.left() < 0:
                ask.emit("steps", {"step": name, "size": size.name, "error": NO_TIME, "passed": False})
                continue
            try:
                errors = step_differs(smaller, way, dead_share, ask.card.device, 1 if ask.quick else LAG)
            except Exception as exception:
                if is_lost(exception):
                    raise
                ask.emit("steps", {"step": name, "size": size.name, "error": in_words(exception), "passed": False})
                continue
            free()
            limits = {**LIMITS[way.precision], "bits": 0.0, "counters": 0.0}
            passed = all(errors[of] <= limit for of, limit in limits.items())
            ask.emit("steps", {"step": name, "size": size.name, **errors, "passed": passed})
