"""A build that was killed and run again gives the same bytes, and does not start over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from activation_store.errors import UserError
from activation_store.ownership import Ownership
from activation_store.testing import FullDisk, Killed, KillingDisk, RecordingDisk, UnsyncedDisk, assert_same_files
from dictlearn.dictionaries.topk import TopK
from dictlearn.feature_index import build as index_build
from dictlearn.feature_index import encode, staging, transpose
from dictlearn.feature_index.command import IndexConfig, run_index
from dictlearn.feature_index.plan import Sampled
from dictlearn.feature_index.work import building_folder
from dictlearn.workspace import Workspace

from .conftest import make_run, make_store

CONFIG = IndexConfig("run", logits=False)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("resume"))
    make_run(workspace, "run", make_store(workspace, "store", [90, 60, 100, 50]))
    return workspace


@pytest.fixture(autouse=True)
def many_parts(monkeypatch) -> None:
    """Four parts of 80 rows and ranges of a few latents."""
    monkeypatch.setattr(encode, "batch_rows", lambda d_sae: 16)
    monkeypatch.setattr(encode, "BYTES_PER_SLOT", 512 * 2**20 // 320)
    monkeypatch.setattr(transpose, "BYTES_PER_ACTIVATION", 512 * 2**20 // 400)


@pytest.fixture
def whole(workspace) -> Path:
    """The index of a build that nothing interrupted."""
    return run_index(IndexConfig("run", name="whole", logits=False), workspace)


def build(workspace: Workspace, disk, monkeypatch) -> Path:
    monkeypatch.setattr(staging, "default_disk", lambda: disk)
    return run_index(CONFIG, workspace)


@pytest.fixture
def fresh(workspace) -> Workspace:
    """The workspace without the index that the tests make."""
    path = workspace.index("run")
    for folder in (path, building_folder(path)):
        shutil.rmtree(folder, ignore_errors=True)
    return workspace


def assert_resumes(workspace: Workspace, whole: Path, point: str, count: int, monkeypatch) -> None:
    path = workspace.index("run")
    shutil.rmtree(path, ignore_errors=True)
    with pytest.raises(Killed):
        build(workspace, KillingDisk(point, count, by_signal=False), monkeypatch)
    assert_same_files(build(workspace, UnsyncedDisk(), monkeypatch), whole)
    assert not building_folder(path).exists()


def test_killed_at_the_last_operation_of_each_kind(fresh, whole, monkeypatch) -> None:
    recording = RecordingDisk()
    assert_same_files(build(fresh, recording, monkeypatch), whole)
    counts = Counter(recording.points)
    assert counts["part.rename"] == 4 and counts["range.rename"] >= 3
    for point, count in counts.items():
        assert_resumes(fresh, whole, point, count, monkeypatch)


@pytest.mark.heavy
def test_killed_at_every_operation(fresh, whole, monkeypatch) -> None:
    recording = RecordingDisk()
    build(fresh, recording, monkeypatch)
    for count in range(1, len(recording.points) + 1):
        assert_resumes(fresh, whole, "*", count, monkeypatch)


@pytest.mark.parametrize("point", ["part.rename", "range.rename", "mark.rename"])
def test_killed_again_and_again_at_one_point(fresh, whole, monkeypatch, point) -> None:
    """Each run gets one operation of the kind further than the one before, so this ends."""
    kills = 0
    while not fresh.index("run").exists() and kills < 20:
        try:
            build(fresh, KillingDisk(point, 2, by_signal=False), monkeypatch)
        except Killed:
            kills += 1
    assert kills >= 1
    assert_same_files(fresh.index("run"), whole)


def test_what_has_been_encoded_is_not_encoded_again(fresh, whole, monkeypatch) -> None:
    """Nor counted here are the rows that each build samples to know how much room it needs."""
    encoded = []
    encode_rows = TopK.encode
    monkeypatch.setattr(index_build, "sample", lambda dictionary, work: Sampled(1, 1.0, 1))
    monkeypatch.setattr(TopK, "encode", lambda self, x: encoded.append(len(x)) or encode_rows(self, x))
    with pytest.raises(Killed):
        build(fresh, KillingDisk("part.rename", 3, by_signal=False), monkeypatch)
    assert 160 < sum(encoded) <= 256
    encoded.clear()
    assert_same_files(build(fresh, UnsyncedDisk(), monkeypatch), whole)
    assert sum(encoded) == 300 - 160
    encoded.clear()
    shutil.rmtree(fresh.index("run"))
    with pytest.raises(Killed):
        build(fresh, KillingDisk("range.rename", 2, by_signal=False), monkeypatch)
    encoded.clear()
    assert_same_files(build(fresh, UnsyncedDisk(), monkeypatch), whole)
    assert encoded == []


def test_a_part_that_somebody_removed_is_encoded_again(fresh, whole, monkeypatch) -> None:
    with pytest.raises(Killed):
        build(fresh, KillingDisk("part.rename", 4, by_signal=False), monkeypatch)
    parts = sorted((building_folder(fresh.index("run")) / "parts").glob("*[0-9]"))
    assert len(parts) == 3
    shutil.rmtree(parts[1])
    assert_same_files(build(fresh, UnsyncedDisk(), monkeypatch), whole)


def test_continuing_with_another_memory_gives_the_same(fresh, whole, monkeypatch) -> None:
    for point, memory in (("part.rename", 700), ("range.rename", 2000)):
        with pytest.raises(Killed):
            build(fresh, KillingDisk(point, 2, by_signal=False), monkeypatch)
        monkeypatch.setattr(staging, "default_disk", UnsyncedDisk)
        path = run_index(IndexConfig("run", logits=False, memory_mb=memory), fresh)
        assert_same_files(path, whole)
        shutil.rmtree(path)


def test_what_was_begun_from_something_else_is_thrown_away(fresh, whole, monkeypatch) -> None:
    with pytest.raises(Killed):
        build(fresh, KillingDisk("range.rename", 2, by_signal=False), monkeypatch)
    make_run(fresh, "other", make_store(fresh, "store-2", [40, 70]), d_sae=30)
    monkeypatch.setattr(staging, "default_disk", UnsyncedDisk)
    expected = run_index(IndexConfig("other", name="expected", logits=False), fresh)
    path = run_index(IndexConfig("other", name="run", logits=False), fresh)
    assert_same_files(path, expected)


def test_killed_by_the_system(fresh, whole, tmp_path) -> None:
    """SIGKILL at instants of the clock; the last run is left alone."""
    code = (
        "from dictlearn.feature_index import encode, transpose\n"
        "encode.batch_rows = lambda d_sae: 16\n"
        "encode.BYTES_PER_SLOT = 512 * 2**20 // 320\n"
        "transpose.BYTES_PER_ACTIVATION = 512 * 2**20 // 400\n"
        "from pathlib import Path\n"
        "from dictlearn.feature_index.command import IndexConfig, run_index\n"
        "from dictlearn.workspace import Workspace\n"
        "import dictlearn.feature_index.build, dictlearn.dictionaries.topk, scipy.sparse\n"
        "print('ready', flush=True)\n"
        f"run_index(IndexConfig('run', logits=False), Workspace(Path({str(fresh.root)!r})))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    building = building_folder(fresh.index("run"))
    killed = 0
    for wait in (0.05, 0.01, None):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if wait is not None:
            while not building.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        killed += process.wait(timeout=60) == -signal.SIGKILL
        process.stdout.close()
    assert killed >= 1
    assert_same_files(fresh.index("run"), whole)


def test_a_full_disk_is_one_sentence_and_the_work_is_kept(fresh, whole, monkeypatch) -> None:
    with pytest.raises(UserError, match="is full; free some space and run the same command again"):
        build(fresh, FullDisk(30_000), monkeypatch)
    assert_same_files(build(fresh, UnsyncedDisk(), monkeypatch), whole)


def test_two_processes_do_not_build_one_index(fresh, monkeypatch) -> None:
    building = building_folder(fresh.index("run"))
    building.mkdir()
    owner = Ownership.take(building / ".owner", store=building)
    try:
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            build(fresh, UnsyncedDisk(), monkeypatch)
    finally:
        owner.release()


def test_a_complete_index_is_reused(fresh, monkeypatch) -> None:
    path = build(fresh, UnsyncedDisk(), monkeypatch)
    before = path.stat().st_mtime_ns
    building_folder(path).mkdir()  # what a kill right after the renaming leaves
    monkeypatch.setattr(staging, "Staging", None)
    assert run_index(CONFIG, fresh) == path
    assert path.stat().st_mtime_ns == before and not building_folder(path).exists()
