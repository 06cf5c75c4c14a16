"""Hooks as a person reads them: one name or several, what is predicted from them, and which may be edited."""

from __future__ import annotations

import re
from collections.abc import Sequence

from activation_store.errors import UserError

Hooks = str | Sequence[str]
"""As provenance and configurations have them: a name, or a list of names."""

NUMBER = re.compile(r"\d+")


def names(hooks: Hooks | None) -> tuple[str, ...]:
    """The hooks one by one; none for None and "".

    >>> names("a"), names(["a", "b"]), names(None)
    (('a',), ('a', 'b'), ())
    """
    if not hooks:
        return ()
    return (hooks,) if isinstance(hooks, str) else tuple(map(str, hooks))


def in_words(hook_in: Hooks | None, hook_out: Hooks | None = None) -> str:
    """What a dictionary reads, and what it predicts where that is something else.

    >>> in_words("a"), in_words("a", "a"), in_words("a", ["b", "c"])
    ('a', 'a', 'a → b + c')
    >>> in_words([f"blocks.{layer}.hook_in" for layer in range(4)])
    'blocks.0–3.hook_in'
    """
    read, written = names(hook_in), names(hook_out)
    return together(read) if written in ((), read) else f"{together(read)} → {together(written)}"


def together(hooks: Sequence[str]) -> str:
    """Several hooks in one expression: those that differ in one number alone are written once.

    >>> together(["blocks.1.hook_x", "blocks.4.hook_x"]), together(["blocks.1.hook_x", "tuned:blocks.1.hook_x"])
    ('blocks.1,4.hook_x', 'blocks.1.hook_x + tuned:blocks.1.hook_x')
    """
    between = {tuple(NUMBER.split(hook)) for hook in hooks}
    columns = list(zip(*(NUMBER.findall(hook) for hook in hooks), strict=False))
    places = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(between) != 1 or len(places) != 1:
        return " + ".join(hooks)
    values = [int(number) for number in columns[places[0]]]
    rising = len(values) > 2 and values == list(range(values[0], values[0] + len(values)))
    numbers = [column[0] for column in columns] + [""]
    numbers[places[0]] = f"{values[0]}–{values[-1]}" if rising else ",".join(map(str, values))
    return "".join(part + number for part, number in zip(between.pop(), numbers, strict=True))


def check_editable(hook: str) -> None:
    """Refuse, with a UserError, a hook whose edit would not mean what it says."""
    if hook.endswith("hook_resid_mid"):
        raise UserError(
            f"An edit at {hook} misses the skip connection (the Bridge's resid_mid feeds the MLP branch alone); "
            "edit hook_attn_out or hook_resid_post instead."
        )
