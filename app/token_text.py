"""What each token of a language model reads as, for pages that have no feature index to ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dictlearn.token_text import read_vocabulary, shown


@dataclass(frozen=True)
class TokenTexts:
    """The visible text of every token id of one tokenizer."""

    texts: tuple[str, ...]

    def of(self, ids: Iterable[int]) -> list[str]:
        """An id that the tokenizer does not know reads as ``<unknown 123>``."""
        return [self.texts[i] if 0 <= i < len(self.texts) else f"<unknown {i}>" for i in ids]


def read_token_texts(model: str) -> TokenTexts:
    """Raises UserError when the model or its tokenizer cannot be found."""
    return TokenTexts(tuple(map(shown, read_vocabulary(model)[0])))


def visible(text: str) -> str:
    """Any text (a prompt, a document's id) with what cannot be seen written out."""
    return shown(text.encode("utf-8", errors="surrogateescape" if text.isprintable() else "backslashreplace"))
