"""Writes the tables of docs/training.md from the configuration classes.

    python scripts/make/training_tables.py docs/training.md

The text around the tables is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from page_tables import table, with_tables

from dictlearn.dictionaries import CONFIGS
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig


def sentences(config: type) -> dict[str, str]:
    """The sentence right below each field, which may stand in a class that it inherits from."""
    found: dict[str, str] = {}
    for base in config.__bases__:
        found |= {} if base is object else sentences(base)
    (of_class,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(config))).body
    assert isinstance(of_class, ast.ClassDef)
    for field, below in zip(of_class.body, of_class.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING or field.default is MISSING:
        return "" if field.default_factory is not MISSING else "required"
    return (
        "-"
        if field.default is None
        else f"`{field.default:.5g}`"
        if isinstance(field.default, float)
        else f"`{field.default}`"
    )


def options(config: type) -> str:
    said = sentences(config)
    return table(
        ["key", "default", ""], [[f"`{f.name}`", default(f), said[f.name].replace("|", "\\|")] for f in fields(config)]
    )


TABLES = {
    "run": lambda: options(TrainConfig),
    "optimiser": lambda: options(OptimiserConfig),
    **{kind: lambda config=config: options(config) for kind, config in CONFIGS.items()},  # type: ignore[misc]
}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text(), TABLES))
