"""The plan of batches is arithmetic, so it is checked as arithmetic, on random corpora, without a model.

The promises: every token of the documents used stands in exactly one place of one batch; every place is a row, a BOS
or padding, and counted as such; and from any row on, the plan gives the rows it gives from the beginning.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.errors import UserError
from activation_store.harvest import batches
from activation_store.harvest.batches import plan_batches
from activation_store.harvest.corpus import Document

BOS = 0


def tokenize(texts: list[str]) -> list[list[int]]:
    """One token per letter, a = 1; an underscore is the BOS token written out in a text."""
    return [[BOS if letter == "_" else ord(letter) - 96 for letter in text] for text in texts]


def plan_of(texts, rows=10**9, context=5, batch_size=3, seed=0, bos=BOS):
    documents = [Document(f"{number}", text) for number, text in enumerate(texts)]
    return plan_batches(
        documents,
        tokenize,
        rows=rows,
        context=context,
        batch_size=batch_size,
        seed=seed,
        bos_token_id=bos,
        vocab_size=30,
    )


def all_rows(plan):
    """(rows, 3): token, position and document of every row of the plan."""
    parts = [plan.batch(index) for index in range(plan.batches)]
    return np.concatenate([np.stack([b.token_ids_N, b.positions_N, b.documents_N], 1) for b in parts])


corpora = st.lists(st.text("abcdefgh_", max_size=12), min_size=1, max_size=12).filter(
    lambda t: any(set(x) - {"_"} for x in t)
)
shapes = dict(
    context=st.integers(2, 9), batch_size=st.integers(1, 4), seed=st.integers(0, 9), bos=st.sampled_from([BOS, None])
)


@given(texts=corpora, **shapes)
@settings(deadline=None, max_examples=200)
def test_every_token_is_in_one_place_and_every_place_is_counted(texts, context, batch_size, seed, bos):
    plan = plan_of(texts, context=context, batch_size=batch_size, seed=seed, bos=bos)
    front = [] if bos is None else [bos]
    stream: list[int] = []
    for identity in plan.document_ids:
        for token in front + tokenize([texts[int(identity)]])[0]:
            if bos is not None and token != bos and len(stream) % context == 0:
                stream.append(bos)  # a window that begins inside a document
            stream.append(token)
    assert sorted(plan.document_ids) == sorted(str(number) for number in range(len(texts)))

    computed = np.concatenate([plan.batch(index).tokens_BC for index in range(plan.batches)])
    assert computed.shape == (plan.batches * batch_size, context)
    flat = computed.flatten()
    assert flat[: len(stream)].tolist() == stream
    assert (flat[len(stream) :] == BOS).all()

    assert plan.rows + sum(plan.excluded.values()) == flat.size
    assert plan.rows == sum(token != bos for token in stream) if bos is not None else plan.rows == len(stream)
    assert plan.excluded["padding"] == flat.size - len(stream) < context * batch_size


@given(texts=corpora, **shapes)
@settings(deadline=None, max_examples=200)
def test_rows_say_which_token_of_which_document_they_are(texts, context, batch_size, seed, bos):
    plan = plan_of(texts, context=context, batch_size=batch_size, seed=seed, bos=bos)
    rows = all_rows(plan)
    for document, identity in enumerate(plan.document_ids):
        mine = rows[rows[:, 2] == document]
        expected = [token for token in tokenize([texts[int(identity)]])[0] if token != bos]
        assert mine[:, 0].tolist() == expected
        assert plan.rows_per_document[document] == len(expected)
    assert (np.diff(rows[:, 2]) >= 0).all()
    assert rows[:, 1].max() < context


@given(texts=corpora, row=st.integers(0, 200), **shapes)
@settings(deadline=None, max_examples=200)
def test_from_any_row_the_same_rows_follow(texts, row, context, batch_size, seed, bos):
    plan = plan_of(texts, context=context, batch_size=batch_size, seed=seed, bos=bos)
    row = min(row, plan.rows)
    found = [np.empty((0, 3), dtype=np.int32)]
    for batch, skip in plan.batches_from(row):
        assert 0 <= skip < batch.rows
        found.append(np.stack([batch.token_ids_N, batch.positions_N, batch.documents_N], 1)[skip:])
    assert np.array_equal(np.concatenate(found), all_rows(plan)[row:])


@given(texts=corpora, rows=st.integers(1, 60), **shapes)
@settings(deadline=None, max_examples=200)
def test_it_stops_at_exactly_the_rows_asked_for(texts, rows, context, batch_size, seed, bos):
    options = dict(context=context, batch_size=batch_size, seed=seed, bos=bos)
    whole, part = plan_of(texts, **options), plan_of(texts, rows=rows, **options)
    assert part.rows == min(rows, whole.rows)
    assert np.array_equal(all_rows(part), all_rows(whole)[: part.rows])
    assert part.rows_per_document.sum() == part.rows
    assert part.rows + sum(part.excluded.values()) == part.batches * batch_size * context


def test_every_window_begins_with_bos_and_none_is_doubled_for_it():
    """A window that begins where a document does has the document's BOS already."""
    plan = plan_of(["abcd", "abcd", "abcdefgh"], context=5, batch_size=1)
    windows = np.concatenate([plan.batch(index).tokens_BC for index in range(plan.batches)])
    assert (windows[:, 0] == BOS).all()
    assert plan.excluded["bos"] == len(windows)


def test_kept_places_point_at_the_tokens_of_the_batch():
    plan = plan_of(["abc", "defgh", "a_b"])
    for index in range(plan.batches):
        batch = plan.batch(index)
        assert np.array_equal(batch.tokens_BC.flatten()[batch.kept_N], batch.token_ids_N)
        assert np.array_equal(batch.kept_N % plan.context, batch.positions_N)


def test_the_order_of_documents_depends_on_the_seed_and_is_shuffled():
    texts = ["a"] * 200
    first, again, other = (plan_of(texts, seed=seed).document_ids for seed in (1, 1, 2))
    assert first == again != other
    assert first != sorted(first, key=int)


def test_the_plan_is_pinned():
    """A change of this hash is a change of what everybody's stores contain."""
    assert plan_of(["abc", "defgh", "a_b", "hgf"], seed=3).fingerprint == PINNED


PINNED = "sha256:ad44fae258f8ab5a62af75c380fb47ddbde494e3047295a34a90ee0b87510cae"


def test_the_fingerprint_sees_every_setting():
    base = dict(texts=["abc", "defgh", "ab", "hgf"], context=5, batch_size=3, seed=0, bos=BOS)
    changes = [
        {},
        {"texts": ["abd", "defgh", "ab", "hgf"]},
        {"context": 6},
        {"batch_size": 2},
        {"seed": 1},
        {"bos": None},
    ]
    assert len({plan_of(**{**base, **change}).fingerprint for change in changes}) == len(changes)


def test_documents_that_are_not_needed_are_not_tokenized(monkeypatch):
    monkeypatch.setattr(batches, "TOKENIZED_AT_ONCE", 20)
    asked = []

    def counting(texts):
        asked.extend(texts)
        return tokenize(texts)

    documents = [Document(str(number), "abcdefghij") for number in range(100)]
    plan = plan_batches(documents, counting, rows=35, context=5, batch_size=2, seed=0, bos_token_id=BOS, vocab_size=30)
    assert plan.rows == 35 and len(asked) == 4


@pytest.mark.parametrize(("vocab_size", "bytes_per_token"), [(30, 2), (70_000, 4)])
def test_the_stream_is_compact(vocab_size, bytes_per_token):
    documents = [Document("0", "abc")]
    plan = plan_batches(
        documents, tokenize, rows=9, context=5, batch_size=2, seed=0, bos_token_id=None, vocab_size=vocab_size
    )
    assert plan.stream_T.itemsize == bytes_per_token


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match="gives token 8 in document '0', but the model's vocabulary has 5 tokens"):
        plan_batches(
            [Document("0", "h")], tokenize, rows=9, context=5, batch_size=2, seed=0, bos_token_id=None, vocab_size=5
        )


def test_a_bos_outside_the_vocabulary_is_refused():
    with pytest.raises(
        UserError, match="names token 50256 as the beginning of a text, but its vocabulary has 97 tokens"
    ):
        plan_batches(
            [Document("0", "h")], tokenize, rows=9, context=5, batch_size=2, seed=0, bos_token_id=50256, vocab_size=97
        )


def test_a_context_with_room_for_bos_alone_is_refused():
    with pytest.raises(UserError, match="use a context of at least 2"):
        plan_of(["abc"], context=1)


def test_a_corpus_without_tokens_is_refused():
    with pytest.raises(UserError, match="The corpus's 2 documents give no token"):
        plan_of(["", "_"])
