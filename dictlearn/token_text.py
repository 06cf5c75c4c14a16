"""Tokens as text; by `shown`, safely: no byte is lost, nothing is invisible, nothing moves the reader's eye.

A token is a run of bytes, and need not be whole characters: an emoji may be four tokens. `token_bytes` recovers those
bytes from a tokenizer; `shown` turns them into text in which

* a line break is ``↵``, a tab ``⇥``;
* a byte that is no part of a whole character within the token is ``\\xF0``;
* any other control, format or unassigned character (null, escape, a right-to-left override, a zero-width space) is
  ``\\u{202E}``.

The result is plain text. Whoever draws it must set it as text: it may well contain ``<script>``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN_AS = {"\n": "↵", "\t": "⇥"}
HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that are not drawn, or that change how their surroundings are drawn."""

SPACE_MARK = "\u2581"
"""SentencePiece's sign for a space, which decoding one token alone drops."""


def shown(piece: bytes) -> str:
    """A token's bytes as visible text."""
    return "".join(map(_shown_character, piece.decode("utf-8", errors="surrogateescape")))


@cache
def _shown_character(character: str) -> str:
    if character in SHOWN_AS:
        return SHOWN_AS[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02X}"
    if character != " " and (
        unicodedata.category(character) in HIDDEN_CATEGORIES or (character.isspace() and not character.isprintable())
    ):
        return f"\\u{{{code:04X}}}"
    return character


# --- bytes of tokens --------------------------------------------------------------------------------------------------


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of tokens 0 to ``vocab_size - 1``. A number that the tokenizer does not use has ``<unused N>``.

    Byte-level and SentencePiece vocabularies are inverted exactly; of any other kind the tokenizer's own decoding of
    the single token is taken, which may lack a leading space.
    """
    record = json.loads(tokenizer.to_str())
    added = {int(token["id"]): token["content"] for token in record.get("added_tokens", [])}
    kinds = _decoder_kinds(record.get("decoder"))
    pieces = []
    for token in range(vocab_size):
        piece = tokenizer.id_to_token(token)
        if piece is None:
            pieces.append(f"<unused {token}>".encode())
        elif token in added:
            pieces.append(added[token].encode())
        elif "ByteLevel" in kinds:
            pieces.append(_from_byte_level(piece))
        elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
            pieces.append(_from_sentencepiece(piece))
        else:
            pieces.append(tokenizer.decode([token], skip_special_tokens=False).encode() or piece.encode())
    return pieces


def read_vocabulary(model: str) -> tuple[list[bytes], str]:
    """The bytes of every token of the language model called ``model``, and the fingerprint of its tokenizer.

    Raises:
        UserError: the model or its tokenizer cannot be found.
    """
    from activation_store.harvest.language_model import load_tokenizer, resolve_model, tokenizer_fingerprint

    spec = resolve_model(model)
    tokenizer = load_tokenizer(spec)
    size = max(spec.vocab_size, tokenizer.get_vocab_size())
    return token_bytes(tokenizer, size), tokenizer_fingerprint(tokenizer)


def _decoder_kinds(decoder: dict | None) -> set[str]:
    """The types of a tokenizer's decoder and of those it consists of."""
    if not decoder:
        return set()
    kinds = {str(decoder.get("type"))}
    for part in decoder.get("decoders", []):
        kinds |= _decoder_kinds(part)
    return kinds


def _from_byte_level(piece: str) -> bytes:
    table = _byte_level_table()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)


@cache
def _byte_level_table() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable Latin-1 stands for itself, the rest, in
    order, for the code points from 256 on (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _from_sentencepiece(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()


def text_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A token id as the text it stands for, its leading space included; bytes of half a character are lost."""

    def text(token_id: int) -> str:
        piece = tokenizer.id_to_token(token_id)
        if piece is None:
            return f"<{token_id}>"
        decoded = tokenizer.decode([token_id], skip_special_tokens=False)
        return " " + decoded if piece.startswith(SPACE_MARK) and not decoded.startswith(" ") else decoded

    return text


def known_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """(vocab_size,) bool: which numbers the tokenizer has a token for; a model's vocabulary is often padded."""
    return np.array([tokenizer.id_to_token(token) is not None for token in range(vocab_size)], dtype=bool)
