"""The model card's measurements look at the right positions.

The main instrument is an oracle: predictions made from the true tokens must score 1.0 everywhere, and the same
predictions shifted by one position must not. Not checked: the bundled model's own numbers, which are in its card.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled_lm_card import measure, render
from lm_abilities import (
    BOS_ID,
    CLOSING,
    HIGHEST_ORDER,
    HeldOut,
    Predictions,
    TokenGroups,
    attention_scores,
    bracket_cases,
    bracket_pairs,
    identifier_cases,
    indentation_cases,
    measure_brackets,
    measure_identifiers,
    measure_indentation,
    pack,
    predict,
)
from ngram_baselines import KneserNey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from activation_store.harvest.corpus import Corpus, Document, is_held_out

SOURCE = '''
class Reader:
    """Reads things (and [counts] them."""

    def __init__(self, path_of_file, options={}):
        self.path_of_file = path_of_file
        self.options = dict(options, limit=[1, 2, 3])

    def read_everything(self):
        if self.path_of_file is None:
            raise ValueError("no path :)")
        with open(self.path_of_file) as stream:
            lines = [line.rstrip() for line in stream if line not in self.options["skip"]]
        return {number: self.parse(line) for number, line in enumerate(lines)}


def main():
    reader = Reader("a path", options={"skip": (1, (2, 3))})
    print(reader.read_everything())
'''
CONTEXT = 64


def documents() -> list[Document]:
    """The source with other names in each copy, so that documents differ; ids such that both splits get some."""
    return [
        Document(f"{i}.py", SOURCE.replace("path_of_file", f"path_of_{'abcdefghijkl'[i % 12]}_file{i}"))
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|bos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SOURCE], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def held_out(tokenizer: Tokenizer) -> HeldOut:
    return pack(tokenizer, documents()[:6], CONTEXT)


@pytest.fixture(scope="module")
def groups(tokenizer: Tokenizer) -> TokenGroups:
    return TokenGroups.of(tokenizer)


@pytest.fixture(scope="module")
def ngram(tokenizer: Tokenizer) -> KneserNey:
    training = [np.array(tokenizer.encode(document.text).ids) for document in documents()[6:]]
    return KneserNey(training, HIGHEST_ORDER, tokenizer.get_vocab_size(), BOS_ID)


def oracle(held_out: HeldOut, groups: TokenGroups, vocabulary: int, shift: int = 0) -> Predictions:
    """Predictions of a model that is certain of the true token (or of the one ``shift`` positions on)."""
    true = np.roll(held_out.stream[1 : held_out.targets + 1], -shift)
    certain = np.eye(vocabulary)[true]
    return Predictions(
        log_probability=np.zeros(len(true)),
        best=true,
        best_closing=groups.best_closing(certain),
        best_indentation={number: groups.best_indentation(certain, number) for number in groups.breaks},
    )


def shares(held_out: HeldOut, predictions: Predictions, ngram: KneserNey, groups: TokenGroups) -> list[float]:
    measured = [
        measure_brackets(held_out, predictions, ngram, groups)["all"],
        measure_indentation(held_out, predictions, ngram, groups)["all"],
        measure_identifiers(held_out, predictions, ngram, known_names=set())["all"],
    ]
    assert all(ability["cases"] > 15 for ability in measured), measured
    return [ability["model"] for ability in measured]


def test_an_oracle_scores_one_and_a_shifted_one_does_not(
    held_out: HeldOut, groups: TokenGroups, ngram: KneserNey
) -> None:
    vocabulary = ngram.vocabulary
    assert shares(held_out, oracle(held_out, groups, vocabulary), ngram, groups) == [1.0, 1.0, 1.0]
    for shift in (-1, 1):
        assert max(shares(held_out, oracle(held_out, groups, vocabulary, shift), ngram, groups)) < 0.95


def test_tokens_are_found_by_their_first_visible_character(tokenizer: Tokenizer) -> None:
    document = pack(tokenizer, [Document("a", "a = (b)\n    c")], CONTEXT).documents[0]
    for character in (0, 2, 4, 5, 6, 12):
        token = document.token_at(character)
        assert token is not None
        start, end = document.spans[token]
        assert document.text[start:end].lstrip(" ").startswith(document.text[character])
    assert document.token_at(100) is None


def test_brackets_in_strings_and_comments_are_not_paired() -> None:
    text = 'f(")", [1])  # (\nx = {\n}\n'
    assert bracket_pairs(text) == [(7, 9), (1, 10), (text.index("{"), text.index("}"))]
    assert bracket_pairs("f((]\n  '''") == []


def test_bracket_cases_are_closings_with_their_opening_in_view(held_out: HeldOut, tokenizer: Tokenizer) -> None:
    for target, bracket, distance in bracket_cases(held_out):
        assert tokenizer.decode([held_out.stream[target]]).lstrip(" ").startswith(bracket)
        assert CLOSING[bracket] in tokenizer.decode([held_out.stream[target - distance]])
        assert target - distance >= held_out.visible_from(target)


def test_indentation_cases_say_what_follows_and_what_went_before(tokenizer: Tokenizer) -> None:
    text = "def f():\n    if x:\n        return 1\n\n    y = 2\nz = 3\n"
    held_out = pack(tokenizer, [Document("a", text)], context=8)
    found = [(breaks, after, before) for _, breaks, after, before in indentation_cases(held_out)]
    every_line = [(1, 4, 0), (1, 8, 4), (2, 4, 8), (1, 0, 4)]
    assert found == [case for case in every_line if case in found]  # those whose white space is one token, in order
    assert len(found) >= 3


def test_identifiers_are_told_apart_by_whether_they_stood_in_the_window_before(
    held_out: HeldOut, tokenizer: Tokenizer
) -> None:
    cases = identifier_cases(held_out)
    assert any(case.again for case in cases)
    for case in cases:
        visible = held_out.visible_from(case.targets[-1])
        before = tokenizer.decode(held_out.stream[visible : case.targets[0] - 1].tolist())
        spelled = tokenizer.decode(held_out.stream[case.targets[0] - 1 : case.targets[-1] + 1].tolist())
        assert spelled.strip() == case.name
        assert case.targets[0] - 1 > visible
        if case.again:
            assert re.search(rf"\b{case.name}\b", before)


def test_the_ngram_model_gets_the_history_that_it_scores_documents_with(held_out: HeldOut, ngram: KneserNey) -> None:
    scored = ngram.log_probabilities([document.ids for document in held_out.documents])
    beginning = [document.first + i for document in held_out.documents for i in range(6)]
    for target in [target for target in beginning if target <= held_out.targets]:
        probability = ngram.distribution(*held_out.history(target))[held_out.stream[target]]
        assert math.log(probability) == pytest.approx(scored[target - 1], rel=1e-9)


def test_attention_scores_of_a_perfect_induction_head_and_a_perfect_previous_token_head() -> None:
    length = 5
    attention = torch.zeros(2, 2, 2 * length + 1, 2 * length + 1)
    for query in range(length + 1, 2 * length + 1):
        attention[:, 0, query, query - length + 1] = (
            1  # tokens 1..5, then again at 6..10: from 6 to 2, from 7 to 3, ...
        )
        attention[:, 1, query, query - 1] = 1
    induction, previous = attention_scores(attention, length)
    assert induction.tolist() == [1, 0]
    assert previous.tolist() == [0, 1]


# --- the whole card of a tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    from transformers import LlamaConfig, LlamaForCausalLM

    corpus = Corpus("stdlib", documents(), origin={"python": "3.0", "file_list": "sha256:0", "licence": "its licence"})
    assert 0 < sum(is_held_out(document.id) for document in corpus.documents) < len(corpus.documents)
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS_ID,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    training = dict(
        step=0, seed=1, epochs_from_step=[[0, 1]], batch=2, left_out={}, origin=corpus.origin, corpus=corpus.fingerprint
    )
    (folder / "training.json").write_text(json.dumps(training))
    return folder, corpus


def test_the_card_of_an_untrained_model_says_that_it_can_do_nothing(tiny: tuple[Path, Corpus]) -> None:
    folder, corpus = tiny
    card = measure(folder, corpus)
    loss, heads = card["loss"], card["heads"]["longest"]
    assert loss["5-gram"] < loss["bigram"] < loss["unigram"] < math.log(card["model"]["vocabulary"]) + 0.05
    assert loss["model"] == pytest.approx(math.log(card["model"]["vocabulary"]), abs=0.1)
    assert np.array(heads["induction"]).shape == (2, 2)
    assert np.array(heads["induction"]).max() < 2 * heads["uniform attention"]
    assert json.loads(json.dumps(card)) == card

    text = render(card)
    assert f"**{loss['model']:.3f}**" in text
    assert "its licence" in text
    assert not re.search(r"\bNone\b|\{|\bnan\b", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("`}`", ""))


def test_predictions_are_those_of_the_model_window_by_window(
    tiny: tuple[Path, Corpus], held_out: HeldOut, groups: TokenGroups
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    predictions = predict(model, held_out, groups)
    assert predictions.log_probability.shape == (held_out.targets,)
    for window in (0, held_out.windows - 1):
        ids = torch.from_numpy(held_out.stream[window * CONTEXT : (window + 1) * CONTEXT + 1])[None]
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:])
        mine = -predictions.log_probability[window * CONTEXT : (window + 1) * CONTEXT].mean()
        assert mine == pytest.approx(loss.item(), rel=1e-5)


def test_another_pythons_text_is_refused(tiny: tuple[Path, Corpus]) -> None:
    folder, corpus = tiny
    other = replace(corpus, documents=corpus.documents[:-1])
    with pytest.raises(SystemExit, match="Use the Python it was trained with"):
        measure(folder, other)
