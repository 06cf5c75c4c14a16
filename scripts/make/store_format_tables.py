"""Writes the tables of docs/store-format.md from what `activation_store.spec` says.

    python scripts/make/store_format_tables.py docs/store-format.md

The text around the tables is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from page_tables import table, with_tables

from activation_store.spec import (
    ACTIVATION_TYPES,
    COMPRESSIONS,
    DOCUMENT_COLUMNS,
    ROW_ARRAYS,
    STATISTICS_ARRAYS,
    STORED_TYPES,
    Geometry,
    HookSpec,
)

ROW_ARRAYS_HOLD = {
    "token_ids": "the token whose activation the row is",
    "positions": "its place in the window the model saw, from 0",
    "documents": "its document, as an index into the document table",
}
STATISTICS_HOLD = {
    "count": ("()", "rows"),
    "mean": ("(d,)", "mean row"),
    "mean_square": ("(d,)", "mean of the squares, not centred"),
    "second_moment": ("(d, d)", "covariance of some of the rows about their own mean, plus mean meanᵀ"),
    "second_moment_rows": ("()", "how many rows those are"),
    "mean_norm": ("()", "mean Euclidean length"),
    "median_norm": ("()", "median Euclidean length: the ⌈count / 2⌉-th smallest"),
    "norm_outliers": ("()", "rows longer than 10 times the median"),
}
DOCUMENT_TABLE_HOLDS = {
    "ids": "the ids of all documents as UTF-8, one after the other",
    "id_ends": "where in `ids` each id ends",
    "splits": "0 for train, 1 for held-out",
    "first_rows": "the document's first row",
    "rows": "how many rows it has",
}


def types() -> str:
    used = dict.fromkeys(ACTIVATION_TYPES, "activations")
    used |= {array.dtype: "about rows" for array in ROW_ARRAYS}
    return table(
        ["Zarr data type", "bytes", "fill value", "used for"],
        [
            [f"`{name}`", str(stored.carrier.itemsize), json.dumps(stored.fill_value), used.get(name, "tables")]
            for name, stored in STORED_TYPES.items()
        ],
    )


def arrays() -> str:
    hook = HookSpec("HOOK", (1,))
    rows = [
        [f"`{hook.array.path}`", "(rows, d) or (rows, heads, d_head)", "the hook's", "activations at the hook HOOK"],
        [f"`{hook.norms.path}`", "(rows,)", f"`{hook.norms.dtype}`", "Euclidean length of each row as stored"],
    ]
    rows += [[f"`{array.path}`", "(rows,)", f"`{array.dtype}`", ROW_ARRAYS_HOLD[array.path]] for array in ROW_ARRAYS]
    return table(["array", "shape", "type", "holds"], rows)


def statistics() -> str:
    return table(
        ["array", "shape", "type", "holds"],
        [[f"`{name}`", STATISTICS_HOLD[name][0], f"`{dtype}`", STATISTICS_HOLD[name][1]]
         for name, dtype in STATISTICS_ARRAYS.items()],
    )  # fmt: skip


def documents() -> str:
    return table(
        ["array", "type", "holds"],
        [[f"`{name}`", f"`{dtype}`", DOCUMENT_TABLE_HOLDS[name]] for name, dtype in DOCUMENT_COLUMNS.items()],
    )


def compressions() -> str:
    return table(
        ["`compression`", "codecs of a chunk after `bytes`"],
        [[f"`{name}`", f"`{json.dumps(codecs)}`" if codecs else "none"] for name, codecs in COMPRESSIONS.items()],
    )


def geometry() -> str:
    default = Geometry()
    return table(
        ["", "rows", "bytes at d = 512 in bfloat16"],
        [
            ["chunk", f"{default.rows_per_chunk:,}", f"{default.rows_per_chunk * 1024:,}"],
            ["shard", f"{default.rows_per_shard:,}", f"{default.rows_per_shard * 1024:,}"],
        ],
    )


TABLES = {made.__name__: made for made in (types, arrays, documents, statistics, compressions, geometry)}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(), TABLES))
