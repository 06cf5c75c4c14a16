"""Several stores of the same rows, harvested from different models over the same text, read as if they were one.

Row i of each store is the same token of the same document: what a dictionary needs that compares two models, or two
checkpoints of one. The hooks of the first store keep their names; those of another one are called ``STORE:HOOK``, such
as ``tuned:blocks.2.hook_resid_post``. Everything but the hooks is the first store's: its tokens and documents, its
manifest, and the chunks that decide the order of rows. So the stores may be cut and compressed differently.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from activation_store.errors import UserError
from activation_store.spec import DOCUMENTS, POSITIONS, TOKEN_IDS, UNKNOWN, ArraySpec, HookSpec
from activation_store.statistics import HookStatistics
from activation_store.store import Store

SEPARATOR = ":"

BLOCK_ROWS = 1 << 20
"""Rows compared at a time: 4 MiB of token ids from each of two stores."""


class AlignedStores(Store):
    """A `Store` of the rows of several, with the hooks of all.

    Args:
        stores: opened stores; the first gives its hooks their own names.

    Attributes:
        stores: by name, in the order given.

    Raises:
        UserError: see `check_aligned`.
    """

    def __init__(self, stores: Sequence[Store]):
        check_aligned(stores)
        super().__init__(stores[0].place, stores[0].manifest)
        self.stores = {store.name: store for store in stores}

    @property
    def first(self) -> Store:
        """The store whose hooks have their own names."""
        return next(iter(self.stores.values()))

    @property
    def together(self) -> list[Store]:
        return list(self.stores.values())

    def home(self, name: str) -> tuple[Store, str]:
        prefix, separator, hook = name.partition(SEPARATOR)
        others = [other for other in self.stores if other != self.first.name]
        if separator and prefix in others:
            return self.stores[prefix], self.stores[prefix].hook(hook).name
        if separator and name not in self.first.hooks:
            raise UserError(
                f"{name} should be a hook of the store {prefix!r}, and the stores aligned with {self.first.name} are "
                f"{', '.join(others) or 'none'}; hooks of {self.first.name} itself have no store before them."
            )
        return self.first, self.first.hook(name).name

    @property
    def complete(self) -> bool:
        """Whether all of them are."""
        return all(store.complete for store in self.together)

    def refresh(self) -> AlignedStores:
        return AlignedStores([store.refresh() for store in self.stores.values()])

    @property
    def hooks(self) -> dict[str, HookSpec]:
        """The hooks of all stores by the names they have here."""
        named = dict(self.first.hooks)
        for other in self.together[1:]:
            for hook in other.hooks.values():
                name = f"{other.name}{SEPARATOR}{hook.name}"
                named[name] = dataclasses.replace(hook, name=name)
        return named

    def hook(self, name: str) -> HookSpec:
        self.home(name)
        return self.hooks[name]

    def read_rows(self, hook: str, start: int, stop: int) -> np.ndarray:
        store, name = self.home(hook)
        return store.read_rows(name, start, stop)

    def take(self, hook: str, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        store, name = self.home(hook)
        return store.take(name, indices, out)

    def norms(self, hook: str, start: int, stop: int) -> np.ndarray:
        store, name = self.home(hook)
        return store.norms(name, start, stop)

    def take_norms(self, hook: str, indices: np.ndarray) -> np.ndarray:
        store, name = self.home(hook)
        return store.take_norms(name, indices)

    def statistics(self, hook: str) -> HookStatistics:
        store, name = self.home(hook)
        return store.statistics(name)

    def prefetch(self, hook: str, chunks: np.ndarray) -> None:
        """``chunks`` are numbers of chunks of the first store."""
        store, name = self.home(hook)
        ours, theirs = self.manifest.geometry.rows_per_chunk, store.manifest.geometry.rows_per_chunk
        if ours != theirs:
            starts, stops = chunks * ours, np.minimum((chunks + 1) * ours, self.rows)
            parts = [np.arange(a // theirs, -(-b // theirs)) for a, b in zip(starts, stops, strict=True)]
            chunks = np.unique(np.concatenate([np.empty(0, np.int64), *parts]))
        store.prefetch(name, chunks)

    def reserve(self, rows: int) -> None:
        ours = self.manifest.geometry.rows_per_chunk
        for (
            store
        ) in self.stores.values():  # a small chunk of ours may lie in a large one of theirs, which is read whole
            store.reserve(rows * -(-store.manifest.geometry.rows_per_chunk // ours))

    @property
    def is_mapped(self) -> bool:
        """Whether rows of all stores are read through memory maps."""
        return all(store.is_mapped for store in self.stores.values())

    def _read(self, array: ArraySpec, start: int, stop: int) -> np.ndarray:
        return self.first._read(array, start, stop)

    def _take(self, array: ArraySpec, indices: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        return self.first._take(array, indices, out)


# --- whether rows are the same ----------------------------------------------------------------------------------------


def check_aligned(stores: Sequence[Store]) -> None:
    """Refuse stores whose rows are not the same tokens of the same documents in the same splits.

    Tokens, positions and documents are compared by the checksums of their shards where those agree, and otherwise row
    by row.

    Raises:
        UserError: they are not; two have one name, or a name that hides a hook; nothing is known of their tokens.
    """
    if not stores:
        raise ValueError("there is no store to align others with")
    first, *others = stores
    repeated = [name for name, times in Counter(store.name for store in stores).items() if times > 1]
    if repeated:
        raise UserError(
            f"Two of the stores to be read together are called {repeated[0]!r}, by which their hooks are told apart; "
            "rename the folder of one of them."
        )
    for other in others:
        if SEPARATOR in other.name:
            raise UserError(
                f"The name of store {other.name!r} has a colon in it, and STORE:HOOK could not be read with it; rename "
                "its folder."
            )
        for hook in first.hooks:
            if hook.startswith(f"{other.name}{SEPARATOR}"):
                raise UserError(
                    f"Hook {hook} of {first.name} could not be told from one of the store {other.name!r}; rename the "
                    "folder of that store."
                )
    for other in others:
        _refuse_other_documents(first, other)
        for store in (first, other):
            _refuse_unknown_tokens(store)
        for array, read in (
            (TOKEN_IDS, Store.token_ids),
            (POSITIONS, Store.positions),
            (DOCUMENTS, Store.documents),
        ):
            if not _same_checksums(first, other, array):
                _refuse_other_values(first, other, array, read)


def _refuse_other_documents(first: Store, other: Store) -> None:
    if other.rows != first.rows:
        raise _not_aligned(first, other, f"{first.name} has {first.rows:,} rows and {other.name} {other.rows:,}")
    if other.manifest.documents_checksum == first.manifest.documents_checksum:
        return
    ours, theirs = first.document_table, other.document_table
    for number, (one, another) in enumerate(zip(ours, theirs, strict=False)):
        if one != another:
            raise _not_aligned(
                first,
                other,
                f"document {number} is {one.id!r} with {one.rows:,} rows, {one.split}, in {first.name} and "
                f"{another.id!r} with {another.rows:,} rows, {another.split}, in {other.name}",
            )
    raise _not_aligned(first, other, f"{first.name} has {len(ours):,} documents and {other.name} {len(theirs):,}")


def _refuse_unknown_tokens(store: Store) -> None:
    """Imported rows may have none. A document was imported whole, so its first row tells of all."""
    first_rows = np.unique(store.document_first_rows)
    tokens = store.take_row_array(TOKEN_IDS, first_rows[first_rows < store.rows])
    if (tokens == UNKNOWN).any():
        raise UserError(
            f"The tokens of store {store.name} are not known, as it was imported from a file that has none, so "
            "nothing tells that its rows are those of another store; harvest it with `dictlearn harvest`."
        )


def _same_checksums(first: Store, other: Store, array: str) -> bool:
    """Whether two arrays are equal as far as their manifests tell; other bytes may still hold equal values."""
    one, another = first.manifest, other.manifest
    cut_alike = one.geometry == another.geometry and one.compression == another.compression
    return cut_alike and one.shards[array] == another.shards[array]


def _refuse_other_values(first: Store, other: Store, array: str, read: Callable[[Store, int, int], np.ndarray]) -> None:
    bounds = [*range(0, first.rows, BLOCK_ROWS), first.rows]
    for start, stop in pairwise(bounds):
        ours, theirs = read(first, start, stop), read(other, start, stop)
        differing = np.flatnonzero(ours != theirs)
        if len(differing):
            at = int(differing[0])
            what = {TOKEN_IDS: "token", POSITIONS: "position", DOCUMENTS: "document"}[array]
            raise _not_aligned(
                first,
                other,
                f"row {start + at:,} has {what} {ours[at]} in {first.name} and {theirs[at]} in {other.name}",
            )


def _not_aligned(first: Store, other: Store, difference: str) -> UserError:
    return UserError(
        f"Stores {first.name} and {other.name} do not hold the same rows: {difference}. Harvest both from the same "
        "corpus, with the same tokenizer, context, number of tokens and seed."
    )
