"""Hooks as a person reads them."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from dictlearn import hook_names


def test_the_examples_say_what_comes_out() -> None:
    result = doctest.testmod(hook_names)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("hook_in", "hook_out", "words"),
    [
        ("a", None, "a"),
        (["a"], "a", "a"),
        ("blocks.2.x", "blocks.2.y", "blocks.2.x → blocks.2.y"),
        ([f"blocks.{i}.x" for i in range(12)], [f"blocks.{i}.y" for i in range(12)], "blocks.0–11.x → blocks.0–11.y"),
        (["blocks.2.x", "blocks.0.x"], None, "blocks.2,0.x"),
        (["blocks.2.x", "tuned:blocks.2.x"], None, "blocks.2.x + tuned:blocks.2.x"),
        (["blocks.1.attn.h3", "blocks.2.attn.h4"], None, "blocks.1.attn.h3 + blocks.2.attn.h4"),
        (["a", "a"], None, "a + a"),
        (None, None, ""),
        ([], "", ""),
    ],
)
def test_hooks_in_words(hook_in: Any, hook_out: Any, words: str) -> None:
    assert hook_names.in_words(hook_in, hook_out) == words
