"""Writes the tables of docs/reproductions.md from what the scripts of scripts/reproduce/ measured.

    python scripts/make/reproduction_tables.py docs/reproductions.md reproductions/*.json

The text around the tables is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from page_tables import table, with_tables


def tables(results: list[Path]) -> dict[str, list[list[str]]]:
    """By name: the header, then the rows."""
    return {name: made for path in results for name, made in json.loads(path.read_text())["tables"].items()}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    made = {
        name: lambda rows=rows: table(rows[0], rows[1:]) for name, rows in tables(list(map(Path, sys.argv[2:]))).items()
    }
    page.write_text(with_tables(page.read_text(), made))
