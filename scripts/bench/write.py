"""What it takes to write a store, beside a plain write of the same bytes with their checksum.

    python scripts/bench/write.py --rows 524288 --widths 256 512 1024 --rounds 7

In every round each job writes the same rows of one hook, in batches of 4,096, and syncs each 65,536 rows:

- plain: the bytes of the rows, as they are, into one file, and their XXH3;
- store: `StoreWriter`, whole: shards, indexes, the arrays about rows, checksums, commits, statistics;
- statistics: `activation_store.moments.Moments` alone over the same rows;
- conversion: float32 to bfloat16 bits, by torch, which a harvest does before it writes.

The ratio is (store - statistics) / plain: what the format and its promises cost; statistics and conversion stand apart.
Medians over the rounds, in CPU-seconds of the process for each million rows. Of ratios, the median of the rounds'.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import threadpoolctl
import torch
import xxhash

from activation_store.moments import Moments, second_moment_stride
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.writer import StoreWriter

BATCH_ROWS = 4096


def jobs(rows: int, d: int, folder: Path, compression: str, geometry: Geometry) -> dict[str, Callable[[], None]]:
    values = np.random.default_rng(0).normal(size=(BATCH_ROWS, d)).astype(np.float32)
    as_torch = torch.from_numpy(values)
    bits = as_torch.to(torch.bfloat16).view(torch.uint16).numpy()
    hook = HookSpec("blocks.0.hook_resid_post", (d,))
    about = np.zeros(BATCH_ROWS, dtype=np.int32)

    def plain() -> None:
        digest = xxhash.xxh3_64()
        with (folder / "plain").open("wb", buffering=0) as file:
            for first in range(0, rows, BATCH_ROWS):
                file.write(bits)
                digest.update(bits)
                if (first + BATCH_ROWS) % geometry.rows_per_shard == 0:
                    os.fsync(file.fileno())

    def store() -> None:
        plan = StorePlan(rows, [DocumentRows("all", "train", 0, rows)])
        with StoreWriter(folder / "store.zarr", plan, [hook], geometry, {}, compression=compression) as writer:
            for _ in range(0, rows, BATCH_ROWS):
                writer.append({hook.name: bits}, about, about, about)
            writer.finish()

    def statistics() -> None:
        for _ in range(rows // geometry.rows_per_shard):
            moments = Moments(d, second_moment_stride(rows, d))
            for _ in range(0, geometry.rows_per_shard, BATCH_ROWS):
                moments.update(bits)
            moments.settle()

    def conversion() -> None:
        for _ in range(0, rows, BATCH_ROWS):
            as_torch.to(torch.bfloat16)

    return {"plain": plain, "store": store, "statistics": statistics, "conversion": conversion}


def measure(
    rows: int, d: int, rounds: int, folder: Path, compression: str, geometry: Geometry
) -> dict[str, list[float]]:
    """CPU-seconds of every job in every round, after one round that does not count. What it wrote is then removed."""
    place = folder / "place"
    every = jobs(rows, d, place, compression, geometry)
    names = list(every)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        for name in names[number:] + names[:number]:
            place.mkdir()
            began = time.process_time()
            every[name]()
            if number >= 0:
                taken[name].append(time.process_time() - began)
            shutil.rmtree(place)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=524_288, help="a multiple of the rows of a shard")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows-per-shard", type=int, default=Geometry.rows_per_shard)
    parser.add_argument("--compression", default="none")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    options = parser.parse_args()
    geometry = Geometry(rows_per_shard=options.rows_per_shard)
    rows = max(1, options.rows // geometry.rows_per_shard) * geometry.rows_per_shard
    torch.set_num_threads(1)
    print("| d | plain write + XXH3 | store | of it statistics | (store - statistics) / plain | conversion, apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, threadpoolctl.threadpool_limits(1):
        for d in options.widths:
            taken = measure(rows, d, options.rounds, Path(folder), options.compression, geometry)
            per_million = {name: median(seconds) / rows * 1e6 for name, seconds in taken.items()}
            every = zip(taken["store"], taken["statistics"], taken["plain"], strict=True)
            ratio = median((store - statistics) / plain for store, statistics, plain in every)
            cells = [per_million["plain"], per_million["store"], per_million["statistics"], ratio]
            shown = [f"{cell:.2f}" for cell in (*cells, per_million["conversion"])]
            print(f"| {d} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
