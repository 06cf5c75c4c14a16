"""Steering and concept detection at matched KL (Shafran, Geiger, Geva 2025, arXiv 2506.10920), without their judge.

    python scripts/reproduce/steering.py

Concepts are sets of tokens of Python source. A text is a dozen tokens of the standard library; it has a concept when
one of its tokens is in the set. At the neurons of the bundled language model's third MLP each concept gets a direction
from training text in several ways: difference of means over texts, as in the paper, or over single tokens; the feature
of SNMF, and the latent of a TopK autoencoder, that best tells training texts with the concept from those without (by
AUROC), or whose direct effect on the logits of the concept's tokens is largest, in units of its spread over the
vocabulary. What choosing alone is worth show as many random directions, chosen from in the same ways; what the measure
rewards shows the direction that raises the concept's logits most by the weights alone; the null is a random direction.
On held-out text are measured

detection  AUROC and S_CD of texts with and without the concept.
steering   At strengths where the next token after several prompts has moved by the same KL: the rise of the log of the
           probability of all the concept's tokens together, over all positions of other texts; and, of what the steered
           model writes, the share of the concept's tokens and the log-probability without steering.

A seed draws the texts, the initial weights of the autoencoder and the start of the factorisation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
from sae_family import named, plain_run
from torch import Tensor

from activation_store.harvest.language_model import load_tokenizer, resolve_model
from activation_store.seeds import numpy_stream
from activation_store.store import Store, open_store
from dictlearn.dictionaries.configs import SemiNMFConfig, TopKConfig
from dictlearn.steering import (
    Detection,
    Direction,
    Sampling,
    concept_scores,
    continuations,
    detect,
    difference_of_means,
    direction,
    fluency,
    match_kl,
    of_latent,
    padded,
    random_directions,
    steer,
)
from dictlearn.steering.detection import text_activations

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LAYER = 2
HOOK = f"blocks.{LAYER}.mlp.hook_post"
CONCEPTS = {
    "numbers": r" ?\d+",
    "self": r" ?self",
    "quotes": r"[\s(\[{,=]*['\"]+[\s)\]},:]*",
    "imports": r" ?(import|from)",
    "capitals": r"[ _]?[A-Z][A-Z_]+",
    "comments": r"\s*#+",
    "errors": r" ?(raise|except|[A-Za-z]*Error|Exception)",
    "constants": r" ?(None|True|False)",
}
"""Patterns that a whole token matches."""
TARGETS = (0.1, 0.25, 0.5)
WRITTEN_AT = 0.25
"""The KL at which the model writes on."""
MEANS, TOKEN_MEANS = "difference of means, texts", "difference of means, tokens"
SNMF, SAE = "SNMF", "TopK SAE"
BY_DETECTION, BY_LOGITS = "by detection", "by logits"
BEST_RANDOM, ONE_RANDOM = "best of 128 random", "one random"
LOGITS = "logits' own direction"
METHODS = [MEANS, TOKEN_MEANS, LOGITS]
METHODS += [f"{kind}, {how}" for kind in (SNMF, SAE, BEST_RANDOM) for how in (BY_DETECTION, BY_LOGITS)]
METHODS += [ONE_RANDOM]


def measure_bundled(options: Options) -> list[Record]:
    tokens, pieces, of_each = (15_000, 240, 5) if options.quick else (150_000, 1000, 100)
    prompts, length = (2, 4) if options.quick else (6, 20)
    concepts = {name: CONCEPTS[name] for name in ("numbers", "quotes")} if options.quick else CONCEPTS
    name = harvested(options, [HOOK], tokens)
    store = open_store(options.workspace.store(name))
    model = language_model(store)
    tokenizer = load_tokenizer(resolve_model(store.provenance["model"]["name"]))
    words = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(tokenizer.get_vocab_size())]
    sets = {concept: members(words, pattern) for concept, pattern in concepts.items()}
    records = []
    for seed in options.seeds:
        train_texts, test_texts = (texts(store, split, pieces, seed) for split in ("train", "held-out"))
        bench = Bench(model, store, test_texts[: 4 * prompts], seed, prompts, length)
        candidates = dictionaries(options, name, seed)
        candidates[BEST_RANDOM] = random_directions(len(candidates[SAE]), store.d(HOOK), HOOK, seed)
        logit_effects_of = {kind: logit_effects(model, directions) for kind, directions in candidates.items()}
        activations = [text_activations(model, HOOK, each, skip_first=True) for each in (train_texts, test_texts)]
        for number, (concept, members_V) in enumerate(sets.items()):
            train_set, test_set = (
                labelled(each, rows, members_V, of_each)
                for each, rows in zip((train_texts, test_texts), activations, strict=True)
            )
            chosen = choose(candidates, logit_effects_of, train_set, members_V)
            chosen[LOGITS] = logits_direction(model, members_V)
            chosen[ONE_RANDOM] = candidates[BEST_RANDOM][number]
            for method, way in chosen.items():
                found = test_set.detect(concept_scores(test_set.activations, [way])[:, 0])
                words_of = {"concept": concept, "method": method, "seed": seed}
                records.append(words_of | {"kl": "", "auroc": 100 * found.auroc, "s_cd": found.s_cd})
                records += [words_of | measured for measured in bench.measure(way, members_V)]
    return records


def members(words: Sequence[str], pattern: str) -> np.ndarray:
    """(V,) whether each token is one of a concept's."""
    return np.array([re.fullmatch(pattern, word) is not None for word in words])


def texts(store: Store, split: str, count: int, seed: int, length: int = 12) -> list[list[int]]:
    """Pieces of documents of a split, BOS first."""
    bos = store.manifest.batches["bos_token_id"]
    rng = numpy_stream(seed, f"texts to steer by, {split}")
    spans = [(first, last - length) for first, last in store.split_rows(split) if last - first > length]
    sizes = np.array([last - first for first, last in spans], dtype=float)
    found: list[list[int]] = []
    while len(found) < count:
        first, last = spans[rng.choice(len(spans), p=sizes / sizes.sum())]
        row = int(rng.integers(first, last))
        documents = store.documents(row, row + length)
        if (documents == documents[0]).all():
            found.append([bos, *map(int, store.token_ids(row, row + length))])
    return found


def dictionaries(options: Options, store: str, seed: int) -> dict[str, list[Direction]]:
    """What each feature, or latent, writes; as many of the one as of the other."""
    d_sae, k, steps, rows, iterations = (16, 4, 5, 128, 5) if options.quick else (128, 16, 400, 4096, 300)
    plain: Any = plain_run(f"bundled-{seed}", store, HOOK, seed, d_sae, steps, 5e-3, 256)
    dead = plain.dictionary.dead_after_rows
    snmf = SemiNMFConfig(d_sae=d_sae, winners=0.01, rows=rows, iterations=iterations, dead_after_rows=dead)
    configs = {
        SNMF: replace(named(plain, "snmf", snmf), steps=1),  # the factorisation is all there is to the paper's
        SAE: named(plain, "topk", TopKConfig(d_sae=d_sae, k=k, dead_after_rows=dead)),
    }
    found = {}
    for kind, config in configs.items():
        (dictionary,) = train([config], options.workspace, config.name)
        found[kind] = [of_latent(dictionary, latent) for latent in range(d_sae) if dictionary.W_dec[latent].any()]
    return found


@dataclass(frozen=True)
class Labelled:
    """Texts that have a concept, then as many at most that do not.

    Attributes:
        activations: (T, D) of each text.
        having: (X,) whether a text has the concept.
        at: (T,) of each text, whether a token is one of the concept's.
    """

    activations: list[Tensor]
    having: np.ndarray
    at: list[Tensor]

    def detect(self, scores: np.ndarray) -> Detection:
        return detect(scores[self.having], scores[~self.having])


def labelled(pieces: list[list[int]], activations: list[Tensor], members_V: np.ndarray, of_each: int) -> Labelled:
    at = [torch.from_numpy(members_V[piece[1:]]) for piece in pieces]
    having = np.array([bool(each.any()) for each in at])
    kept = [*np.flatnonzero(having)[:of_each], *np.flatnonzero(~having)[:of_each]]
    return Labelled([activations[number] for number in kept], having[kept], [at[number] for number in kept])


def choose(
    candidates: dict[str, list[Direction]], effects: dict[str, Tensor], found: Labelled, members_V: np.ndarray
) -> dict[str, Direction]:
    """Method -> its direction for a concept, from training texts and, by logits, from the model's weights."""
    rows, at = torch.cat(found.activations), torch.cat(found.at)
    of_having = torch.from_numpy(found.having).repeat_interleave(torch.tensor([len(each) for each in found.at]))
    chosen = {
        MEANS: difference_of_means(rows[of_having], rows[~of_having], HOOK),
        TOKEN_MEANS: difference_of_means(rows[at], rows[~at], HOOK),
    }
    for kind, directions in candidates.items():
        aurocs = [found.detect(of_one).auroc for of_one in concept_scores(found.activations, directions).T]
        chosen[f"{kind}, {BY_DETECTION}"] = directions[int(np.argmax(aurocs))]
        raised = effects[kind][:, torch.from_numpy(members_V)].mean(dim=1)
        chosen[f"{kind}, {BY_LOGITS}"] = directions[int(raised.argmax())]
    return chosen


def logit_effects(model: TransformerBridge, directions: Sequence[Direction]) -> Tensor:
    """(N, V) direct effects on logits, less their mean over the vocabulary and in units of their spread over it."""
    units_ND = torch.stack([each.unit for each in directions])
    effects_NV = (units_ND @ model.W_out[LAYER] * model.ln_final.weight) @ model.W_U
    return (effects_NV - effects_NV.mean(dim=1, keepdim=True)) / effects_NV.std(dim=1, keepdim=True)


def logits_direction(model: TransformerBridge, members_V: np.ndarray) -> Direction:
    """What raises the concept's logits most directly, by the model's weights alone: the mean of their gradients."""
    wanted = model.W_U[:, torch.from_numpy(members_V)].mean(dim=1) - model.W_U.mean(dim=1)
    return direction(model.W_out[LAYER] @ (model.ln_final.weight * wanted), HOOK, LOGITS)


class Bench:
    """Held-out prompts and texts of one seed, what the model makes of them unsteered, and of a direction."""

    def __init__(
        self, model: TransformerBridge, store: Store, texts: list[list[int]], seed: int, prompts: int, length: int
    ) -> None:
        self._model, self._prompts, self._read = model, padded(texts[:prompts]), padded(texts[prompts:])
        self._sampling = Sampling(tokens=length, top_p=0.9, seed=seed)
        self._base_BTV = self._log_probs(None, 0.0)
        self._unsteered = continuations(model, self._prompts, self._sampling)

    def measure(self, way: Direction, members_V: np.ndarray) -> list[Record]:
        """A record for each KL."""
        records: list[Record] = []
        concept_V = torch.from_numpy(members_V)
        before = self._mass(self._base_BTV, concept_V)
        for strength in match_kl(self._model, self._prompts, way, TARGETS, signs=[1]):
            steered_BTV = self._log_probs(way, strength.alpha)
            moved = (self._base_BTV.exp() * (self._base_BTV - steered_BTV)).sum(dim=-1).mean()
            record = {
                "kl": f"{strength.target:g}",
                "missed": 100 * (not strength.hit),
                "rise": float((self._mass(steered_BTV, concept_V) - before).mean()),
                "kl_elsewhere": float(moved),
            }
            if strength.target == WRITTEN_AT:
                written = continuations(self._model, self._prompts, self._sampling, way, strength.alpha)
                record["share"] = self._share(written, concept_V) - self._share(self._unsteered, concept_V)
                record["fluency"] = self._fluency(written) - self._fluency(self._unsteered)
            records.append(record)
        return records

    def _log_probs(self, way: Direction | None, alpha: float) -> Tensor:
        """(B, T, V) of what follows every token but BOS."""
        with torch.no_grad():
            if way is None:
                logits = self._model(self._read.tokens)
            else:
                with steer(self._model, way, alpha):
                    logits = self._model(self._read.tokens)
        return logits[:, 1:].double().log_softmax(dim=-1)

    def _mass(self, log_probs_BTV: Tensor, concept_V: Tensor) -> Tensor:
        return log_probs_BTV[..., concept_V].logsumexp(dim=-1)

    def _share(self, written: Tensor, concept_V: Tensor) -> float:
        return 100 * float(concept_V[written].double().mean())

    def _fluency(self, written: Tensor) -> float:
        return float(fluency(self._model, self._prompts, written).mean())


def tables(records: list[Record]) -> dict[str, Table]:
    if not records:
        return {}
    by_seed = over_concepts(records)
    detection = [record for record in by_seed if record["kl"] == ""]
    steering = [record for record in by_seed if record["kl"]]
    others = {BY_DETECTION: (MEANS, TOKEN_MEANS), BY_LOGITS: (MEANS, LOGITS)}
    pairs = [
        (f"{SNMF}, {how}", other)
        for how, means in others.items()
        for other in (*means, f"{SAE}, {how}", f"{BEST_RANDOM}, {how}")
    ]
    pairs.append((MEANS, f"{SAE}, {BY_DETECTION}"))
    rows = []
    for first, second in pairs:
        cells = [figure(differences(detection, "auroc", {"method": first}, {"method": second}), 1)]
        for kl in TARGETS:
            one, other = ({"method": method, "kl": f"{kl:g}"} for method in (first, second))
            cells.append(figure(differences(steering, "rise", one, other)))
        rows.append([f"{first} minus {second}", *cells])
    return {
        "steering detection": tabulate(
            detection,
            {"": "method"},
            {"AUROC, %": ("auroc", 1), "S_CD": ("s_cd", 2), "without S_CD, %": ("no_s_cd", 1)},
        ),
        "steering effect": tabulate(
            steering,
            {"KL": "kl", "": "method"},
            {
                "rise, nats": ("rise", 3),
                "share of written tokens, more, %": ("share", 1),
                "nats per token, more": ("fluency", 2),
                "KL on other texts": ("kl_elsewhere", 2),
                "KL missed, %": ("missed", 1),
            },
        ),
        "steering differences": Table(["seed by seed", "AUROC, %", *(f"rise at KL {kl:g}" for kl in TARGETS)], rows),
        "steering concepts": of_concepts(records),
    }


def over_concepts(records: list[Record]) -> list[Record]:
    """Means over concepts: a record for each seed, method and KL."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for method in METHODS:
        for record in records:
            if record["method"] == method:
                groups.setdefault((record["kl"], method, record["seed"]), []).append(record)
    found = []
    for (kl, method, seed), group in sorted(groups.items(), key=lambda item: item[0][0]):
        record = {"kl": kl, "method": method, "seed": seed}
        for key in ("auroc", "s_cd", "rise", "share", "fluency", "kl_elsewhere", "missed"):
            values = [each[key] for each in group if each.get(key) is not None]
            record |= {key: float(np.mean(values))} if values else {}
        if kl == "":
            record["no_s_cd"] = 100 * float(np.mean([each["s_cd"] is None for each in group]))
        found.append(record)
    return found


def of_concepts(records: list[Record]) -> Table:
    """The rise at one KL, concept by concept."""
    at = [record for record in records if record["kl"] == f"{WRITTEN_AT:g}"]
    methods = [method for method in METHODS if any(record["method"] == method for record in at)]
    rows = []
    for concept in dict.fromkeys(record["concept"] for record in at):
        of_one = [record for record in at if record["concept"] == concept]
        cells = [[record["rise"] for record in of_one if record["method"] == method] for method in methods]
        rows.append([concept, *(figure(values, 2) for values in cells)])
    return Table([f"rise at KL {WRITTEN_AT:g}, nats", *methods], rows)


PARTS = {"bundled": measure_bundled}


def main(argv: Sequence[str] | None = None) -> None:
    reproduce("steering", __doc__, PARTS, tables, argv)


if __name__ == "__main__":
    main()
