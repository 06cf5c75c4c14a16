"""How long things take on this device: its two ceilings, the kernels, the whole step beside its peers, its stages.

Kernels are timed by device events over inputs that no cache holds; steps from an idle device to an idle device, so that
what a step waits for on the host counts. Where implementations are compared they take turns, in an order drawn anew in
every round, on the same batches.

Axes: B rows, D width, S latents, K active per row, G groups, A dead latents.
"""

from __future__ import annotations

import importlib.util
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_arithmetic import BFLOAT16, FLOAT32, Size, auxk_ms, bound, stages
from gpu_card import Ask, free, in_words, is_lost
from gpu_implementations import (
    FUSED,
    LEARNING_RATE,
    PEERS,
    PORTABLE,
    SPREADS,
    WAYS,
    Ours,
    Rows,
    dead_latents,
    fvu,
    peer,
    planted_rows,
)
from torch import Tensor

from dictlearn import ops
from dictlearn.dictionaries.dead_latents import rounded_up
from dictlearn.ops import triton_pairs, triton_select, triton_update
from dictlearn.ops.row_gradients import AdamStep
from dictlearn.training.finite import Unread

BATCHES = 6
"""Batches that go round: more than any cache holds, few enough for memory."""
DEAD_SHARE = 0.1


def emit_error(ask: Ask, table: str, row: dict[str, object], error: Exception) -> None:
    """An error that leaves the device usable costs one row."""
    if is_lost(error):
        raise error
    ask.emit(table, {**row, "error": in_words(error)})


# --- the card ---------------------------------------------------------------------------------------------------------


def ceilings(ask: Ask) -> None:
    """A copy of memory, and a product of random bfloat16 matrices: what the bounds are computed with."""
    card, device = ask.card, ask.card.device
    elements, side = (2**31, 8192) if card.measures else (2**10, 64)
    source = torch.randint(256, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = card.milliseconds([partial(target.copy_, source)])
    moved = None if took is None else 2 * elements / took / 1e9
    del source, target
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    took = card.milliseconds([partial(torch.mm, a, b, out=out)], repeats=20)
    rate = None if took is None else 2 * side**3 / took / 1e9
    ask.emit("ceilings", {"what": f"copy of {elements / 1e9:.1f} GB, read and written", "TB/s": moved})
    ask.emit("ceilings", {"what": f"product of {side} x {side} in bfloat16, random", "TFLOP/s": rate})
    for size in ask.sizes:
        x_BD, W_SD = (torch.randn(n, size.d, device=device, dtype=torch.bfloat16) for n in (size.batch, size.latents))
        b_S, out = W_SD[:, 0].contiguous(), W_SD.new_empty(size.batch, size.latents)
        took = card.milliseconds([partial(torch.addmm, b_S, x_BD, W_SD.T, out=out)])
        rate = None if took is None else 2 * size.batch * size.latents * size.d / took / 1e9
        ask.emit("ceilings", {"what": f"encoder's product at {size.name}, torch.addmm", "TFLOP/s": rate, "ms": took})


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernels(ask: Ask) -> None:
    """Each kernel alone beside what torch offers, with the time that its bytes or operations take at the ceilings.

    What is gathered is counted without a cache, so that a share of the floor may be above 1.
    """
    for spread in SPREADS:
        if spread == SPREADS[0]:
            encoder_kernels(ask, ask.size)
        if ask.left() > 0:
            pair_kernels(ask, ask.size, spread)


def timed(
    ask: Ask, kernel: str, size: Size, floor_ms: float, calls: list[Callable[[], object]], **more: object
) -> None:
    row: dict[str, object] = {"size": size.name, "kernel": kernel, **more}
    try:
        took = ask.card.milliseconds(calls)
    except Exception as error:
        emit_error(ask, "kernels", row, error)
        return
    share = None if took is None else floor_ms / took
    ask.emit("kernels", {**row, "ms": took, "floor ms": floor_ms, "share of the floor": share})


OTHER_TILINGS = (
    triton_select.Tiling(128, 128, 64, 16, 3, 4, 2),
    triton_select.TILING._replace(stages=3),
)
"""Beside the chosen one: two programs on a multiprocessor; one stage less."""


def encoder_kernels(ask: Ask, size: Size) -> None:
    rates, low = ask.rates, torch.bfloat16
    rows = planted_rows(size, SPREADS[0], 2, ask.card.device)
    W_SD = rows.start.to(low)
    b_S = torch.zeros(size.latents, device=ask.card.device, dtype=low)
    xs = [batch.to(low) for batch in rows.batches]
    pre_BS = torch.empty(size.batch, size.latents, device=ask.card.device, dtype=low)
    product_ms = 1e3 * 2 * size.batch * size.latents * size.d / rates.flops
    once_ms = 1e3 * BFLOAT16 * size.batch * size.latents / rates.bytes
    maxima_ms = once_ms / 64

    def torch_product(x_BD: Tensor) -> Tensor:
        return torch.addmm(b_S, x_BD, W_SD.T, out=pre_BS)

    def with_maxima_after(x_BD: Tensor) -> Tensor:
        return triton_select.group_maxima(torch_product(x_BD), "relu")

    def fused(x_BD: Tensor, tiling: triton_select.Tiling | None = None) -> object:
        return triton_select.product_with_maxima(x_BD, W_SD, b_S, tiling)

    products: dict[str, tuple[Callable[[Tensor], object], float]] = {
        "product, torch.addmm": (torch_product, product_ms),
        "product, then group_maxima": (with_maxima_after, product_ms + once_ms),
        "product_with_maxima": (fused, product_ms),
    }
    for tiling in () if ask.quick else OTHER_TILINGS:
        products[f"product_with_maxima, {tuple(tiling)}"] = partial(fused, tiling=tiling), product_ms
    for name, (product, floor) in products.items():
        timed(ask, name, size, floor, [partial(product, x) for x in xs])
    torch_product(xs[0])
    timed(ask, "group_maxima", size, once_ms + maxima_ms, [lambda: triton_select.group_maxima(pre_BS, "relu")])
    maxima_BG = triton_select.group_maxima(pre_BS, "relu")
    read_ms = maxima_ms + 1e3 * BFLOAT16 * 64 * size.pairs / rates.bytes
    timed(ask, "select", size, read_ms, [lambda: triton_select.select(pre_BS, maxima_BG, size.k, "relu")])
    timed(ask, "torch.topk", size, once_ms, [lambda: pre_BS.topk(size.k, dim=1, sorted=False)])
    dead_BA = pre_BS[:, : rounded_up(int(DEAD_SHARE * size.latents), size.latents)].float()
    if triton_select.fits(dead_BA.shape[1], dead_BA.dtype):
        floor = 1e3 * 2 * FLOAT32 * dead_BA.numel() / rates.bytes
        timed(
            ask, "keep_topk, dead latents", size, floor, [lambda: triton_select.keep_topk(dead_BA, size.d // 2, "relu")]
        )
        portable = partial(ops.load("portable").keep_topk, dead_BA, size.d // 2, "relu")
        timed(ask, "keep_topk, portable", size, floor, [portable])


def pair_kernels(ask: Ask, size: Size, spread: str) -> None:
    rows = planted_rows(size, spread, 2, ask.card.device)
    ours = Ours(size, rows.start, rows.batches[0], FUSED)
    chosen = []
    for x in rows.batches:
        codes = ours.dictionary.encode(x)
        chosen.append((codes.values.contiguous(), codes.indices.contiguous(), x.to(torch.bfloat16)))
    W_SD = rows.start.to(torch.bfloat16)
    of = stages(size, ask.rates)
    counts = torch.bincount(chosen[0][1].flatten(), minlength=size.latents)
    on = f"{spread}: {int((counts > 0).sum()):,} latents, one in {int(counts.max()):,} of {size.batch:,} rows"
    bags = [triton_pairs.bags(indices, size.latents) for _, indices, _ in chosen]
    W_dec, b_dec = ours.dictionary.W_dec, ours.dictionary.b_dec.detach()
    triton_update.lowered(W_dec)  # from now on the update writes this copy too, as in training
    mean_SD, square_SD = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    adam = AdamStep(LEARNING_RATE, (0.9, 0.999), 1e-8, torch.ones((), device=W_dec.device))

    def update(bag: triton_pairs.Bags, values_BK: Tensor, rows_BD: Tensor) -> None:
        gradient = triton_update.PairGradient(bag, values_BK, rows_BD, unit_rows=True)
        gradient.update(W_dec, mean_SD, square_SD, adam)

    batch_ms = 1e3 * size.batch * size.d / ask.rates.bytes
    calls: dict[str, tuple[list[Callable[[], object]], float]] = {
        "row update of one matrix": (
            [partial(update, bag, v, x) for bag, (v, _, x) in zip(bags, chosen, strict=True)],
            (of["sums by latent"] + of["update"]) / 2,
        ),
        "errors (decode, bias, difference)": (
            [
                partial(triton_pairs.errors, v, i, W_SD, b_dec, x)
                for (v, i, _), x in zip(chosen, rows.batches, strict=True)
            ],
            of["decoding"] + (2 * FLOAT32 + BFLOAT16) * batch_ms,
        ),
        "decode": ([partial(triton_pairs.decode, v, i, W_SD) for v, i, _ in chosen], of["decoding"]),
        "pair_products": ([partial(triton_pairs.pair_products, x, W_SD, i) for _, i, x in chosen], of["decoding"]),
        "bags (sorting pairs)": (
            [partial(triton_pairs.bags, i, size.latents) for _, i, _ in chosen],
            of["sorting pairs"],
        ),
        "sum_by_latent, stored in float32": (
            [partial(triton_pairs.sum_by_latent, bag, v, x) for bag, (v, _, x) in zip(bags, chosen, strict=True)],
            of["decoding"] + 1e3 * FLOAT32 * size.latents * size.d / ask.rates.bytes,
        ),
    }
    for name, (each, floor) in calls.items():
        timed(ask, name, size, floor, each, on=on)


# --- whole steps ------------------------------------------------------------------------------------------------------


class Contender:
    """An implementation whose steps are measured.

    Attributes:
        before: bytes that were held before it was made.
        wall: ms of a step in each round, by dead share.
        peak: the most bytes that it held at once during a step, weights and moments included.
    """

    def __init__(self, name: str, make: Callable[[], Any], ask: Ask) -> None:
        self.name = name
        self.before = ask.card.held_bytes()
        self.made = make()
        self.wall: dict[float, list[float | None]] = defaultdict(list)
        self.peak: int | None = None

    def steps(self, rows: Rows, first: int, count: int, dead_S: Tensor | None) -> None:
        for number in range(first, first + count):
            if dead_S is not None:
                self.made.hold_dead(dead_S)
            self.made.step(rows.batch(number))


def against_peers(ask: Ask) -> None:
    """Ours, our portable operations and the peers, on latents of a power law; live and with dead latents."""
    shares = [DEAD_SHARE] if ask.quick else [0.0, DEAD_SHARE]
    race(ask, SPREADS[0], {"ours": FUSED, "ours, portable operations": PORTABLE}, True, shares)


def against_peers_on_uniform_latents(ask: Ask) -> None:
    race(ask, SPREADS[1], {"ours": FUSED}, True, [0.0])


def ways_of_ours(ask: Ask) -> None:
    race(ask, SPREADS[0], WAYS, False, [0.0])


def race(ask: Ask, spread: str, ways: dict[str, Any], peers: bool, dead_shares: list[float]) -> None:
    """Rounds in turn. The loss is of rows that were not trained on, after as many steps for each."""
    size = ask.size
    rows = planted_rows(size, spread, BATCHES, ask.card.device)
    first_rows = rows.batches[0]
    makers: dict[str, Callable[[], Any]] = {
        name: partial(Ours, size, rows.start, first_rows, way) for name, way in ways.items()
    }
    for name, (module, kind) in PEERS.items() if peers else ():
        if importlib.util.find_spec(module) is None:
            ask.emit("whole step", {"size": size.name, "latents": spread, "step": name, "error": "not installed"})
        else:
            makers[name] = partial(peer, kind, size, rows.start, first_rows)
    with contenders(ask, spread, makers, rows) as running:
        order = random.Random(0)
        taken = ask.warm_up + 1
        for share in dead_shares:
            dead_S = dead_latents(size.latents, share, ask.card.device) if share else None
            for number in range(-1 if share else 0, ask.rounds):
                if number > 1 and ask.left() < 0:
                    break
                for contender in order.sample(running, len(running)):
                    # before the first round with dead latents: what ours learns late is as old as a few steps
                    steps = ask.warm_up if number < 0 else ask.steps
                    run = partial(contender.steps, rows, taken, steps, dead_S)
                    try:
                        took = ask.card.wall_ms(run)
                    except Exception as error:
                        of = {"size": size.name, "latents": spread, "step": contender.name, "dead": share}
                        running.remove(contender)
                        emit_error(ask, "whole step", of, error)
                        free()
                        continue
                    if number >= 0:
                        contender.wall[share].append(None if took is None else took / steps)
                taken += ask.warm_up if number < 0 else ask.steps
            show_race(ask, spread, share, running, rows, taken)


@contextmanager
def contenders(ask: Ask, spread: str, makers: dict[str, Callable[[], Any]], rows: Rows) -> Iterator[list[Contender]]:
    """Those that could be made and have taken their first steps; freed when all is done."""
    running: list[Contender] = []
    try:
        for name, make in makers.items():
            try:
                contender = Contender(name, make, ask)
                contender.steps(rows, 0, ask.warm_up, None)
                peak = ask.card.peak_bytes(partial(contender.steps, rows, ask.warm_up, 1, None))
                contender.peak = None if peak is None else peak - contender.before
                running.append(contender)
            except Exception as error:
                emit_error(ask, "whole step", {"size": ask.size.name, "latents": spread, "step": name}, error)
                free()
        yield running
    finally:
        running.clear()
        free()


def show_race(ask: Ask, spread: str, share: float, running: list[Contender], rows: Rows, taken: int) -> None:
    size = ask.size
    ours = next((c for c in running if c.name == "ours"), None)
    least = bound(size, ask.rates) + auxk_ms(size, share, ask.rates)
    for contender in running:
        wall = [took for took in contender.wall[share] if took is not None]
        ms = median(wall) if wall else None
        ratios: list[float] = []
        if ours is not None and wall:
            pairs = zip(contender.wall[share], ours.wall[share], strict=False)
            ratios = [a / b for a, b in pairs if a is not None and b is not None]
        ask.emit(
            "whole step",
            {
                "size": size.name,
                "latents": spread,
                "dead": share,
                "step": contender.name,
                "ms": ms,
                "least ms": min(wall, default=None),
                "most ms": max(wall, default=None),
                "rounds": len(contender.wall[share]),
                "tokens/s": None if ms is None else round(1e3 * size.batch / ms),
                "x ours": median(ratios) if ratios else None,
                "share of the row-fused bound": None if ms is None else least / ms,
                "peak GB": None if contender.peak is None else contender.peak / 1e9,
                "peak / (weights, moments, one [B, S])": (
                    None if contender.peak is None else contender.peak / size.kept_bytes
                ),
                "after steps": taken,
                "FVU": fvu(contender.made.reconstruct, rows.held_out),
            },
        )


# --- stages -----------------------------------------------------------------------------------------------------------


def stages_of_step(ask: Ask) -> None:
    """What the device does in a step, by kernel, and how much of the step it does nothing."""
    from torch.profiler import ProfilerActivity, profile

    size, steps = ask.size, ask.steps
    rows = planted_rows(size, SPREADS[0], BATCHES, ask.card.device)
    ours = Ours(size, rows.start, rows.batches[0], FUSED)
    for share in (0.0, DEAD_SHARE):
        dead_S = dead_latents(size.latents, share, ask.card.device)

        def take(count: int, dead_S: Tensor = dead_S) -> None:
            for number in range(count):
                ours.hold_dead(dead_S)
                ours.step(rows.batch(number))

        take(ask.warm_up)
        wall = ask.card.wall_ms(partial(take, steps))
        queued = ask.card.queue_ms(partial(take, 1))
        if not ask.card.measures:
            ask.emit("stages", {"size": size.name, "dead": share, "kernel": "whole step", "ms": None})
            continue
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
            take(steps)
            ask.card.synchronise()
        took: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for event in record.events():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            if on_device and not getattr(event, "is_user_annotation", False):  # a range, of which the kernels are part
                took[event.name] += event.time_range.elapsed_us() / 1e3 / steps
                calls[event.name] += 1
        whole = (wall or 0.0) / steps
        busy = sum(took.values())
        shown = sorted(took, key=lambda name: -took[name])[:14]
        for name in shown:
            row = {"kernel": name[:90], "ms": took[name], "share": took[name] / whole, "calls": calls[name] / steps}
            ask.emit("stages", {"size": size.name, "dead": share, **row})
        others = busy - sum(took[name] for name in shown)
        rest = {"other kernels": others, "nothing runs": whole - busy, "whole step": whole}
        rest["the host, to queue a step"] = queued or 0.0
        for name, ms in rest.items():
            ask.emit("stages", {"size": size.name, "dead": share, "kernel": name, "ms": ms, "share": ms / whole})


# --- graphs -----------------------------------------------------------------------------------------------------------


class Unwatched(Unread):
    """Nobody asks whether steps were finite: what is asked of a device cannot be captured."""

    def add(self, *found: Any) -> None:
        pass


def graph_of_step(ask: Ask) -> None:
    """A step captured once and replayed, beside the same launched anew each time.

    Without AuxK, and without the check for finite numbers, of which the host has to learn something now and then.
    """
    size = ask.size
    rows = planted_rows(size, SPREADS[0], 1, ask.card.device)
    ours = Ours(size, rows.start, rows.batches[0], replace(FUSED, auxk_weight=0.0))
    ours.member.unread = Unwatched()
    for part in ours.member.optimiser._parts:
        for group in part.param_groups:
            group["capturable"] = True  # torch's Adam refuses to be captured without
    x = rows.batches[0].clone()

    def steps(count: int) -> None:
        for _ in range(count):
            ours.step(x)

    steps(ask.warm_up)
    launched = ask.card.wall_ms(partial(steps, ask.steps))
    row: dict[str, object] = {"size": size.name, "launched ms": None if launched is None else launched / ask.steps}
    if not ask.card.measures:
        ask.emit("graphs", {**row, "replayed ms": None})
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps(3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            steps(1)
    except Exception as error:
        ask.emit("graphs", {**row, "error": in_words(error)})
        raise  # a capture that failed may leave the stream unusable: the next section has a process of its own
    before = ours.dictionary.W_dec.detach().clone()
    replayed = ask.card.milliseconds([graph.replay])
    moved = not torch.equal(before, ours.dictionary.W_dec)
    ask.emit("graphs", {**row, "replayed ms": replayed, "weights move": moved})


# --- what changes results ---------------------------------------------------------------------------------------------


def precision(ask: Ask) -> None:
    """Training in bfloat16 and in float32 from the same start on the same rows, several seeds.

    The Jaccard index is of the latents that the two precisions select for the same rows and the same weights, those of
    the bfloat16 run after its last step. The FVU is of held-out rows encoded in float32.
    """
    size, steps = ask.size, 1 if ask.quick else 20 * ask.steps
    for seed in range(1 if ask.quick else 3):
        rows = planted_rows(size, SPREADS[0], 4 * BATCHES, ask.card.device, seed)
        row: dict[str, object] = {"size": size.name, "seed": seed, "steps": steps}
        for name in ("bfloat16", "float32"):
            ours = Ours(size, rows.start, rows.batches[0], replace(FUSED, precision=name))
            for number in range(steps):
                ours.step(rows.batch(number))
            row[f"FVU, {name}"] = fvu(ours.reconstruct, rows.held_out)
            if name == "bfloat16":
                row["Jaccard of the selected"] = selected_alike(ours, rows.held_out)
            del ours
            free()
        ask.emit("precision", row)
        if ask.left() < 0:
            return


@torch.no_grad()
def selected_alike(ours: Ours, rows: Tensor) -> float:
    """Mean over rows of shared latents over all that either precision selects."""
    chosen = []
    for low in (True, False):
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=low):
            chosen.append([ours.dictionary.encode(part).indices for part in rows.split(1024)])
    one_BK, other_BK = (torch.cat(parts) for parts in chosen)
    both_B2K = torch.cat([one_BK, other_BK], dim=1).sort(dim=1).values  # a row selects a latent once
    shared_B = (both_B2K[:, 1:] == both_B2K[:, :-1]).sum(dim=1).double()
    return float((shared_B / (both_B2K.shape[1] - shared_B)).mean())
