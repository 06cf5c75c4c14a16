"""A disk that is really full: ENOSPC from the system at whatever write it comes, not from a test's own class.

One sentence; committed rows are there and right; once there is space, the same call ends with the bytes of a store that
never met a full disk. (`test_writer.py` fills a disk that only claims to be full, at places of its choice.)
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from activation_store.errors import UserError
from activation_store.spec import COMPRESSIONS, DocumentRows, Geometry, HookSpec, StorePlan
from activation_store.testing import UnsyncedDisk, assert_same_files
from activation_store.verify import verify
from activation_store.writer import StoreWriter
from tests.activation_store import small_store
from tests.activation_store.large_store import make
from tests.activation_store.small_disk import run_on_a_small_disk

HOW_IT_GOES = """
import json, shutil, sys
from pathlib import Path
import numpy as np
from activation_store.errors import UserError
from activation_store.store import open_store
from activation_store.verify import verify
from tests.activation_store.large_store import HOOK, make, stored

disk, compression, free, kept = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
store, ballast = disk / "store", disk / "ballast"
said = []
while True:
    ballast.write_bytes(b"")
    ballast.unlink()
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))
    try:
        make(store, compression=compression)
    except UserError as refusal:
        rows = 0
        if (store / "zarr.json").exists():
            opened = open_store(store)
            rows = opened.rows
            assert np.array_equal(opened.read_rows(HOOK.name, 0, rows), stored(0, rows))
            assert verify(store) == []
        said.append([str(refusal), rows, [file.name for file in (store / ".staging").glob("shard-*")]])
        free = free * 3 // 2  # somebody frees some space
        continue
    break
shutil.copytree(store, kept)
print(json.dumps(said))
"""


@pytest.fixture(scope="module", params=COMPRESSIONS)
def undisturbed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "store"
    make(path, UnsyncedDisk(), compression=request.param)
    return request.param, path


@pytest.mark.parametrize("kilobytes", [4, 700])
def test_a_full_disk_is_one_sentence_and_the_same_call_goes_on_when_there_is_space(tmp_path, undisturbed, kilobytes):
    compression, whole = undisturbed
    (tmp_path / "disk").mkdir()
    done = run_on_a_small_disk(HOW_IT_GOES, tmp_path / "disk", 24, compression, kilobytes << 10, tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    where = tmp_path / "disk" / "store"
    assert len(said) >= 2, "the disk was hardly ever full"
    assert sorted(rows for _, rows, _ in said) == [rows for _, rows, _ in said], "committed rows were lost"
    assert {rows for _, rows, _ in said} - {0}, "the disk was only full before the first commit"
    for sentence, rows, left in said:
        assert sentence == (
            f"The disk of {where} is full. The {rows:,} rows committed so far are safe: free some space and run the "
            "same command again."
        )
        assert left == [], "what filled the disk was not given back"
    assert_same_files(tmp_path / "kept", whole)


def test_a_limit_on_the_size_of_files_is_one_sentence(tmp_path, undisturbed):
    """EFBIG, which needs no disk of its own: the system refuses in the middle of a shard."""
    compression, whole = undisturbed
    program = """
import sys
from activation_store.errors import UserError
from tests.activation_store.large_store import make
try:
    make(sys.argv[1], compression=sys.argv[2])
except UserError as refusal:
    print(refusal)
"""
    path = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", program, path, compression],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    )
    assert done.stdout == f"{path} cannot be written: File too large.\n", done.stderr
    make(path, compression=compression)
    assert_same_files(path, whole)


def test_a_process_that_could_not_put_its_pid_there_does_not_refuse_itself(fast_folder, small_path, monkeypatch):
    """The lock it had taken by then is let go of."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = fast_folder / "store"
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"The disk of .*store is full"):
            small_store.make(path)
    small_store.make(path)
    assert_same_files(path, small_path)


def test_too_many_open_files_are_one_sentence_and_none_stays_open(fast_folder, small_path):
    path = fast_folder / "store"
    with small_store.open_writer(path, UnsyncedDisk()) as writer:  # its metadata is in place
        small_store.append(writer, 0, 128)
    before = open_files()
    with (
        only_so_many_open_files(6),
        pytest.raises(UserError, match=r"cannot be written: Too many open files\. The 128"),
    ):
        small_store.make(path, UnsyncedDisk())
    assert open_files() == before
    small_store.make(path)
    assert_same_files(path, small_path)


def test_a_store_of_many_hooks_needs_two_open_files_for_each_of_them_and_no_more(fast_folder):
    """The shards that are being written; metadata and statistics are many more files."""
    hooks = [HookSpec(f"blocks.{layer}.hook_resid_post", (2,), "float32") for layer in range(120)]
    rows = {hook.name: np.ones((16, 2), dtype=np.float32) for hook in hooks}
    plan = StorePlan(16, [DocumentRows("a", "train", 0, 16)])
    with (
        only_so_many_open_files(2 * len(hooks) + 40),
        StoreWriter(fast_folder / "store", plan, hooks, Geometry(16, 16), {}, disk=UnsyncedDisk()) as writer,
    ):
        writer.append(rows, *np.zeros((3, 16), dtype=np.int64))
        writer.finish()
    assert verify(fast_folder / "store") == []


@contextlib.contextmanager
def only_so_many_open_files(count):
    """Besides those that are open already."""
    there = open_files()
    free = [number for number in range(2000) if number not in there]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def open_files():
    found = set()
    for number in range(1000):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found
