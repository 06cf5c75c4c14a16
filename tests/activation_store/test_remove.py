"""Removing a store: only a store, only one that nobody writes, and at no instant a half that looks like one."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import pytest

from activation_store import remove as removing
from activation_store.errors import UserError
from activation_store.remove import ASIDE, look, remove
from activation_store.spec import OWNER_FILE
from activation_store.store import open_store
from activation_store.testing import Killed, UnsyncedDisk, assert_same_files, files_of
from activation_store.writer import StoreWriter
from tests.activation_store.object_servers import new_url, objects_of
from tests.activation_store.small_store import GEOMETRY, HOOKS, PROVENANCE, ROWS, append, open_writer, plan


@pytest.fixture
def store(copied):
    """A store under the name that a workspace gives it."""
    return copied.rename(copied.with_name("mine.zarr"))


def test_nothing_is_left_of_a_store(store):
    remove(store)
    assert list(store.parent.iterdir()) == []


def test_neighbours_are_not_touched(store, small_path):
    shutil.copytree(small_path, store.with_name("mine.zarr.zarr"))
    (store.parent / "mine").mkdir()
    remove(store)
    assert sorted(entry.name for entry in store.parent.iterdir()) == ["mine", "mine.zarr.zarr"]
    assert_same_files(store.with_name("mine.zarr.zarr"), small_path)


def test_what_would_be_lost(store, small):
    found = look(store)
    assert (found.rows, found.hooks, found.complete) == (ROWS, tuple(hook.name for hook in HOOKS), True)
    assert found.bytes == sum(map(len, files_of(store).values()))
    assert (found.fingerprint, found.problem) == (small.fingerprint, None)


def test_a_store_that_is_being_written_is_left_alone(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
        with pytest.raises(UserError, match=f"store is being written by process {os.getpid()}; wait for it to end"):
            remove(fast_folder / "store")
        append(writer, 300, ROWS)
        writer.finish()
    assert open_store(fast_folder / "store").complete


def test_an_unfinished_store_can_be_removed(fast_folder):
    with open_writer(fast_folder / "store", UnsyncedDisk()) as writer:
        append(writer, 0, 300)
    found = look(fast_folder / "store")
    assert (found.rows, found.complete) == (256, False)
    remove(fast_folder / "store")
    assert list(fast_folder.iterdir()) == []


def test_a_writer_that_begins_under_the_name_keeps_its_lock(store, monkeypatch):
    """Whoever begins a store of that name as soon as it is free must not lose the lock to the end of the removal."""
    rename, begun = os.rename, []

    def renamed(source, target):
        rename(source, target)
        begun.append(open_writer(store, UnsyncedDisk()))

    monkeypatch.setattr(removing.os, "rename", renamed)
    remove(store)
    monkeypatch.undo()
    assert (store / OWNER_FILE).exists()
    append(begun[0], 0, ROWS)
    begun[0].finish()
    assert open_store(store).complete and not store.with_name("mine.zarr" + ASIDE).exists()


# --- killed -----------------------------------------------------------------------------------------------------------


def kill_at(monkeypatch, step):
    """Die before the ``step``-th of: every rename, every unlink, every rmdir. Returns what was reached."""
    reached = []

    def counted(name, do):
        def operation(*arguments, **named):
            reached.append(name)
            if len(reached) == step:
                raise Killed
            return do(*arguments, **named)

        return operation

    monkeypatch.setattr(os, "rename", counted("rename", os.rename))
    monkeypatch.setattr(os, "unlink", counted("unlink", os.unlink))
    monkeypatch.setattr(os, "rmdir", counted("rmdir", os.rmdir))
    monkeypatch.setattr(pathlib.Path, "unlink", counted("unlink", pathlib.Path.unlink))
    return reached


def test_killed_at_any_step_there_is_the_whole_store_or_none(store, small_path, monkeypatch):
    operations = len(files_of(store))
    for step in [*range(1, 12), *range(12, operations, 7)]:
        shutil.rmtree(store.parent)
        shutil.copytree(small_path, store)
        with monkeypatch.context() as patched:
            kill_at(patched, step)
            with pytest.raises(Killed):
                remove(store)
        there = {entry.name for entry in store.parent.iterdir()}
        if store.exists():
            (store / OWNER_FILE).unlink(missing_ok=True)
            assert_same_files(store, small_path)
            assert there == {"mine.zarr"}
        else:
            assert there == {"mine.zarr" + ASIDE}
        found = look(store)
        assert found.problem == (None if store.exists() else "its removal was interrupted")
        remove(store)
        assert list(store.parent.iterdir()) == []


def test_the_kills_above_reach_every_kind_of_step(store, monkeypatch):
    with monkeypatch.context() as patched:
        reached = kill_at(patched, 0)
        remove(store)
    assert reached.index("rename") < reached.index("unlink") < reached.index("rmdir")
    assert reached.count("unlink") >= 20


def test_what_an_interrupted_removal_left_goes_with_the_next_store_of_that_name(store, small_path):
    shutil.copytree(small_path, store.with_name("mine.zarr" + ASIDE))
    remove(store)
    assert list(store.parent.iterdir()) == []


# --- what is no store, and what is no longer one ----------------------------------------------------------------------


def test_what_is_not_a_store_is_left_alone(fast_folder):
    precious = fast_folder / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    for metadata in (None, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"x": 1}}), "{"):
        if metadata is not None:
            (precious / "zarr.json").write_text(metadata)
        with pytest.raises(UserError, match="precious is not an activation store: it is left alone"):
            remove(precious)
    assert (precious / "thesis.tex").exists()
    (fast_folder / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        remove(fast_folder / "file")
    assert look(fast_folder / "nothing") is None
    with pytest.raises(UserError, match="There is no store .*nothing"):
        remove(fast_folder / "nothing")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"rows": 430', '"rows": 431', "does not match its own checksum"),
        ('"format_version": ', '"format_version": 9', "of format version 9"),
    ],
)
def test_a_store_that_cannot_be_read_can_be_removed(store, old, new, words):
    manifest = (store / "zarr.json").read_text()
    assert old in manifest
    (store / "zarr.json").write_text(manifest.replace(old, new))
    assert words in look(store).problem
    remove(store)
    assert not store.exists()


def test_a_folder_that_may_not_be_changed_is_one_sentence(store, monkeypatch):
    def refused(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(removing.os, "rename", refused)
    with pytest.raises(UserError, match="mine.zarr cannot be removed: Permission denied."):
        remove(store)
    monkeypatch.undo()
    assert open_store(store).complete and not (store / OWNER_FILE).exists()


# --- object stores ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("s3")
def test_a_store_in_an_object_store_loses_its_manifest_first(s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    url = new_url("mine.zarr")
    neighbour = url + "-and-more"
    for location in (url, neighbour):
        with StoreWriter(location, plan(), HOOKS, GEOMETRY, PROVENANCE) as writer:
            append(writer, 0, ROWS)
            writer.finish()
    kept = objects_of(neighbour, s3_server.environment())
    from activation_store.object_folder import ObjectFolder

    remove_objects = ObjectFolder.remove

    def interrupted(place, keys, subject):
        if "zarr.json" not in keys and subject == "removal":
            raise KeyboardInterrupt
        remove_objects(place, keys, subject)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectFolder, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(url)
    with pytest.raises(UserError, match="There is no activation store"):
        open_store(url)
    assert look(url).problem == "it has no manifest"
    remove(url)
    assert objects_of(url, s3_server.environment()) == {}
    assert objects_of(neighbour, s3_server.environment()) == kept
