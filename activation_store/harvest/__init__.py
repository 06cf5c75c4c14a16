"""Where activations come from: a corpus through a language model. Names are imported when first used; see `run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from activation_store.on_first_use import on_first_use

if TYPE_CHECKING:
    from activation_store.harvest.language_model import load_language_model, load_tokenizer, resolve_model
    from activation_store.harvest.live import LiveLoader
    from activation_store.harvest.run import HarvestConfig, HarvestInterrupted, HarvestPlan, describe, harvest

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

__getattr__, __dir__ = on_first_use(
    __name__,
    {
        "language_model": "load_language_model load_tokenizer resolve_model",
        "live": "LiveLoader",
        "run": "HarvestConfig HarvestInterrupted HarvestPlan describe harvest",
    },
)
