"""What `dictlearn store info` knows of a store, and rows drawn from one."""

from __future__ import annotations

import numpy as np
import pytest

from activation_store.describe import FIRST_TOKENS, describe
from activation_store.errors import UserError
from activation_store.sample import draw_rows
from activation_store.spec import Geometry, HookSpec
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk
from tests.activation_store.small_store import GEOMETRY, HOOKS, ROWS, append, open_writer, plan, token_ids, values

# --- describing -------------------------------------------------------------------------------------------------------


def test_a_description_counts_what_is_there(small, small_path):
    described = describe(small)
    assert described.rows == sum(split.rows for split in described.splits) == ROWS
    assert sum(split.documents for split in described.splits) == sum(document.rows > 0 for document in plan().documents)
    assert described.bytes == sum(file.stat().st_size for file in small_path.rglob("*") if file.is_file())
    for hook in described.hooks:
        shards = (small_path / "activations" / hook.name).glob("*")
        assert hook.bytes == sum(file.stat().st_size for file in shards) > ROWS * 8
    assert described.first_token_ids == token_ids(0, FIRST_TOKENS).tolist()
    assert (described.compression, described.rows_per_shard) == ("none", GEOMETRY.rows_per_shard)


def test_a_description_has_the_statistics_of_a_complete_store(small):
    for hook, described in zip(HOOKS, describe(small).hooks, strict=True):
        statistics = small.statistics(hook.name)
        assert described.mean_norm == statistics.mean_norm
        assert described.median_norm == statistics.median_norm
        assert described.norm_outliers == statistics.norm_outliers


def test_a_growing_store_is_described_as_far_as_it_is_there(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
        described = describe(open_store(fast_folder / "store"))  # while the next commit is being written
        staged = sum(file.stat().st_size for file in (fast_folder / "store" / ".staging").iterdir())
        everything = sum(file.stat().st_size for file in (fast_folder / "store").rglob("*") if file.is_file())
    assert (described.rows, described.rows_planned, described.complete) == (256, ROWS, False)
    assert sum(split.rows for split in described.splits) == 256
    assert {(hook.mean_norm, hook.median_norm, hook.norm_outliers) for hook in described.hooks} == {(None, None, None)}
    assert staged and described.bytes == everything - staged


def test_a_store_without_rows_can_be_described(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()):
        described = describe(open_store(fast_folder / "store"))
    assert (described.rows, described.first_token_ids) == (0, [])
    with pytest.raises(UserError, match="has no rows yet"):
        draw_rows(open_store(fast_folder / "store"), 1)


def test_compression_shows_in_the_sizes(fast_folder, small_path):
    zeros = HookSpec("zeros", (64,), "float32")
    with open_writer(
        fast_folder / "store", UnsyncedDisk(), hooks=[zeros], geometry=Geometry(16, 128), compression="zstd"
    ) as writer:
        documents = np.repeat(np.arange(len(plan().documents)), [document.rows for document in plan().documents])
        writer.append({"zeros": np.zeros((ROWS, 64), np.float32)}, *[np.zeros(ROWS, int)] * 2, documents)
        writer.finish()
    described = describe(open_store(fast_folder / "store"))
    assert described.compression == "zstd" and described.hooks[0].bytes < ROWS * 64 * 4 / 10


# --- drawing rows -----------------------------------------------------------------------------------------------------


def test_a_drawn_row_is_what_the_store_has_there(small):
    drawn = draw_rows(small, 40, seed=3)
    assert len({row.row for row in drawn}) == 40 and [row.row for row in drawn] == sorted(row.row for row in drawn)
    for each in drawn:
        document = next(d for d in plan().documents if d.first_row <= each.row < d.first_row + d.rows)
        assert (each.document, each.split) == (document.id, document.split)
        assert each.position == each.row % 50
        first = each.row - each.index
        assert each.token_ids == token_ids(first, first + len(each.token_ids)).tolist()
        assert document.first_row <= first and first + len(each.token_ids) <= document.first_row + document.rows
        assert each.index <= 16 and len(each.token_ids) - each.index - 1 <= 8
        assert list(each.norms) == [hook.name for hook in HOOKS]
        exact = np.linalg.norm(values(HOOKS[2], each.row, each.row + 1))
        assert each.norms[HOOKS[2].name] == pytest.approx(exact, rel=1e-6)


def test_the_seed_decides_which_rows(small):
    def rows(seed):
        return [row.row for row in draw_rows(small, 20, seed)]

    assert rows(1) == rows(1) != rows(2)


def test_every_part_of_a_store_is_drawn_from(small):
    """A thousand draws of one row: each fifth of the store gets its share (200 expected, 12 standard deviations)."""
    rows = [draw_rows(small, 1, seed)[0].row for seed in range(1000)]
    assert np.bincount(np.array(rows) * 5 // ROWS, minlength=5).min() > 100


def test_asking_for_more_rows_than_there_are_gives_all(small):
    assert [row.row for row in draw_rows(small, 10**9)] == list(range(ROWS))


def test_norms_of_one_hook_only(small):
    assert list(draw_rows(small, 1, hooks=[HOOKS[1].name])[0].norms) == [HOOKS[1].name]
    with pytest.raises(UserError, match="blocks.0.attn.hook_zz is not among them"):
        draw_rows(small, 1, hooks=["blocks.0.attn.hook_zz"])
    with pytest.raises(UserError, match="rows is 0"):
        draw_rows(small, 0)
