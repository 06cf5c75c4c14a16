"""What each process of `test_ranks.py` does: compare its part with the whole, computed beside it in float64."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dictlearn import ops
from dictlearn.dictionaries.abs_topk import AbsTopK
from dictlearn.dictionaries.base import Update
from dictlearn.dictionaries.batch_topk import BatchTopK
from dictlearn.dictionaries.k_sparse import KSparse
from dictlearn.dictionaries.skip import Skip
from dictlearn.dictionaries.topk import TopK
from dictlearn.ops.ranks import ProcessMesh
from dictlearn.training.parallel import keep_latents

KINDS: tuple[type[TopK] | type[KSparse], ...] = (TopK, AbsTopK, BatchTopK, Skip, KSparse)
ROWS, D_IN, D_OUT, LATENTS = 24, 10, 7, 37  # 37 latents are shared unevenly


def compare(rank: int, size: int, data_parts: int, rendezvous: str) -> None:
    """Loss, its terms, codes and all gradients of a split dictionary equal those of the whole one."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    mesh = dist.init_device_mesh("cpu", (data_parts, size // data_parts), mesh_dim_names=("data", "latents"))
    groups = mesh.get_group("data"), mesh.get_group("latents")
    try:
        kinds = [kind for kind in KINDS if groups[1].size() == 1 or kind.latent_tensors]
        cases = itertools.product(kinds, (0, 1), (1, 5, 30), (3, 40), DEAD, (False, True))
        for kind, seed, k, k_aux, dead, transcoder in cases:
            if not getattr(kind.Config, "transcodes" if transcoder else "autoencodes", True):
                continue
            if kind is KSparse and (k_aux != 3 or dead != DEAD[0]):
                continue  # it does nothing about dead latents
            whole, x, target = made(kind, seed, k, k_aux, dead, transcoder)
            part = copy.deepcopy(whole)
            latents = [LATENTS * i // groups[1].size() for i in (groups[1].rank(), groups[1].rank() + 1)]
            rows = slice(*(ROWS * i // groups[0].size() for i in (groups[0].rank(), groups[0].rank() + 1)))
            keep_latents(part, (latents[0], latents[1]))

            ops.use_ranks(None)
            ops.set_backend("reference")
            expected = whole.loss(x, target)
            expected.total.backward()
            whole.observe(expected.codes)
            ops.set_backend("auto")

            ops.use_ranks(ProcessMesh(*groups))
            found = part.loss(x[rows], None if target is None else target[rows])
            found.total.backward()
            ops.ranks().average_gradients(list(part.parameters()))
            part.observe(found.codes)
            case = f"{kind.kind}, seed {seed}, k {k}, k_aux {k_aux}, {dead}, transcoder {transcoder}, rank {rank}"
            close(ops.mean_over_rows(found.total.detach()), expected.total.detach(), f"total: {case}")
            assert found.terms.keys() == expected.terms.keys(), case
            for name, value in found.terms.items():
                close(ops.mean_over_rows(value), expected.terms[name], f"{name}: {case}")
            close(found.output, expected.output[rows], f"output: {case}")
            close(
                found.codes.dense(),
                expected.codes.dense()[rows, latents[0] : latents[1]],
                f"codes: {case}",
            )
            for name, parameter in part.named_parameters():
                of_whole = dict(whole.named_parameters())[name].grad
                if name in part.latent_tensors:
                    of_whole = of_whole[latents[0] : latents[1]]
                close(parameter.grad, of_whole, f"gradient of {name}: {case}")
            if isinstance(whole, BatchTopK) and isinstance(part, BatchTopK):
                expected_threshold = float(expected.codes.values[expected.codes.values > 0].min())
                part.config = replace(part.config, threshold_rate=1.0)
                part.after_update(Update({}, 0, 1, torch.Generator(), x[rows], target, found))
                assert abs(float(part.threshold) - expected_threshold) < 1e-9, case
            assert torch.equal(part.rows_since_fired, whole.rows_since_fired[latents[0] : latents[1]]), case
    finally:
        ops.use_ranks(None)
        dist.destroy_process_group()


DEAD = ("nothing dead", "the last third dead", "everything dead")


def made(
    kind: type[TopK] | type[KSparse], seed: int, k: int, k_aux: int, dead: str, transcoder: bool
) -> tuple[TopK | KSparse, torch.Tensor, torch.Tensor | None]:
    """A dictionary in float64 with no parameter at a symmetric place, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    of_topk = {} if kind is KSparse else {"k_aux": min(k_aux, LATENTS), "multi_topk_weight": seed / 8}
    config = kind.Config(d_sae=LATENTS, k=k, dead_after_rows=100, **of_topk)
    dictionary = kind(config, D_IN, D_OUT if transcoder else None).double()
    x = torch.randn(ROWS, D_IN, generator=generator, dtype=torch.float64) * 3 + 1
    target = torch.randn(ROWS, D_OUT, generator=generator, dtype=torch.float64) if transcoder else None
    dictionary.initialise(x, target, generator, None)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    first = {"nothing dead": LATENTS, "the last third dead": 2 * LATENTS // 3, "everything dead": 0}[dead]
    dictionary.rows_since_fired[first:] = 10**6
    return dictionary, x, target


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=lambda message: f"{what}: {message}")
