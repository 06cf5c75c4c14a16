"""Stores of every shape, for tests by hypothesis: few rows, any mix of hooks, types, heads, documents and geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from activation_store.spec import ACTIVATION_TYPES, COMPRESSIONS, SPLITS, DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.testing import UnsyncedDisk
from activation_store.writer import StoreWriter

WIDTHS = st.sampled_from([(1,), (5,), (8,), (2, 3), (3, 1)])


@dataclass(frozen=True)
class RandomStore:
    """What a store is made from; ``bits`` seeds its values, ``text`` its tokens and their positions."""

    hooks: tuple[HookSpec, ...]
    geometry: Geometry
    plan: StorePlan
    provenance: dict[str, Any]
    compression: str
    bits: int
    text: int

    def write(self, path: Path) -> Path:
        chance, text = np.random.default_rng(self.bits), np.random.default_rng(self.text)
        made_of = (self.plan, self.hooks, self.geometry, self.provenance)
        with StoreWriter(path, *made_of, compression=self.compression, disk=UnsyncedDisk()) as writer:
            rows = self.plan.rows
            documents = np.repeat(np.arange(len(self.plan.documents)), [d.rows for d in self.plan.documents])
            writer.append(
                {hook.name: finite(chance, (rows, *hook.shape), hook.dtype) for hook in self.hooks},
                text.integers(0, 2**31 - 1, rows),
                text.integers(0, 1000, rows),
                documents,
            )
            writer.finish()
        return path


def finite(chance: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any bits that are a finite number: subnormals, the largest, both zeros."""
    width, exponent = {"bfloat16": (16, 0x7F80), "float16": (16, 0x7C00), "float32": (32, 0x7F800000)}[dtype]
    bits = chance.integers(0, 1 << width, shape, dtype=np.uint64)
    bits = np.where(bits & np.uint64(exponent) == exponent, bits & ~np.uint64(exponent), bits)
    carrier = np.dtype(f"<u{width // 8}")
    return bits.astype(carrier) if dtype == "bfloat16" else bits.astype(carrier).view(dtype)


@st.composite
def random_stores(draw: st.DrawFn, **fixed: Any) -> RandomStore:
    """``fixed`` sets any attribute."""
    names = draw(st.lists(st.sampled_from(["a", "blocks.0.hook_z", "ü.hook"]), min_size=1, max_size=3, unique=True))
    hooks = tuple(HookSpec(name, draw(WIDTHS), draw(st.sampled_from(ACTIVATION_TYPES))) for name in names)
    rows_per_chunk = draw(st.integers(1, 5))
    geometry = Geometry(rows_per_chunk, rows_per_chunk * draw(st.integers(1, 4)))
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any))
    ids = draw(st.lists(st.text(max_size=12), min_size=len(lengths), max_size=len(lengths), unique=True))
    documents, row = [], 0
    for id_, length in zip(ids, lengths, strict=True):
        documents.append(DocumentRows(id_, draw(st.sampled_from(SPLITS)), row, length))
        row += length
    plan = StorePlan(
        row,
        documents,
        excluded=draw(st.dictionaries(st.sampled_from(["bos", "padding"]), st.integers(0, 9))),
        batches={"seed": draw(st.integers(0, 99)), "context": 8, "bos_token_id": None},
    )
    model = {"name": "tiny", "fingerprint": "sha256:00"}
    made = {
        "hooks": hooks,
        "geometry": geometry,
        "plan": plan,
        "provenance": {"model": model, "tokenizer": "sha256:11", "corpus": {"name": "x"}},
        "compression": draw(st.sampled_from(sorted(COMPRESSIONS))),
        "bits": draw(st.integers(0, 2**32 - 1)),
        "text": draw(st.integers(0, 2**32 - 1)),
    }
    return RandomStore(**(made | fixed))
