"""Stores of the same rows are read in lockstep, whatever each is cut like; stores of other rows are refused."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import activation_store.aligned as aligned
from activation_store.aligned import AlignedStores, check_aligned
from activation_store.bfloat16 import as_float32
from activation_store.errors import UserError
from activation_store.filters import RowFilter
from activation_store.loader import Loader
from activation_store.spec import UNKNOWN, DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import Store, open_store
from activation_store.testing import UnsyncedDisk, assert_resumes_everywhere
from activation_store.writer import StoreWriter
from tests.activation_store.random_stores import random_stores
from tests.activation_store.small_store import moved

torch = pytest.importorskip("torch")
SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ROWS = 300
HOOK = "blocks.1.hook_resid_post"
TUNED = f"tuned:{HOOK}"
DOCUMENTS = [DocumentRows(f"d{i}", "held-out" if i % 4 == 3 else "train", 25 * i, 25) for i in range(12)]


def written(path, factor, *, d=4, geometry=Geometry(8, 64), compression="none", documents=DOCUMENTS, **columns):  # noqa: B008
    """A store whose row i holds i, i + 1, .. times ``factor``; ``columns`` replace token ids, positions, documents."""
    rows = sum(document.rows for document in documents)
    plan = StorePlan(rows, documents, batches={"seed": 0})
    made_of = (plan, [HookSpec(HOOK, (d,), "float32")], geometry, {"model": {"name": path.name, "fingerprint": "x"}})
    row = np.arange(rows)
    columns = {
        "token_ids": row * 7 % 31,
        "positions": row % 25,
        "documents": np.repeat(np.arange(len(documents)), [document.rows for document in documents]),
    } | columns
    with StoreWriter(path, *made_of, compression=compression, disk=UnsyncedDisk()) as writer:
        writer.append({HOOK: (factor * (row[:, None] + np.arange(d))).astype(np.float32)}, *columns.values())
        writer.finish()
    return open_store(path)


@pytest.fixture
def base(fast_folder):
    return written(fast_folder / "base", 1)


@pytest.fixture
def tuned(fast_folder):
    return written(fast_folder / "tuned", 1000, d=3)


def expected(rows):
    row = torch.from_numpy(rows).float()[:, None]
    return {HOOK: row + torch.arange(4), TUNED: 1000 * (row + torch.arange(3))}


# --- what is delivered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 3])
def test_hooks_of_all_stores_come_in_lockstep(base, tuned, prefetch):
    loader = Loader(AlignedStores([base, tuned]), [TUNED, HOOK], 16, epochs=2, prefetch=prefetch)
    batches = 0
    for batch in loader:
        batches += 1
        assert list(batch) == [TUNED, HOOK]
        for hook, values in expected(loader.last_rows()).items():
            assert torch.equal(batch[hook], values)
    assert batches == loader.batches_in_epoch(0) + loader.batches_in_epoch(1)
    assert (loader.d(HOOK), loader.d(TUNED)) == (4, 3)


def test_rows_come_in_the_order_of_the_first_store_alone(base, tuned):
    asked = dict(epochs=1, seed=5, buffer_rows=64, split="held-out")
    together = Loader(AlignedStores([base, tuned]), [HOOK, TUNED], 8, **asked)
    alone = Loader(base, [HOOK], 8, **asked)
    assert together.manifest is base.manifest and together.rows == alone.rows == 75
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[HOOK], other[HOOK])
    assert str(together.mixing()) and together.mixing().rows == 75


@settings(SHARED, max_examples=12)
@given(made=random_stores(), data=st.data())
def test_batches_are_rows_of_their_own_stores_whatever_the_stores_are_like(fast_folder, made, data):
    """Other hooks, types, chunks, shards and compression in each store; read from the middle on, and in parts."""
    stores = []
    for number in range(data.draw(st.integers(1, 3))):
        one = made if not number else data.draw(random_stores(plan=made.plan, text=made.text))
        shutil.rmtree(fast_folder / f"s{number}", ignore_errors=True)
        stores.append(open_store(one.write(fast_folder / f"s{number}")))
    homes = {name: (stores[0], name) for name in stores[0].hooks}
    homes |= {f"{store.name}:{name}": (store, name) for store in stores[1:] for name in store.hooks}
    assert list(AlignedStores(stores).hooks) == list(homes)
    hooks = data.draw(st.lists(st.sampled_from(sorted(homes)), min_size=1, unique=True))
    asked = dict(
        split="all",
        seed=data.draw(st.integers(0, 9)),
        buffer_rows=data.draw(st.integers(1, 30)),
        prefetch=data.draw(st.sampled_from([0, 2])),
        epochs=2,
    )
    batch_size = data.draw(st.integers(1, made.plan.rows))
    loader = Loader(AlignedStores(stores), hooks, batch_size, **asked)
    whole = list(Loader(stores[0], list(stores[0].hooks)[:1], batch_size, **asked).rows_from(0, 0))
    begin = data.draw(st.integers(0, len(whole) - 1))
    before = Loader(AlignedStores(stores), hooks, batch_size, **asked)
    for _ in itertools.islice(before, begin):
        pass
    loader.load_state_dict(before.state_dict())
    loader.part_of_batch = part, parts = data.draw(st.sampled_from([(0, 1), (0, 2), (1, 2), (1, 3)]))
    for (_, _, rows), batch in zip(whole[begin:], loader, strict=True):
        mine = rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]
        assert np.array_equal(loader.last_rows(), mine)
        assert list(batch) == hooks
        for hook, (store, name) in homes.items():
            if hook in batch:
                values = as_float32(store.take(name, mine)).reshape(batch[hook].shape)
                assert np.array_equal(batch[hook].numpy(), values), hook


def test_resumes_at_the_exact_next_batch_from_every_position(base, tuned):
    assert_resumes_everywhere(lambda: Loader(AlignedStores([base, tuned]), [HOOK, TUNED], 32, epochs=2, buffer_rows=64))


def test_a_position_belongs_to_the_stores_it_was_taken_in(base, tuned, fast_folder):
    state = Loader(AlignedStores([base, tuned]), [HOOK, TUNED], 32).state_dict()
    other = written(fast_folder / "elsewhere" / "tuned", 2000)
    with pytest.raises(UserError, match=r"cannot continue where it was: aligned_stores was \{'tuned': 'sha256:"):
        Loader(AlignedStores([base, other]), [HOOK, TUNED], 32).load_state_dict(state)


def test_a_row_is_filtered_by_its_norm_in_each_of_the_stores(base, fast_folder):
    tuned = written(fast_folder / "tuned", np.where(np.arange(ROWS) % 10, 1, 50)[:, None])
    loader = Loader(
        AlignedStores([base, tuned]), [HOOK, TUNED], 8, row_filter=RowFilter(max_norm_ratio=1.5), split="all"
    )
    norms = [store.norms(HOOK, 0, ROWS) for store in (base, tuned)]
    short = [of_store <= 1.5 * np.sort(of_store)[(ROWS - 1) // 2] for of_store in norms]
    assert loader.rows == (short[0] & short[1]).sum() < min(short[0].sum(), short[1].sum())


def test_everything_but_the_hooks_is_the_first_stores(base, tuned):
    both = AlignedStores([base, tuned])
    assert both.fingerprint == base.fingerprint and both.name == "base" and both.rows == ROWS
    assert np.array_equal(both.statistics(TUNED).mean, tuned.statistics(HOOK).mean)
    assert np.array_equal(both.statistics(HOOK).mean, base.statistics(HOOK).mean)
    assert np.array_equal(both.read_rows(TUNED, 3, 9), tuned.read_rows(HOOK, 3, 9))
    assert np.array_equal(both.take_norms(TUNED, np.array([5, 2])), tuned.take_norms(HOOK, np.array([5, 2])))
    around, alone = both.text_around(30, 9, 2), base.text_around(30, 9, 2)
    assert np.array_equal(around.token_ids, alone.token_ids) and around.document == 1
    assert both.refresh().rows == ROWS and both.hook(TUNED).name == TUNED


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_stores_of_other_rows_are_refused_and_the_first_difference_is_named(base, fast_folder):
    row = np.arange(ROWS)
    for number, (made, said) in enumerate(
        [
            (dict(documents=DOCUMENTS[:11]), "base has 300 rows and other 275"),
            (
                dict(documents=moved(DOCUMENTS, 4, split="held-out")),
                "document 4 is 'd4' with 25 rows, train, in base and 'd4' with 25 rows, held-out, in other",
            ),
            (
                dict(documents=moved(DOCUMENTS, 2, id="x")),
                "document 2 is 'd2' with 25 rows, train, in base and 'x' with 25 rows, train, in other",
            ),
            (
                dict(documents=[*DOCUMENTS, DocumentRows("none", "train", ROWS, 0)]),
                "base has 12 documents and other 13",
            ),
            (dict(token_ids=np.where(row == 288, 30, row * 7 % 31)), "row 288 has token 1 in base and 30 in other"),
            (dict(positions=row % 25 + (row >= 299)), "row 299 has position 24 in base and 25 in other"),
        ]
    ):
        other = written(fast_folder / str(number) / "other", 2, **made)
        with pytest.raises(UserError, match=f"base and other do not hold the same rows: {said}. Harvest both from"):
            check_aligned([base, other])


def test_rows_are_compared_where_checksums_cannot_tell(base, fast_folder, monkeypatch):
    """Other shards have other checksums. A difference is found in any block."""
    monkeypatch.setattr(aligned, "BLOCK_ROWS", 100)
    row = np.arange(ROWS)
    check_aligned([base, written(fast_folder / "cut", 2, geometry=Geometry(5, 20))])
    check_aligned([base, written(fast_folder / "packed", 2, compression="zstd")])
    for at in (0, 99, 100, 250):
        tokens = np.where(row == at, 999, row * 7 % 31)
        other = written(fast_folder / f"other-{at}", 2, geometry=Geometry(5, 20), token_ids=tokens)
        with pytest.raises(UserError, match=f"row {at} has token {at * 7 % 31} in base and 999 in"):
            check_aligned([base, other])


def test_rows_whose_checksums_agree_are_not_read(base, tuned, monkeypatch):
    monkeypatch.setattr(Store, "token_ids", None)
    monkeypatch.setattr(Store, "positions", None)
    monkeypatch.setattr(Store, "documents", None)
    check_aligned([base, tuned])


def test_stores_that_know_no_tokens_are_refused(fast_folder):
    unknown = np.full(ROWS, UNKNOWN)
    stores = [written(fast_folder / name, 1, token_ids=unknown) for name in ("one", "two")]
    with pytest.raises(UserError, match="The tokens of store one are not known, as it was imported"):
        check_aligned(stores)


def test_names_that_would_be_mistaken_are_refused(base, tuned, fast_folder):
    with pytest.raises(UserError, match="Two of the stores to be read together are called 'base'"):
        check_aligned([base, written(fast_folder / "elsewhere" / "base", 2)])
    with pytest.raises(UserError, match="The name of store 'a:b' has a colon in it"):
        check_aligned([base, written(fast_folder / "a:b", 2)])
    plan = StorePlan(2, [DocumentRows("d", "train", 0, 2)])
    hooks = [HookSpec("tuned:x", (1,), "float32")]
    with StoreWriter(fast_folder / "odd", plan, hooks, Geometry(8, 64), {}, disk=UnsyncedDisk()) as writer:
        writer.append({"tuned:x": np.ones((2, 1), np.float32)}, *np.zeros((3, 2), dtype=np.int64))
        writer.finish()
    with pytest.raises(UserError, match="Hook tuned:x of odd could not be told from one of the store 'tuned'"):
        check_aligned([open_store(fast_folder / "odd"), tuned])


def test_a_hook_that_is_not_there_is_refused_by_the_store_that_should_have_it(base, tuned):
    with pytest.raises(UserError, match=r"tuned has hooks blocks.1.hook_resid_post; blocks.9 is not among them"):
        Loader(AlignedStores([base, tuned]), ["tuned:blocks.9"], 8)
    with pytest.raises(UserError, match=r"base has hooks blocks.1.hook_resid_post; blocks.9 is not among them"):
        Loader(AlignedStores([base, tuned]), ["blocks.9"], 8)
    with pytest.raises(UserError, match=r"a hook of the store 'turned', and the stores aligned with base are tuned;"):
        Loader(AlignedStores([base, tuned]), [f"turned:{HOOK}"], 8)


def test_stores_read_together_are_not_followed(base, tuned):
    with pytest.raises(UserError, match="The stores base, tuned are read together, and .* cannot be followed"):
        Loader(AlignedStores([base, tuned]), [HOOK], 8, follow=True)


def test_a_store_alone_is_aligned_with_itself(base):
    alone = Loader(base, [HOOK], 8, epochs=1)
    for one, other in zip(Loader(AlignedStores([base]), [HOOK], 8, epochs=1), alone, strict=True):
        assert torch.equal(one[HOOK], other[HOOK])
