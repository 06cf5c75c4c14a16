"""Several stores become one.

Stores of the same hooks are put one after the other: all documents of the first, then those of the second. Stores of
the same rows (the same plan: documents, tokens, batches) at different hooks are put side by side, which is what one
wants after harvesting one more layer. Anything else is refused, and the refusal names what differs.

The model and the tokenizer must be the same. What else the stores' provenance has in common stays; the rest is listed
for each of them, with its fingerprint, under ``merged``. A document that is in two of the stores would count twice: it
is refused, or kept on request, the later ones named ``ID #2``, ``ID #3``; each in the split of the first, so that no
document is both trained on and held out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from activation_store.errors import UserError
from activation_store.progress import NoProgress, Progress
from activation_store.spec import DocumentRows, HookSpec, StorePlan, differences
from activation_store.store import Store, open_store
from activation_store.writer import StoreWriter

BLOCK_BYTES = 16 << 20
"""Of all arrays together in memory at a time."""

REPEATED_NAMED = 3


@dataclass(frozen=True)
class Section:
    """A range of the merged store's rows, and where they are read: each hook, and tokens, positions and documents."""

    first_row: int
    first_document: int
    hooks: Mapping[str, Store]
    store: Store


@dataclass(frozen=True)
class Merger:
    """What the merged store will be; ``side_by_side`` says which of the two kinds it is."""

    side_by_side: bool
    plan: StorePlan
    hooks: tuple[HookSpec, ...]
    provenance: dict[str, Any]
    sections: list[Section]


def merge(
    sources: Sequence[str | os.PathLike[str]],
    location: str | os.PathLike[str],
    *,
    keep_repeated: bool = False,
    compression: str = "none",
    progress: Progress | None = None,
) -> Merger:
    """Make one store of several, or continue to. Chunks and shards are cut as in the first.

    Args:
        sources: folders or URLs of two stores or more; every shard of theirs is compared with its checksum.
        location: the store to make.
        keep_repeated: keep the rows of documents that are in two of them.
        compression: of the merged store, "none" or "zstd".

    Raises:
        UserError: stores that do not fit together, are damaged or incomplete; what `StoreWriter` refuses. Damage is met
            where it is: what was merged before it stays, and with that shard restored the same merge goes on.
    """
    stores = [open_store(source, verify_reads=True) for source in sources]
    merger = plan_merge(stores, keep_repeated)
    progress = progress or NoProgress()
    geometry = stores[0].manifest.geometry
    with (
        StoreWriter(
            location, merger.plan, merger.hooks, geometry, merger.provenance, compression=compression
        ) as writer,
        progress.task("Merging", total=merger.plan.rows, unit="rows") as task,
    ):
        task.advance(writer.next_row)
        for section in merger.sections:
            for start, stop in _blocks(section, merger.hooks, writer.next_row - section.first_row):
                writer.append(
                    {name: store.read_rows(name, start, stop) for name, store in section.hooks.items()},
                    section.store.token_ids(start, stop),
                    section.store.positions(start, stop),
                    section.store.documents(start, stop) + section.first_document,
                )
                task.advance(stop - start)
        writer.finish()
    return merger


def plan_merge(stores: Sequence[Store], keep_repeated: bool = False) -> Merger:
    """What ``stores`` make together; see `merge`."""
    _refuse_misfits(stores)
    plans = [store.manifest.identity()["plan"] for store in stores]
    if all(plan == plans[0] for plan in plans):
        return _side_by_side(stores)
    return _one_after_the_other(stores, keep_repeated)


# --- the two kinds ----------------------------------------------------------------------------------------------------


def _side_by_side(stores: Sequence[Store]) -> Merger:
    first = stores[0]
    shared = [name for name, times in Counter(name for store in stores for name in store.hooks).items() if times > 1]
    if shared:
        raise UserError(
            f"{_names(stores)} hold the same rows, and each has {shared[0]}: there is nothing to put together. "
            "Stores of the same rows are merged when their hooks differ."
        )
    for other in stores[1:]:
        _refuse_other_tokens(first, other)
    plan = StorePlan(first.rows, first.document_table, first.manifest.excluded, first.manifest.batches)
    hooks = {name: store for store in stores for name in store.hooks}
    return Merger(
        side_by_side=True,
        plan=plan,
        hooks=tuple(store.hook(name) for name, store in hooks.items()),
        provenance=_provenance(stores),
        sections=[Section(0, 0, hooks, first)],
    )


def _one_after_the_other(stores: Sequence[Store], keep_repeated: bool) -> Merger:
    first = stores[0]
    for other in stores[1:]:
        if found := _differences(first, other, _hooks(first), _hooks(other)):
            raise UserError(
                f"{first.name} and {other.name} have neither the same hooks nor the same rows: {found[0]}. "
                "Merge stores of the same hooks, or of the same harvest at different hooks."
            )
        if first.manifest.batches.get("bos_token_id") != other.manifest.batches.get("bos_token_id"):
            raise UserError(
                f"{first.name} and {other.name} treat the BOS token differently: one leaves its rows out. "
                "Harvest or import both the same way."
            )
    excluded: Counter[str] = Counter()
    for store in stores:
        excluded.update(store.manifest.excluded)
    first_rows = np.cumsum([0, *(store.rows for store in stores)]).tolist()
    first_documents = np.cumsum([0, *(len(store.document_table) for store in stores)]).tolist()
    return Merger(
        side_by_side=False,
        plan=StorePlan(first_rows[-1], _documents(stores, first_rows, keep_repeated), excluded, _batches(stores)),
        hooks=first.manifest.hooks,
        provenance=_provenance(stores),
        sections=[
            Section(first_row, first_document, dict.fromkeys(first.hooks, store), store)
            for first_row, first_document, store in zip(first_rows, first_documents, stores, strict=False)
        ],
    )


def _documents(stores: Sequence[Store], first_rows: Sequence[int], keep_repeated: bool) -> list[DocumentRows]:
    merged: list[DocumentRows] = []
    split_of: dict[str, str] = {}
    taken: set[str] = set()
    for store, first_row in zip(stores, first_rows, strict=False):
        repeated = [document.id for document in store.document_table if document.id in split_of]
        if repeated and not keep_repeated:
            shown = ", ".join(repeated[:REPEATED_NAMED]) + (", ..." if len(repeated) > REPEATED_NAMED else "")
            raise UserError(
                f"{len(repeated):,} documents of {store.name} are in a store before it too ({shown}): merged, they "
                "would count twice. Merge stores of other documents, or keep both with --keep-repeated."
            )
        for document in store.document_table:
            split = split_of.get(document.id, document.split)
            name = _free_name(document.id, taken)
            taken.add(name)
            merged.append(DocumentRows(name, split, first_row + document.first_row, document.rows))
        split_of = {document.id: document.split for document in store.document_table} | split_of
    return merged


def _free_name(id_: str, taken: set[str]) -> str:
    number, name = 1, id_
    while name in taken:
        number += 1
        name = f"{id_} #{number}"
    return name


def _batches(stores: Sequence[Store]) -> dict[str, Any]:
    """What the plans have in common, and each of them; windows of the shortest context fit all."""
    plans = [store.manifest.batches for store in stores]
    contexts = [plan["context"] for plan in plans if plan.get("context")]
    each = [
        {"fingerprint": store.fingerprint, "rows": store.rows, "batches": plan}
        for store, plan in zip(stores, plans, strict=True)
    ]
    return _in_common(plans) | ({"context": min(contexts)} if contexts else {}) | {"merged": each}


def _provenance(stores: Sequence[Store]) -> dict[str, Any]:
    made_from = [store.provenance for store in stores]
    corpora = dict.fromkeys(str((made.get("corpus") or {}).get("name", "unknown")) for made in made_from)
    each = [
        {
            "name": store.name,
            "fingerprint": store.fingerprint,
            "rows": store.rows,
            "hooks": list(store.hooks),
            "provenance": made,
        }
        for store, made in zip(stores, made_from, strict=True)
    ]
    shared = {"model": made_from[0].get("model"), "corpus": {"name": " + ".join(corpora)}}
    return shared | _in_common(made_from) | {"merged": each}


def _in_common(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in records[0].items() if all(other.get(key) == value for other in records)}


# --- what does not fit ------------------------------------------------------------------------------------------------


def _refuse_misfits(stores: Sequence[Store]) -> None:
    if len(stores) < 2:
        raise UserError("Merging takes two stores or more.")
    first = stores[0]
    by_fingerprint: dict[str, Store] = {}
    for store in stores:
        if not store.complete:
            raise UserError(
                f"Store {store.location} is not complete: {store.rows:,} of {store.manifest.rows_planned:,} rows are "
                "there. Run its harvest again to finish it, then merge."
            )
        if same := by_fingerprint.get(store.fingerprint):
            raise UserError(
                f"{same.location} and {store.location} hold the same rows at the same hooks; leave one out."
            )
        by_fingerprint[store.fingerprint] = store
        if found := _differences(first, store, _model_and_tokenizer(first), _model_and_tokenizer(store)):
            raise UserError(
                f"{first.name} and {store.name} were not made by the same model and tokenizer: {'; '.join(found)}."
            )


def _refuse_other_tokens(first: Store, other: Store) -> None:
    """The same plan should mean the same tokens; a store that was made by hand may say so and have others."""
    rows = max(1, BLOCK_BYTES // 8)
    for start in range(0, first.rows, rows):
        stop = min(first.rows, start + rows)
        for read in (Store.token_ids, Store.positions):
            unequal = np.flatnonzero(read(first, start, stop) != read(other, start, stop))
            if len(unequal):
                what = "token" if read is Store.token_ids else "position"
                raise UserError(
                    f"{first.name} and {other.name} should hold the same rows, but the {what} of row "
                    f"{start + int(unequal[0])} differs; verify both with `dictlearn store verify`."
                )


def _model_and_tokenizer(store: Store) -> dict[str, Any]:
    """A model that has a fingerprint may have moved: then its name does not count."""
    model = dict(store.provenance.get("model") or {})
    if model.get("fingerprint"):
        del model["name"]
    return {"model": model, "tokenizer": store.provenance.get("tokenizer")}


def _differences(first: Store, other: Store, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    return differences(here, there, where=(f"in {first.name}", f"in {other.name}"))


def _hooks(store: Store) -> dict[str, Any]:
    return {"hooks": sorted(store.manifest.identity()["hooks"], key=lambda hook: hook["name"])}


def _names(stores: Sequence[Store]) -> str:
    return ", ".join(store.name for store in stores[:-1]) + " and " + stores[-1].name


def _blocks(section: Section, hooks: Sequence[HookSpec], first: int) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // sum(hook.array.row_bytes for hook in hooks))
    for start in range(max(0, first), section.store.rows, rows):
        yield start, min(section.store.rows, start + rows)
