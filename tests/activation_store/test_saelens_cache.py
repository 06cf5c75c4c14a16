"""A cache that SAELens made becomes a store with the same values, in its order.

The files below are made as SAELens' runner makes them. That they are was checked against sae-lens 6.54.12: caches of a
two-layer model were written by its CacheActivationsRunner (float32, float16 and float64; one buffer and several; more
contexts than Arrow takes in one batch; a sliced context; shuffled; a text that was too short), their schemas compared
with `write_cache`'s, and every value and token that came out of an import compared with what the runner's own data set
returned: all equal. The runner cannot write bfloat16 (Arrow has no such type).
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from activation_store import saelens_cache
from activation_store.bfloat16 import from_float32
from activation_store.errors import UserError
from activation_store.saelens_cache import import_saelens_cache
from activation_store.spec import UNKNOWN, Geometry
from activation_store.store import open_store
from activation_store.testing import assert_same_files
from activation_store.verify import verify
from activation_store.writer import StoreWriter

HOOK = "blocks.1.hook_resid_post"
CONTEXTS, CONTEXT, D = 25, 6, 5
GEOMETRY = Geometry(8, 32)


def activations(contexts=CONTEXTS, dtype="float32"):
    return np.random.default_rng(0).normal(size=(contexts, CONTEXT, D)).astype(dtype)


def tokens(contexts=CONTEXTS):
    return np.random.default_rng(1).integers(0, 50_000, (contexts, CONTEXT)).astype(np.int32)


def write_cache(folder, values, token_ids, *, hook=HOOK, parts=3, batch=4):
    """A cache in ``parts`` Arrow files, ``batch`` contexts to a record batch (1000 in SAELens')."""
    folder.mkdir()
    context, d = values.shape[1:]
    features = {hook: {"shape": [context, d], "dtype": values.dtype.name, "_type": "Array2D"}}
    extension = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([[context, d], values.dtype.name]),
    }
    fields = [pa.field(hook, pa.list_(pa.list_(pa.from_numpy_dtype(values.dtype))), metadata=extension)]
    if token_ids is not None:
        features["token_ids"] = {"feature": {"dtype": "int32", "_type": "Value"}, "length": context, "_type": "List"}
        fields.append(pa.field("token_ids", pa.list_(pa.int32(), context)))
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    names = []
    for number, part in enumerate(np.array_split(np.arange(len(values)), parts)):
        names.append(f"data-{number:05d}-of-{parts:05d}.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for rows in np.split(part, range(batch, len(part), batch)):
                columns = [lists_of_lists(values[rows])]
                if token_ids is not None:
                    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(token_ids[rows].reshape(-1)), context))
                stream.write_batch(pa.record_batch(columns, schema=schema))
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "cde786ea1ff171b5", "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    return folder


def lists_of_lists(values):
    n, context, d = values.shape
    inner = pa.ListArray.from_arrays(np.arange(0, n * context * d + 1, d, dtype=np.int32), pa.array(values.reshape(-1)))
    return pa.ListArray.from_arrays(np.arange(0, n * context + 1, context, dtype=np.int32), inner)


@pytest.fixture
def cache(fast_folder):
    return write_cache(fast_folder / "cache", activations(), tokens())


def imported(cache, name="store", **options):
    location = cache.parent / name
    import_saelens_cache(cache, location, geometry=GEOMETRY, **options)
    return open_store(location)


def rows_of(store):
    return store.read_rows(HOOK, 0, store.rows)


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("parts", "batch", "block_bytes"), [(1, 1000, 1 << 20), (3, 4, 1 << 20), (2, 10, 300)])
def test_every_value_and_token_comes_out_as_it_is_there(fast_folder, monkeypatch, dtype, parts, batch, block_bytes):
    monkeypatch.setattr(saelens_cache, "BLOCK_BYTES", block_bytes)
    values, token_ids = activations(dtype=dtype), tokens()
    store = imported(write_cache(fast_folder / "cache", values, token_ids, parts=parts, batch=batch))
    assert store.hook(HOOK).dtype == dtype
    assert rows_of(store).tobytes() == values.tobytes()
    assert np.array_equal(store.token_ids(0, store.rows), token_ids.reshape(-1))
    assert np.array_equal(store.positions(0, store.rows), np.tile(np.arange(CONTEXT), CONTEXTS))
    assert np.array_equal(store.documents(0, store.rows), np.repeat(np.arange(CONTEXTS), CONTEXT))
    assert store.manifest.batches["context"] == CONTEXT
    assert verify(store.location) == []


def test_what_the_datasets_library_writes_is_read_the_same_way(fast_folder):
    """With that library loaded, pyarrow wraps the column in the library's own type."""
    datasets = pytest.importorskip("datasets")
    values, token_ids = activations(), tokens()
    features = datasets.Features(
        {
            HOOK: datasets.Array2D(shape=(CONTEXT, D), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=CONTEXT),
        }
    )
    made = datasets.Dataset.from_dict({HOOK: values, "token_ids": token_ids}, features=features)
    made.save_to_disk(fast_folder / "cache", num_shards=2)
    assert rows_of(imported(fast_folder / "cache")).tobytes() == values.tobytes()
    assert np.array_equal(imported(fast_folder / "cache").token_ids(0, 150), token_ids.reshape(-1))


def test_the_last_tenth_of_the_contexts_is_held_out(cache):
    store = imported(cache)
    assert store.split_rows("held-out") == [(23 * CONTEXT, 25 * CONTEXT)]


def test_a_context_that_comes_twice_is_in_one_split(fast_folder):
    """The runner starts over where its text ends: the last tenth would repeat what is trained on."""
    token_ids, values = tokens(20), activations(20)
    again = np.concatenate([np.arange(20), np.arange(6)])
    store = imported(write_cache(fast_folder / "cache", values[again], token_ids[again]))
    split_of_row = np.repeat([d.split for d in store.document_table], CONTEXT)
    contexts = store.token_ids(0, store.rows).reshape(-1, CONTEXT)
    train = {bytes(c) for c, split in zip(contexts, split_of_row[::CONTEXT], strict=True) if split == "train"}
    held_out = {bytes(c) for c, split in zip(contexts, split_of_row[::CONTEXT], strict=True) if split == "held-out"}
    assert len(train) == 18 and len(held_out) == 2 and not train & held_out


def test_a_cache_without_tokens_has_unknown_ones(fast_folder):
    store = imported(write_cache(fast_folder / "cache", activations(), None))
    assert set(store.token_ids(0, store.rows)) == {UNKNOWN}
    assert store.split_rows("held-out") == [(23 * CONTEXT, 25 * CONTEXT)]


def test_the_runners_settings_tell_the_model_and_the_slice(cache):
    settings = {"model_name": "gpt2", "context_size": 8, "seqpos_slice": [1, -1], "device": "cuda", "dtype": "float32"}
    (cache / "cache_activations_runner_cfg.json").write_text(json.dumps(settings))
    store = imported(cache)
    assert store.provenance["model"] == {"name": "gpt2", "fingerprint": None}
    assert store.positions(0, CONTEXT).tolist() == [1, 2, 3, 4, 5, 6]
    assert store.provenance["imported"]["runner"] == {
        "model_name": "gpt2",
        "context_size": 8,
        "seqpos_slice": [1, -1],
    }


def test_settings_that_do_not_fit_the_contexts_leave_positions_unknown(cache):
    (cache / "cache_activations_runner_cfg.json").write_text('{"context_size": 9}')
    assert set(imported(cache).positions(0, 60)) == {UNKNOWN}


def test_another_type_on_disk_is_rounded_to(cache, fast_folder):
    assert np.array_equal(rows_of(imported(cache, dtype="bfloat16")), from_float32(activations()).reshape(-1, D))
    wide = write_cache(fast_folder / "wide", activations(dtype="float64"), tokens())
    with pytest.raises(UserError, match=f"{HOOK} in .*wide holds float64, .* --dtype"):
        imported(wide, "other")
    assert np.array_equal(rows_of(imported(wide, "other", dtype="float32")), activations().reshape(-1, D))


def test_caches_of_the_same_tokens_have_the_same_plan(fast_folder):
    """So that they can be merged hook by hook, wherever they were cached."""
    first = imported(write_cache(fast_folder / "one", activations(), tokens()))
    second = write_cache(fast_folder / "two", 2 * activations(), tokens(), hook="blocks.0.hook_resid_post")
    import_saelens_cache(second, fast_folder / "store2", geometry=GEOMETRY)
    assert open_store(fast_folder / "store2").manifest.identity()["plan"] == first.manifest.identity()["plan"]


def test_blocks_are_no_larger_than_memory_was_given_to(cache, monkeypatch):
    monkeypatch.setattr(saelens_cache, "BLOCK_BYTES", 2 * CONTEXT * D * 4)
    blocks = list(saelens_cache.Cache(cache).as_foreign_rows(None).blocks(0))
    assert {len(block.token_ids) for block in blocks} == {CONTEXT, 2 * CONTEXT}
    assert [block.first_row for block in blocks] == list(np.cumsum([0] + [len(b.token_ids) for b in blocks[:-1]]))


@pytest.mark.parametrize("row", [0, 5, 6, 47, 48, 100, 149])
def test_blocks_begin_at_the_context_that_is_asked_for(cache, row):
    blocks = saelens_cache.Cache(cache).as_foreign_rows(None).blocks(row)
    first = next(blocks)
    assert first.first_row <= row < first.first_row + len(first.token_ids)
    rows = np.concatenate([first.rows[HOOK], *(block.rows[HOOK] for block in blocks)])
    assert np.array_equal(rows, activations().reshape(-1, D)[first.first_row :])
    assert row - first.first_row < CONTEXT


def test_an_interrupted_import_continues_where_it_was(cache, monkeypatch):
    imported(cache, "undisturbed")
    append = StoreWriter.append

    def interrupted(writer, *columns, **named):
        if writer.next_row > 70:
            raise KeyboardInterrupt
        append(writer, *columns, **named)

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            imported(cache)
    assert open_store(cache.parent / "store").rows == 64
    imported(cache)
    assert_same_files(cache.parent / "store", cache.parent / "undisturbed")


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(cache, **options):
    with pytest.raises(UserError) as refused:
        imported(cache, **options)
    assert not (cache.parent / "store").exists()
    return str(refused.value)


def test_an_unfinished_cache_is_refused(cache):
    (cache / ".tmp_shards").mkdir()
    assert "cache is unfinished: SAELens' runner was interrupted, or is still at work" in refusal(cache)


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_a_folder_without_its_lists_is_no_cache(cache, name):
    (cache / name).unlink()
    assert f"holds no {name}, so it is no data set that SAELens cached" in refusal(cache)
    (cache / name).write_text("{")
    assert f"{name} cannot be read" in refusal(cache)
    (cache / name).write_text("[]")
    assert f"{name} is damaged: it should hold a JSON object" in refusal(cache)
    (cache / name).write_text("{}")
    assert "cache" in refusal(cache)


def test_there_is_no_folder(fast_folder):
    assert "There is no folder" in refusal(fast_folder / "none")
    (fast_folder / "file").write_text("")
    assert "is not a folder" in refusal(fast_folder / "file")


def test_a_data_set_of_something_else_is_refused(cache):
    info = {"features": {"text": {"dtype": "string", "_type": "Value"}}}
    (cache / "dataset_info.json").write_text(json.dumps(info))
    assert "is a data set, but not of cached activations: it should have a column" in refusal(cache)
    assert "and has text." in refusal(cache)


@pytest.mark.parametrize("context", [0, 7])
def test_columns_of_another_shape_than_is_said_are_refused(cache, context):
    file = cache / "dataset_info.json"
    file.write_text(file.read_text().replace(str(CONTEXT), str(context)))
    refusal(cache)


def test_a_missing_part_is_named(cache):
    (cache / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow is missing, though state.json lists it" in refusal(cache)


def test_a_part_that_is_listed_twice_is_refused(cache):
    state = (cache / "state.json").read_text()
    (cache / "state.json").write_text(state.replace("data-00001", "data-00000"))
    assert "state.json is damaged: it lists a data file twice" in refusal(cache)


def test_a_truncated_part_is_refused_wherever_it_was_cut(cache):
    """Cut between two batches it would be a shorter stream that reads without complaint."""
    file = cache / "data-00002-of-00003.arrow"
    content = file.read_bytes()
    for length in (0, 7, 600, len(content) // 2, len(content) - 8, len(content) - 1):
        file.write_bytes(content[:length])
        assert "data-00002-of-00003.arrow is truncated" in refusal(cache)
    file.write_bytes(content[:100] + content[-8:])
    assert "data-00002-of-00003.arrow is damaged; Arrow says:" in refusal(cache)


def test_values_that_are_not_finite_are_named(fast_folder):
    values = activations()
    values[13, 2, 1] = np.nan
    words = refusal(write_cache(fast_folder / "cache", values, tokens()))
    assert f"Row {13 * CONTEXT + 2} of {HOOK} in cache holds nan" in words


def test_lists_of_other_lengths_and_missing_values_are_refused(cache):
    file = cache / "data-00001-of-00003.arrow"
    schema = pa.ipc.open_stream(file.read_bytes()).schema
    row = [[1.0] * D] * CONTEXT

    def refusal_of(rows):
        columns = [pa.array(rows, schema.field(0).type), pa.array([[1] * CONTEXT] * len(rows), schema.field(1).type)]
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, schema) as stream:
            stream.write_batch(pa.record_batch(columns, schema=schema))
        return refusal(cache)

    assert f"{HOOK} holds lists of [6, 5] values, expected 6" in refusal_of([row, row[1:]])
    assert f"{HOOK} holds lists of [5, 4] values, expected 5" in refusal_of([[*row[1:], [1.0] * (D - 1)]])
    assert f"{HOOK} lacks 1 values" in refusal_of([[*row[1:], [1.0] * (D - 1) + [None]]])
    assert f"{HOOK} holds lists of [6, None] values" in refusal_of([row, None])


def test_a_cache_in_which_nothing_was_stored_is_refused(fast_folder):
    cache = write_cache(fast_folder / "cache", activations(3), tokens(3), parts=1)
    state = json.loads((cache / "state.json").read_text())
    (cache / "state.json").write_text(json.dumps(state | {"_data_files": []}))
    assert "holds no activations" in refusal(cache)


def test_an_import_is_not_continued_from_another_cache(fast_folder):
    imported(write_cache(fast_folder / "cache", activations(), tokens()))
    shutil.rmtree(fast_folder / "cache")
    with pytest.raises(UserError, match="was made otherwise"):
        imported(write_cache(fast_folder / "cache", activations() + 1, tokens()))
