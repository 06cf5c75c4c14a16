"""Reading: rows by number, text, splits, statistics; and what a reader is told when something is wrong."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_store.bfloat16 import to_float32
from activation_store.errors import UserError
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from tests.activation_store.small_store import (
    HOOKS,
    ROWS,
    append,
    document_of_row,
    open_writer,
    plan,
    stored,
    token_ids,
)

ROW_NUMBERS = st.lists(st.integers(0, ROWS - 1), max_size=50)


@pytest.fixture(scope="module")
def opened(small_path):
    return open_store(small_path)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dtype)
def test_any_range_of_rows_is_what_was_written(opened, hook):
    for start, stop in [(0, ROWS), (0, 0), (ROWS, ROWS), (5, 6), (127, 129), (100, 400), (384, ROWS)]:
        assert np.array_equal(opened.read_rows(hook.name, start, stop), stored(hook, start, stop))


@given(rows=ROW_NUMBERS)
def test_any_rows_in_any_order_are_what_was_written(opened, rows):
    for hook in HOOKS:
        assert np.array_equal(opened.take(hook.name, np.array(rows, dtype=int)), stored(hook, 0, ROWS)[rows])
    assert np.array_equal(opened.take_row_array("token_ids", np.array(rows, dtype=int)), token_ids(0, ROWS)[rows])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, ROWS + 1), (5, 4)])
def test_rows_that_are_not_there_are_refused(small, start, stop):
    with pytest.raises(IndexError, match="the store has 430 rows"):
        small.read_rows(HOOKS[0].name, start, stop)


@pytest.mark.parametrize("row", [-1, ROWS])
def test_taking_a_row_that_is_not_there_is_refused(small, row):
    with pytest.raises(IndexError, match=r"the store has rows 0\.\.429"):
        small.take(HOOKS[0].name, np.array([0, row]))


def test_what_was_read_cannot_be_used_to_change_the_store(small, small_path):
    small.read_rows(HOOKS[0].name, 0, 9)[:] = 7
    small.take(HOOKS[0].name, np.arange(9))[:] = 7
    assert np.array_equal(open_store(small_path).read_rows(HOOKS[0].name, 0, 9), stored(HOOKS[0], 0, 9))


def test_tensors_keep_the_type_of_the_store(small):
    torch = pytest.importorskip("torch")
    assert small.tensor(HOOKS[0].name, 3, 9).dtype == torch.bfloat16
    assert small.tensor(HOOKS[1].name, 3, 9).shape == (6, 2, 3)
    expected = torch.from_numpy(to_float32(stored(HOOKS[0], 3, 9)))
    assert torch.equal(small.tensor(HOOKS[0].name, 3, 9).float(), expected)


def test_an_unknown_hook_is_refused_with_the_names_of_those_there_are(small):
    with pytest.raises(
        UserError, match=r"has hooks blocks.0.hook_resid_post, .*; blocks.0.hook_resid_pre is not among"
    ):
        small.read_rows("blocks.0.hook_resid_pre", 0, 1)
    with pytest.raises(UserError, match=r"Did you mean blocks\.1\.hook_mlp_out\?"):
        small.d("blocks.1.hook_mlp_ou")
    assert small.d("blocks.0.attn.hook_z") == 6


# --- text and documents -----------------------------------------------------------------------------------------------


@given(row=st.integers(0, ROWS - 1), before=st.integers(0, 80), after=st.integers(0, 80))
def test_the_text_around_a_row_stays_in_its_document(opened, row, before, after):
    text = opened.text_around(row, before, after)
    rows = np.arange(text.first_row, text.first_row + len(text.token_ids))
    assert text.token_ids[text.index] == token_ids(row, row + 1)[0]
    assert np.array_equal(text.token_ids, token_ids(rows[0], rows[-1] + 1))
    document = document_of_row()
    assert text.document == document[row] and set(document[rows]) == {text.document}
    # As much as was asked for, unless the document ends.
    assert row - rows[0] == before or document[rows[0] - 1] != text.document or rows[0] == 0
    assert rows[-1] - row == after or rows[-1] == ROWS - 1 or document[rows[-1] + 1] != text.document


def test_the_document_table_is_the_plan(small):
    assert small.document_table == list(plan().documents)
    assert np.array_equal(small.documents(0, ROWS), document_of_row())
    assert np.array_equal(small.positions(40, 60), np.arange(40, 60) % 50)


def test_splits_share_out_the_rows_by_document(small):
    train, held_out = small.split_rows("train"), small.split_rows("held-out")
    rows = {
        split: {r for a, b in small.split_rows(split) for r in range(a, b)} for split in ("train", "held-out", "all")
    }
    documents = plan().documents
    assert rows["train"] == {r for r in range(ROWS) if documents[document_of_row()[r]].split == "train"}
    assert rows["train"] | rows["held-out"] == rows["all"] == set(range(ROWS))
    assert not rows["train"] & rows["held-out"]
    joined = sorted(train + held_out)
    assert all(stop == start for (_, stop), (start, _) in pairwise(joined)), "ranges are not maximal"
    with pytest.raises(UserError, match="There is no split 'test'; use train, held-out or all"):
        small.split_rows("test")


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dtype)
def test_statistics_are_those_of_the_rows_as_stored(small, hook):
    rows = stored(hook, 0, ROWS)
    rows = (to_float32(rows) if hook.dtype == "bfloat16" else rows).astype(np.float64).reshape(ROWS, -1)
    statistics = small.statistics(hook.name)
    assert statistics.count == ROWS
    assert np.allclose(statistics.mean, rows.mean(axis=0), rtol=1e-13)
    assert np.allclose(statistics.second_moment, rows.T @ rows / ROWS, rtol=1e-13)
    assert np.allclose(statistics.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9)
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-13)
    assert statistics.mean_squared_norm == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-13)
    assert statistics.excluded == {"bos": len(plan().documents)}


def test_an_unfinished_store_has_no_statistics_and_says_why(fast_folder):
    with open_writer(fast_folder / "store") as writer:
        append(writer, 0, 200)
    with pytest.raises(UserError, match=r"has no statistics yet: 128 of 430 rows are there\. Run its harvest again"):
        open_store(fast_folder / "store").statistics(HOOKS[0].name)


# --- growing ----------------------------------------------------------------------------------------------------------


def test_a_reader_sees_committed_rows_and_may_look_again(fast_folder):
    path = fast_folder / "store"
    with open_writer(path, UnsyncedDisk()) as writer:
        append(writer, 0, 200)
        early = open_store(path)
        assert early.rows == 128 and not early.complete
        assert early.split_rows("all") == [(0, 128)]
        assert max(stop for split in ("train", "held-out") for _, stop in early.split_rows(split)) == 128
        append(writer, 200, ROWS)
        writer.finish()
    assert early.rows == 128
    with pytest.raises(IndexError):
        early.read_rows(HOOKS[0].name, 0, 129)
    assert early.refresh().rows == ROWS
    assert early.refresh().fingerprint == early.fingerprint


def test_rows_of_a_shard_that_is_not_committed_are_not_there(copied):
    """The manifest decides, whatever files lie about."""
    shard = copied / HOOKS[0].array.shard_key(9)
    shard.write_bytes((copied / HOOKS[0].array.shard_key(0)).read_bytes())
    assert open_store(copied).rows == ROWS


# --- for a person -----------------------------------------------------------------------------------------------------


def test_a_store_says_what_it_is(small):
    assert repr(small).endswith("430 rows (complete), hooks " + ", ".join(hook.name for hook in HOOKS) + ">")


# --- wrong from the start ---------------------------------------------------------------------------------------------


def test_a_store_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(
        UserError, match=r"There is no activation store at .*nowhere; make one with `dictlearn harvest`\."
    ):
        open_store(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not the folder of an activation store"):
        open_store(tmp_path / "file")


def test_a_zarr_group_that_is_no_store_is_told_apart(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match="belongs to a Zarr group that is not an activation store"):
        open_store(tmp_path / "other.zarr")
