"""Crosscoders (Lindsey et al. 2024) between two checkpoints: does what is new get latents of its own?

    python scripts/reproduce/crosscoder.py                  # minutes of one core

The bundled language model is fine-tuned for some dozens of steps on the standard library's source with every `self`
written as `this`: what is new is known. A second copy is fine-tuned just as long on the same source as it is; nothing
is new there but the fine-tuning itself, which makes it the null. All three models are harvested over the same text,
other modules in pieces, half of them with `this`, and crosscoders are trained between the bundled model and each copy.

Of each latent: its relative norm, the length of its decoder row for the tuned model over the lengths of both, 0 for a
latent of the bundled model alone and 1 for one of the tuned model alone. And its share on what changed: of the
held-out rows in which it fires, those whose token is a `this` that stands for `self`, or one of the two tokens after.
Every seed has other initial weights; text and models are the same.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduction import Options, Record, Table, harvested, language_model, reproduce, tabulate, train, write_pieces

from activation_store.harvest.corpus import open_corpus
from activation_store.harvest.language_model import resolve_model
from activation_store.seeds import permutation
from activation_store.store import Store, open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import BatchTopKConfig, CrosscoderConfig
from dictlearn.metrics.evaluation import token_windows
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig

HOOK = "blocks.2.hook_resid_post"
CONTEXT = 128
AFTER = 2
"""Tokens after a `this` that count as changed too: the point, and the attribute."""
EXTREME = 20
"""Latents with the largest relative norms that are looked at."""
EDGES = (0.0, 0.1, 0.3, 0.45, 0.55, 0.7, 0.9, 1.0)
RATE = 1e-3
"""Of the fine-tuning, at its peak."""
CHANGED, NULL = "`self` became `this`", "nothing (null)"


@dataclass(frozen=True)
class Size:
    tuning_steps: int
    tokens: int
    d_sae: int
    k: int
    steps: int


# --- the models and the text ------------------------------------------------------------------------------------------


def with_this(text: str) -> str:
    return re.sub(r"\bself\b", "this", text)


def tune(folder: Path, texts: Sequence[str], steps: int) -> None:
    """The bundled model after ``steps`` of 16 windows of ``texts``, as a Hugging Face folder."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").exists():  # in a workspace that was kept
        return
    bundled = resolve_model("bundled").folder
    assert bundled is not None
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer.json"))
    stream = np.concatenate([[0, *encoded.ids] for encoded in tokenizer.encode_batch(list(texts))])
    cut = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    windows = torch.from_numpy(cut[permutation(len(cut), 0, "tuning windows")])
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 5, 2 * (steps - step) / steps)
        tokens = windows[torch.arange(16 * step, 16 * step + 16) % len(windows)]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"tuning, step {step} of {steps}: {loss.item():.3f} nats per token", flush=True)
    model.half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder / name)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(options: Options) -> list[Record]:
    size = Size(2, 15_000, 64, 4, 10) if options.quick else Size(80, 80_000, 512, 32, 400)
    root = options.workspace.root
    documents = open_corpus("stdlib").split("all")
    to_tune, to_read = documents[0::2], documents[1::2]
    if options.quick:
        to_tune, to_read = to_tune[:40], to_read[:80]
    write_pieces(root / "text", to_read, with_this)
    texts = [document.text for document in to_tune]
    tune(root / "tuned", list(map(with_this, texts)), size.tuning_steps)
    tune(root / "again", texts, size.tuning_steps)
    for name, model in (("base", "bundled"), ("tuned", str(root / "tuned")), ("again", str(root / "again"))):
        text = {"corpus": str(root / "text"), "context": CONTEXT}
        harvested(options, [HOOK], size.tokens, name, model=model, **text)
    records = []
    for tuned, change in (("tuned", CHANGED), ("again", NULL)):
        base, other = (open_store(options.workspace.store(name)) for name in ("base", tuned))
        costs = {"base nats": surprise(base, size.tokens // 5), "tuned nats": surprise(other, size.tokens // 5)}
        for seed in options.seeds:
            configs = [run(kind, tuned, seed, size) for kind in ("crosscoder", "batchtopk")]
            for config, dictionary in zip(configs, train(configs, options.workspace, f"{tuned}-{seed}"), strict=True):
                kind = {"crosscoder": "L1 crosscoder", "batchtopk": "BatchTopK of both"}[config.dictionary.kind]
                words: Record = {"kind": kind, "tuned on": change, "seed": seed}
                records.append(words | costs | compare(dictionary, base, other, 8192))
    return records


def run(kind: str, tuned: str, seed: int, size: Size) -> TrainConfig[Any]:
    common: dict[str, Any] = {"d_sae": size.d_sae, "dead_after_rows": size.steps * 256 // 10}
    dictionary = CrosscoderConfig(**common) if kind == "crosscoder" else BatchTopKConfig(k=size.k, **common)
    return TrainConfig(
        name=f"{kind}-{tuned}-{seed}",
        store="base",
        aligned_stores=(tuned,),
        hook=(HOOK, f"{tuned}:{HOOK}"),
        dictionary=dictionary,
        optimiser=OptimiserConfig(learning_rate=2e-3),
        batch_size=256,
        steps=size.steps,
        buffer_rows=65_536,
        seed=seed,
        order_seed=0,
        log_every=100,
        checkpoint_every=size.steps,
    )


@torch.no_grad()
def compare(dictionary: Dictionary, base: Store, tuned: Store, rows: int) -> Record:
    """Relative norms, what the extreme latents fire on, and the reconstruction, on held-out rows."""
    parts, changed = [], []
    for start, stop in base.split_rows("held-out"):
        parts.append(torch.cat([store.tensor(HOOK, start, stop).float() for store in (base, tuned)], dim=1))
        changed.append(changed_rows(base.token_ids(start, stop), base.documents(start, stop)))
    x, changed_B = torch.cat(parts)[:rows], torch.from_numpy(np.concatenate(changed)[:rows])
    codes = dictionary.encode(x)
    active_BS = codes.dense() != 0
    fired_S = active_BS.sum(dim=0)
    alive_S = fired_S >= 5
    norm_base, norm_tuned = (part.norm(dim=1) for part in dictionary.W_dec.split(dictionary.input_parts, dim=1))
    relative_S = norm_tuned / (norm_base + norm_tuned).clamp_min(1e-12)
    on_changed_S = (active_BS & changed_B[:, None]).sum(dim=0) / fired_S.clamp_min(1)
    order = relative_S.masked_fill(~alive_S, float("nan")).nan_to_num(nan=-1.0).argsort(descending=True)
    top, alive = order[: min(EXTREME, int(alive_S.sum()))], relative_S[alive_S]
    bottom = order[: int(alive_S.sum())][-EXTREME:]
    counts = np.histogram(alive.numpy(), bins=EDGES)[0] / max(1, len(alive))
    error = (x - dictionary.decode(codes)).square().sum() / (x - x.mean(dim=0)).square().sum()
    return {
        "l0": float(codes.l0().double().mean()),
        "fvu": float(error),
        "alive": 100 * float(alive_S.double().mean()),
        "rows changed": 100 * float(changed_B.double().mean()),
        "spread": float(alive.std()),
        "top norm": float(relative_S[top].mean()),
        "top": 100 * float(on_changed_S[top].mean()),
        "bottom": 100 * float(on_changed_S[bottom].mean()),
        "all": 100 * float(on_changed_S[alive_S].mean()),
        **{f"bin {number}": 100 * float(count) for number, count in enumerate(counts)},
    }


def changed_rows(token_ids: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Whether each row is a `this` for `self`, or comes just after one."""
    changed = np.zeros(len(token_ids), dtype=bool)
    for place in np.flatnonzero(stands_for_self(token_ids) & np.append(documents[1:] == documents[:-1], False)):
        changed[place : place + 1 + AFTER] = documents[place : place + 1 + AFTER] == documents[place]
    return changed


def stands_for_self(token_ids: np.ndarray) -> np.ndarray:
    """Where a `this` has a point, a comma or a bracket after it, along the last axis."""
    from tokenizers import Tokenizer

    bundled = resolve_model("bundled").folder
    assert bundled is not None
    ids = Tokenizer.from_file(str(bundled / "tokenizer.json")).get_vocab()
    this = np.isin(token_ids, [ids["this"], ids["Ġthis"]])
    this[..., :-1] &= np.isin(token_ids[..., 1:], [ids[token] for token in (".", ",", ")", "):")])
    this[..., -1:] = False
    return this


@torch.no_grad()
def surprise(store: Store, tokens: int) -> float:
    """Nats that a `this` for `self` costs the model of ``store``, on the store's held-out text."""
    model, batches, nats = language_model(store), store.manifest.batches, []
    for tokens_BT, real_BT in token_windows(store, batches["bos_token_id"], batches["context"], tokens):
        logs = model(tokens_BT)[:, :-1].log_softmax(dim=-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
        nats.append(-logs[(torch.from_numpy(stands_for_self(tokens_BT.numpy())) & real_BT)[:, 1:]])
    return float(torch.cat(nats).mean())


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Record]) -> dict[str, Table]:
    if not records:
        return {}
    words = {"": "kind", "tuned on what is new": "tuned on"}
    bins = {f"{low:g} to {high:g}": (f"bin {number}", 1) for number, (low, high) in enumerate(pairwise(EDGES))}
    return {
        "crosscoder norms": tabulate(records, words, {"standard deviation": ("spread", 3), **bins}),
        "crosscoder changed": tabulate(
            records,
            words,
            {
                "L0": ("l0", 1),
                "FVU": ("fvu", 3),
                "alive, %": ("alive", 1),
                f"mean norm of the {EXTREME} largest": ("top norm", 2),
                "their rows on `this`, %": ("top", 1),
                f"those of the {EXTREME} smallest": ("bottom", 1),
                "of all latents": ("all", 1),
                "all rows": ("rows changed", 1),
            },
        ),
        "crosscoder tuning": tabulate(
            [r for r in records if r["seed"] == 0 and r["kind"] == records[0]["kind"]],
            {"tuned on what is new": "tuned on"},
            {"nats of a `this` before": ("base nats", 2), "after": ("tuned nats", 2)},
        ),
    }


PARTS = {"bundled": measure}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("crosscoder", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
