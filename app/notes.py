"""What a person wrote about features, in the workspace's notes.sqlite.

A note belongs to a latent of a run's dictionary, not to an index, so that it survives making the index again. The
dictionary's fingerprint is part of the key: a run that was trained again has other features under the same numbers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from activation_store.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS feature_notes (
    run TEXT NOT NULL,
    dictionary TEXT NOT NULL,
    latent INTEGER NOT NULL,
    text TEXT NOT NULL,
    written TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (run, dictionary, latent)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Notes:
    """The notes in one file, which is made with the first note."""

    path: Path

    def read(self, run: str, dictionary: str, latent: int) -> str:
        """The note on a latent, "" when there is none."""
        with self._open() as connection:
            if connection is None:
                return ""
            row = connection.execute(
                "SELECT text FROM feature_notes WHERE run = ? AND dictionary = ? AND latent = ?",
                (run, dictionary, latent),
            ).fetchone()
        return row[0] if row else ""

    def of_run(self, run: str, dictionary: str) -> dict[int, str]:
        """Latent -> note."""
        with self._open() as connection:
            if connection is None:
                return {}
            return dict(
                connection.execute(
                    "SELECT latent, text FROM feature_notes WHERE run = ? AND dictionary = ?", (run, dictionary)
                )
            )

    def write(self, run: str, dictionary: str, latent: int, text: str) -> None:
        """Replace the note on a latent; an empty text removes it."""
        text = text.strip()
        with self._open(make=True) as connection:
            assert connection is not None
            connection.execute(
                "DELETE FROM feature_notes WHERE run = ? AND dictionary = ? AND latent = ?", (run, dictionary, latent)
            )
            if text:
                connection.execute(
                    "INSERT INTO feature_notes (run, dictionary, latent, text) VALUES (?, ?, ?, ?)",
                    (run, dictionary, latent, text),
                )

    @contextmanager
    def _open(self, make: bool = False) -> Iterator[sqlite3.Connection | None]:
        if not make and not self.path.exists():
            yield None
            return
        try:
            with closing(sqlite3.connect(self.path, timeout=5)) as connection, connection:
                connection.execute(SCHEMA)
                yield connection
        except sqlite3.Error as error:
            raise UserError(
                f"The notes in {str(self.path)!r} cannot be used ({error}); restore the file, or move it away and "
                "begin anew."
            ) from error
