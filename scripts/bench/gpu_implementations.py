"""Steps of TopK with AuxK on one device, ours and two peers', from the same weights on the same rows.

Axes: B rows of a batch, D width, S latents, K active per row, N batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from gpu_arithmetic import Size
from torch import Tensor
from train_step_worker import AUXK_WEIGHT, MANY_STEPS, Implementation, SAELens, Sparsify

from dictlearn import ops
from dictlearn.codes import Codes
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Optimiser
from dictlearn.training.step import Member, Step, take_step

LEARNING_RATE = 3e-4
SPREADS = ("power law", "uniform")


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows that a planted dictionary made, and where every implementation begins.

    Attributes:
        batches: (N, B, D) float32 of unit mean square.
        held_out: (H, D).
        start: (S, D) unit rows near the planted ones, for decoders and, transposed, for encoders.
    """

    batches: Tensor
    held_out: Tensor
    start: Tensor

    def batch(self, number: int) -> Tensor:
        return self.batches[number % len(self.batches)]


def planted_rows(size: Size, spread: str, batches: int, device: torch.device, seed: int = 0) -> Rows:
    """Rows of K latents each out of S, drawn uniformly, or by a power law: the n-th with a chance as 1 / n."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    planted_SD = F.normalize(normal(size.latents, size.d), dim=1)
    ranks_S = torch.arange(1, size.latents + 1, device=device, dtype=torch.float64)
    chance_S = ranks_S.reciprocal() if spread == "power law" else torch.ones_like(ranks_S)
    # which latents are common has nothing to do with their numbers
    order_S = torch.randperm(size.latents, generator=generator, device=device)
    ends_S = (chance_S / chance_S.sum()).cumsum(0)

    def some(rows: int) -> Tensor:
        drawn = torch.rand(rows, size.k, generator=generator, device=device, dtype=torch.float64)
        latents = order_S[torch.searchsorted(ends_S, drawn).clamp_max(size.latents - 1)]
        codes = 0.5 + torch.rand(rows, size.k, generator=generator, device=device)
        made = F.embedding_bag(latents, planted_SD, mode="sum", per_sample_weights=codes)
        return made + 0.3 * normal(rows, size.d) / size.d**0.5

    made = [some(size.batch) for _ in range(batches + 1)]
    scale = made[0].square().mean().sqrt()
    start_SD = F.normalize(planted_SD + 0.5 * normal(size.latents, size.d) / size.d**0.5, dim=1)
    return Rows(torch.stack(made[:-1]).div_(scale), made[-1][:4096] / scale, start_SD)


def dead_latents(latents: int, share: float, device: torch.device) -> Tensor:
    """(S,) int64, 1 for a share of the latents."""
    generator = torch.Generator().manual_seed(1)
    dead_S = torch.zeros(latents, dtype=torch.int64)
    dead_S[torch.randperm(latents, generator=generator)[: int(share * latents)]] = 1
    return dead_S.to(device)


# --- ours -----------------------------------------------------------------------------------------------------------


class NoControl:
    """The scaling that is used asks for no statistics."""

    mean = second_moment = np.zeros(0)


@dataclass(frozen=True)
class Way:
    """How our step is computed.

    Attributes:
        backend: of `dictlearn.ops`.
        precision: "bfloat16" (autocast), "float32", or "float64" for weights and all.
        clip: largest norm of the gradient; 0 for none.
        accumulate: parts of a batch; from two on, gradients are stored and the update is a pass of its own.
        auxk_weight: 0 leaves AuxK out.
    """

    backend: str = "triton"
    precision: str = "bfloat16"
    clip: float = 0.0
    accumulate: int = 1
    auxk_weight: float = AUXK_WEIGHT


class HeldTopK(TopK):
    """What is held dead may fire and does not count as fired: so it stays dead, and nobody else writes the counters.

    Attributes:
        held_S: (S,) bool; None for none.
    """

    held_S: Tensor | None = None

    def observe(self, codes: Codes) -> None:
        if self.held_S is not None:
            codes = replace(codes, values=codes.values.masked_fill(self.held_S[codes.indices], 0.0))
        super().observe(codes)


class Ours:
    """A TopK autoencoder in training.

    Attributes:
        member: what `take_step` takes.
        taken: what the last step found.
    """

    def __init__(self, size: Size, start_SD: Tensor, first_rows: Tensor, way: Way) -> None:
        ops.set_backend(way.backend)
        self.way = way
        config = TopKConfig(d_sae=size.latents, k=size.k, auxk_weight=way.auxk_weight)
        with torch.device(start_SD.device):
            self.dictionary = HeldTopK(config, size.d)
        if way.precision == "float64":
            self.dictionary.double()
        self._begin(start_SD, first_rows)
        precision = "bfloat16" if way.precision == "bfloat16" else "float32"
        optimiser = Optimiser(OptimiserConfig(learning_rate=LEARNING_RATE), self.dictionary)
        generator = torch.Generator().manual_seed(0)
        self.member = Member("ours", self.dictionary, optimiser, generator, way.clip, way.accumulate, precision)
        self.steps = MANY_STEPS // 2  # of a long run: no warm-up, no decay
        self.taken: Step | None = None
        self._dead_S: Tensor | None = None

    @torch.no_grad()
    def _begin(self, start_SD: Tensor, first_rows: Tensor) -> None:
        """As `TopK.initialise`, at weights that are given."""
        dictionary = self.dictionary
        dictionary.subtracts_b_dec = True
        dictionary.input_scaling.fit(first_rows.to(dictionary.W_dec.dtype), NoControl())
        dictionary.W_dec.copy_(start_SD)
        dictionary.W_enc.copy_(start_SD)
        dictionary.b_dec.copy_(first_rows.mean(dim=0))

    def hold_dead(self, dead_S: Tensor) -> None:
        """From now on. The steps right after wait for the device, as the first ones of a run do."""
        if dead_S is not self._dead_S:
            self._dead_S, self.dictionary.held_S = dead_S, dead_S.bool()
            self.dictionary.rows_since_fired.copy_(dead_S * (self.dictionary.config.dead_after_rows + 1))

    def step(self, x: Tensor) -> Tensor:
        ops.set_backend(self.way.backend)
        self.taken = None  # the next step needs the room
        self.taken = take_step(self.member, x, None, self.steps, MANY_STEPS)
        self.steps += 1
        return self.taken.loss.total.detach()

    def reconstruct(self, x: Tensor) -> Tensor:
        self.member.unread.settle()
        return self.dictionary(x)


# --- peers ----------------------------------------------------------------------------------------------------------


class SparsifyOnDevice(Sparsify):
    """Its forward pass is bfloat16 autocast on a GPU, and its trainer lets float32 products run in TF32."""

    def step(self, x: Tensor) -> float:
        torch.set_float32_matmul_precision("high")
        try:
            return super().step(x)
        finally:
            torch.set_float32_matmul_precision("highest")

    def begin(self, start_SD: Tensor, centre_D: Tensor) -> None:
        self.coder.encoder.weight.data.copy_(start_SD)
        self.coder.W_dec.data.copy_(start_SD)
        self.coder.b_dec.data.copy_(centre_D)


class SAELensOnDevice(SAELens):
    """As its users get it with ``autocast``, the faster of its two precisions."""

    autocast: ClassVar[bool] = True

    def begin(self, start_SD: Tensor, centre_D: Tensor) -> None:
        for name, begin in {"W_enc": start_SD.T, "W_dec": start_SD, "b_dec": centre_D}.items():
            getattr(self.model, name).data.copy_(begin)


PEERS: dict[str, tuple[str, type[Implementation]]] = {
    "sparsify, Adam": ("sparsify", SparsifyOnDevice),
    "SAELens, bfloat16 autocast": ("sae_lens", SAELensOnDevice),
}
"""By the name in the tables: the module it needs, and its step."""


def peer(kind: type[Implementation], size: Size, start_SD: Tensor, first_rows: Tensor) -> Any:
    """A peer on the rows' device, at the given weights."""
    chosen = type(kind.__name__, (kind,), {"device": first_rows.device.type})
    made = chosen(size.d, size.latents, size.k, LEARNING_RATE, first_rows)
    made.begin(start_SD, first_rows.mean(dim=0))
    return made


FUSED = Way()
PORTABLE = replace(FUSED, backend="portable")

WAYS = {
    "ours": FUSED,
    "ours, clipped": replace(FUSED, clip=1.0),
    "ours, in two parts (stored gradients)": replace(FUSED, accumulate=2),
    "ours, float32": replace(FUSED, precision="float32"),
    "ours, portable operations": PORTABLE,
}


def fvu(reconstruct: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """Share of the rows' variance that is not rebuilt."""
    with torch.no_grad():
        left = sum(float((part - reconstruct(part)).double().square().sum()) for part in rows.split(1024))
        return left / float((rows - rows.mean(dim=0)).double().square().sum())
