"""Documents from every kind of source, the split that depends on the id alone, and the sentences for bad input."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_store.errors import UserError
from activation_store.harvest import corpus as corpus_module
from activation_store.harvest.corpus import SECTION_CHARS, Document, is_held_out, open_corpus


def ids(corpus) -> list[str]:
    return [document.id for document in corpus.documents]


def sentence(name, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_corpus(str(name), **options)
    return str(caught.value)


# --- the split ---


def test_the_split_is_pinned():
    """Changing these would move documents between train and held-out under everybody's stores and models."""
    held_out = [name for name in (f"{number}.py" for number in range(60)) if is_held_out(name)]
    assert held_out == HELD_OUT_OF_SIXTY


HELD_OUT_OF_SIXTY = ["9.py", "28.py", "50.py"]


def test_about_a_tenth_is_held_out():
    assert 800 < sum(is_held_out(f"folder/file{number}.py") for number in range(10_000)) < 1200


def test_the_two_splits_are_the_whole_corpus(tmp_path):
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(200)))
    corpus = open_corpus(str(tmp_path))
    train, held_out = corpus.split("train"), corpus.split("held-out")
    assert len(train) + len(held_out) == 200 and len(held_out) > 5
    assert not {d.id for d in train} & {d.id for d in held_out}
    assert corpus.split("all") == corpus.documents
    with pytest.raises(UserError, match="There is no split 'test'; use train, held-out or all"):
        corpus.split("test")


# --- the standard library ---


def test_the_standard_library_is_a_corpus_of_source_without_tests():
    corpus = open_corpus("stdlib")
    names = ids(corpus)
    assert {"argparse.py", "json/decoder.py"} <= set(names) and names == sorted(set(names), key=names.index)
    assert not [name for name in names if {"test", "tests", "idlelib", "site-packages"} & set(name.split("/"))]
    assert corpus.origin["python"] and corpus.origin["file_list"].startswith("sha256:")
    assert corpus.left_out["near-duplicate"] > 20  # the generated code pages
    assert corpus.fingerprint == open_corpus("stdlib").fingerprint


def test_near_duplicates_are_left_out_and_the_first_is_kept():
    lines = [f"value_{number} = compute(number={number})" for number in range(40)]
    documents = [
        Document("a", "\n".join(lines)),
        Document("b", "\n".join([*lines[:38], "something_else = entirely()"])),
        Document("c", "\n".join(reversed(lines))),
    ]
    assert [d.id for d in corpus_module._without_near_duplicates(documents)] == ["a", "c"]


# --- files and folders ---


def test_a_folder_of_everything(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("one")
    (tmp_path / "a.md").write_text("two")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "  "}\n{"text": "four"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", None, "six"]}), tmp_path / "d.parquet")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    corpus = open_corpus(str(tmp_path))
    assert ids(corpus) == ["a.md", "c.jsonl#1", "c.jsonl#4", "d.parquet#0", "d.parquet#2", "b/one.txt"]
    assert [d.text for d in corpus.documents] == ["two", "three", "four", "five", "six", "one"]
    assert corpus.left_out == {"empty": 1, "undecodable": 1}


def test_a_file_has_the_ids_it_has_in_its_folder(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "three"}\n')
    assert ids(open_corpus(str(tmp_path / "x.jsonl"))) == ids(open_corpus(str(tmp_path)))


def test_the_fingerprint_sees_ids_and_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = open_corpus(str(tmp_path)).fingerprint
    (tmp_path / "a.txt").write_text("two")
    second = open_corpus(str(tmp_path)).fingerprint
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, open_corpus(str(tmp_path)).fingerprint}) == 3


@given(st.lists(st.integers(1, SECTION_CHARS), min_size=1, max_size=8))
def test_sections_put_together_are_the_text(line_lengths):
    text = "\n".join("x" * length for length in line_lengths)
    sections = list(corpus_module._sections(Document("novel.txt", text)))
    assert "".join(section.text for section in sections) == text
    assert all(len(section.text) <= 3 * SECTION_CHARS for section in sections)
    assert len({section.id for section in sections}) == len(sections)
    assert all(section.text.endswith("\n") for section in sections[:-1])


def test_reading_stops_at_the_limit_also_within_a_file(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": "abcde" * 10}) for _ in range(100)))
    corpus = open_corpus(str(tmp_path), limit_chars=170)
    assert len(corpus.documents) == 4
    assert corpus.origin["read"] == "the first 170 characters"
    assert "read" not in open_corpus(str(tmp_path), limit_chars=10**9).origin


def test_half_a_surrogate_pair_is_left_out_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud800"}\n{"text": "fine"}\n')
    corpus = open_corpus(str(tmp_path))
    assert ids(corpus) == ["x.jsonl#2"] and corpus.left_out == {"undecodable": 1}
    assert corpus.fingerprint


# --- bad input ---


@pytest.mark.parametrize("name", ["", "no/such/place", "x" * 5000, "nul\0"])
def test_what_does_not_exist(name):
    assert "neither 'stdlib' nor an existing file or folder" in sentence(name)


def test_no_text(tmp_path):
    assert "holds no file ending in .txt" in sentence(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "holds no text (left out: 1 undecodable, 1 empty)" in sentence(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "Line 2 of"),
        ("[1]", "has no text under 'text'"),
        ('{"body": "x"}', "name the key that holds it with --text-field"),
        ('{"text": 5}', "has no text under 'text'"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_lines(tmp_path, line, expected):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert expected in sentence(tmp_path)


def test_another_text_field(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "words"}\n')
    assert open_corpus(str(tmp_path), text_field="body").documents[0].text == "words"


def test_bad_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["a", "b"]}), file)
    assert "has no column 'text'; its columns are id, body" in sentence(file)
    assert "The column 'id' of" in sentence(file, text_field="id")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or no Parquet file" in sentence(file, text_field="body")


def test_a_hub_data_set_that_cannot_be_had_is_one_sentence():
    said = sentence("hub:nobody/nothing")
    assert "The hub data set 'nobody/nothing' cannot be read" in said and "\n" not in said


def test_hub_documents_are_numbered_and_limited(monkeypatch):
    import datasets

    rows = [{"body": "words here"}, {"body": " "}, {"body": "more words"}, {"body": "too many"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter(rows))
    corpus = open_corpus("hub:someone/texts", text_field="body", limit_chars=15)
    assert ids(corpus) == ["someone/texts:train#0", "someone/texts:train#2"]
    assert corpus.left_out == {"empty": 1}
    assert "its columns are body" in sentence("hub:someone/texts")
