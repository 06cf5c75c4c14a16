"""Tokens become text that is safe to show, and lose nothing on the way."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dictlearn.token_text import known_tokens, shown, token_bytes

TEXT = "naïve 😀 \u202ebidi\x00 tabs\t and\r\nlines, ünïcödé — 日本語"


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (b" self", " self"),
        (b"\n\t", "↵⇥"),
        (b"\r\n", "\\u{000D}↵"),
        ("é😀".encode(), "é😀"),
        ("😀".encode()[:2], "\\xF0\\x9F"),
        (b"a\xff", "a\\xFF"),
        ("\u202e\u200b\ufeff".encode(), "\\u{202E}\\u{200B}\\u{FEFF}"),
        (b"\x00\x1b[31m", "\\u{0000}\\u{001B}[31m"),
        ("a\u00a0b\u2028".encode(), "a\\u{00A0}b\\u{2028}"),
        (b"<script>alert(1)</script>", "<script>alert(1)</script>"),
        (b"", ""),
    ],
)
def test_shown(piece: bytes, expected: str) -> None:
    assert shown(piece) == expected


@given(st.binary(max_size=20))
def test_whatever_the_bytes_nothing_invisible_is_left(piece: bytes) -> None:
    text = shown(piece)
    text.encode()  # no lone surrogate
    assert not {unicodedata.category(c) for c in text} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert bool(text) == bool(piece)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<é>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama's: spaces as a mark, unknown characters as bytes."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abdeilnsтï",
        "\u2581a",
        "\u2581na",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(make) -> None:
    tokenizer = make()
    size = tokenizer.get_vocab_size()
    pieces = token_bytes(tokenizer, size + 2)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(pieces[i] for i in ids) == TEXT.encode()
    assert pieces[size:] == [f"<unused {size}>".encode(), f"<unused {size + 1}>".encode()]
    assert known_tokens(tokenizer, size + 2).tolist() == [True] * size + [False] * 2
    special = tokenizer.token_to_id("<s>")
    assert pieces[special] == b"<s>"


def test_tokens_added_later_are_their_text() -> None:
    tokenizer = byte_level()
    assert token_bytes(tokenizer, tokenizer.get_vocab_size())[-1] == "<é>".encode()


def test_other_vocabularies_are_decoded_by_their_tokenizer() -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    assert token_bytes(tokenizer, 2) == [b"hello", b"world"]


def test_a_real_model_of_strangers(shared) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "models" / "stories260K" / "tokenizer.json"))
    pieces = token_bytes(tokenizer, tokenizer.get_vocab_size())
    text = "Once upon a time, there was a little girl\nnamed Lily 😀."
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(pieces[i] for i in ids).removeprefix(b" ") == text.encode()
