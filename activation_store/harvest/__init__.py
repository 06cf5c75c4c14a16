"""Where activations come from: a corpus through a language model. Names are imported when first used; see `run`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_store.harvest.language_model import load_language_model, load_tokenizer, resolve_model
    from activation_store.harvest.live import LiveLoader
    from activation_store.harvest.run import HarvestConfig, HarvestInterrupted, HarvestPlan, describe, harvest

_HOMES = {
    "HarvestConfig": "run",
    "HarvestInterrupted": "run",
    "HarvestPlan": "run",
    "LiveLoader": "live",
    "describe": "run",
    "harvest": "run",
    "load_language_model": "language_model",
    "load_tokenizer": "language_model",
    "resolve_model": "language_model",
}

__all__ = [
    "HarvestConfig",
    "HarvestInterrupted",
    "HarvestPlan",
    "LiveLoader",
    "describe",
    "harvest",
    "load_language_model",
    "load_tokenizer",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
