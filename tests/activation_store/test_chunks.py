"""Rows of compressed and remote shards: the right ones whoever asks, in the memory of the slots, whatever fails."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activation_store.chunks import Arena
from activation_store.codec import decoder
from activation_store.errors import UserError
from activation_store.local_folder import LocalFolder
from activation_store.store import Store, open_store, read_manifest
from activation_store.testing import UnsyncedDisk
from tests.activation_store import large_store
from tests.activation_store.small_store import GEOMETRY, HOOKS, ROWS, stored

HOOK = HOOKS[0]
EXPECTED = stored(HOOK, 0, ROWS)
CHUNKS = -(-ROWS // GEOMETRY.rows_per_chunk)


class Troubled(LocalFolder):
    """A folder whose reads take some time and fail on demand; remembers what was asked for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.chance = random.Random(0)
        self.longest = 0.0
        self.failing = 0.0
        self.problem = OSError(5, "the disk makes noises")
        self.asked = Counter()

    def read_ranges(self, key, starts, stops):
        self.asked.update((key, start) for start in starts)
        if self.longest:
            time.sleep(self.chance.uniform(0, self.longest))
        if self.chance.random() < self.failing:
            raise self.problem
        return super().read_ranges(key, starts, stops)


@pytest.fixture
def place(small_zstd_path):
    return Troubled(small_zstd_path)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def make_arena(place, pool):
    store = Store(place, read_manifest(place))

    def make(slots):
        return Arena(place, HOOK.array, GEOMETRY, CHUNKS, slots, decoder("zstd"), store._index, pool)

    return make


def taken(arena, rows):
    out = np.empty((len(rows), *HOOK.shape), dtype=HOOK.array.carrier)
    arena.take(np.asarray(rows, dtype=np.int64), out)
    return out


def assert_usable(arena):
    """Nothing is held any more: all slots can be had at once, and then all rows are right."""
    in_time(lambda: taken(arena, np.arange(arena.slots) * GEOMETRY.rows_per_chunk))
    assert np.array_equal(in_time(lambda: taken(arena, np.arange(ROWS))), EXPECTED)


def in_time(do, seconds=60):
    """What ``do`` returns; fails instead of waiting for ever."""
    done = []
    thread = threading.Thread(target=lambda: done.append(do()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    assert done, "it failed in its thread"
    return done[0]


# --- the right rows ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, CHUNKS + 3),
    takes=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=60), max_size=6),
    ahead=st.lists(st.lists(st.integers(0, CHUNKS - 1), max_size=CHUNKS), max_size=6),
)
def test_any_rows_with_any_number_of_slots(make_arena, slots, takes, ahead):
    arena = make_arena(slots)
    for number, rows in enumerate(takes):
        if number < len(ahead):
            arena.prefetch(np.array(ahead[number], dtype=np.int64))
        assert np.array_equal(taken(arena, rows), EXPECTED[np.array(rows, dtype=int)])
    assert_usable(arena)


@pytest.mark.parametrize("slots", [1, 3, 13])
def test_many_threads_with_few_slots_get_the_right_rows_and_come_to_an_end(make_arena, place, slots):
    arena = make_arena(slots)
    place.longest = 0.002

    def work(seed):
        chance = np.random.default_rng(seed)
        for _ in range(10):
            if chance.random() < 0.4:
                arena.prefetch(chance.integers(0, CHUNKS, chance.integers(0, CHUNKS)))
            # From a few rows of one chunk to rows of more chunks than there are slots.
            rows = chance.integers(0, ROWS, chance.integers(1, 4 ** chance.integers(1, 5)))
            assert np.array_equal(taken(arena, rows), EXPECTED[rows])
        return True

    with ThreadPoolExecutor(10) as threads:
        working = [threads.submit(work, seed) for seed in range(10)]
        assert all(working_one.result(timeout=100) for working_one in working)
    assert_usable(arena)


def test_a_chunk_fetched_ahead_is_not_fetched_again(make_arena, place):
    arena = make_arena(6)
    arena.prefetch(np.arange(6))
    assert np.array_equal(taken(arena, np.arange(6 * 16)), EXPECTED[: 6 * 16])
    assert np.array_equal(taken(arena, np.arange(6 * 16)[::-1]), EXPECTED[: 6 * 16][::-1])
    assert sum(place.asked.values()) == 6 and max(place.asked.values()) == 1


def test_chunks_asked_for_ahead_beyond_the_room_or_twice_do_no_harm(make_arena, place):
    arena = make_arena(4)
    arena.prefetch(np.array([3, 3, 3, 7, 7, 1, 0, 9, 12, 3]))
    arena.prefetch(np.arange(CHUNKS))
    assert np.array_equal(in_time(lambda: taken(arena, np.arange(ROWS))), EXPECTED)
    assert_usable(arena)


def test_one_request_is_made_for_the_chunks_of_a_shard(make_arena, place, monkeypatch):
    requests = []
    read_ranges = Troubled.read_ranges
    monkeypatch.setattr(Troubled, "read_ranges", lambda *a: requests.append(a[1]) or read_ranges(*a))
    taken(make_arena(CHUNKS), np.arange(ROWS))
    assert sorted(requests) == [HOOK.array.shard_key(shard) for shard in range(4)]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_an_arena_takes_the_memory_of_its_slots(make_arena):
    arena = make_arena(5)
    taken(arena, np.arange(ROWS))
    assert arena.nbytes == 5 * GEOMETRY.rows_per_chunk * HOOK.array.row_bytes
    assert make_arena(10_000).nbytes == CHUNKS * GEOMETRY.rows_per_chunk * HOOK.array.row_bytes


def test_a_store_keeps_as_many_rows_as_were_reserved(small_zstd_path):
    store = open_store(small_zstd_path)
    store.reserve(40)
    assert np.array_equal(store.read_rows(HOOK.name, 0, ROWS), EXPECTED)
    assert store._arena(HOOK.array).slots == 3  # of 16 rows
    store.reserve(17)  # the first still needs what it asked for
    assert store._arena(HOOK.array).slots == 3
    store.reserve(100)
    assert store._arena(HOOK.array).slots == 7
    assert open_store(small_zstd_path)._arena(HOOK.array).slots == CHUNKS


READ_IT = """
import sys
import numpy as np
from activation_store.store import open_store
from tests.activation_store.large_store import HOOK, ROWS, stored

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

store, chance = open_store(sys.argv[1]), np.random.default_rng(0)
store.reserve(int(sys.argv[2]))
store.take(HOOK.name, np.arange(0, ROWS, 977))  # what threads and libraries take for themselves
before = most = resident()
for _ in range(60):
    rows = chance.integers(0, ROWS, 256)
    assert np.array_equal(store.take(HOOK.name, rows)[:, 0], rows.astype(np.float32))
    most = max(most, resident())
print(most - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_all_of_a_large_store_grows_the_process_by_no_more_than_was_reserved(tmp_path):
    large_store.make(tmp_path / "store", UnsyncedDisk(), compression="zstd")
    grown = {}
    for rows in (2048, large_store.ROWS):
        done = subprocess.run(
            [sys.executable, "-c", READ_IT, tmp_path / "store", str(rows)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": "."},
        )
        assert done.returncode == 0, done.stderr
        grown[rows] = int(done.stdout)
    row_bytes = large_store.HOOK.array.row_bytes
    assert grown[2048] < 2048 * row_bytes + (3 << 20) < large_store.ROWS * row_bytes / 2
    assert grown[large_store.ROWS] > large_store.ROWS * row_bytes / 2, "what is measured is not what is kept"


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(5, "the disk makes noises"), r"c\.0\.0 cannot be read: the disk makes noises\."),
        (FileNotFoundError(2, "no such file"), r"c\.0\.0 is missing, though the manifest counts its rows"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence_and_is_tried_again_by_the_next(make_arena, place, problem, said):
    arena = make_arena(4)
    place.failing, place.problem = 1.0, problem
    arena.prefetch(np.arange(2))  # says nothing: nobody has asked for a row yet
    for _ in range(3):
        with pytest.raises(UserError, match=said):
            taken(arena, np.arange(40))
    place.failing = 0.0
    assert_usable(arena)


def test_an_error_that_nobody_expects_reaches_the_one_who_asked(make_arena, place):
    arena = make_arena(4)
    place.failing, place.problem = 1.0, ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        taken(arena, np.arange(40))
    place.failing = 0.0
    assert_usable(arena)


def test_a_damaged_chunk_is_refused_by_name_and_the_others_are_read(small_zstd_path, tmp_path):
    path = shutil.copytree(small_zstd_path, tmp_path / "store")
    file = path / HOOK.array.shard_key(1)
    content = bytearray(file.read_bytes())
    content[30] ^= 4  # in the first of its chunks, rows 128 to 143
    file.write_bytes(content)
    store = open_store(path)
    for rows in (range(128, 256), range(130, 131), [5, 140, 300]):
        with pytest.raises(UserError, match=r"c\.1\.0 is damaged: its chunk 0 cannot be decoded"):
            store.take(HOOK.name, np.array(rows))
    others = np.r_[0:128, 144:ROWS]
    assert np.array_equal(store.take(HOOK.name, others), EXPECTED[others])


@pytest.mark.parametrize("slots", [2, 9])
def test_many_threads_with_a_place_that_often_fails(make_arena, place, slots):
    """Each take is right or an error; nobody waits for ever, and in the end everything is as before."""
    arena = make_arena(slots)
    place.longest, place.failing = 0.002, 0.3
    outcomes = Counter()

    def work(seed):
        chance = np.random.default_rng(seed)
        for _ in range(25):
            arena.prefetch(chance.integers(0, CHUNKS, 3))
            rows = chance.integers(0, ROWS, chance.integers(1, 40))
            try:
                found = taken(arena, rows)
            except UserError:
                outcomes["refused"] += 1
                continue
            assert np.array_equal(found, EXPECTED[rows])
            outcomes["right"] += 1

    with ThreadPoolExecutor(10) as threads:
        for working in [threads.submit(work, seed) for seed in range(10)]:
            working.result(timeout=100)
    assert min(outcomes["right"], outcomes["refused"]) > 10
    place.failing = 0.0
    assert_usable(arena)


def test_an_interrupted_take_lets_go_of_its_slots(make_arena, place, monkeypatch):
    """Ctrl-C while it waits, as in a notebook: the next cell must not hang."""
    arena = make_arena(2)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("activation_store.chunks.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taken(arena, np.arange(20))
    assert_usable(arena)
