"""Measure a small language model of Python source, and write what was found as its model card.

    python scripts/make/bundled_lm_card.py --folder activation_store/harvest/bundled

Reads the Hugging Face folder that train_bundled_lm.py exported and writes README.md and card.json into it. Everything
is measured on the held-out documents, packed into windows as in training, with the weights as they are on disk; the
n-gram models predict the same tokens and were counted on the same training tokens. What each number means is written
in the card itself, beside the number and beside what a model without the ability would get.

Only the Python that the model was trained with can measure it: another one's held-out files are partly the same text
as this one's training files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_abilities import (
    BOS_ID,
    CASES,
    HIGHEST_ORDER,
    IDENTIFIER,
    TokenGroups,
    measure_brackets,
    measure_heads,
    measure_identifiers,
    measure_indentation,
    pack,
    predict,
)
from ngram_baselines import KneserNey
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from activation_store.harvest.corpus import Corpus, open_corpus

BUNDLED = Path(__file__).resolve().parents[2] / "activation_store" / "harvest" / "bundled"
PROMPTS = (
    "def __init__(self, name, value):\n        self.name =",
    "    try:\n        import",
    "        if not isinstance(",
)


def measure(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Everything the card says, as plain data."""
    training = json.loads((folder / "training.json").read_text())
    if training["corpus"] != corpus.fingerprint:
        raise SystemExit(
            f"{folder} was trained on another text ({training['origin']}) than the {corpus.name!r} of this Python "
            f"({corpus.origin}): measured here, its held-out loss would be too low. Use the Python it was trained with."
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    training_texts = [document.text for document in corpus.split("train")]
    training_ids = [np.array(encoding.ids) for encoding in tokenizer.encode_batch(training_texts)]
    held_out = pack(tokenizer, corpus.split("held-out"), context)
    groups = TokenGroups.of(tokenizer)

    predictions = predict(model, held_out, groups)
    losses = {}
    for order, name in {1: "unigram", 2: "bigram", HIGHEST_ORDER: f"{HIGHEST_ORDER}-gram"}.items():
        ngram = KneserNey(training_ids, order, vocabulary, end_token=BOS_ID)
        log_probability = ngram.log_probabilities([document.ids for document in held_out.documents])
        losses[name] = round(float(-log_probability[: held_out.targets].mean()), 4)
    losses["model"] = round(float(-predictions.log_probability.mean()), 4)
    known_names = {match[0] for text in training_texts for match in IDENTIFIER.finditer(text)}
    return {
        "model": {
            "layout": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
            "heads": model.config.num_attention_heads,
            "MLP width": model.config.intermediate_size,
            "vocabulary": vocabulary,
            "context": context,
        },
        "training": training,
        "training tokens": sum(map(len, training_ids)) + len(training_ids),
        "held out": {
            "documents": len(held_out.documents),
            "characters": sum(len(document.text) for document in held_out.documents),
            "predicted tokens": held_out.targets,
        },
        "loss": losses,
        "brackets": measure_brackets(held_out, predictions, ngram, groups),
        "indentation": measure_indentation(held_out, predictions, ngram, groups),
        "identifiers": measure_identifiers(held_out, predictions, ngram, known_names),
        "heads": measure_heads(model, vocabulary, context),
        "completions": [[prompt, complete(model, tokenizer, prompt)] for prompt in PROMPTS],
    }


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: Tokenizer, prompt: str, tokens: int = 24) -> str:
    """The likeliest next tokens, one after another."""
    ids = [BOS_ID, *tokenizer.encode(prompt).ids]
    given = len(ids)
    while len(ids) < given + tokens:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[given:])


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Measurements of the same shape as a Markdown table, shares in per cent."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{100 * value:.1f} %"

    columns = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def head_table(scores: list[list[float]]) -> str:
    """Layers down, heads across; a score over 0.3 in bold."""
    lines = ["| layer | " + " | ".join(f"head {head}" for head in range(len(scores[0]))) + " |"]
    lines.append("|---" * (len(scores[0]) + 1) + "|")
    for layer, row in enumerate(scores):
        lines.append(f"| {layer} | " + " | ".join(f"**{x:.2f}**" if x > 0.3 else f"{x:.2f}" for x in row) + " |")
    return "\n".join(lines)


def strongest(scores: list[list[float]]) -> str:
    score, layer, head = max((x, i, j) for i, row in enumerate(scores) for j, x in enumerate(row))
    return f"layer {layer}, head {head}: {score:.2f}"


def render(card: dict[str, Any]) -> str:
    model, training, loss = card["model"], card["training"], card["loss"]
    short, longest = card["heads"]["short"], card["heads"]["longest"]
    highest = f"{HIGHEST_ORDER}-gram"
    schedule = ", ".join(
        f"a schedule of {epochs} epochs from step {step:,}" for step, epochs in training["epochs_from_step"]
    )
    left_out = ", ".join(f"{count} {reason}" for reason, count in training["left_out"].items()) or "none"
    completions = "\n\n".join(
        f"```python\n{prompt}⟨{completion.rstrip()}⟩\n```" for prompt, completion in card["completions"]
    )
    return f"""---
license: apache-2.0
language: code
library_name: transformers
---

# A small language model of Python source

The language model that dictlearn ships, so that everything in the workbench can be tried without a download. It is here
to be looked into, not to write programs. Made by `scripts/make/train_bundled_lm.py`; this page and `card.json` by
`scripts/make/bundled_lm_card.py`.

| | |
|---|---|
| layout | {model["layout"]}: RMSNorm, rotary positions, gated MLP, tied embedding |
| size | {model["parameters"]:,} parameters in half precision; {model["layers"]} layers, width {model["width"]}, \
{model["heads"]} heads, MLP width {model["MLP width"]} |
| tokens | byte-level BPE, {model["vocabulary"]:,} tokens; one `<|bos|>` (id {BOS_ID}) before each document |
| context | {model["context"]} tokens |
| training | {training["step"]:,} steps of {training["batch"]} windows, {schedule}, \
{card["training tokens"]:,} tokens per epoch; Muon and AdamW; seed {training["seed"]} |

## Text

The source of the Python standard library, without `test` and `idlelib`, as Python {training["origin"]["python"]} has it
on disk. File list (ids and hashes of the texts): `{training["origin"]["file_list"]}`. Left out: {left_out}. A tenth of
the documents, chosen by a hash of their path, is held out: {card["held out"]["documents"]} documents,
{card["held out"]["characters"]:,} characters. Near-duplicates were removed before the split.

The text is under the {training["origin"]["licence"]} and is not contained here; the weights are
released under the licence of this project (Apache 2.0). A model of this size can repeat short passages of its text.

## Held-out loss

Nats per token over {card["held out"]["predicted tokens"]:,} tokens, documents packed into windows of {model["context"]}
as in training. The n-gram models are interpolated Kneser-Ney with modified discounts, counted on the same training
tokens; they predict the same tokens, and their history is cut by the beginning of a document only, not by that of a
window.

| unigram | bigram | {highest} | this model | below the {highest} |
|---|---|---|---|---|
| {loss["unigram"]:.3f} | {loss["bigram"]:.3f} | {loss[highest]:.3f} | **{loss["model"]:.3f}** | \
{loss[highest] - loss["model"]:.3f} |

## What it can do

All on held-out text; at most {CASES:,} positions each, drawn once.

**Closing a bracket.** Where a closing bracket comes next (as Python's tokeniser pairs them, the opening one visible in
the window), is the right one of `)`, `]` and `}}` the likeliest of the three?

{table(card["brackets"])}

**Indenting.** Where a line ends, and given that it ends here, is the likeliest indentation of the next line the right
one? Beside it: the same indentation as the line that ends.

{table(card["indentation"])}

**Copying an identifier.** An identifier of two or more tokens that stood earlier in the window: after its first token,
are all the others the likeliest? Beside it: the same question where the identifier stands for the first time.

{table(card["identifiers"])}

## Heads

{short["random tokens"]} random tokens, then the same again. *Induction*: mean attention from a token of the second half
to the token after its first occurrence; the strongest is {strongest(short["induction"])}. Attention spread evenly would
be {short["uniform attention"]:.3f}. The loss falls from {short["loss, first time"]:.2f} nats on the first half to \
{short["loss, again"]:.2f} on the second.

{head_table(short["induction"])}

*Previous token*: mean attention to the token just before; the strongest is {strongest(short["previous token"])}.

{head_table(short["previous token"])}

With {longest["random tokens"]} random tokens, the most that fit twice, the strongest induction head is \
{strongest(longest["induction"])}, where even attention would be {longest["uniform attention"]:.3f}.

## Some completions

The likeliest tokens, in ⟨ ⟩.

{completions}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUNDLED, help="the Hugging Face folder to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    card = measure(options.folder, open_corpus("stdlib"))
    (options.folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (options.folder / "README.md").write_text(render(card))
    print(f"wrote {options.folder / 'README.md'}: {card['loss']}")


if __name__ == "__main__":
    main()
