"""What the bfloat16 of the GPU's kernels changes: which latents are selected, and how well is rebuilt in the end.

    python scripts/bench/bfloat16.py --store workspace/stores/demo.zarr --hook blocks.2.hook_resid_post

TopK is trained in three ways, on the same rows in the same order from the same start: in float32; with the encoder's
product in bfloat16, as autocast of the portable operations does; and with everything in bfloat16 that the kernels
(`dictlearn.ops.triton_backend`) keep in it: rows, both weight matrices where they are read, pre-activations, and the
gradient of the output. Those roundings are made here by plain PyTorch on a CPU, with sums in float32, so this says what
they do to a dictionary and nothing of how fast they are.

- FVU: of held-out rows, encoded in float32 whatever the training.
- Jaccard index: of the latents that bfloat16 and float32 select for the same held-out rows with the same weights.
- "another seed": how far apart the FVU of float32 runs with different seeds are, to compare the difference with.

Means over the seeds with 95 % intervals; differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from activation_store.loader import Loader
from activation_store.seeds import derive_seed
from activation_store.store import Store, open_store
from dictlearn import ops
from dictlearn.circuits.head_identification import interval
from dictlearn.dictionaries.configs import TopKConfig
from dictlearn.dictionaries.topk import TopK
from dictlearn.metrics.evaluation import row_batches
from dictlearn.ops import portable, reference, sparse
from dictlearn.ops.reference import Rule
from dictlearn.training.optimiser_config import OptimiserConfig
from dictlearn.training.optimisers import Optimiser
from dictlearn.training.step import Member, take_step

WAYS = {
    "float32": ("portable", "float32"),
    "encoder's product in bfloat16": ("portable", "bfloat16"),
    "all that the kernels keep in bfloat16": ("rounding", "bfloat16"),
}


# --- the kernels' roundings -------------------------------------------------------------------------------------------


def select(
    x_BD: Tensor, W_SD: Tensor, b_S: Tensor, k: int, also_A: Tensor | None, rule: Rule, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Products of what is stored in bfloat16, summed in float32 with the bias, and rounded once."""
    with torch.autocast("cpu", enabled=False):
        pre_BS = torch.addmm(b_S.to(W_SD.dtype).float(), x_BD.float(), W_SD.float().T).to(W_SD.dtype)
    values_BK, indices_BK = reference.largest(pre_BS, k, rule)
    return values_BK.to(kind), indices_BK, None if also_A is None else pre_BS[:, also_A].to(kind)


ROUNDING = sparse.Primitives(
    read=lambda weight: weight.detach().bfloat16(),
    select=select,
    bags=portable.PRIMITIVES.bags,
    sum_by_latent=lambda bags, weights, rows: portable.PRIMITIVES.sum_by_latent(bags, weights, rows.float()),
    decode=lambda weights, indices, vectors: portable.PRIMITIVES.decode(weights, indices, vectors.float()),
    pair_products=lambda rows, vectors, indices: portable.PRIMITIVES.pair_products(
        rows.float(), vectors.float(), indices
    ),
)


class Rounding(sparse.Operations):
    keep_topk = staticmethod(portable.keep_topk)


ops.BACKENDS["rounding"] = lambda: Rounding(ROUNDING)


# --- training and measuring -------------------------------------------------------------------------------------------


@contextmanager
def operations(backend: str) -> Iterator[None]:
    ops.set_backend(backend)
    try:
        yield
    finally:
        ops.set_backend("auto")


def trained(store: Store, asked: argparse.Namespace, seed: int, way: str) -> TopK:
    backend, precision = WAYS[way]
    generator = torch.Generator().manual_seed(derive_seed(seed, "dictionary") % 2**63)
    rows = asked.steps * asked.batch
    config = TopKConfig(d_sae=asked.d_sae, k=asked.k, dead_after_rows=rows // 10)
    batches = iter(Loader(store, [asked.hook], asked.batch, seed=seed, buffer_rows=2**16))
    first = torch.cat([next(batches)[asked.hook].float() for _ in range(max(1, 8192 // asked.batch))])
    dictionary = TopK(config, store.d(asked.hook))
    with operations("portable"):
        dictionary.initialise(first, None, generator, store.statistics(asked.hook))
    rule = OptimiserConfig()
    member = Member("one", dictionary, Optimiser(rule, dictionary), generator, rule.gradient_clip, precision=precision)
    with operations(backend):
        for step in range(asked.steps):
            take_step(member, next(batches)[asked.hook].float(), None, step, asked.steps)
    return dictionary


@torch.no_grad()
def measured(dictionary: TopK, rows: Tensor) -> dict[str, float]:
    """The FVU in float32, and how alike both precisions select."""
    with operations("portable"):
        left = float((rows - dictionary(rows)).double().square().sum())
        chosen = [dictionary.encode(rows)]
    with operations("rounding"):
        chosen.append(dictionary.encode(rows))
    one, other = (codes.dense() != 0 for codes in chosen)
    alike = ((one & other).sum(dim=1) / (one | other).sum(dim=1).clamp_min(1)).double().mean()
    return {"FVU": left / float((rows - rows.mean(dim=0)).double().square().sum()), "Jaccard": float(alike)}


def in_words(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    found = interval(values)
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"


def table(records: list[dict[str, object]], seeds: int) -> str:
    of = {way: [r for r in records if r["way"] == way] for way in WAYS}
    full = np.array([r["FVU"] for r in of["float32"]], dtype=float)
    lines = ["| training | FVU | minus float32's | Jaccard index |", "| --- | --- | --- | --- |"]
    for way, found in of.items():
        fvu = [float(r["FVU"]) for r in found]  # type: ignore[arg-type]
        apart = "-" if way == "float32" else in_words(list(np.array(fvu) - full), 5)
        alike = in_words([float(r["Jaccard"]) for r in found], 4)  # type: ignore[arg-type]
        lines.append(f"| {way} | {in_words(fvu, 4)} | {apart} | {alike} |")
    if seeds > 1:
        spread = mean(abs(a - b) for a, b in combinations(full, 2))
        lines.append(f"| float32, another seed | | {spread:.5f} apart | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8192, help="held-out rows")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers of each run")
    asked = parser.parse_args()
    store = open_store(asked.store)
    held_out = row_batches(store, (asked.hook,), (asked.hook,), asked.rows, 4096)
    rows = torch.cat([x for x, _ in held_out]).float()
    records: list[dict[str, object]] = []
    for seed in range(asked.seeds):
        for way in WAYS:
            records.append({"seed": seed, "way": way, **measured(trained(store, asked, seed, way), rows)})
            print(records[-1], flush=True)
    if asked.out is not None:
        settings = {name: value for name, value in vars(asked).items() if name not in ("store", "out")}
        asked.out.write_text(json.dumps({"settings": settings, "records": records}, indent=1))
    print(table(records, asked.seeds))


if __name__ == "__main__":
    main()
