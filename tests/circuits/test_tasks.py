"""Prompt pairs differ in one word, tokens stay aligned, and planted heads are what they are said to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from activation_store.errors import UserError
from activation_store.seeds import numpy_stream
from dictlearn.circuits.tasks import (
    BOS_ID,
    PLANTED,
    TEXT_TASKS,
    induction_pairs,
    planted_heads,
    text_task,
    token_pairs,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of too few merges: some words are one token, most are several."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    texts = [frame for task in TEXT_TASKS.values() for frame in task.frames] + [
        " ".join(TEXT_TASKS["return"].words)
    ] * 3
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- prompts in words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_the_prompts_of_a_pair_differ_in_one_word_that_the_positive_repeats(name: str) -> None:
    task, rng = TEXT_TASKS[name], numpy_stream(0, "test pairs")
    for _ in range(100):
        pair = task.pair(rng)
        start = next(i for i, (p, n) in enumerate(zip(pair.positive, pair.negative, strict=False)) if p != n)
        start = max(i for i in range(start + 1) if not pair.positive[i - 1].isalnum())
        fitting = [
            (w, v)
            for w in task.words
            for v in task.words
            if pair.positive[start:].startswith(w)
            and pair.positive[:start] + v + pair.positive[start + len(w) :] == pair.negative
        ]
        assert len(fitting) == 1
        repeated, other = fitting[0]
        assert repeated != other
        words_of_positive = split_words(pair.positive)
        assert words_of_positive.count(repeated) > split_words(pair.negative).count(repeated) >= 1
        assert other not in words_of_positive
        assert split_words(pair.negative).count(other) == 1
        assert pair.answer[1:] in task.words and pair.answer[1:] in words_of_positive
        assert f" {other}" in pair.rivals and pair.answer not in pair.rivals


def split_words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text).split()


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_no_word_is_more_frequent_in_one_class(name: str) -> None:
    """The changed word is drawn from all words in both classes, so positives are not the more diverse ones."""
    task, rng = TEXT_TASKS[name], numpy_stream(1, "test pairs")
    pairs = [task.pair(rng) for _ in range(3000)]
    distinct = [len({getattr(pair, kind) for pair in pairs}) for kind in ("positive", "negative")]
    assert distinct[0] <= distinct[1]


def test_unknown_tasks_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="There is no task 'retrun'.* return, assign, pass-on, mention"):
        text_task("retrun")


def test_token_pairs_are_aligned_padded_and_begin_with_bos(tokenizer: Tokenizer) -> None:
    pairs = token_pairs(TEXT_TASKS["assign"], tokenizer, 7, pairs=40, seed=0)
    assert len(pairs) == 40 and len(np.unique(pairs.lengths_N)) > 1
    for n in range(40):
        length = pairs.lengths_N[n]
        positive, negative = pairs.positive_NT[n], pairs.negative_NT[n]
        assert positive[0] == negative[0] == 7
        assert (positive[length:] == 0).all() and (negative[length:] == 0).all()
        text = tokenizer.decode(positive[1:length].tolist())
        assert tokenizer.encode(text).ids == positive[1:length].tolist()
        assert tokenizer.encode(tokenizer.decode(negative[1:length].tolist())).ids == negative[1:length].tolist()
        parameter = text.rsplit("self.", 1)[1].removesuffix(" =").lstrip("_")
        assert tokenizer.encode(f"{text} {parameter}").ids[length - 1] == pairs.answers_N[n]
        changed = np.flatnonzero(positive != negative)
        assert 1 <= len(changed) == changed[-1] - changed[0] + 1
    assert len({tuple(row) for row in pairs.positive_NT.tolist()}) > 35


def test_prompts_come_from_the_seed_and_truth_has_others(tokenizer: Tokenizer) -> None:
    task = TEXT_TASKS["return"]
    first, again, other, truth = (
        token_pairs(task, tokenizer, None, 20, seed, purpose).positive_NT.tolist()
        for seed, purpose in ((0, "score"), (0, "score"), (1, "score"), (0, "truth"))
    )
    assert first == again
    assert first != other and first != truth


def test_a_tokenizer_that_keeps_too_few_pairs_aligned_is_refused_in_one_sentence() -> None:
    blind = Tokenizer(WordLevel({"?": 0}, unk_token="?"))  # every prompt is one token, and the answer is never a second
    with pytest.raises(UserError, match=r"^Only 0 of the 5 pairs asked for of the task 'return' are aligned[^.]*\.$"):
        token_pairs(TEXT_TASKS["return"], blind, None, 5, seed=0)


def test_an_answer_that_begins_like_another_word_is_left_out() -> None:
    """Letter by letter every answer begins with the same space, so a next token cannot tell them apart."""
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="Only 0 of the 5 pairs"):
        token_pairs(TEXT_TASKS["return"], letters, None, 5, seed=0)


# --- random tokens ----------------------------------------------------------------------------------------------------


def test_induction_pairs_differ_in_one_token_and_only_the_positive_says_what_follows() -> None:
    pairs = induction_pairs(200, vocabulary=30, words=8, seed=0)
    for positive, negative, answer in zip(pairs.positive_NT, pairs.negative_NT, pairs.answers_N, strict=True):
        (at,) = np.flatnonzero(positive != negative)
        assert positive[0] == BOS_ID
        assert positive[at] == positive[-1] and positive[at + 1] == answer
        assert (positive[1:-1] == positive[-1]).sum() == 1
        assert (negative[1:-1] == negative[-1]).sum() == 0
        assert (negative == negative[at]).sum() == 1
    assert (pairs.lengths_N == 10).all()


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="a vocabulary of 10 tokens, not 9"):
        induction_pairs(5, vocabulary=9, words=8, seed=0)


# --- planted heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_heads_are_as_diverse_in_negatives_as_in_positives(kind: str) -> None:
    """Without noise states can be counted: as many in either class, and as many over both, for every kind of head."""
    heads = planted_heads(kind, 0, pairs=200, heads=12, known=3, width=8, noise=0.0)
    assert heads.known_H.sum() == 3
    reading = 0
    for head in range(12):
        positive, negative = (
            {tuple(row) for row in outputs[:, head].tolist()} for outputs in (heads.positive_NHD, heads.negative_NHD)
        )
        assert len(positive | negative) == 8
        if heads.known_H[head]:
            assert len(positive) == len(negative) == 4 and not positive & negative
        elif len(negative) == 1:
            reading += 1
            assert len(positive) == 8
        else:
            assert len(positive) == len(negative) == 8
    assert reading == (3 if kind == "diverse-positives" else 0)


def test_equal_means_are_equal() -> None:
    heads = planted_heads("equal-means", 0, pairs=4000, heads=6, known=2, noise=0.0)
    states_apart = np.linalg.norm(heads.positive_NHD[0] - heads.positive_NHD[1:].mean(axis=0), axis=1)
    means_apart = np.linalg.norm(heads.positive_NHD.mean(axis=0) - heads.negative_NHD.mean(axis=0), axis=1)
    assert (means_apart < 0.06).all() and (states_apart > 0.5).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "shifty"}, "There is no planted task 'shifty'; the planted tasks are shifted, equal-means"),
        ({"known": 30}, "1 to 24 known heads of 48"),
        ({"states": 6}, "not 8 known heads, 6 states"),
    ],
)
def test_plants_with_nothing_to_find_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planted_heads(**{"kind": "shifted", "seed": 0, **settings})


# --- the script -------------------------------------------------------------------------------------------------------


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter that refuses to import torch."""
    code = (
        f"import sys; sys.modules['torch'] = None; sys.argv = ['identify_heads.py', *{arguments!r}]\n"
        "import runpy; runpy.run_path('scripts/circuits/identify_heads.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--model", "nowhere/at/all"), "There is no model 'nowhere/at/all'"),
        (("--model", "planted", "--task", "return"), "There is no planted task 'return'"),
        (("--model", "small", "--task", "return"), "The small models are trained on one task"),
        (("--model", "bundled", "--task", "shifted"), "There is no task 'shifted' for a language model"),
        (("--seeds", "4"), "An interval over 4 seeds says too little"),
        (("--pairs", "4", "--examples", "8"), "At least 5 pairs of prompts are needed"),
        (("--pairs", "6", "--examples", "13"), "The SAE can be trained on 1 to 12 examples of 6 pairs, not on 13."),
    ],
)
def test_bad_input_is_one_sentence_before_torch_is_loaded(arguments: tuple[str, ...], sentence: str) -> None:
    result = run_script(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith(sentence)
