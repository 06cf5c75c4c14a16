"""Writes the tables of docs/reproductions.md from what the scripts of scripts/reproduce/ measured.

    python scripts/make/reproduction_tables.py docs/reproductions.md reproductions/*.json

The text around the tables is written by hand. The first table, ``verdicts``, is made of that text: what stands in bold
at the beginning of an item, "Reproduced: ...", "Partly: ..." or "Not reproduced: ...".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from page_tables import table, with_tables


def tables(results: list[Path]) -> dict[str, list[list[str]]]:
    """By name: the header, then the rows."""
    return {name: made for path in results for name, made in json.loads(path.read_text())["tables"].items()}


VERDICT = re.compile(r"^- \*\*(Reproduced|Partly|Not reproduced)([^:*]*): ([^*]+?)\.?\*\*", re.MULTILINE)
HEADINGS = {"Reproduced": "reproduced", "Partly": "partly", "Not reproduced": "not reproduced"}


def verdicts(text: str) -> str:
    """The table of what each section found, in the sections' own words."""
    rows = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        found: dict[str, list[str]] = {word: [] for word in HEADINGS}
        for word, where, claim in VERDICT.findall(section):
            word = "Partly" if where == " in part" else word
            claim = " ".join(claim.split()).removesuffix(",")
            found[word].append(f"{claim} ({where.strip()})" if where.startswith(" on") else claim)
        if any(found.values()):
            link = re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            rows.append([f"[{title}](#{link})", *("; ".join(claims) for claims in found.values())])
    return table(["", *HEADINGS.values()], rows)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    made = {
        name: lambda rows=rows: table(rows[0], rows[1:]) for name, rows in tables(list(map(Path, sys.argv[2:]))).items()
    }
    text = with_tables(page.read_text(), made)
    page.write_text(with_tables(text, {"verdicts": lambda: verdicts(text)}))
