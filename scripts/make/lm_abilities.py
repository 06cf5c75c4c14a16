"""What a small language model of Python source can do, measured on held-out text beside an n-gram model.

In the order of the file: the held-out text as the model sees it; what the model says at every position; where a
closing bracket, an indentation or a repeated identifier comes next and whether it is told; what each attention head
does on repeated random tokens. bundled_lm_card.py writes the numbers down and says what they mean.
"""

from __future__ import annotations

import io
import keyword
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from ngram_baselines import KneserNey
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from activation_store.harvest.corpus import Document

BOS_ID = 0
HIGHEST_ORDER = 5
SEED = 0
CASES = 2000
"""At most so many positions per ability: the n-gram model needs a whole distribution for each of them."""
FAR = 20
"""A bracket that was opened at least so many tokens ago cannot be seen by the 5-gram."""
BATCH = 8
RANDOM_TOKENS = 50
"""Length of the random sequence that is repeated to find induction heads; the field's usual choice."""
CLOSING = {")": "(", "]": "[", "}": "{"}
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")
LINE_BREAK = re.compile(r"(\n+)( *)")

Case = TypeVar("Case")


# --- the held-out text as the model sees it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenisedDocument:
    """One held-out document: where its tokens are in its text (characters, half-open) and in the packed stream."""

    text: str
    ids: np.ndarray
    spans: list[tuple[int, int]]
    first: int  # index in the stream of ids[0]; the BOS token stands before it

    def token_at(self, character: int) -> int | None:
        """The token whose first character, not counting a space in front, is this one; None if there is none."""
        index = int(np.searchsorted([start for start, _ in self.spans], character, side="right")) - 1
        for candidate in (index, index - 1):
            if candidate >= 0:
                start, end = self.spans[candidate]
                if character in (start, start + (self.text[start : start + 1] == " ")) and character < end:
                    return candidate
        return None


@dataclass(frozen=True)
class HeldOut:
    """The packed stream, of which ``windows * context`` tokens are predicted: stream[1], stream[2], ..."""

    documents: list[TokenisedDocument]
    stream: np.ndarray
    context: int

    @property
    def windows(self) -> int:
        return (len(self.stream) - 1) // self.context

    @property
    def targets(self) -> int:
        return self.windows * self.context

    def visible_from(self, target: int) -> int:
        """Index in the stream of the oldest token in the window that predicts stream[target]."""
        return (target - 1) // self.context * self.context

    def history(self, target: int) -> tuple[list[int], bool]:
        """The tokens of the same document before stream[target], for an n-gram model, and whether that is all."""
        history = self.stream[max(0, target - HIGHEST_ORDER) : target].tolist()
        if BOS_ID in history:
            return history[len(history) - history[::-1].index(BOS_ID) :], True
        return history, False


def pack(tokenizer: Tokenizer, documents: list[Document], context: int) -> HeldOut:
    tokenised: list[TokenisedDocument] = []
    stream: list[int] = []
    for document in documents:
        encoding = tokenizer.encode(document.text)
        tokenised.append(
            TokenisedDocument(document.text, np.array(encoding.ids), encoding.offsets, first=len(stream) + 1)
        )
        stream += [BOS_ID, *encoding.ids]
    return HeldOut(tokenised, np.array(stream), context)


# --- what the model says at every position ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenGroups:
    """Sets of token ids whose probabilities are added up, or compared, at a position."""

    closing: dict[str, np.ndarray]  # bracket -> tokens that begin with it
    breaks: dict[int, tuple[np.ndarray, np.ndarray]]  # number of line breaks -> (tokens, indentation after each)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenGroups:
        texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        closing = {c: np.array([i for i, t in enumerate(texts) if t.lstrip(" ").startswith(c)]) for c in CLOSING}
        breaks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number in (1, 2):
            found = [(i, m) for i, t in enumerate(texts) if (m := LINE_BREAK.fullmatch(t)) and len(m[1]) == number]
            # The tokeniser leaves the last space of an indentation to the word after it.
            indentation = np.array([len(m[2]) + 1 if m[2] else 0 for _, m in found])
            breaks[number] = np.array([i for i, _ in found]), indentation
        return cls(closing, breaks)

    def best_closing(self, probabilities: np.ndarray) -> np.ndarray:
        """(..., vocabulary) -> (...,) index into CLOSING of the likeliest closing bracket."""
        return np.stack([probabilities[..., ids].sum(-1) for ids in self.closing.values()]).argmax(0)

    def best_indentation(self, probabilities: np.ndarray, line_breaks: int) -> np.ndarray:
        """(..., vocabulary) -> (...,) the likeliest indentation, given that so many line breaks come next."""
        ids, indentation = self.breaks[line_breaks]
        return indentation[probabilities[..., ids].argmax(-1)]


@dataclass(frozen=True)
class Predictions:
    """Per target: log probability of the true token (nats), the likeliest token, and the likeliest of each group."""

    log_probability: np.ndarray
    best: np.ndarray
    best_closing: np.ndarray
    best_indentation: dict[int, np.ndarray]


@torch.no_grad()
def predict(model: PreTrainedModel, held_out: HeldOut, groups: TokenGroups) -> Predictions:
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, held_out.windows, BATCH):
        rows = np.arange(start, min(start + BATCH, held_out.windows))[:, None] * held_out.context
        tokens = torch.from_numpy(held_out.stream[rows + np.arange(held_out.context + 1)])
        log_probability = model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
        true = log_probability.gather(2, tokens[:, 1:, None]).squeeze(2)
        probability = log_probability.exp().numpy()
        parts.append(
            (
                true.numpy().ravel(),
                probability.argmax(-1).ravel(),
                groups.best_closing(probability).ravel(),
                *(groups.best_indentation(probability, number).ravel() for number in groups.breaks),
            )
        )
    true, best, closing, *indentations = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Predictions(true, best, closing, dict(zip(groups.breaks, indentations, strict=True)))


# --- the abilities: where to look, and what is right there ------------------------------------------------------------


def bracket_pairs(text: str) -> list[tuple[int, int]]:
    """(opening, closing) character positions of the brackets that Python's own tokeniser pairs; none if it refuses."""
    line_starts = np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))])
    pairs, waiting = [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.OP:
                continue
            position = int(line_starts[token.start[0] - 1]) + token.start[1]
            if token.string in CLOSING.values():
                waiting.append(position)
            elif token.string in CLOSING:
                pairs.append((waiting.pop(), position))
    except (tokenize.TokenError, SyntaxError, IndexError):
        return []
    return pairs


def bracket_cases(held_out: HeldOut) -> list[tuple[int, str, int]]:
    """(target, bracket, tokens since it was opened) where a closing bracket begins a token, its opening visible."""
    cases = []
    for document in held_out.documents:
        for opening, closing in bracket_pairs(document.text):
            token = document.token_at(closing)
            if token is None:
                continue
            opened = int(np.searchsorted([end for _, end in document.spans], opening, side="right"))
            target = document.first + token
            if opened < token and document.first + opened >= held_out.visible_from(target):
                cases.append((target, document.text[closing], token - opened))
    return cases


def indentation_cases(held_out: HeldOut) -> list[tuple[int, int, int, int]]:
    """(target, line breaks, indentation after them, indentation of the line that ends), where one token says it."""
    cases = []
    for document in held_out.documents:
        for i, (start, end) in enumerate(document.spans[:-1]):
            match = LINE_BREAK.fullmatch(document.text[start:end])
            following = document.text[end : end + 2]
            if match is None or len(match[1]) > 2:
                continue
            if (following[:1] == " ") != bool(match[2]) or not following[-1:].strip():
                continue  # the white space goes on in the next token
            line = document.text[document.text.rfind("\n", 0, start) + 1 : start]
            if line.strip():
                before = len(line) - len(line.lstrip(" "))
                cases.append((document.first + i, len(match[1]), len(match[2]) + 1 if match[2] else 0, before))
    return cases


@dataclass(frozen=True)
class IdentifierCase:
    """An identifier of several tokens, of which all but the first are to be told."""

    targets: range
    name: str
    again: bool  # it stood earlier in the same window


def identifier_cases(held_out: HeldOut) -> list[IdentifierCase]:
    """Identifiers of two or more tokens that occur twice or more in one window: first and later occurrences."""
    by_window: dict[tuple[int, str], list[range]] = {}
    for document in held_out.documents:
        ends = {end: i for i, (_, end) in enumerate(document.spans)}
        for match in IDENTIFIER.finditer(document.text):
            first, last = document.token_at(match.start()), ends.get(match.end())
            if keyword.iskeyword(match[0]) or first is None or last is None or last <= first:
                continue
            targets = range(document.first + first + 1, document.first + last + 1)
            window = held_out.visible_from(targets[-1])
            if targets[0] - 1 > window:  # the whole identifier is predicted in one window
                by_window.setdefault((window, match[0]), []).append(targets)
    return [
        IdentifierCase(targets, name, again=number > 0)
        for (_, name), occurrences in by_window.items()
        if len(occurrences) > 1
        for number, targets in enumerate(occurrences)
    ]


def share(hits: list[bool] | np.ndarray) -> float | None:
    return round(float(np.mean(hits)), 4) if len(hits) else None


def sample(cases: list[Case], targets: int, of: Callable[[Case], int]) -> list[Case]:
    """At most CASES of the cases that are predicted at all, in order, the same ones every time."""
    cases = [case for case in cases if of(case) <= targets]
    if len(cases) > CASES:
        chosen = np.random.default_rng(SEED).choice(len(cases), CASES, replace=False)
        cases = [cases[i] for i in np.sort(chosen)]
    return cases


def measure_brackets(held_out: HeldOut, model: Predictions, ngram: KneserNey, groups: TokenGroups) -> dict[str, Any]:
    kinds = list(CLOSING)
    measured = {}
    all_cases = bracket_cases(held_out)
    for name, cases in {
        "all": all_cases,
        f"opened {FAR} or more tokens ago": [case for case in all_cases if case[2] >= FAR],
    }.items():
        cases = sample(cases, held_out.targets, of=lambda case: case[0])
        right = np.array([kinds.index(bracket) for _, bracket, _ in cases])
        at = np.array([target for target, _, _ in cases], dtype=int) - 1
        counted = np.array([groups.best_closing(ngram.distribution(*held_out.history(case[0]))) for case in cases])
        measured[name] = {
            "cases": len(cases),
            "model": share(model.best_closing[at] == right),
            "5-gram": share(counted == right),
            "always )": share(right == kinds.index(")")),
        }
    return measured


def measure_indentation(held_out: HeldOut, model: Predictions, ngram: KneserNey, groups: TokenGroups) -> dict[str, Any]:
    cases = sample(indentation_cases(held_out), held_out.targets, of=lambda case: case[0])
    changing = [case for case in cases if case[2] != case[3]]
    measured = {}
    for name, chosen in {"all": cases, "where it changes": changing}.items():
        counted = [
            int(groups.best_indentation(ngram.distribution(*held_out.history(target)), number)) == after
            for target, number, after, _ in chosen
        ]
        measured[name] = {
            "cases": len(chosen),
            "model": share([int(model.best_indentation[n][t - 1]) == after for t, n, after, _ in chosen]),
            "5-gram": share(counted),
            "as the line before": share([after == before for _, _, after, before in chosen]),
        }
    return measured


def measure_identifiers(
    held_out: HeldOut, model: Predictions, ngram: KneserNey, known_names: set[str]
) -> dict[str, Any]:
    measured = {}
    cases = [case for case in identifier_cases(held_out) if case.targets[-1] <= held_out.targets]
    for name, chosen in {
        "all": cases,
        "in no training document": [case for case in cases if case.name not in known_names],
    }.items():
        first = [case for case in chosen if not case.again]
        again = sample([case for case in chosen if case.again], held_out.targets, of=lambda case: case.targets[-1])
        measured[name] = {
            "cases": len(again),
            "model": share([all(model.best[t - 1] == held_out.stream[t] for t in case.targets) for case in again]),
            "model, at its first occurrence": share(
                [all(model.best[t - 1] == held_out.stream[t] for t in case.targets) for case in first]
            ),
            "5-gram": share(
                [
                    all(ngram.distribution(*held_out.history(t)).argmax() == held_out.stream[t] for t in case.targets)
                    for case in again
                ]
            ),
        }
    return measured


# --- heads ------------------------------------------------------------------------------------------------------------


def measure_heads(model: PreTrainedModel, vocabulary: int, context: int) -> dict[str, Any]:
    """Attention on random tokens and the same tokens again, for a short sequence and for the longest that fits."""
    return {
        "short": attention_to_a_repetition(model, vocabulary, min(RANDOM_TOKENS, (context - 1) // 2)),
        "longest": attention_to_a_repetition(model, vocabulary, (context - 1) // 2),
    }


@torch.no_grad()
def attention_to_a_repetition(
    model: PreTrainedModel, vocabulary: int, length: int, repeats: int = 32
) -> dict[str, Any]:
    """BOS, ``length`` tokens drawn uniformly, the same again: per layer and head, means over the second half.

    Induction: from a token to the one that followed its first occurrence. Previous token: to the one before it.
    """
    rng = np.random.default_rng(SEED)
    once = torch.from_numpy(rng.integers(1, vocabulary, size=(repeats, length)))
    tokens = torch.cat([torch.full((repeats, 1), BOS_ID), once, once], dim=1)
    scores = []
    losses = []
    for rows in tokens.split(4):
        output = model(input_ids=rows, output_attentions=True)
        scores.append(torch.stack([torch.stack(attention_scores(a, length)) for a in output.attentions], dim=1))
        log_probability = output.logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
        losses.append(-log_probability.unflatten(1, (2, length)).mean((0, 2)))
    induction, previous = torch.stack(scores).mean(0)
    first, again = torch.stack(losses).mean(0).tolist()
    uniform = np.mean([1 / (position + 1) for position in range(length + 1, 2 * length + 1)])
    return {
        "random tokens": length,
        "induction": [[round(x, 4) for x in layer] for layer in induction.tolist()],
        "previous token": [[round(x, 4) for x in layer] for layer in previous.tolist()],
        "uniform attention": round(float(uniform), 4),
        "loss, first time": round(first, 4),
        "loss, again": round(again, 4),
    }


def attention_scores(attention: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, heads, query, key) of one layer -> induction and previous-token score, each (heads,)."""
    queries = torch.arange(length + 1, 2 * length + 1)
    induction = attention[:, :, queries, queries - length + 1]
    previous = attention[:, :, queries, queries - 1]
    return induction.mean((0, 2)), previous.mean((0, 2))
