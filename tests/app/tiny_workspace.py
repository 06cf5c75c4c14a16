"""A small workspace with everything in it, made in seconds: what the app's tests and its authors look at.

The text is the standard library's and the files are written by the project's own writers; the language model and the
dictionaries have random weights. Activations are not the model's: a row is its token's random vector plus a share of
its predecessors', so that latents fire on tokens and their contexts. Some tokens and one document are hostile: see
HOSTILE.

Run as a script to make one: `python tests/app/tiny_workspace.py FOLDER`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from activation_store.harvest.corpus import is_held_out, open_corpus
from activation_store.harvest.language_model import resolve_model
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store, open_store
from activation_store.writer import StoreWriter
from dictlearn.circuits import graph as graphs
from dictlearn.workspace import Workspace

HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror='window.pwned=1'>",
    "**bold** :smile: $x^2$ `code`",
    "[link](javascript:window.pwned=1)",
    "\x1b[31mred\x00",
    "\u202edesrever",
    "&lt;b&gt;",
)
"""Tokens that must be shown as they are, and do nothing."""

HOSTILE_DOCUMENT = "<img src=x onerror='window.pwned=1'> **md** :smile:.py"
HOOKS = ("blocks.1.hook_resid_post", "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
D, CONTEXT, N_LAYERS = 24, 64, 4
DOCUMENTS = 24
CHARS = 2400
"""Of each document."""


def make_workspace(root: Path, logits: bool = True) -> Workspace:
    """Two stores, four runs (one of them unfinished), two indexes, a graph."""
    workspace = Workspace(root)
    model = make_model(root.parent / (root.name + "-model"))
    store = make_store(workspace, "stdlib", model)
    make_growing_store(workspace, "growing", model)
    make_run(workspace, "sae", store, HOOKS[0], HOOKS[0], d_sae=256, k=8, seed=1)
    make_run(workspace, "sae-wide", store, HOOKS[0], HOOKS[0], d_sae=512, k=12, seed=2)
    make_run(workspace, "transcoder-2", store, HOOKS[1], HOOKS[2], d_sae=128, k=6, seed=3)
    make_run(workspace, "training", store, HOOKS[0], HOOKS[0], d_sae=256, k=8, seed=4, finished=False)
    from dictlearn.feature_index.command import IndexConfig, run_index

    run_index(IndexConfig(run="sae", logits=logits), workspace)
    run_index(IndexConfig(run="transcoder-2", logits=False), workspace)
    graphs.write(make_graph(store, workspace), workspace.graph("import-sys"))
    return workspace


# --- model and store --------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """A random two-layer Llama and a byte-level tokenizer trained on a little of the standard library."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([text for _, text in documents()], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in HOSTILE])
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def documents() -> list[tuple[str, str]]:
    """The beginnings of some files of the standard library, and a hostile one."""
    found = [document for document in open_corpus("stdlib").documents if len(document.text) > CHARS]
    chosen = found[:: max(1, len(found) // DOCUMENTS)][:DOCUMENTS]
    hostile = "def attack():\n    return [\n" + "".join(f"        {token},\n" for token in HOSTILE * 3) + "    ]\n"
    return [(HOSTILE_DOCUMENT, hostile), *((document.id, document.text[:CHARS]) for document in chosen)]


def make_store(workspace: Workspace, name: str, model: Path) -> Store:
    """Every document, complete."""
    write_store(workspace.store(name), model, stop=None)
    return open_store(workspace.store(name))


def make_growing_store(workspace: Workspace, name: str, model: Path) -> None:
    """The same, left after its first commit."""
    write_store(workspace.store(name), model, stop=1)


def write_store(path: Path, model: Path, stop: int | None) -> None:
    """Write a store; ``stop`` commits of it, or all."""
    spec = resolve_model(str(model))
    from activation_store.harvest.language_model import load_tokenizer

    tokenizer = load_tokenizer(spec)
    token_ids, positions, of_document, table = [], [], [], []
    row = 0
    for number, (identity, text) in enumerate(documents()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        held_out = number % 5 == 1 or is_held_out(identity)
        table.append(DocumentRows(identity, "held-out" if held_out else "train", row, len(ids)))
        token_ids += ids
        positions += [1 + i % (CONTEXT - 1) for i in range(len(ids))]
        of_document += [number] * len(ids)
        row += len(ids)
    hooks = [HookSpec(hook, (D,), "float32") for hook in HOOKS]
    provenance = {
        "model": spec.provenance(),
        "corpus": {"name": "stdlib"},
        "context": CONTEXT,
        "bos_left_out": True,
    }
    plan = StorePlan(row, table, {"BOS": row // (CONTEXT - 1)}, {"seed": 0})
    geometry = Geometry(rows_per_chunk=128, rows_per_shard=2048)
    rows = activations(np.array(token_ids), spec.vocab_size)
    end = row if stop is None else stop * geometry.rows_per_shard
    with StoreWriter(path, plan, hooks, geometry, provenance) as writer:
        writer.append(
            {hook: values[:end] for hook, values in zip(HOOKS, rows, strict=True)},
            np.array(token_ids[:end]),
            np.array(positions[:end]),
            np.array(of_document[:end]),
        )
        if stop is None:
            writer.finish()


def activations(token_ids: np.ndarray, vocabulary: int) -> list[np.ndarray]:
    """One (rows, D) float32 array for each of HOOKS."""
    random = np.random.default_rng(7)
    vectors = random.normal(size=(vocabulary, D))
    rows = vectors[token_ids]
    context = rows + 0.6 * np.roll(rows, 1, axis=0) + 0.3 * np.roll(rows, 2, axis=0)
    mixed = context @ random.normal(size=(D, D)) / math.sqrt(D)
    return [context.astype(np.float32), mixed.astype(np.float32), np.tanh(mixed).astype(np.float32)]


# --- runs -------------------------------------------------------------------------------------------------------------


def make_run(
    workspace: Workspace, name: str, store: Store, hook: str, target: str, d_sae: int, k: int, seed: int, finished=True
) -> None:
    """A run folder as training leaves it: config, curves, dictionary, evaluation."""
    files = workspace.run(name)
    files.folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "name": name,
        "store": store.path.stem,
        "hook": hook,
        "target_hook": None if target == hook else target,
        "dictionary": {"kind": "topk", "d_sae": d_sae, "k": k, "auxk_weight": 0.03125, "dead_after_rows": 10_000_000},
        "optimiser": {"learning_rate": None, "warm_up_steps": 1000, "decay_share": 0.2, "gradient_clip": 1.0},
        "batch_size": 4096,
        "steps": 400,
        "seed": seed,
    }
    files.config.write_text(yaml.safe_dump(config, sort_keys=False))
    lines = curve(seed, k, steps=400 if finished else 170)
    files.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not finished:
        return
    save_dictionary(files.dictionary, store, hook, target, d_sae, k, seed)
    if name != "sae-wide":
        evaluation = {
            "run": name,
            "store": store.path.stem,
            "store_fingerprint": store.fingerprint,
            "asked": {"rows": 4096, "tokens": 2048, "batch_size": 1024},
            "hook_in": hook,
            "hook_out": target,
            "split": "held-out",
            "reconstruction": {
                "rows": 4096,
                "fvu": 0.1 + 0.1 * seed,
                "explained_variance": 0.9 - 0.1 * seed,
                "l0": float(k),
                "dead_share": 0.05 * seed,
            },
            "downstream": {
                "tokens": 2040,
                "ce_clean": 2.1,
                "ce_spliced": 2.3 + seed / 10,
                "kl_spliced": 0.2 + seed / 10,
                "loss_recovered": 0.93 - seed / 50,
            },
        }
        files.evaluation.write_text(json.dumps(evaluation))


def curve(seed: int, k: int, steps: int) -> list[dict[str, float]]:
    """Lines of metrics.jsonl that fall as losses do."""
    random = np.random.default_rng(seed)
    lines = []
    for step in range(10, steps + 1, 10):
        loss = 0.12 + 0.05 * seed + 0.9 * math.exp(-step / 60) + 0.01 * random.normal()
        lines.append(
            {
                "step": step,
                "rows": step * 4096,
                "loss": loss,
                "mse": loss * 0.97,
                "fvu": loss * 1.1,
                "l0": k - 0.2 * random.random(),
                "dead_share": 0.3 * (1 - math.exp(-step / 150)) / seed,
                "learning_rate": 1e-3 * min(1, step / 40, (401 - step) / 80 if step > 320 else 1),
                "gradient_norm": 0.4 + 2 * math.exp(-step / 50) + 0.05 * random.random(),
                "wall_seconds": step * 0.11,
                "wall_tokens_per_second": 37_000 + 900 * random.normal(),
            }
        )
    return lines


def save_dictionary(folder: Path, store: Store, hook: str, target: str, d_sae: int, k: int, seed: int) -> None:
    """A TopK dictionary with random unit directions, which read what they write."""
    import torch

    from dictlearn.dictionaries.configs import TopKConfig
    from dictlearn.dictionaries.files import save
    from dictlearn.dictionaries.topk import TopK

    generator = torch.Generator().manual_seed(seed)
    dictionary = TopK(TopKConfig(d_sae=d_sae, k=k), D, None if target == hook else D)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, D, generator=generator), dim=1)
    mean = torch.tensor(store.statistics(hook).mean, dtype=torch.float32)
    with torch.no_grad():
        dictionary.W_enc.copy_(directions)
        dictionary.W_dec.copy_(directions)
        dictionary.b_enc.copy_(-directions @ mean)
        dictionary.b_dec.copy_(mean)
    made_from = {
        "hook_in": hook,
        "hook_out": target,
        "model": store.manifest.provenance["model"],
        "bos_left_out": True,
        "store": {"name": store.path.stem, "fingerprint": store.fingerprint},
        "seed": seed,
    }
    save(dictionary, folder, made_from)


# --- a graph ----------------------------------------------------------------------------------------------------------


def make_graph(store: Store, workspace: Workspace) -> graphs.AttributionGraph:
    """A random attribution graph whose sums hold, with a transcoder on layer 2 and error nodes elsewhere."""
    random = np.random.default_rng(11)
    tokens = ("<s>", "import", " sys", "\n", "def", " main", "(", HOSTILE[0], ")", ":", "\n", "   ", " return")
    n = len(tokens)
    nodes: list[graphs.Node] = []
    for position, token in enumerate(tokens):
        nodes.append(
            graphs.Node(f"token/{position}", "token", position, 1.0, 0.1, True, token_id=position, token=token)
        )
        for layer in range(N_LAYERS):
            if layer == 2:
                for latent in random.choice(128, size=3 + position % 4, replace=False).tolist():
                    kept = bool(random.random() < 0.75)
                    nodes.append(
                        graphs.Node(
                            f"feature/{layer}/{position}/{latent}",
                            "feature",
                            position,
                            float(random.gamma(2)),
                            float(random.random() ** 3),
                            kept,
                            explained=kept,
                            layer=layer,
                            latent=latent,
                        )
                    )
            else:
                kept = bool(random.random() < 0.6)
                nodes.append(
                    graphs.Node(
                        f"error/{layer}/{position}",
                        "error",
                        position,
                        2.0,
                        float(random.random() ** 4),
                        kept,
                        layer=layer,
                    )
                )
    for rank, (token, probability) in enumerate(((" sys", 0.61), (" os", 0.2), (HOSTILE[1], 0.04))):
        nodes.append(
            graphs.Node(
                f"logit/{rank}", "logit", n - 1, 3.0 - rank, 1 - rank / 3, True, True, token_id=rank, token=token,
                probability=probability,
            )
        )  # fmt: skip
    return finished_graph(nodes, tokens, store, random)


def finished_graph(
    nodes: list[graphs.Node], tokens: tuple[str, ...], store: Store, random: np.random.Generator
) -> graphs.AttributionGraph:
    """Add random edges and the residues that make every explained node's inputs add up to its value."""
    from dataclasses import replace

    edges: list[graphs.Edge] = []
    finished = []
    level = {"token": -1, "logit": N_LAYERS}
    for node in nodes:
        if not (node.kept and node.explained):
            finished.append(node)
            continue
        height = level.get(node.kind, node.layer)
        below = [
            other
            for other in nodes
            if other.kept and other.position <= node.position and level.get(other.kind, other.layer) < height
        ]
        chosen = random.choice(len(below), size=min(len(below), 9), replace=False)
        weights = random.normal(size=len(chosen)) * 0.5
        edges += [
            graphs.Edge(
                below[i].id, node.id, float(weight), float(weight) * 0.4, (graphs.EdgeHead(1, 2, float(weight) * 0.5),)
            )
            for i, weight in zip(chosen.tolist(), weights.tolist(), strict=True)
        ]
        left = node.value - float(weights.sum())
        residue = {"bias": left * 0.7, graphs.PRUNED: left * 0.3}
        heads = (graphs.HeadTerm(1, 2, max(0, node.position - 1), 0.4), graphs.HeadTerm(0, 3, 0, -0.2))
        finished.append(replace(node, residue=residue, heads=heads, direct={"embedding": 0.3, "bias": left * 0.7}))
    scores = graphs.GraphScores(0.71, 0.83, 0.29, 0.4)
    return graphs.AttributionGraph(
        prompt="".join(tokens[1:]),
        tokens=tokens,
        token_ids=tuple(range(len(tokens))),
        model={**store.manifest.provenance["model"], "layers": N_LAYERS, "heads": 4, "vocabulary": 900},
        transcoders=(
            {
                "layer": 2,
                "run": "transcoder-2",
                "hook_in": HOOKS[1],
                "hook_out": HOOKS[2],
                "kind": "topk",
                "d_sae": 128,
                "store": "stdlib",
            },
        ),
        settings={"max_feature_nodes": 4000, "node_threshold": 0.8, "edge_threshold": 0.98},
        nodes=tuple(finished),
        edges=tuple(edges),
        heads=tuple(graphs.HeadInfluence(i // 4, i % 4, 0.4 / (1 + i)) for i in range(16)),
        scores=scores,
        nulls={
            "untrained transcoders": graphs.GraphScores(0.21, 0.4, 0.79, 0.5),
            "permuted decoder rows": graphs.GraphScores(0.15, 0.38, 0.85, 0.5),
        },
    )


if __name__ == "__main__":
    make_workspace(Path(sys.argv[1]))
