"""A harvest: a corpus through a language model, the activations at its hooks into a store.

What comes first is what can be refused cheaply. ``describe`` needs no torch: names, hooks, context length, corpus,
disk space and an existing store are all settled before a model is loaded. ``harvest`` then loads the model, computes
one batch to see every hook fire with the shape its config promises, and only then makes the store.

The same command continues an unfinished harvest at the batch that holds the first row not yet committed. Batches are
always computed whole and at one shape, so the finished store has the bytes of one that was never interrupted (on the
same device, with the same versions; the versions are recorded, and a store begun with others is refused by name).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from activation_store.errors import UserError
from activation_store.harvest.batches import Batch, BatchPlan, plan_batches
from activation_store.harvest.corpus import Corpus, is_held_out, open_corpus
from activation_store.harvest.language_model import (
    ModelSpec,
    load_tokenizer,
    resolve_model,
    tokenizer_fingerprint,
)
from activation_store.progress import NoProgress, Progress, Task
from activation_store.spec import (
    METADATA_FILE,
    OWNER_FILE,
    STAGING_FOLDER,
    DocumentRows,
    Geometry,
    HookSpec,
    Manifest,
    StorePlan,
    arrays_of,
    differences,
)
from activation_store.writer import StoreWriter

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from activation_store.harvest.capture import Capture

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

    store: Path
    """Folder of the store to make or to continue."""

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

    model_dtype: str = "float32"
    """Type the model computes in: float32, bfloat16 or float16."""

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
class HarvestPlan:
    """What a harvest will do, for ``--dry-run``. Sizes in bytes, times in seconds."""

    rows: int
    rows_asked: int
    hooks: dict[str, tuple[int, ...]]
    documents: int
    batches: int
    excluded: dict[str, int]
    bytes_on_disk: int
    bytes_free: int
    peak_memory: int
    seconds: float | None
    seconds_are: str
    """How ``seconds`` was come by: it is an estimate, and this says of what kind."""
    rows_committed: int
    """Rows already there, when the harvest continues a store."""
    complete: bool
    """The store is already there, whole: nothing will be computed."""


class HarvestInterrupted(KeyboardInterrupt):
    """Ctrl-C during a harvest; the text says what is safe and how to go on."""


def harvest(config: HarvestConfig, progress: Progress | None = None, stop_after: int | None = None) -> Path:
    """Make the store of ``config``, or continue it, or find it already complete.

    Args:
        stop_after: compute this many batches and stop, leaving a store that the same call continues.

    Returns:
        The store's folder.

    Raises:
        UserError: see the module; nothing is computed when the request cannot be met.
        HarvestInterrupted: on Ctrl-C; committed rows stay.
    """
    progress = progress or NoProgress()
    request = Request.of(config)
    if request.is_complete():
        return config.store
    plan = request.plan(progress)
    wanted = request.manifest(plan)
    request.refuse_another_store(wanted)
    _refuse_full_disk(config.store, plan.rows, request.hooks, request.geometry, request.existing)
    try:
        _compute(request, plan, progress, stop_after)
    except KeyboardInterrupt:
        committed = _read_manifest(config.store)
        raise HarvestInterrupted(
            f"Stopped with {committed.rows if committed else 0:,} of {plan.rows:,} rows safe in {config.store}; "
            "the same command continues from there."
        ) from None
    return config.store


def describe(config: HarvestConfig, progress: Progress | None = None) -> HarvestPlan:
    """What ``harvest(config)`` would do, without doing it and without torch.

    The corpus is tokenized, so rows and bytes are exact; memory and time are estimates.

    Raises:
        UserError: whatever ``harvest`` would refuse before loading the model.
    """
    request = Request.of(config)
    plan = request.plan(progress or NoProgress())
    request.refuse_another_store(request.manifest(plan))
    existing = request.existing
    _refuse_full_disk(config.store, plan.rows, request.hooks, request.geometry, existing)
    rows_left = plan.rows - (existing.rows if existing else 0)
    seconds, how = _estimate_seconds(request, plan, rows_left)
    return HarvestPlan(
        rows=plan.rows,
        rows_asked=config.tokens,
        hooks={hook.name: hook.shape for hook in request.hooks},
        documents=len(plan.document_ids),
        batches=plan.batches,
        excluded=plan.excluded,
        bytes_on_disk=_bytes_on_disk(plan.rows, request.hooks, request.geometry),
        bytes_free=_bytes_free(config.store),
        peak_memory=_estimate_memory(request, plan),
        seconds=seconds,
        seconds_are=how,
        rows_committed=existing.rows if existing else 0,
        complete=bool(existing and existing.complete),
    )


# --- the request, checked -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A config whose names have been looked up and whose numbers fit together; made by ``of``, imports no torch."""

    config: HarvestConfig
    spec: ModelSpec
    hooks: tuple[HookSpec, ...]
    geometry: Geometry
    existing: Manifest | None
    corpus: Corpus
    tokenizer: Tokenizer
    capture: str
    """The way of reading activations, for which "auto" is a question still open: the first batch will answer it."""

    @classmethod
    def of(cls, config: HarvestConfig) -> Request:
        _check_numbers(config)
        geometry = Geometry(config.rows_per_chunk, config.rows_per_shard)
        spec = resolve_model(config.model)
        hooks = tuple(HookSpec(name, spec.hook_shape(name), config.dtype) for name in config.hooks)
        if spec.n_ctx is not None and config.context > spec.n_ctx:
            raise UserError(
                f"A context of {config.context} tokens was asked for, but {spec.name} was made for {spec.n_ctx} at "
                f"most; use --context {spec.n_ctx} or less."
            )
        existing = _read_manifest(config.store)
        if existing is None:
            _refuse_full_disk(config.store, config.tokens, hooks, geometry, None)
        limit = max(CORPUS_CHARS_KEPT, CORPUS_CHARS_PER_ROW * config.tokens)
        corpus = open_corpus(config.corpus, config.text_field, limit_chars=limit)
        capture = _way_of_capture(config, spec, existing)
        return cls(config, spec, hooks, geometry, existing, corpus, load_tokenizer(spec), capture)

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

        return "cuda" if torch.cuda.is_available() else "cpu"

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

    def plan(self, progress: Progress) -> BatchPlan:
        return plan_batches(
            self.corpus.documents,
            lambda texts: [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)],
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
        return Manifest.of_plan(self.store_plan(plan), self.hooks, self.geometry, self.provenance)

    def is_complete(self) -> bool:
        """Whether the store is there, whole, and was made from the same things: told without tokenizing the corpus.

        Other versions of torch are no reason to compute a whole store again, so a complete one is taken as it is.
        """
        existing = self.existing
        if existing is None or not existing.complete:
            return False
        asked_for_same = (existing.hooks, existing.geometry) == (self.hooks, self.geometry)
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
    if config.capture not in ("auto", "bridge", "modules"):
        raise UserError(f"Activations cannot be captured from {config.capture!r}; use auto, bridge or modules.")


def _read_manifest(store: Path) -> Manifest | None:
    """The manifest of a store that is there; None when nothing is.

    Raises:
        UserError: when something else is there, or the manifest is damaged.
    """
    file = store / METADATA_FILE
    try:
        if file.exists():
            return Manifest.from_bytes(file.read_bytes(), str(file))
        foreign = store.is_dir() and {entry.name for entry in store.iterdir()} - {OWNER_FILE, STAGING_FOLDER}
    except OSError as error:
        raise UserError(f"{store} cannot be read: {error.strerror}.") from error
    if store.exists() and not store.is_dir():
        raise UserError(f"{store} is a file; name a folder for the store.")
    if foreign:
        raise UserError(
            f"{store} is not empty and is no activation store (it holds {min(foreign)}); "
            "name another folder for the store."
        )
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- size, memory, time ---------------------------------------------------------------------------------------------


def _bytes_on_disk(rows: int, hooks: Sequence[HookSpec], geometry: Geometry) -> int:
    """Size of a store with ``rows`` rows: whole chunks, shard indexes, statistics; without the document table."""
    chunks = -(-rows // geometry.rows_per_chunk)
    index = geometry.shards(rows) * (16 * geometry.chunks_per_shard + 4)
    arrays = sum(chunks * geometry.rows_per_chunk * array.row_bytes + index for array in arrays_of(hooks))
    return arrays + sum(8 * (hook.d * hook.d + hook.d + 2) for hook in hooks)


def _bytes_free(store: Path) -> int:
    folder = store.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _refuse_full_disk(
    store: Path, rows: int, hooks: Sequence[HookSpec], geometry: Geometry, existing: Manifest | None
) -> None:
    """What is committed already does not count; a shard is written beside the others, so nothing is needed twice."""
    needed = _bytes_on_disk(rows, hooks, geometry)
    if existing is not None:
        needed -= _bytes_on_disk(existing.rows, hooks, geometry)
    free = _bytes_free(store)
    if needed > free:
        raise UserError(
            f"{rows:,} rows of {len(hooks)} {'hook' if len(hooks) == 1 else 'hooks'} need "
            f"{_size(needed)} on the disk of {store}, where {_size(free)} are free; ask for fewer tokens or hooks, "
            "or name another place."
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _estimate_memory(request: Request, plan: BatchPlan) -> int:
    """Peak of the process in bytes: what importing takes, the weights, one forward pass, and what is in hand."""
    spec, config = request.spec, request.config
    per_number = 4 if config.model_dtype == "float32" else 2
    weights = spec.n_layers * spec.parameters_per_layer() + 2 * spec.vocab_size * spec.d_model
    tokens = config.batch_size * config.context
    widest = 6 * spec.d_model + 4 * (spec.d_mlp or 4 * spec.d_model) + 4 * spec.n_heads * config.context
    rows = sum(hook.d for hook in request.hooks) * tokens * 8
    sums = sum(3 * 8 * hook.d * hook.d for hook in request.hooks)
    text = sum(len(document.text) for document in request.corpus.documents)
    return BEFORE_THE_MODEL + (weights + tokens * widest) * per_number + rows + sums + text + 12 * plan.rows


BEFORE_THE_MODEL = 680_000_000
"""Bytes resident after importing torch (CPU build) and transformer-lens, and tokenizing by the million characters."""


def _estimate_seconds(request: Request, plan: BatchPlan, rows_left: int) -> tuple[float | None, str]:
    """Time for the forward passes that are left, from the floating-point operations in them."""
    if request.device != "cpu":
        return None, "not estimated on a GPU; the progress bar will tell after the first batches"
    if rows_left == 0:
        return 0.0, "nothing is left to compute"
    spec, config = request.spec, request.config
    layers = min(spec.n_layers, spec.last_layer_needed(config.hooks) + 1)
    products = 2 * spec.parameters_per_layer() / PRODUCTS_REACH
    scores = SCORE_TAKES * spec.n_heads * config.context
    tokens = plan.batches * config.batch_size * config.context * rows_left / plan.rows
    work = tokens * layers * (products + scores)
    return work / _matrix_speed() + LOADING_TAKES, (
        f"an estimate: the work of {work / 1e9:,.0f} GFLOP, at the speed numpy multiplies matrices with here now, "
        f"and {LOADING_TAKES:.0f} s to load the model"
    )


PRODUCTS_REACH = 0.8
"""Share of the speed of a large matrix product that the model's own products reach."""

SCORE_TAKES = 1500
"""One attention score, at the Bridge's eager attention, takes as long as this many operations of a matrix product: it
is written and read by some ten elementwise steps (measured on 8 heads of 32, context 128 to 512, on a CPU)."""

LOADING_TAKES = 8.0
"""Seconds, nearly all of them imports."""


def _matrix_speed() -> float:
    """Floating-point operations per second of a float32 matrix product, the best of ten short ones."""
    a = np.ones((768, 768), dtype=np.float32)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 768**3 / best


# --- computing ------------------------------------------------------------------------------------------------------


def _compute(request: Request, plan: BatchPlan, progress: Progress, stop_after: int | None) -> None:
    """Run the forward passes that are left and write their rows."""
    config = request.config
    rows_committed = request.existing.rows if request.existing else 0
    if rows_committed == plan.rows:  # killed between the last commit and the statistics
        _open_writer(request, plan).finish()
        return

    import torch
    from threadpoolctl import ThreadpoolController

    threads_before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with progress.task("Loading the model", total=1, unit="model") as task:
            capture, way, words = _open_capture(request, plan)
            task.advance(1, through=words)
        # The writer's sums are small matrix products in numpy, whose BLAS has threads of its own beside torch's: they
        # wait for each other by spinning, and one product then takes ten times as long as on a single thread.
        one_blas_thread = ThreadpoolController().select(internal_api="openblas").limit(limits=1)
        with one_blas_thread, capture:
            computed = _computed_batches(capture, plan, rows_committed, request.device)
            title = f"Harvesting from row {rows_committed:,}" if rows_committed else "Harvesting"
            with progress.task(title, total=plan.rows - rows_committed, unit="rows") as task:
                _write(replace(request, capture=way), plan, computed, task, stop_after)
    finally:
        torch.set_num_threads(threads_before)


def _open_capture(request: Request, plan: BatchPlan) -> tuple[Capture, str, str]:
    """The capture, "bridge" or "modules", and the same in words; compared on the first batch if the store is new."""
    import torch

    from activation_store.harvest.modules import open_capture

    config = request.config
    first, _ = next(plan.batches_from(0))

    def first_batch(capture: Capture) -> dict[str, torch.Tensor]:
        with capture:
            return _run(capture.peek, first, plan, request.device)

    return open_capture(
        request.spec,
        {hook.name: hook.shape for hook in request.hooks},
        getattr(torch, config.dtype),
        way=request.capture,
        device=request.device,
        model_dtype=config.model_dtype,
        first_batch=first_batch if request.existing is None else None,
    )


def _computed_batches(
    capture: Capture, plan: BatchPlan, first_row: int, device: str
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Batches with the activations of their kept rows, from the batch that holds ``first_row``."""
    for batch, _ in plan.batches_from(first_row):
        rows = _run(capture.run, batch, plan, device)
        yield batch, {hook: _as_stored(values) for hook, values in rows.items()}


def _run(
    forward: Callable[[torch.Tensor, torch.Tensor | None], dict[str, torch.Tensor]],
    batch: Batch,
    plan: BatchPlan,
    device: str,
) -> dict[str, torch.Tensor]:
    """The kept rows of a batch at every hook."""
    import torch

    tokens = torch.from_numpy(batch.tokens_BC).to(device)
    all_kept = batch.rows == batch.tokens_BC.size
    kept = None if all_kept else torch.from_numpy(batch.kept_N).to(device)
    try:
        return forward(tokens, kept)
    except UserError as error:
        raise UserError(f"Batch {batch.index} of {plan.batches}: {error}") from error


def _as_stored(rows: Any) -> np.ndarray:
    """A tensor as numpy carries it to disk: bfloat16 as its uint16 bits."""
    import torch

    rows = rows.cpu()
    return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def _write(
    request: Request,
    plan: BatchPlan,
    computed: Iterator[tuple[Batch, dict[str, np.ndarray]]],
    task: Task,
    stop_after: int | None,
) -> None:
    """Append batch after batch, and finish the store when the last row is in.

    The first batch is computed before the store is made: a hook that does not fire must not leave an empty one behind.
    """
    started = time.perf_counter()
    first = next(computed)
    with _open_writer(request, plan) as writer:
        rows_before = writer.next_row
        for count, (batch, rows) in enumerate(chain([first], computed), start=1):
            before = writer.next_row
            writer.append(rows, batch.token_ids_N, batch.positions_N, batch.documents_N, first_row=batch.first_row)
            rate = (writer.next_row - rows_before) / (time.perf_counter() - started)
            task.advance(writer.next_row - before, tokens_per_s=f"{rate:,.0f}")
            if count == stop_after and writer.next_row < plan.rows:
                return
        writer.finish()


def _open_writer(request: Request, plan: BatchPlan) -> StoreWriter:
    return StoreWriter(
        request.config.store, request.store_plan(plan), request.hooks, request.geometry, request.provenance
    )
