"""What the scripts of this folder have in common: options, training on a store, intervals over seeds, and the result.

A script measures *records*, flat dicts with a seed in each, and makes its tables of them. Both go to `--out` as JSON;
`scripts/make/reproduction_tables.py` puts the tables into docs/reproductions.md. A cell holds the mean over seeds and
the half-width of its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store, open_store
from activation_store.writer import StoreWriter
from dictlearn.circuits.head_identification import interval
from dictlearn.dictionaries.base import Dictionary
from dictlearn.terminal import TerminalProgress, print_error, print_line
from dictlearn.training.command import train_group
from dictlearn.training.configs import TrainConfig
from dictlearn.workspace import Workspace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from activation_store.harvest.corpus import Document
    from dictlearn.metrics.downstream import Downstream

FEWEST_SEEDS = 5
QUICK_SEEDS = 2

Record = dict[str, Any]
"""Numbers of one dictionary and one seed, and the words that tell it from others."""


@dataclass(frozen=True)
class Table:
    """A table of the page, by the name that its place there has."""

    header: list[str]
    rows: list[list[str]]


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What every script is told."""

    seeds: range
    quick: bool
    workspace: Workspace


def reproduce(
    method: str,
    description: str | None,
    parts: Mapping[str, Callable[[Options], list[Record]]],
    tables: Callable[[list[Record]], dict[str, Table]],
    argv: Sequence[str] | None = None,
    *,
    if_asked: Sequence[str] = (),
) -> None:
    """Measure the parts that were asked for, print their tables, and write records and tables to OUT/METHOD.json.

    Parts that were measured before and are not asked for now keep their records there. Those of ``if_asked`` need data
    that not everybody has, and are measured only when they are named.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=FEWEST_SEEDS, help=f"at least {FEWEST_SEEDS} (the default)")
    parser.add_argument(
        "--part",
        action="append",
        choices=list(parts),
        help="measure this part (may be repeated); all that need no data of yours when not given",
    )
    parser.add_argument("--out", type=Path, default=Path("reproductions"), help="folder of the result, METHOD.json")
    parser.add_argument("--workspace", type=Path, help="folder to keep stores and runs in, from where a killed script "
                        "goes on; a temporary one when not given")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seeds of next to nothing, for tests")
    parser.add_argument(
        "--tabulate", action="store_true", help="measure nothing, make the tables of OUT/METHOD.json anew"
    )
    asked = parser.parse_args(argv)
    try:
        if asked.seeds < FEWEST_SEEDS and not asked.quick:
            raise UserError(f"An interval over {asked.seeds} seeds says too little; give at least {FEWEST_SEEDS}.")
        file = asked.out / f"{method}.json"
        if asked.tabulate and not file.exists():
            raise UserError(f"There is no {str(file)!r} with records to make tables of; leave --tabulate out.")
        only = () if asked.tabulate else tuple(asked.part or (part for part in parts if part not in if_asked))
        seeds = range(QUICK_SEEDS if asked.quick else asked.seeds)
        command = shlex.join(["python", f"scripts/reproduce/{method}.py", *(sys.argv[1:] if argv is None else argv)])
        for part in only:
            begun = time.perf_counter()
            with _workspace(asked.workspace) as workspace:
                records = parts[part](Options(seeds, asked.quick, workspace))
            found = _read(file)  # now, since another process may have measured another part meanwhile
            kept = [record for record in found["records"] if record["part"] != part]
            found["records"] = kept + [{"part": part, **record} for record in records]
            found["commands"][part] = command
            found["seconds"][part] = round(time.perf_counter() - begun)
            _write(file, found, tables)
            print_line(f"{part}: {found['seconds'][part]:,} s")
        found = _read(file)
        _write(file, found, tables)
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    for name, made in tables(found["records"]).items():
        print("", name, *("| " + " | ".join(row) + " |" for row in (made.header, *made.rows)), sep="\n")


@contextmanager
def _workspace(asked: Path | None) -> Iterator[Workspace]:
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(asked or Path(folder))
        (workspace.root / "stores").mkdir(parents=True, exist_ok=True)
        yield workspace


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"commands": {}, "seconds": {}, "records": []}


def _write(file: Path, found: dict[str, Any], tables: Callable[[list[Record]], dict[str, Table]]) -> None:
    found["tables"] = {name: [made.header, *made.rows] for name, made in tables(found["records"]).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")


# --- training ---------------------------------------------------------------------------------------------------------


def train(configs: Sequence[TrainConfig[Any]], workspace: Workspace, name: str) -> list[Dictionary]:
    """The dictionaries of runs that read each batch once."""
    from dictlearn.dictionaries.files import load

    train_group(configs, workspace, workspace.sweep(name).checkpoints, name, TerminalProgress())
    return [load(workspace.run(config.name).dictionary) for config in configs]


def write_rows(location: Path, hook: str, train_rows: np.ndarray, held_out_rows: np.ndarray, name: str) -> None:
    """A store of plain vectors (N, D), or what is already there: two documents, to train on and to hold out."""
    rows = np.concatenate([train_rows, held_out_rows]).astype(np.float32)
    documents = [
        DocumentRows("train", "train", 0, len(train_rows)),
        DocumentRows("test", "held-out", len(train_rows), len(held_out_rows)),
    ]
    provenance = {"model": {"name": name, "fingerprint": f"none: {name}"}, "corpus": {"name": name}}
    hooks = [HookSpec(hook, (rows.shape[1],), "float32")]
    plan = StorePlan(len(rows), documents, {}, {"bos_token_id": None})
    with StoreWriter(location, plan, hooks, Geometry(256, 4096), provenance) as writer:
        if not writer.complete:
            first = writer.next_row
            numbers = np.arange(first, len(rows))
            writer.append({hook: rows[first:]}, numbers * 0, numbers, 1 * (numbers >= len(train_rows)), first_row=first)
            writer.finish()


def harvested(options: Options, hooks: Sequence[str], tokens: int, name: str = "rows", **asked: Any) -> str:
    """The ``name`` of a store of a model's activations, by default of the bundled one over the standard library."""
    from activation_store.harvest.corpus import open_corpus
    from activation_store.harvest.run import HarvestConfig, harvest

    if options.quick:
        tokens, pieces = 15_000, options.workspace.root / "pieces"
        write_pieces(pieces, open_corpus("stdlib").split("all")[:60])
        asked = {"corpus": str(pieces), **asked}
    store = options.workspace.store(name)
    harvest(HarvestConfig(hooks=tuple(hooks), store=store, tokens=tokens, **asked), TerminalProgress())
    return name


def harvested_stories260k(options: Options, hooks: Sequence[str]) -> str:
    """The name of a store of stories260K's activations over English novels. Raises UserError where it is not there."""
    shared = Path(os.environ.get("DICTLEARN_SHARED", ""))
    model, text = shared / "models" / "stories260K", shared / "data" / "text" / "novels"
    if not (model.is_dir() and text.is_dir()):
        raise UserError(
            "There is no stories260K: DICTLEARN_SHARED should name a folder with models/stories260K, a Hugging Face "
            "folder, and data/text/novels, a folder of texts; the bundled model needs nothing (--part bundled)."
        )
    corpus = {} if options.quick else {"corpus": str(text)}  # of novels a quick run would have not a single whole one
    return harvested(options, hooks, 300_000, model=str(model), **corpus)


def write_pieces(folder: Path, documents: Sequence[Document], change: Callable[[str], str] = str) -> None:
    """Pieces of 100 lines, a file each, so that a short harvest has many; every other one changed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [document.text.splitlines(keepends=True) for document in documents]
    pieces = ["".join(of[first : first + 100]) for of in lines for first in range(0, len(of), 100)]
    for number, piece in enumerate(pieces):
        (folder / f"{number:05d}.txt").write_text(change(piece) if number % 2 else piece)


# --- measuring --------------------------------------------------------------------------------------------------------


def held_out(
    workspace: Workspace, store: str, hook: str, target_hook: str | None, rows: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Held-out rows of a store, raw, and their targets."""
    from dictlearn.metrics.evaluation import row_batches

    yield from row_batches(open_store(workspace.store(store)), (hook,), (target_hook or hook,), rows, 4096)


def downstream(dictionary: Dictionary, store: Store, tokens: int) -> Downstream:
    """What splicing a dictionary into the store's own model costs on the store's held-out text."""
    from dictlearn.metrics.downstream import measure_downstream
    from dictlearn.metrics.evaluation import token_windows

    hook_out = dictionary.provenance["hook_out"]
    mean = torch.tensor(store.statistics(hook_out).mean).float().flatten()
    bos = store.manifest.batches["bos_token_id"]
    windows = token_windows(store, bos, store.manifest.batches["context"], tokens)
    return measure_downstream(language_model(store), dictionary, hook_out, mean, windows, skip_first=bos is not None)


@cache
def language_model(store: Store) -> TransformerBridge:
    """The one whose activations are in ``store``, loaded once."""
    from activation_store.harvest.language_model import load_language_model, resolve_model

    return load_language_model(resolve_model(store.provenance["model"]["name"]))


# --- figures ----------------------------------------------------------------------------------------------------------


def figure(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± half-width; a single value as it is, and "-" where nothing was measured."""
    there = [value for value in values if value is not None and math.isfinite(value)]
    if len(there) < 2:
        return f"{there[0]:.{digits}f}" if there else "-"
    found = interval(there)
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"


def tabulate(records: Sequence[Record], label: Mapping[str, str], columns: Mapping[str, tuple[str, int]]) -> Table:
    """A row for each different set of words, in the order in which they come, and a figure in each cell.

    Args:
        label: heading -> key of a word.
        columns: heading -> key of a number, and its digits.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(str(record[key]) for key in label.values()), []).append(record)
    rows = [
        [*words, *(figure([record.get(key) for record in group], digits) for key, digits in columns.values())]
        for words, group in groups.items()
    ]
    return Table([*label, *columns], rows)


def differences(records: Sequence[Record], key: str, first: Record, second: Record) -> list[float]:
    """``first`` minus ``second`` seed by seed, of the records with these words."""

    def by_seed(words: Record) -> dict[int, float]:
        return {r["seed"]: r[key] for r in records if all(r.get(name) == word for name, word in words.items())}

    ones, others = by_seed(first), by_seed(second)
    return [ones[seed] - others[seed] for seed in sorted(ones.keys() & others.keys())]
