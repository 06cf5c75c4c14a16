"""A filter leaves out what it says, counts it, belongs to the position, and is refused when nothing is left."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_store.filters as filters
from activation_store.bfloat16 import from_float32
from activation_store.errors import UserError
from activation_store.filters import RowFilter, select_rows
from activation_store.loader import Loader
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk, assert_resumes_everywhere
from activation_store.writer import StoreWriter
from tests.activation_store.small_store import HOOKS, ROWS, append, document_of_row, open_writer, plan

torch = pytest.importorskip("torch")
NAMES = [hook.name for hook in HOOKS]


def rows_of(loader):
    """All rows that a loader delivers in its first epoch."""
    return sorted(row for _, _, rows in loader.rows_from(0, 0) for row in rows.tolist())


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@st.composite
def requests(draw):
    lengths = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=8))
    ranges, row = [], 0
    for skipped, taken in lengths:
        ranges.append((row + skipped + bool(row), row := row + skipped + bool(row) + taken))
    cuts = [0, *sorted(draw(st.lists(st.integers(0, row), max_size=6))), row]
    documents = [DocumentRows(f"d{i % 3}/{i}", "train", a, b - a) for i, (a, b) in enumerate(pairwise(cuts))]
    rows = np.arange(row)
    tables = [rows * 7 % 20, (rows * 13 % 11).astype(np.float32), (rows * 5 % 17).astype(np.float32)]
    first = draw(st.integers(0, 19))
    asked = RowFilter(
        positions=draw(st.none() | st.just((first, draw(st.integers(first, 25))))),
        documents=draw(st.sampled_from([(), ("d0/*",), ("d0/0", "d*")])),
        max_norm_ratio=draw(st.none() | st.floats(0.5, 4)),
    )
    return np.array(ranges), documents, tables, asked


@settings(max_examples=300)
@given(request=requests(), block=st.integers(1, 50))
def test_what_is_selected_is_what_passes_row_by_row(request, block):
    ranges, documents, (positions, *norms), asked = request
    medians = (3.0, 5.0)
    expected, left_out = [], {}
    for row in (row for start, stop in ranges for row in range(start, stop)):
        document = next(d for d in documents if d.first_row <= row < d.first_row + d.rows)
        if asked.documents and not (document.id.startswith("d0/") or "d*" in asked.documents):
            left_out["documents"] = left_out.get("documents", 0) + 1
        elif asked.positions and not asked.positions[0] <= positions[row] <= asked.positions[1]:
            left_out["positions"] = left_out.get("positions", 0) + 1
        elif asked.max_norm_ratio and any(
            n[row] > asked.max_norm_ratio * m for n, m in zip(norms, medians, strict=True)
        ):
            left_out["norms"] = left_out.get("norms", 0) + 1
        else:
            expected.append(row)

    def select():
        return select_rows(
            ranges,
            asked,
            documents=documents,
            positions=lambda a, b: positions[a:b],
            norms=[(lambda a, b, n=n: n[a:b], m) for n, m in zip(norms, medians, strict=True)],
            where="this split",
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "BLOCK_ROWS", block)
        if not expected:
            with pytest.raises(UserError, match="No row of this split passes the filter"):
                select()
            return
        found = select()
    assert [row for start, stop in found.ranges for row in range(start, stop)] == expected
    assert {name: count for name, count in found.left_out.items() if count} == left_out
    assert (found.ranges[1:, 0] > found.ranges[:-1, 1]).all(), "neighbours are joined"


def test_rows_are_looked_at_a_block_at_a_time():
    longest = []

    def positions(start, stop):
        longest.append(stop - start)
        return np.zeros(stop - start, dtype=np.int32)

    far = 10 * filters.BLOCK_ROWS
    select_rows(
        np.array([[0, 5], [far, far + 5]]),
        RowFilter(positions=(0, 0)),
        documents=[],
        positions=positions,
        norms=[],
        where="",
    )
    assert longest == [filters.BLOCK_ROWS, 5], "blocks without rows of the split are not read"


# --- in a loader ------------------------------------------------------------------------------------------------------


def test_positions(small):
    loader = Loader(small, NAMES, 8, split="all", drop_last=False, row_filter=RowFilter(positions=(3, 20)), epochs=1)
    assert rows_of(loader) == [row for row in range(ROWS) if 3 <= row % 50 <= 20]
    assert loader.left_out == {"positions": ROWS - loader.rows}
    batches = list(loader)
    delivered = sorted(row for batch in batches for row in batch[NAMES[2]][:, 0].round().long().tolist() if row)
    assert delivered == [row for row in rows_of(loader) if row and not 48 <= row < 64]


@pytest.mark.parametrize("documents", [("lib/é2.py",), ("lib/é1?.py",), ("*3.py", "lib/é2.py", "*é*")])
def test_documents(small, documents):
    from fnmatch import fnmatchcase

    loader = Loader(small, NAMES, 1, drop_last=False, row_filter=RowFilter(documents=documents), epochs=1)
    owners, table = document_of_row(), plan().documents
    wanted = [
        row
        for row in range(ROWS)
        if table[owners[row]].split == "train" and any(fnmatchcase(table[owners[row]].id, p) for p in documents)
    ]
    assert rows_of(loader) == wanted and wanted
    train = sum(document.rows for document in table if document.split == "train")
    assert loader.left_out == {"documents": train - len(wanted)}


@pytest.fixture(scope="module")
def with_outliers(tmp_path_factory):
    """600 rows; every 50th at hook a, and every 60th at hook b, is a hundred times as long as the others."""
    path = tmp_path_factory.mktemp("outliers") / "store"
    hooks = [HookSpec("a", (4,), "bfloat16"), HookSpec("b", (6,), "float32")]
    rows = np.arange(600)
    a, b = (np.random.default_rng(d).standard_normal((600, d)).astype(np.float32) for d in (4, 6))
    a[rows % 50 == 7] *= 100
    b[rows % 60 == 9] *= 100
    documents = [DocumentRows(str(i), "train", i * 100, 100) for i in range(6)]
    with StoreWriter(path, StorePlan(600, documents), hooks, Geometry(32, 128), {}, disk=UnsyncedDisk()) as writer:
        writer.append({"a": from_float32(a), "b": b}, rows, rows % 40, rows // 100)
        writer.finish()
    return open_store(path)


@pytest.mark.parametrize("hooks", [["a"], ["b"], ["a", "b"]])
def test_norms_at_any_of_the_hooks(with_outliers, hooks):
    """A row is left out when it is far out at one hook, though it may not be at another."""
    loader = Loader(with_outliers, hooks, 1, row_filter=RowFilter(max_norm_ratio=10), epochs=1)
    far = {"a": set(range(7, 600, 50)), "b": set(range(9, 600, 60))}
    wanted = set(range(600)).difference(*(far[hook] for hook in hooks))
    assert rows_of(loader) == sorted(wanted) and loader.left_out == {"norms": 600 - len(wanted)}


def test_the_ratio_is_to_the_median(with_outliers):
    norms = with_outliers.tensor("b", 0, 600).double().norm(dim=1).numpy()
    loader = Loader(with_outliers, ["b"], 1, row_filter=RowFilter(max_norm_ratio=1.25), epochs=1)
    assert rows_of(loader) == np.flatnonzero(norms <= 1.25 * np.sort(norms)[299]).tolist()


def test_filters_together_and_their_counts_add_up(with_outliers):
    asked = RowFilter(positions=(0, 30), documents=("[124]",), max_norm_ratio=1.2)
    loader = Loader(with_outliers, ["a"], 1, row_filter=asked)
    assert list(loader.left_out) == ["documents", "positions", "norms"] and all(loader.left_out.values())
    assert loader.rows + sum(loader.left_out.values()) == 600
    assert Loader(with_outliers, ["a"], 1).left_out == {}


def test_a_filtered_loader_resumes_everywhere(small):
    asked = RowFilter(positions=(3, 40), max_norm_ratio=1.5)
    assert_resumes_everywhere(lambda: Loader(small, NAMES, 16, epochs=2, row_filter=asked, buffer_rows=64))


def test_a_filter_is_part_of_the_position(small):
    asked = RowFilter(positions=(3, 40))
    state = Loader(small, NAMES, 16, row_filter=asked).state_dict()
    assert json.loads(json.dumps(state)) == state
    Loader(small, NAMES, 16, row_filter=RowFilter(positions=[3, 40])).load_state_dict(state)
    with pytest.raises(UserError, match=r"row_filter was \{'positions': \[3, 40\]\} and is None"):
        Loader(small, NAMES, 16).load_state_dict(state)


def test_a_position_from_before_there_were_filters_is_continued(small):
    state = Loader(small, NAMES, 16).state_dict()
    for later in ("row_filter", "row_order"):
        del state["order"][later]
    Loader(small, NAMES, 16).load_state_dict(state)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(positions=(5, 3)), "positions=5,3 holds no position"),
        (dict(positions=(-1, 3)), "positions=-1,3 holds no position"),
        (dict(max_norm_ratio=0), "max_norm_ratio is 0; it must be a number above 0"),
        (dict(max_norm_ratio=float("nan")), "max_norm_ratio is nan"),
        (dict(documents="lib/a.py"), r"documents is a list of ids or patterns: \['lib/a.py'\]"),
    ],
    ids=str,
)
def test_a_filter_that_makes_no_sense_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        RowFilter(**asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            dict(documents=("lib/é2.py", "lib/e3.py")),
            "No document .* is called 'lib/e3.py'; documents are called, for example, 'lib/é0.py'",
        ),
        (
            dict(positions=(50, 99)),
            r"No row of split 'train' of store .* passes the filter \(left out of 294 rows: positions 294\)",
        ),
        (dict(documents=("lib/é1.py",), positions=(0, 9)), "left out of 294 rows: documents 294, positions 0"),
    ],
    ids=str,
)
def test_a_filter_that_leaves_nothing_is_refused(small, asked, said):
    with pytest.raises(UserError, match=said):
        Loader(small, NAMES[2:], 4, row_filter=RowFilter(**asked))


def test_norms_of_an_unfinished_store_are_refused(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
        store = open_store(fast_folder / "store")
        assert Loader(store, NAMES, 4, row_filter=RowFilter(positions=(0, 9))).rows
        with pytest.raises(UserError, match="has no statistics yet: 256 of 430 rows are there"):
            Loader(store, NAMES, 4, row_filter=RowFilter(max_norm_ratio=10))
