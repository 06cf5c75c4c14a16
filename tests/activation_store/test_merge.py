"""Stores that fit together become one, row for row; stores that do not are refused by what differs.

Not checked here: the writing itself, which is StoreWriter's.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store import merge as merging
from activation_store.errors import UserError
from activation_store.merge import merge
from activation_store.spec import DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.store import open_store
from activation_store.testing import UnsyncedDisk, assert_same_files, files_of
from activation_store.verify import verify
from activation_store.writer import StoreWriter
from tests.activation_store.object_servers import new_url, objects_of
from tests.activation_store.random_stores import RandomStore, random_stores
from tests.activation_store.small_store import HOOKS, append, open_writer

MODEL = {"name": "tiny", "fingerprint": "sha256:00", "weight_processing": {"fold": False}}
PROVENANCE = {"model": MODEL, "tokenizer": "sha256:11", "corpus": {"name": "x"}, "versions": {"torch": "2"}}
BATCHES = {"context": 8, "bos_token_id": None, "seed": 0}


def made(path, ids=("a", "b"), hooks=HOOKS, seed=0, **changed):
    """A store of one document of 20 rows for each id, every second held out."""
    documents = [
        DocumentRows(id_, "held-out" if number % 2 else "train", 20 * number, 20) for number, id_ in enumerate(ids)
    ]
    plan = StorePlan(
        20 * len(documents), documents, changed.pop("excluded", {"bos": 2}), BATCHES | changed.pop("batches", {})
    )
    arguments = {
        "provenance": PROVENANCE | changed.pop("provenance", {}),
        "geometry": Geometry(4, 16),
        "compression": "none",
        "text": seed,
    }
    return RandomStore(tuple(hooks), plan=plan, bits=seed, **(arguments | changed)).write(path)


def everything(path):
    """All that merging must keep, as one dict of arrays."""
    store = open_store(path)
    rows = {name: store.read_rows(name, 0, store.rows) for name in store.hooks}
    ids = np.array([document.id for document in store.document_table])
    of_rows = {name: getattr(store, name)(0, store.rows) for name in ("token_ids", "positions")}
    return rows | of_rows | {"document": ids[store.documents(0, store.rows)]}


def assert_together(path, *parts):
    merged, parts = everything(path), [everything(part) for part in parts]
    for name, column in merged.items():
        wanted = np.concatenate([part[name] for part in parts])
        assert column.dtype.itemsize == wanted.dtype.itemsize and np.array_equal(column, wanted), name


# --- one after the other ----------------------------------------------------------------------------------------------


def test_stores_of_the_same_hooks_are_put_one_after_the_other(fast_folder):
    a = made(fast_folder / "a", ["a", "b"], seed=1, provenance={"versions": {"torch": "2"}})
    b = made(
        fast_folder / "b",
        ["c", "d", "e"],
        seed=2,
        excluded={"bos": 5, "padding": 1},
        batches={"seed": 7, "context": 4},
        provenance={"corpus": {"name": "y"}, "versions": {"torch": "3"}},
    )
    merge([a, b], fast_folder / "merged")
    assert_together(fast_folder / "merged", a, b)
    assert verify(fast_folder / "merged") == []
    store = open_store(fast_folder / "merged")
    assert [(d.id, d.split, d.first_row) for d in store.document_table] == [
        ("a", "train", 0),
        ("b", "held-out", 20),
        ("c", "train", 40),
        ("d", "held-out", 60),
        ("e", "train", 80),
    ]
    assert store.manifest.excluded == {"bos": 7, "padding": 1}
    assert store.statistics(HOOKS[0].name).count == 100
    assert (store.manifest.batches["context"], store.manifest.batches["bos_token_id"]) == (4, None)
    assert "seed" not in store.manifest.batches
    assert [part["batches"]["seed"] for part in store.manifest.batches["merged"]] == [0, 7]
    assert (store.provenance["model"], store.provenance["tokenizer"]) == (MODEL, "sha256:11")
    assert store.provenance["corpus"] == {"name": "x + y"} and "versions" not in store.provenance
    assert [(part["name"], part["fingerprint"], part["rows"]) for part in store.provenance["merged"]] == [
        ("a", open_store(a).fingerprint, 40),
        ("b", open_store(b).fingerprint, 60),
    ]
    assert [part["provenance"]["versions"]["torch"] for part in store.provenance["merged"]] == ["2", "3"]


HOOKS_OF_ALL = (HookSpec("a", (3,), "bfloat16"), HookSpec("b", (2, 2), "float32"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stores=st.lists(random_stores(hooks=HOOKS_OF_ALL), min_size=2, max_size=3),
    block_bytes=st.sampled_from([1, 60, 1 << 20]),
)
def test_any_stores_of_the_same_hooks_are_what_was_written_at_once(fast_folder, monkeypatch, stores, block_bytes):
    """Compared, byte for byte, with a store that a writer made of the same rows under the merged plan."""
    monkeypatch.setattr(merging, "BLOCK_BYTES", block_bytes)
    for leftover in fast_folder.iterdir():
        shutil.rmtree(leftover)
    parts = []
    for number, store in enumerate(stores):
        batches = {**store.plan.batches, "number": number}
        documents = [replace(d, id=f"{number} {d.id}") for d in store.plan.documents]
        different = replace(store, plan=replace(store.plan, documents=documents, batches=batches))
        parts.append(different.write(fast_folder / f"part {number}"))
    merger = merge(parts, fast_folder / "merged")
    columns = [everything(part) for part in parts]
    with StoreWriter(
        fast_folder / "at once", merger.plan, merger.hooks, stores[0].geometry, merger.provenance, disk=UnsyncedDisk()
    ) as writer:
        writer.append(
            {hook.name: np.concatenate([column[hook.name] for column in columns]) for hook in HOOKS_OF_ALL},
            np.concatenate([column["token_ids"] for column in columns]),
            np.concatenate([column["positions"] for column in columns]),
            np.repeat(np.arange(len(merger.plan.documents)), [d.rows for d in merger.plan.documents]),
        )
        writer.finish()
    assert_same_files(fast_folder / "merged", fast_folder / "at once")


def test_a_merged_store_can_be_merged_again(fast_folder):
    parts = [
        made(fast_folder / name, [name], seed=number, batches={"seed": number}) for number, name in enumerate("abc")
    ]
    merge(parts[:2], fast_folder / "ab")
    merge([fast_folder / "ab", parts[2]], fast_folder / "abc")
    assert_together(fast_folder / "abc", *parts)


def test_hooks_may_be_in_another_order(fast_folder):
    parts = [made(fast_folder / "a", ["a"]), made(fast_folder / "b", ["b"], hooks=HOOKS[::-1])]
    merge(parts, fast_folder / "merged")
    assert list(open_store(fast_folder / "merged").hooks) == [hook.name for hook in HOOKS]
    assert_together(fast_folder / "merged", *parts)


def test_an_interrupted_merge_continues_in_the_store_it_had_reached(fast_folder, monkeypatch):
    parts = [made(fast_folder / name, [name * 2, name], seed=number) for number, name in enumerate("abc")]
    merge(parts, fast_folder / "undisturbed")
    monkeypatch.setattr(merging, "BLOCK_BYTES", 400)
    append, next_rows = StoreWriter.append, []

    def interrupted(writer, *columns, **named):
        next_rows.append(writer.next_row)
        if len(next_rows) > 1 and next_rows[0] == 0 and writer.next_row > 70:
            raise KeyboardInterrupt
        append(writer, *columns, **named)

    monkeypatch.setattr(StoreWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, fast_folder / "merged")
    assert open_store(fast_folder / "merged").rows == 64
    next_rows.clear()
    merge(parts, fast_folder / "merged")
    assert next_rows[0] == 64
    assert_same_files(fast_folder / "merged", fast_folder / "undisturbed")
    next_rows.clear()
    merge(parts, fast_folder / "merged")  # nothing is left to do
    assert next_rows == []


def test_the_merged_store_can_be_compressed(fast_folder):
    parts = [made(fast_folder / "a", ["a"], compression="zstd"), made(fast_folder / "b", ["b"])]
    merge(parts, fast_folder / "merged", compression="zstd")
    assert open_store(fast_folder / "merged").manifest.compression == "zstd"
    assert_together(fast_folder / "merged", *parts)


@pytest.mark.needs("s3")
def test_stores_are_merged_wherever_they_are(fast_folder, s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    parts = [made(fast_folder / "a", ["a"]), made(fast_folder / "b", ["b"], seed=1)]
    there, merged = new_url("b"), new_url("merged.zarr")
    made(there, ["b"], seed=1)
    merge([parts[0], there], merged)
    merge(parts, fast_folder / "merged")
    assert objects_of(merged, s3_server.environment()) == files_of(fast_folder / "merged")


# --- the same document in two of them ---------------------------------------------------------------------------------


def test_a_document_in_two_of_them_is_refused(fast_folder):
    parts = [made(fast_folder / "a", ["p", "q", "r"]), made(fast_folder / "b", ["r", "s", "q"], seed=1)]
    with pytest.raises(UserError, match=r"2 documents of b are in a store before it too \(r, q\).*--keep-repeated"):
        merge(parts, fast_folder / "merged")
    assert not (fast_folder / "merged").exists()


def test_repeated_documents_are_kept_apart_on_request_and_stay_in_their_split(fast_folder):
    parts = [
        made(fast_folder / "a", ["p", "q"]),
        made(fast_folder / "b", ["q", "q #2", "p"], seed=1),
        made(fast_folder / "c", ["p"], seed=2),
    ]
    merge(parts, fast_folder / "merged", keep_repeated=True)
    table = open_store(fast_folder / "merged").document_table
    assert [document.id for document in table] == ["p", "q", "q #2", "q #2 #2", "p #2", "p #3"]
    assert [document.split for document in table] == ["train", "held-out", "held-out", "held-out", "train", "train"]


# --- side by side -----------------------------------------------------------------------------------------------------


def test_stores_of_the_same_rows_get_the_hooks_of_all(fast_folder):
    paths = [
        made(fast_folder / hook.name, hooks=[hook], seed=5, geometry=Geometry(4, 8 * n))
        for n, hook in enumerate(HOOKS, 1)
    ]
    merge(paths, fast_folder / "merged")
    merged = everything(fast_folder / "merged")
    for path in paths:
        for name, column in everything(path).items():
            assert np.array_equal(merged[name], column)
    store = open_store(fast_folder / "merged")
    assert list(store.hooks) == [hook.name for hook in HOOKS] and store.manifest.geometry == Geometry(4, 8)
    assert store.manifest.identity()["plan"] == open_store(paths[0]).manifest.identity()["plan"]
    assert [part["hooks"] for part in store.provenance["merged"]] == [[hook.name] for hook in HOOKS]
    assert verify(fast_folder / "merged") == []


def test_one_more_layer_can_be_added_to_a_merged_store(fast_folder):
    paths = [made(fast_folder / hook.name, hooks=[hook]) for hook in HOOKS]
    merge(paths[:2], fast_folder / "two")
    merge([fast_folder / "two", paths[2]], fast_folder / "three")
    assert list(open_store(fast_folder / "three").hooks) == [hook.name for hook in HOOKS]


def test_a_plan_that_says_the_same_of_other_tokens_is_found_out(fast_folder):
    paths = [made(fast_folder / "a", hooks=HOOKS[:1]), made(fast_folder / "b", hooks=HOOKS[1:2], text=1)]
    with pytest.raises(UserError, match="a and b should hold the same rows, but the token of row 0 differs"):
        merge(paths, fast_folder / "merged")


def test_the_same_hook_of_the_same_rows_twice_is_refused(fast_folder):
    paths = [
        made(fast_folder / "a", hooks=HOOKS[:2]),
        made(fast_folder / "b", hooks=HOOKS[1:], provenance={"versions": {"torch": "3"}}),
    ]
    with pytest.raises(UserError, match=f"a and b hold the same rows, and each has {HOOKS[1].name}"):
        merge(paths, fast_folder / "merged")


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"hooks": [replace(HOOKS[0], dtype="float32"), *HOOKS[1:]]},
            r'neither the same hooks nor the same rows: hook blocks.0.hook_resid_post is "bfloat16 \[8\]" in a and '
            r'"float32 \[8\]" in b',
        ),
        ({"hooks": HOOKS[:2]}, r'hook blocks.1.hook_mlp_out is "float32 \[4\]" in a and absent in b'),
        (
            {"provenance": {"model": MODEL | {"fingerprint": "sha256:22"}}},
            'not made by the same model and tokenizer: model.fingerprint is "sha256:00" in a and "sha256:22" in b',
        ),
        (
            {"provenance": {"model": MODEL | {"weight_processing": {"fold": True}}}},
            "weight_processing.fold is false in a",
        ),
        ({"provenance": {"tokenizer": "sha256:33"}}, 'tokenizer is "sha256:11" in a and "sha256:33" in b'),
        ({"batches": {"bos_token_id": 0}}, "a and b treat the BOS token differently"),
    ],
)
def test_what_differs_is_named(fast_folder, changed, words):
    parts = [made(fast_folder / "a", ["a"]), made(fast_folder / "b", ["b"], **changed)]
    with pytest.raises(UserError, match=words):
        merge(parts, fast_folder / "merged")
    assert not (fast_folder / "merged").exists()


def test_a_model_that_has_moved_is_still_the_same(fast_folder):
    parts = [
        made(fast_folder / "a", ["a"]),
        made(fast_folder / "b", ["b"], provenance={"model": MODEL | {"name": "/b"}}),
    ]
    merge(parts, fast_folder / "merged")
    assert open_store(fast_folder / "merged").provenance["model"] == MODEL


def test_models_that_have_no_fingerprint_are_told_apart_by_name(fast_folder):
    parts = [
        made(fast_folder / name, [name], provenance={"model": {"name": name, "fingerprint": None}}) for name in "ab"
    ]
    with pytest.raises(UserError, match='model.name is "a" in a and "b" in b'):
        merge(parts, fast_folder / "merged")


def test_an_incomplete_store_is_refused(fast_folder, small_path):
    with open_writer(fast_folder / "growing", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
    with pytest.raises(UserError, match="growing is not complete: 256 of 430 rows are there. Run its harvest again"):
        merge([small_path, fast_folder / "growing"], fast_folder / "merged")


def test_one_store_or_the_same_twice_is_refused(fast_folder, small_path, copied):
    with pytest.raises(UserError, match="Merging takes two stores or more"):
        merge([small_path], fast_folder / "merged")
    with pytest.raises(UserError, match="small and .*copied hold the same rows at the same hooks; leave one out"):
        merge([small_path, copied], fast_folder / "merged")


def test_a_store_is_not_merged_into_itself(fast_folder):
    parts = [made(fast_folder / "a", ["a"]), made(fast_folder / "b", ["b"])]
    with pytest.raises(UserError, match="was made otherwise"):
        merge(parts, parts[0])


def test_damage_is_found_and_not_copied(fast_folder):
    """A merged store has checksums of its own: what is copied unseen would never be found again."""
    parts = [made(fast_folder / "a", ["a"]), made(fast_folder / "b", ["b"])]
    shard = parts[1] / "activations" / HOOKS[2].name / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"b/activations/blocks.1.hook_mlp_out/c.0.0 is damaged"):
        merge(parts, fast_folder / "merged")
