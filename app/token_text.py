"""What each token of a language model reads as, for pages that have no feature index to ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from activation_store.harvest.language_model import load_tokenizer, resolve_model
from dictlearn.feature_index.token_text import shown, token_bytes


@dataclass(frozen=True)
class TokenTexts:
    """The visible text of every token id of one tokenizer."""

    texts: tuple[str, ...]

    def of(self, ids: Iterable[int]) -> list[str]:
        """An id that the tokenizer does not know reads as ``<unknown 123>``."""
        return [self.texts[i] if 0 <= i < len(self.texts) else f"<unknown {i}>" for i in ids]


def read_token_texts(model: str) -> TokenTexts:
    """Raises UserError when the model or its tokenizer cannot be found."""
    spec = resolve_model(model)
    tokenizer = load_tokenizer(spec)
    size = max(spec.vocab_size, tokenizer.get_vocab_size())
    return TokenTexts(tuple(map(shown, token_bytes(tokenizer, size))))


def visible(text: str) -> str:
    """Any text (a prompt, a document's id) with what cannot be seen written out."""
    return shown(text.encode("utf-8", errors="surrogateescape" if text.isprintable() else "backslashreplace"))
