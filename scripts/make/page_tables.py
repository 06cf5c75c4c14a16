"""Tables of a documentation page that a script writes: each stands between two comments that name it.

<!-- table: types -->
| ... |
<!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with each table between its comments as it should be; what is around them stays as it is."""
    for name, made in tables.items():
        between = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not between.search(text):
            raise SystemExit(f"The text has no place for the table {name!r}.")
        text = between.sub(lambda found, made=made: f"{found[1]}{made()}\n{found[2]}", text)  # type: ignore[misc]
    return text
