"""What to look for heads with: pairs of prompts that differ in one word, and heads planted with a known answer.

A positive prompt determines its completion, the negative does not: one word of it is another. The pairs are made so
that positives are not the more diverse class, because head identification counts codes that only positives have, and a
class that says more different things has more of them whatever the model does with it. (In the published greater-than
task every negative holds the same two digits; here no slot has fewer values in the negatives than in the positives.)

Three sources:

- `TEXT_TASKS`: prompts in words, for a model with a tokenizer. `token_pairs` keeps the pairs whose two prompts have the
  same number of tokens, so that one can be patched into the other position by position.
- `induction_pairs`: random tokens ... A B ... A, completed by B; for a model trained on nothing else.
- `planted_heads`: no model at all, but heads' outputs drawn at random, with the heads that matter known.

No torch here: a wrong name or number is refused before anything slow is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CANDIDATES_PER_PAIR = 50
"""How many prompts are drawn for one pair before a task is said not to suit a tokenizer."""


# --- prompts in words -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ in one word, what the first determines, and the other words of the two.

    ``answer`` and ``rivals`` begin with the space that separates them from the prompt.
    """

    positive: str
    negative: str
    answer: str
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class TextTask:
    """Frames with the slots {b}, {here} and perhaps {a}: three different words are drawn, and {here} holds one of them.

    In a positive {here} is the word that ``repeats`` names, "a" or "b"; in a negative it is the third word, which
    occurs nowhere else in the prompt. The answer is {b}.
    """

    name: str
    says: str
    frames: tuple[str, ...]
    repeats: str
    words: tuple[str, ...]

    def pair(self, rng: np.random.Generator) -> PromptPair:
        """One pair, every frame and every triple of different words equally likely."""
        frame = self.frames[rng.integers(len(self.frames))]
        a, b, other = (self.words[i] for i in rng.choice(len(self.words), size=3, replace=False))
        positive, negative = (frame.format(a=a, b=b, here=here) for here in ({"a": a, "b": b}[self.repeats], other))
        return PromptPair(positive, negative, answer=f" {b}", rivals=(f" {a}", f" {other}"))


IDENTIFIERS = (
    "name value path key data type size text file line mode host port index item count start end level message code "
    "result user time address buffer command encoding field filename flags format function handler header length "
    "limit method module offset option parent pattern prefix request source stream target token version"
)

THINGS = (
    "ball doll dog cat bird car tree box book cake toy hat bear fish frog truck boat cup duck bunny lion bug flower "
    "kite cookie apple"
)

TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask(
            "return",
            "Python: a name used twice is returned (in negatives, two names were used once)",
            (
                "def check({b}):\n    if {here} is None:\n        return None\n    return",
                "def check({here}):\n    if not {b}:\n        return None\n    return",
                "def _parse({b}):\n    if not {here}:\n        raise ValueError\n    return",
            ),
            "b",
            tuple(IDENTIFIERS.split()),
        ),
        TextTask(
            "assign",
            "Python: self.b is assigned the parameter b (in negatives there is no such parameter)",
            (
                "def __init__(self, {a}, {here}):\n        self.{a} = {a}\n        self.{b} =",
                "def __init__(self, {here}, {a}):\n        self.{a} = {a}\n        self.{b} =",
                "def reset(self, {a}, {here}):\n        self._{a} = {a}\n        self._{b} =",
            ),
            "b",
            tuple(IDENTIFIERS.split()),
        ),
        TextTask(
            "pass-on",
            "Python: the second parameter is passed on after the first (in negatives, after another name)",
            (
                "def __init__(self, {a}, {b}):\n        super().__init__({here},",
                "def __init__(self, {a}, {b}):\n        Base.__init__(self, {here},",
                "def update(self, {a}, {b}):\n        return self._update({here},",
                "def create({a}, {b}):\n    return _create({here},",
            ),
            "a",
            tuple(IDENTIFIERS.split()),
        ),
        TextTask(
            "mention",
            "English: the one thing a story is about is mentioned again (in negatives it is about two things)",
            (
                "Lily saw a {b}. She liked the {here}. She wanted to play with the",
                "Once upon a time, there was a {b}. The {here} was very happy. One day, the",
                "Tom had a {here}. He loved the {b}. Then Tom took the",
            ),
            "b",
            tuple(THINGS.split()),
        ),
    )
}
"""The first is the default."""


def text_task(name: str) -> TextTask:
    """The task called ``name``.

    Raises:
        UserError: when there is none.
    """
    if name not in TEXT_TASKS:
        raise UserError(f"There is no task {name!r} for a language model; the tasks are {', '.join(TEXT_TASKS)}.")
    return TEXT_TASKS[name]


@dataclass(frozen=True)
class TokenPairs:
    """Prompts as token ids, ready for a model. Legend: N pairs, T tokens of the longest prompt.

    ``positive_NT`` and ``negative_NT`` are padded on the right with zeros; ``lengths_N`` counts the real tokens, the
    same for both prompts of a pair. ``answers_N`` is the token that should follow a positive.
    """

    positive_NT: np.ndarray
    negative_NT: np.ndarray
    lengths_N: np.ndarray
    answers_N: np.ndarray

    def __len__(self) -> int:
        return len(self.answers_N)


def token_pairs(
    task: TextTask, tokenizer: Tokenizer, bos_token_id: int | None, pairs: int, seed: int, purpose: str = "score"
) -> TokenPairs:
    """Draw ``pairs`` different pairs of prompts that this tokenizer keeps aligned.

    A pair is kept when its two prompts have as many tokens, when the tokens of prompt and answer together begin with
    the prompt's, and when the answer's first token is not that of another word in the pair. The BOS token, when the
    model has one, stands in front.

    Args:
        purpose: names the random stream, so that heads' effects are measured on other prompts than heads are scored on.

    Raises:
        UserError: when so many cannot be found.
    """
    if pairs < 1:
        raise UserError(f"At least one pair of prompts is needed, not {pairs}.")
    rng = numpy_stream(seed, f"prompts of task {task.name}, {purpose}")
    front = [] if bos_token_id is None else [bos_token_id]
    kept: dict[PromptPair, tuple[list[int], list[int], int]] = {}
    for _ in range(CANDIDATES_PER_PAIR * pairs):
        pair = task.pair(rng)
        if pair in kept:
            continue
        positive, answer = _completion(tokenizer, pair.positive, pair.answer)
        negative = tokenizer.encode(pair.negative, add_special_tokens=False).ids
        rivals = [_completion(tokenizer, pair.positive, rival)[1] for rival in pair.rivals]
        if answer is not None and answer not in rivals and len(positive) == len(negative):
            kept[pair] = (front + positive, front + negative, answer)
        if len(kept) == pairs:
            return _padded(list(kept.values()))
    raise UserError(
        f"Only {len(kept)} of the {pairs} pairs asked for of the task {task.name!r} are aligned in this model's "
        f"tokens; ask for fewer examples, or for another task ({', '.join(TEXT_TASKS)})."
    )


def _completion(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], int | None]:
    """The prompt's tokens and the answer's first one; None where the answer changes how the prompt is cut."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    whole = tokenizer.encode(prompt + answer, add_special_tokens=False).ids
    return ids, whole[len(ids)] if whole[: len(ids)] == ids and len(whole) > len(ids) else None


def _padded(rows: list[tuple[list[int], list[int], int]]) -> TokenPairs:
    lengths_N = np.array([len(positive) for positive, _, _ in rows])
    positive_NT = np.zeros((len(rows), lengths_N.max()), dtype=np.int64)
    negative_NT = np.zeros_like(positive_NT)
    for n, (positive, negative, _) in enumerate(rows):
        positive_NT[n, : len(positive)] = positive
        negative_NT[n, : len(negative)] = negative
    return TokenPairs(positive_NT, negative_NT, lengths_N, np.array([answer for _, _, answer in rows]))


# --- random tokens --------------------------------------------------------------------------------------------------

BOS_ID = 0
"""The token in front of every induction prompt; the words are 1 .. vocabulary - 1."""


def induction_pairs(pairs: int, vocabulary: int, words: int, seed: int, purpose: str = "score") -> TokenPairs:
    """BOS, ``words`` different random tokens, and one of them, A, again: what followed A follows again.

    In the negative the first A is another token that occurs nowhere else, so nothing says what follows the last token.

    Raises:
        UserError: when the vocabulary has too few tokens for that.
    """
    if words < 2 or vocabulary < words + 2:
        raise UserError(
            f"An induction prompt of {words} different words needs at least 2 words and a vocabulary of "
            f"{max(words, 2) + 2} tokens, not {vocabulary}."
        )
    rng = numpy_stream(seed, f"induction prompts, {purpose}")
    positive_NT = np.full((pairs, words + 2), BOS_ID, dtype=np.int64)
    negative_NT = positive_NT.copy()
    answers_N = np.empty(pairs, dtype=np.int64)
    for n in range(pairs):
        *sequence, other = rng.choice(vocabulary - 1, size=words + 1, replace=False) + 1
        at = rng.integers(words - 1)  # the last word has nothing behind it
        positive_NT[n, 1:] = [*sequence, sequence[at]]
        negative_NT[n] = positive_NT[n]
        negative_NT[n, 1 + at] = other
        answers_N[n] = sequence[at + 1]
    return TokenPairs(positive_NT, negative_NT, np.full(pairs, words + 2), answers_N)


# --- planted heads --------------------------------------------------------------------------------------------------

PLANTED = {
    "shifted": "known heads use one half of their states in positives and the other half in negatives",
    "equal-means": "the same, and the states of either half sum to zero: the class moves no head's mean",
    "diverse-positives": "as shifted, and as many other heads use all their states in positives and one in negatives",
}


@dataclass(frozen=True)
class PlantedHeads:
    """Heads' outputs with a known answer. Legend: N pairs, H heads, D width."""

    positive_NHD: np.ndarray
    negative_NHD: np.ndarray
    known_H: np.ndarray


def planted_heads(
    kind: str,
    seed: int,
    pairs: int = 250,
    heads: int = 48,
    known: int = 8,
    width: int = 64,
    states: int = 8,
    noise: float = 0.5,
) -> PlantedHeads:
    """Draw heads: each has an offset of its own, one of its states per example, and noise. Offsets and states have norm
    1.

    Heads that are not known use all their states in both classes. So positives are never the more diverse class, and
    over both classes together a known head is distributed like any other: with shuffled labels nothing can be found.
    "diverse-positives" breaks the first on purpose, in heads that are not known, as the published tasks do.

    Args:
        states: of each head, a multiple of 4, so that half of them can be made of opposite vectors.
        noise: norm of the noise, in units of the norm of a state.

    Raises:
        UserError: for an unknown kind, or numbers that leave nothing to find.
    """
    if kind not in PLANTED:
        raise UserError(f"There is no planted task {kind!r}; the planted tasks are {', '.join(PLANTED)}.")
    if not 0 < known <= heads // 2 or states < 4 or states % 4 or pairs < 1:
        raise UserError(
            f"Planted heads need 1 to {heads // 2} known heads of {heads}, a multiple of 4 states and at least one "
            f"pair; not {known} known heads, {states} states and {pairs} pairs."
        )
    rng = numpy_stream(seed, f"planted heads, {kind}")
    roles = rng.permutation(heads)
    known_H, reading_H = np.zeros((2, heads), dtype=bool)
    known_H[roles[:known]] = True
    reading_H[roles[known : 2 * known]] = kind == "diverse-positives"

    def vectors(*shape: int) -> np.ndarray:
        return rng.standard_normal((*shape, width)) / np.sqrt(width)

    states_HSD = vectors(heads, states)
    if kind == "equal-means":
        states_HSD[:, 1::2] = -states_HSD[:, ::2]  # neighbours are opposite, and either half is made of neighbours
    offsets_HD = vectors(heads)

    def outputs(first_H: np.ndarray, count_H: np.ndarray) -> np.ndarray:
        """Heads that use the ``count_H`` states from ``first_H`` on."""
        state_NH = first_H + rng.integers(count_H, size=(pairs, heads))
        drawn_NHD = states_HSD[np.arange(heads), state_NH]
        return (offsets_HD + drawn_NHD + noise * vectors(pairs, heads)).astype(np.float32)

    half_H = np.where(known_H, states // 2, states)
    positive_NHD = outputs(np.zeros(heads, dtype=np.int64), half_H)
    negative_NHD = outputs(np.where(known_H, states // 2, 0), np.where(reading_H, 1, half_H))
    return PlantedHeads(positive_NHD, negative_NHD, known_H)
