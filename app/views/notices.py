"""When something is missing or cannot be read: one sentence, and the command that mends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dictlearn_app import links
from dictlearn_app.views import controls
from dictlearn_app.views.sheet import command, heading, hint, problem, sheet


def refuse(error: Exception, key: str) -> None:
    """Show the sentence of a UserError."""
    sheet([problem(str(error))], key)


def choose_one(
    kind: str, names: Sequence[str], asked: str, change: Callable[[str], links.Link], key: str, verb: str
) -> str | None:
    """The name that the address asks for, the first when it asks for none; None after saying that there is none.

    A name that is not there is said, not replaced: a pasted link never shows something else than it names.
    """
    if not names:
        sheet(
            [
                heading(kind),
                hint(f"This workspace holds no {kind.lower()} yet."),
                command(f"dictlearn {verb} --help", "makes one; Home lists what there is to make it from"),
            ],
            f"{key}.none",
        )
        return None
    if asked and asked not in names:
        sheet(
            [
                heading(kind),
                problem(
                    f"There is no {kind.lower()} {asked!r} in this workspace; choose one of those below, "
                    f"or make it with `dictlearn {verb}`."
                ),
            ],
            f"{key}.unknown",
        )
        controls.choice(kind, ["", *names], "", change, f"{key}.other")
        return None
    return asked or names[0]
