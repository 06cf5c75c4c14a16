"""Cross-layer transcoders (Ameisen et al. 2025, "Circuit tracing") against a transcoder of every layer by itself.

    python scripts/reproduce/cross_layer.py                  # both parts; minutes of one core
    python scripts/reproduce/cross_layer.py --part planted

Both have as many latents and as many active latents in each layer. Ours keep the k largest pre-activations of a layer,
where the paper has JumpReLU with a penalty.

planted    Features that are read at one layer of four and written there and at the two layers after it. With `stays`
           0 later inputs do not show the feature; with 1 they do, so that later layers can read it again. How many
           latents, over all layers, write a feature: those with a cosine of 0.7 or more to where it is written at one
           of its layers. Every seed has other features, rows and initial weights.
bundled    All MLPs of the bundled language model: FVU of each layer, and nats per token lost when every MLP is replaced
           at once. Every seed has other initial weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from reproduction import (
    Options,
    Record,
    Table,
    differences,
    figure,
    harvested,
    language_model,
    reproduce,
    tabulate,
    train,
)

from activation_store.store import Store, open_store
from dictlearn.dictionaries.base import Dictionary
from dictlearn.dictionaries.configs import CrossLayerConfig, TopKConfig
from dictlearn.metrics.evaluation import token_windows
from dictlearn.metrics.splicing import splice
from dictlearn.synthetic import CrossLayerFeatures, input_hook, output_hook, write_store
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig

ACROSS, EACH = "cross-layer", "layer by layer"
LAYERS = 4
INPUTS, OUTPUTS = (tuple(hook(layer) for layer in range(LAYERS)) for hook in (input_hook, output_hook))
WRITES = 0.7
"""Cosine from which on a latent counts as one that writes a feature."""


def trained(store: str, seed: int, options: Options, d_layer: int, k: int, steps: int) -> dict[str, list[Dictionary]]:
    """One dictionary of all layers, and one for each; they read the same batches."""
    across: TrainConfig[Any] = TrainConfig(
        name=f"{store}-across-{seed}",
        store=store,
        hook=INPUTS,
        target_hook=OUTPUTS,
        dictionary=CrossLayerConfig(d_sae=LAYERS * d_layer, k=k, dead_after_rows=steps * 256 // 10),
        optimiser=OptimiserConfig(learning_rate=2e-3),
        batch_size=256,
        steps=steps,
        buffer_rows=65_536,
        seed=seed,
        order_seed=0,
        log_every=100,
        checkpoint_every=steps,
    )
    alone = TopKConfig(d_sae=d_layer, k=k, dead_after_rows=steps * 256 // 10)
    each = [
        replace(
            across, name=f"{store}-{layer}-{seed}", hook=INPUTS[layer], target_hook=OUTPUTS[layer], dictionary=alone
        )
        for layer in range(LAYERS)
    ]
    one, *others = train([across, *each], options.workspace, f"{store}-{seed}")
    return {ACROSS: [one], EACH: others}


@torch.no_grad()
def fvu_of_layers(dictionaries: Sequence[Dictionary], rows: Mapping[str, torch.Tensor]) -> tuple[list[float], float]:
    """FVU of each layer's output, and active latents per row and layer."""
    if len(dictionaries) == 1:
        codes = dictionaries[0].encode(torch.cat([rows[hook] for hook in INPUTS], dim=1))
        rebuilt = dictionaries[0].decode(codes).split(dictionaries[0].output_parts, dim=1)
        l0 = float(codes.l0().double().mean()) / LAYERS
    else:
        all_codes = [d.encode(rows[hook]) for d, hook in zip(dictionaries, INPUTS, strict=True)]
        rebuilt = tuple(d.decode(codes) for d, codes in zip(dictionaries, all_codes, strict=True))
        l0 = float(np.mean([codes.l0().double().mean() for codes in all_codes]))
    targets = [rows[hook] for hook in OUTPUTS]
    return [
        float((y - r).square().sum() / (y - y.mean(0)).square().sum()) for y, r in zip(targets, rebuilt, strict=True)
    ], l0


def by_layer(fvus: Sequence[float]) -> Record:
    return {f"fvu {layer}": fvu for layer, fvu in enumerate(fvus)} | {"fvu": float(np.mean(fvus))}


# --- planted features -------------------------------------------------------------------------------------------------


def measure_planted(options: Options) -> list[Record]:
    rows, steps = (4096, 20) if options.quick else (100_000, 800)
    records = []
    for stays in (0.0, 1.0):
        for seed in options.seeds:
            planted = CrossLayerFeatures(seed=seed, stays=stays, features=128, mean_l0=5.0)
            store = f"planted-{stays:.0f}-{seed}"
            write_store(options.workspace.store(store), planted, rows)
            batch = planted.draw(0, 4096, "test")
            test = {hook: torch.from_numpy(x) for hook, x in batch.activations.items()}
            for kind, dictionaries in trained(store, seed, options, 64, 4, steps).items():
                fvus, l0 = fvu_of_layers(dictionaries, test)
                records.append(
                    {"kind": kind, "stays": stays, "seed": seed, "l0": l0}
                    | by_layer(fvus)
                    | latents_of_features(dictionaries, planted)
                )
    return records


def latents_of_features(dictionaries: Sequence[Dictionary], planted: CrossLayerFeatures) -> Record:
    """Share of features that some latent writes, and latents for each of these, among those written to three layers."""
    three_F = planted.written.sum(axis=1) == planted.written_layers
    writers_F = np.zeros(planted.features)
    covered_FL = np.zeros((planted.features, LAYERS), dtype=bool)
    for number, dictionary in enumerate(dictionaries):
        parts = dictionary.W_dec.detach().double().split(dictionary.output_parts, dim=1)
        layers = range(LAYERS) if len(dictionaries) == 1 else [number]
        writes_FSL = np.stack(
            [
                cosines(planted.written_directions[:, layer], part.numpy()) >= WRITES
                for layer, part in zip(layers, parts, strict=True)
            ],
            axis=2,
        )
        writers_F += writes_FSL.any(axis=2).sum(axis=1)
        covered_FL[:, list(layers)] |= writes_FSL.any(axis=1)
    found_F = three_F & (writers_F > 0)
    return {
        "found": float(found_F[three_F].mean()),
        "writers": float(writers_F[found_F].mean()) if found_F.any() else float("nan"),
        "layers covered": float(covered_FL[found_F].sum(axis=1).mean()) if found_F.any() else float("nan"),
    }


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of all pairs of rows; 0 where a row is 0."""
    units = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (first, second)]
    return units[0] @ units[1].T


# --- the bundled language model ---------------------------------------------------------------------------------------


def measure_bundled(options: Options) -> list[Record]:
    d_layer, k, steps, tokens = (32, 4, 5, 256) if options.quick else (256, 16, 400, 2048)
    name = harvested(options, [*INPUTS, *OUTPUTS], 150_000)
    store = open_store(options.workspace.store(name))
    start, stop = max(store.split_rows("held-out"), key=lambda rows: rows[1] - rows[0])
    stop = min(stop, start + 8192)
    test = {hook: store.tensor(hook, start, stop).float() for hook in (*INPUTS, *OUTPUTS)}
    records = []
    for seed in options.seeds:
        for kind, dictionaries in trained(name, seed, options, d_layer, k, steps).items():
            fvus, l0 = fvu_of_layers(dictionaries, test)
            nats = nats_lost(dictionaries, store, tokens)
            records.append({"kind": kind, "seed": seed, "l0": l0, "nats": nats} | by_layer(fvus))
    return records


@torch.no_grad()
def nats_lost(dictionaries: Sequence[Dictionary], store: Store, tokens: int) -> float:
    """Cross-entropy per token with every MLP's output replaced, minus the model's own."""
    model = language_model(store)
    hooks: Sequence[Any] = [OUTPUTS] if len(dictionaries) == 1 else OUTPUTS
    replaced = dict(zip(hooks, dictionaries, strict=True))
    bos = store.manifest.batches["bos_token_id"]
    lost = predicted = 0.0
    for tokens_BT, real_BT in token_windows(store, bos, store.manifest.batches["context"], tokens):
        keep = real_BT[:, 1:] & real_BT[:, :-1]
        targets = tokens_BT[:, 1:][keep]
        clean = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
        with splice(model, replaced, skip_first=bos is not None):
            changed = model(tokens_BT)[:, :-1][keep].double().log_softmax(dim=-1)
        lost += float((clean - changed).gather(1, targets[:, None]).sum())
        predicted += len(targets)
    return lost / predicted


# --- tables -----------------------------------------------------------------------------------------------------------

FVUS = {"L0 of a layer": ("l0", 1), **{f"FVU, layer {layer}": (f"fvu {layer}", 3) for layer in range(LAYERS)}}


def tables(records: Sequence[Record]) -> dict[str, Table]:
    of = {part: [r for r in records if r["part"] == part] for part in ("planted", "bundled")}
    made = {}
    if of["planted"]:
        counts = {
            "features found": ("found", 2),
            "latents per feature found": ("writers", 2),
            "of its 3 layers written": ("layers covered", 2),
        }
        made["clt planted"] = tabulate(of["planted"], {"stays": "stays", "": "kind"}, FVUS | counts)
    if of["bundled"]:
        made["clt bundled"] = tabulate(of["bundled"], {"": "kind"}, FVUS | {"nats lost": ("nats", 3)})
        keys = {**{f"FVU, layer {layer}": f"fvu {layer}" for layer in range(LAYERS)}, "nats lost": "nats"}
        found = [figure(differences(of["bundled"], key, {"kind": ACROSS}, {"kind": EACH})) for key in keys.values()]
        made["clt bundled differences"] = Table(["seed by seed", *keys], [[f"{ACROSS} minus {EACH}", *found]])
    return made


PARTS = {"planted": measure_planted, "bundled": measure_bundled}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("cross_layer", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
