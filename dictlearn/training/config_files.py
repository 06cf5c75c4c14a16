"""Configurations of runs as files: YAML whose keys are the fields of `dictlearn.training.configs.TrainConfig`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.errors import UserError
from activation_store.filters import RowFilter
from dictlearn.training.configs import TrainConfig
from dictlearn.training.optimiser_config import OptimiserConfig

if TYPE_CHECKING:
    import yaml

SECTIONS = {"dictionary": "kind: topk", "optimiser": "learning_rate: 0.001", "row_filter": "positions: [1, 100]"}
"""Keys of a configuration that have keys of their own, with an example."""


def config_from_yaml(path: str | Path) -> TrainConfig[Any]:
    """Read a run's configuration; an unknown key or a wrong type is named.

    Raises:
        UserError: no such file, not YAML, or a value that does not fit.
    """
    record = read_yaml(path)
    record.pop("sweep", None)  # whose member a run is decides nothing about it
    return config_from_dict(record, repr(str(path)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a file. Raises UserError when there is none, or it holds something else."""
    import yaml

    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no configuration file {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader), repr(str(path)))
        record = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"The configuration file {str(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is no text in UTF-8, as a configuration file is.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} holds no configuration; it should be keys and values such as 'name: sae'.")
    return record


def config_to_dict(config: TrainConfig[Any]) -> dict[str, Any]:
    """Plain values for YAML, the dictionary's kind included."""
    record = json.loads(json.dumps(asdict(config)))  # with lists for tuples, as YAML gives them back
    record["dictionary"] = {"kind": config.dictionary.kind, **record["dictionary"]}
    return record


def config_from_dict(record: dict[str, Any], where: str) -> TrainConfig[Any]:
    """The configuration that plain values say; a key that is unknown or a value that does not fit is named.

    Args:
        where: the file or option that the values come from, for the sentence.

    Raises:
        UserError: an unknown key or kind, a missing key, or a value that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    from dictlearn.dictionaries import config_class

    sections = {name: record.get(name) or {} for name in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} is {section!r}; it should be keys and values such as {SECTIONS[name]!r}.")
    nested = dict(sections["dictionary"])
    kind = nested.pop("kind", "topk")
    if not isinstance(kind, str):
        raise UserError(f"{where}: dictionary.kind is {kind!r}; it should be a name such as topk.")
    try:
        _refuse_unknown_keys(where, "", record, TrainConfig)
        _refuse_unknown_keys(where, "dictionary.", nested, config_class(kind))
        _refuse_unknown_keys(where, "optimiser.", sections["optimiser"], OptimiserConfig)
        _refuse_unknown_keys(where, "row_filter.", sections["row_filter"], RowFilter)
        dictionary: Any = TypeAdapter(config_class(kind)).validate_python(nested)
        complete: Any = TrainConfig[config_class(kind)]  # type: ignore[misc]
        config: TrainConfig[Any] = TypeAdapter(complete).validate_python(record | {"dictionary": dictionary})
        refuse_not_finite(f"{where}: ", asdict(config))
        _refuse_truths(where, "", record, config_to_dict(config))
        return config
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key}: {first['msg']} (found {first['input']!r}).") from error


def refuse_not_finite(prefix: str, values: dict[str, Any]) -> None:
    """Raise UserError for a number that is infinite or none, at any depth; ``prefix`` begins the sentence."""
    for key, value in values.items():
        if isinstance(value, dict):
            refuse_not_finite(f"{prefix}{key}.", value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{key} is {value}; it must be a finite number.")


def _refuse_truths(where: str, prefix: str, given: dict[str, Any], made: dict[str, Any]) -> None:
    """YAML reads yes and on as true, which Python takes for the number 1."""
    for key, value in given.items():
        if isinstance(value, dict):
            _refuse_truths(where, f"{prefix}{key}.", value, made.get(key) or {})
        elif isinstance(value, bool) and not isinstance(made.get(key), bool):
            raise UserError(
                f"{where}: {prefix}{key} is {'true' if value else 'false'}; it should be a number or a name."
            )


def _refuse_repeated_keys(root: yaml.Node | None, where: str) -> None:
    """YAML takes the last of two equal keys, and says nothing."""
    import yaml

    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:  # an alias may stand within what it names
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            todo.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                between = f"lines {lines[key.value]} and {line}"
                raise UserError(f"{where} has the key {key.value} twice, in {between}; leave one of them out.")
            lines[key.value] = line


def _refuse_unknown_keys(where: str, prefix: str, record: dict[str, Any], cls: type) -> None:
    known = [f.name for f in fields(cls)]
    for key in record:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise UserError(f"{where} has an unknown key {prefix}{key}; {hint}")
