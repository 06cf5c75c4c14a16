"""What a user asks a harvest for, and whether it can be had: settled without torch and before anything is touched.

`HarvestConfig` is the options; `Request` is a config whose names have been looked up and whose numbers fit together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.codec import check_compression
from activation_store.devices import refuse_missing
from activation_store.errors import UserError
from activation_store.harvest.batches import BatchPlan, plan_batches
from activation_store.harvest.corpus import Corpus, is_held_out, open_corpus
from activation_store.harvest.disk_space import refuse_full_disk
from activation_store.harvest.language_model import (
    ModelSpec,
    load_tokenizer,
    resolve_model,
    tokenizer_fingerprint,
)
from activation_store.location import open_place
from activation_store.place import Place
from activation_store.progress import Progress
from activation_store.spec import (
    METADATA_FILE,
    DocumentRows,
    Geometry,
    HookSpec,
    Manifest,
    StorePlan,
    differences,
    foreign_names,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSIONS_RECORDED = ("torch", "transformers", "transformer-lens", "tokenizers")
"""The packages that decide what an activation is, down to its last bits."""

CORPUS_CHARS_KEPT = 200_000_000
CORPUS_CHARS_PER_ROW = 20
"""A corpus is shuffled in memory, so of a large one only the beginning is read: 200 million characters, or 20 for each
row asked for where that is more (a token of English is 4 to 5). The manifest says when this happened."""


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What to harvest, from what, and where to. Every field is checked before a model is loaded."""

    hooks: tuple[str, ...]
    """TransformerLens names, such as blocks.2.hook_resid_post; all are read in one forward pass."""

    store: str | Path
    """The store to make or to continue: a name, a folder, or a URL such as s3://bucket/name."""

    model: str = "bundled"
    """Language model: "bundled", a folder in Hugging Face layout, or a hub name such as gpt2."""

    corpus: str = "stdlib"
    """Text: "stdlib", a text, JSONL or Parquet file, a folder of them, or hub:owner/dataset[:config[:split]]."""

    text_field: str = "text"
    """Key or column that holds the text, in JSONL, Parquet and hub data sets."""

    tokens: int = 1_000_000
    """Rows to store, one per token; a smaller corpus gives what it has. BOS and padding give no row."""

    context: int = 128
    """Tokens the model sees together."""

    batch_size: int = 32
    """Windows of `context` tokens in one forward pass."""

    seed: int = 0
    """Order in which documents are taken."""

    dtype: str = "bfloat16"
    """Type on disk: bfloat16, float16 or float32."""

    compression: str = "none"
    """What is done to chunks on disk: none, so that they can be memory-mapped, or zstd."""

    model_dtype: str = "float32"
    """Type the model computes in: float32, bfloat16 or float16. bfloat16 moves rows by 1 to 2 % of their length, where
    storing moves them by 0.16 %, and takes half the time on a CPU that has instructions for it."""

    capture: str = "auto"
    """Where activations are read: in the TransformerLens bridge, in the modules of Hugging Face's transformers, which
    compute them sooner, or auto, the modules where they have the hooks and the first batch is as the Bridge's."""

    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1, or auto, which is cuda where there is one and else cpu."""

    threads: int | None = None
    """CPU threads for the model; None leaves torch's own choice."""

    rows_per_chunk: int = Geometry.rows_per_chunk
    """Rows in a chunk, the unit in which a store is shuffled."""

    rows_per_shard: int = Geometry.rows_per_shard
    """Rows in a shard, the unit in which a store is committed; a multiple of rows_per_chunk."""


@dataclass(frozen=True)
class Request:
    """A config whose names have been looked up and whose numbers fit together; made by ``of``, imports no torch."""

    config: HarvestConfig
    place: Place
    spec: ModelSpec
    hooks: tuple[HookSpec, ...]
    geometry: Geometry
    existing: Manifest | None
    corpus: Corpus
    tokenizer: Tokenizer
    capture: str
    """The way of reading activations, for which "auto" is a question still open: the first batch will answer it."""

    @classmethod
    def of(cls, config: HarvestConfig, to_store: bool = True) -> Request:
        """Look everything up. A request that is not to be stored needs no room, and no look at what is in its place."""
        _check_numbers(config)
        if config.device != "auto":
            refuse_missing(config.device)
        geometry = Geometry(config.rows_per_chunk, config.rows_per_shard)
        spec = resolve_model(config.model)
        hooks = tuple(HookSpec(name, spec.hook_shape(name), config.dtype) for name in config.hooks)
        if spec.n_ctx is not None and config.context > spec.n_ctx:
            raise UserError(
                f"A context of {config.context} tokens was asked for, but {spec.name} was made for {spec.n_ctx} at "
                f"most; use --context {spec.n_ctx} or less."
            )
        place = open_place(config.store)
        existing = existing_manifest(place) if to_store else None
        if existing is None and to_store:
            refuse_full_disk(place, config.tokens, hooks, geometry, None)
        limit = max(CORPUS_CHARS_KEPT, CORPUS_CHARS_PER_ROW * config.tokens)
        corpus = open_corpus(config.corpus, config.text_field, limit_chars=limit)
        capture = _way_of_capture(config, spec, existing)
        return cls(config, place, spec, hooks, geometry, existing, corpus, load_tokenizer(spec), capture)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the store says it was made from."""
        return {
            "model": self.spec.provenance(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "corpus": {
                "name": _lasting_name(self.corpus.name),
                "fingerprint": self.corpus.fingerprint,
                "documents": len(self.corpus.documents),
                "left_out": self.corpus.left_out,
                "origin": self.corpus.origin,
            },
            "computed": {
                "device": self.device.split(":")[0],
                "dtype": self.config.model_dtype,
                "capture": self.capture,
            },
            "versions": {package: _version(package) for package in VERSIONS_RECORDED},
        }

    @cached_property
    def device(self) -> str:
        """The device asked for; "auto" is torch's to decide, unless no driver of a GPU leaves any doubt."""
        if self.config.device != "auto":
            return self.config.device
        if not any(Path(driver).exists() for driver in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
            return "cpu"  # no driver of a GPU: spare the import
        import torch

        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"

    @property
    def batches(self) -> dict[str, Any]:
        """What fixes the batches, given model and corpus."""
        config = self.config
        return {
            "rows": config.tokens,
            "context": config.context,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "bos_token_id": self.spec.bos_token_id,
        }

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Each text as token ids, nothing added to it."""
        # "fast" is without the place of each token in its text: 20 to 40 % of the time for what nobody asks.
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def plan(self, progress: Progress) -> BatchPlan:
        return plan_batches(
            self.corpus.documents,
            self.token_ids,
            rows=self.config.tokens,
            context=self.config.context,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            bos_token_id=self.spec.bos_token_id,
            vocab_size=self.spec.vocab_size,
            progress=progress,
        )

    def store_plan(self, plan: BatchPlan) -> StorePlan:
        rows = plan.rows_per_document
        first_rows = np.cumsum(rows) - rows
        documents = [
            DocumentRows(identity, "held-out" if is_held_out(identity) else "train", int(first), int(count))
            for identity, first, count in zip(plan.document_ids, first_rows, rows, strict=True)
        ]
        return StorePlan(plan.rows, documents, plan.excluded, {**self.batches, "fingerprint": plan.fingerprint})

    def manifest(self, plan: BatchPlan) -> Manifest:
        """The store's identity as this request would make it."""
        compression = self.config.compression
        return Manifest.of_plan(self.store_plan(plan), self.hooks, self.geometry, self.provenance, compression)

    def is_complete(self) -> bool:
        """Whether the store is there, whole, and was made from the same things: told without tokenizing the corpus.

        Other versions of torch are no reason to compute a whole store again, so a complete one is taken as it is.
        """
        existing = self.existing
        if existing is None or not existing.complete:
            return False
        here = (existing.hooks, existing.geometry, existing.compression)
        asked_for_same = here == (self.hooks, self.geometry, self.config.compression)
        batches = {key: value for key, value in existing.batches.items() if key != "fingerprint"}
        return asked_for_same and batches == self.batches and _but_versions(existing) == _but_versions(self)

    def refuse_another_store(self, wanted: Manifest) -> None:
        """Refuse to touch a store that was made from something else, naming what differs."""
        if self.existing is None:
            return
        if self.existing.complete:
            wanted = replace(
                wanted, provenance={**wanted.provenance, "versions": self.existing.provenance.get("versions")}
            )
        found = differences(self.existing.identity(), wanted.identity())
        found.sort(key=lambda words: any(hash_ in words for hash_ in ("checksum", "fingerprint", "excluded")))
        if found:  # what a person set comes first, what follows from it last
            more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
            raise UserError(
                f"The store {self.config.store} was made otherwise: {'; '.join(found[:4])}{more}. "
                "Ask for the same as before, or choose another name for the new store."
            )


def _lasting_name(corpus: str) -> str:
    """A corpus's name as it can be found from any working directory."""
    return corpus if corpus == "stdlib" or corpus.startswith("hub:") else str(Path(corpus).resolve())


def _but_versions(made: Manifest | Request) -> dict[str, Any]:
    return {key: value for key, value in made.provenance.items() if key != "versions"}


def _way_of_capture(config: HarvestConfig, spec: ModelSpec, existing: Manifest | None) -> str:
    """The way asked for; of "auto", the one that the rows already there were read, as the last bits depend on it."""
    if config.capture == "modules" and spec.loader != "transformers":
        raise UserError(
            f"{spec.name} is no Hugging Face model, so its activations cannot be read from one's modules; "
            "use --capture auto or bridge."
        )
    if config.capture == "auto" and existing is not None:
        return str(existing.provenance.get("computed", {}).get("capture", "auto"))
    return config.capture


def _check_numbers(config: HarvestConfig) -> None:
    for name in ("tokens", "context", "batch_size"):
        if getattr(config, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(config, name)}; it must be at least 1.")
    if config.threads is not None and config.threads < 1:
        raise UserError(f"--threads is {config.threads}; it must be at least 1.")
    if not config.hooks:
        raise UserError("No hook was asked for; name at least one, such as --hooks blocks.2.hook_resid_post.")
    if twice := [name for name in dict.fromkeys(config.hooks) if config.hooks.count(name) > 1]:
        raise UserError(f"The hook {twice[0]} was asked for {config.hooks.count(twice[0])} times; name it once.")
    if config.model_dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"The model cannot compute in {config.model_dtype!r}; use float32, bfloat16 or float16.")
    check_compression(config.compression)
    if config.capture not in ("auto", "bridge", "modules"):
        raise UserError(f"Activations cannot be captured from {config.capture!r}; use auto, bridge or modules.")


def existing_manifest(place: Place) -> Manifest | None:
    """The manifest of a store that is there; None when nothing is.

    Raises:
        UserError: something else is there, the manifest is damaged, or the place cannot be reached.
    """
    try:
        contents = place.names()
        if METADATA_FILE in contents:
            return Manifest.from_bytes(place.read(METADATA_FILE), place.where(METADATA_FILE))
    except OSError as problem:
        raise UserError(f"{place.location} cannot be read: {problem.strerror or problem}.") from problem
    foreign = foreign_names(contents)
    if foreign:
        raise UserError(
            f"{place.location} is not empty and is no activation store (it holds {min(foreign)}); "
            "name another folder for the store."
        )
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
