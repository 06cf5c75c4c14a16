"""Small stores with known text, dictionaries with random weights, and what a brute-force encoding of them gives.

The language model is a name: its folder has a config, a tokenizer and a file of weights that nothing reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from activation_store.harvest.language_model import resolve_model
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store, open_store
from activation_store.writer import StoreWriter
from dictlearn.feature_index import staging
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.index import FeatureIndex, open_index
from dictlearn.workspace import Workspace

HOOK = "blocks.1.hook_resid_post"
CONTEXT = 16
D = 12


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch) -> None:
    """Nothing here loses power, so nothing is synced."""
    from activation_store.testing import UnsyncedDisk

    monkeypatch.setattr(staging, "default_disk", UnsyncedDisk)


def make_model(folder: Path) -> Path:
    """A folder that resolves as a Llama with a byte-level tokenizer of 256 bytes, BOS, and some padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>"], show_progress=False, initial_alphabet=alphabet, vocab_size=257
    )
    tokenizer.train_from_iterator(["a"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": D,
        "num_attention_heads": 2,
        "vocab_size": 260,
        "bos_token_id": 0,
        "intermediate_size": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights that nothing reads")
    return folder


def make_store(
    workspace: Workspace,
    name: str,
    documents: list[int],
    *,
    seed: int = 0,
    token_ids: np.ndarray | None = None,
    hook: str | tuple[str, ...] = HOOK,
    model: Path | None = None,
    finish: bool = True,
    per_shard: int = 64,
    before: float = 0.5,
) -> Store:
    """A store of rows that are their token's vector, ``before`` times the last one's, and noise.

    ``documents`` gives the length of each; every third is held out. Further hooks are other linear maps of these rows,
    each three times as large as the one before.
    """
    random = np.random.default_rng(seed)
    rows = sum(documents)
    spec = resolve_model(str(model or make_model(workspace.root / "model")))
    vectors = random.normal(size=(spec.vocab_size, D))
    if token_ids is None:
        token_ids = random.integers(1, 40, size=rows)
    values = vectors[token_ids] + before * np.roll(vectors[token_ids], 1, axis=0) + 0.1 * random.normal(size=(rows, D))
    firsts = np.concatenate([[0], np.cumsum(documents)[:-1]]).astype(int)
    table = [
        DocumentRows(f"document-{i}.py", "held-out" if i % 3 == 2 else "train", int(first), n)
        for i, (first, n) in enumerate(zip(firsts, documents, strict=True))
    ]
    positions = np.concatenate([1 + np.arange(n) % (CONTEXT - 1) for n in documents]) if rows else np.zeros(0)
    provenance = {"model": spec.provenance(), "context": CONTEXT, "bos_left_out": True}
    of_hooks = {hook: values} if isinstance(hook, str) else {}
    if not isinstance(hook, str):
        for number, one in enumerate(hook):
            of_hooks[one] = 3**number * values @ np.linalg.qr(random.normal(size=(D, D)))[0]
    with StoreWriter(
        workspace.store(name),
        StorePlan(rows, table),
        [HookSpec(one, (D,), "float32") for one in of_hooks],
        Geometry(16, per_shard),
        provenance,
    ) as writer:
        end = rows if finish else min(rows, 64)
        of_row = np.repeat(np.arange(len(documents)), documents)
        of_rows = {one: array[:end].astype(np.float32) for one, array in of_hooks.items()}
        writer.append(of_rows, token_ids[:end], positions[:end], of_row[:end])
        if finish:
            writer.finish()
    return open_store(workspace.store(name))


def make_run(workspace: Workspace, name: str, store: Store, *, kind: str = "topk", d_sae: int = 24, k: int = 4) -> None:
    """A finished run with random weights. ICFL's codes are signed; a gated row has as many as it has."""
    import torch

    from dictlearn.dictionaries.configs import GatedConfig, ICFLConfig, TopKConfig
    from dictlearn.dictionaries.files import save
    from dictlearn.dictionaries.gated import Gated
    from dictlearn.dictionaries.icfl import ICFL
    from dictlearn.dictionaries.topk import TopK

    generator = torch.Generator().manual_seed(5)
    hook = next(iter(store.hooks))
    rows = torch.randn(d_sae, D, generator=generator)
    with torch.no_grad():
        if kind == "icfl":
            dictionary = ICFL(ICFLConfig(d_sae=d_sae, rounds=k // 2, width=2), D)
            dictionary.atoms.copy_(rows)
        else:
            gated = kind == "gated"
            dictionary = Gated(GatedConfig(d_sae=d_sae), D) if gated else TopK(TopKConfig(d_sae=d_sae, k=k), D)
            dictionary.W_enc.copy_(rows)
            dictionary.W_dec.copy_(rows)
            dictionary.b_enc.copy_(torch.randn(d_sae, generator=generator))
            dictionary.b_enc[0] = -1e9  # never fires
    provenance = {
        "hook_in": hook,
        "hook_out": hook,
        "model": store.provenance["model"],
        "store": {"name": store.path.stem, "fingerprint": store.fingerprint},
    }
    save(dictionary, workspace.run(name).dictionary, provenance)


@dataclass(frozen=True)
class Made:
    """An index with what it was made from."""

    workspace: Workspace
    store: Store
    index: FeatureIndex
    dense: np.ndarray
    """(rows, d_sae): every activation, by brute force."""


def encode_all(workspace: Workspace, run: str, store: Store) -> np.ndarray:
    """The dense activations (rows, d_sae) of the whole store, in batches as long as the index's."""
    import torch

    from dictlearn.dictionaries.files import load
    from dictlearn.feature_index import encode

    dictionary = load(workspace.run(run).dictionary)
    rows = store.tensor(next(iter(store.hooks)), 0, store.rows)
    with torch.no_grad():
        step = encode.batch_rows(dictionary.d_sae)
        dense = [dictionary.encode(batch).dense() for batch in rows.split(step)]
    return torch.cat(dense).numpy()


def make_index(root: Path, documents: list[int], kind: str = "topk", **changes) -> Made:
    workspace = Workspace(root)
    of_run = {name: changes.pop(name) for name in ("d_sae", "k") if name in changes}
    store = make_store(workspace, "store", documents, **changes)
    make_run(workspace, "run", store, kind=kind, **of_run)
    path = run_index(IndexConfig(run="run", logits=False), workspace)
    return Made(workspace, store, open_index(path), encode_all(workspace, "run", store))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """400 rows of twelve documents, some of them empty or of one row."""
    documents = [60, 1, 33, 0, 90, 2, 17, 80, 0, 45, 30, 42]
    return make_index(tmp_path_factory.mktemp("made"), documents)


@pytest.fixture(scope="module")
def made_signed(tmp_path_factory) -> Made:
    return make_index(tmp_path_factory.mktemp("signed"), [50, 70, 40, 60], kind="icfl")
