"""The promises of a store, kept in object stores: real servers, real kills, a network that is really cut.

The store is `small_store`; what must come out is what the same calls make in a local folder, byte for byte. Times are
shortened where a test would have to wait for them: how long a lease lasts and how long a missing network is waited for
are numbers of `activation_store.object_folder`, and have their defaults in subprocesses.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from activation_store import object_folder
from activation_store.disk import KILL_VARIABLE
from activation_store.errors import UserError
from activation_store.loader import Loader
from activation_store.store import open_store
from activation_store.testing import Killed, KillingDisk, RecordingDisk
from activation_store.verify import verify
from tests.activation_store.object_servers import ObjectServer, assert_same_objects, client, new_url, objects_of
from tests.activation_store.small_store import BATCH_ROWS, GEOMETRY, HOOKS, ROWS, append, make, open_writer, stored
from tests.activation_store.trouble import cuts, kills

pytestmark = pytest.mark.needs("s3")

BATCHES = -(-ROWS // BATCH_ROWS)


@pytest.fixture(params=["in memory", "on disk"])
def server(request, monkeypatch):
    """Both servers in turn, and the environment in which they are found."""
    server = request.getfixturevalue("s3_server" if request.param == "in memory" else "durable_s3_server")
    server.use(monkeypatch)
    return server


@pytest.fixture
def network(s3_server, s3_proxy, monkeypatch):
    """The network to the server, and the environment in which the server is found by way of it."""
    s3_server.use(monkeypatch, s3_proxy.port)
    return s3_proxy


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(object_folder, "LEASE", 0.5)
    monkeypatch.setattr(object_folder, "RENEWED_EVERY", 0.1)


def batches_missing(url):
    """How many batches a rerun may compute: those of the rows that are not committed, one of them perhaps in part."""
    try:
        committed = open_store(url).rows
    except UserError:
        return BATCHES
    return -(-(ROWS - committed) // BATCH_ROWS) + 1


# --- the same store ---------------------------------------------------------------------------------------------------


def test_the_objects_are_the_files_of_the_same_store_on_a_disk(server, small_path):
    url = new_url("small")
    assert make(url) == BATCHES
    assert_same_objects(url, small_path)
    assert make(url) == 0


def test_a_compressed_store_too(s3_server, monkeypatch, fast_folder):
    s3_server.use(monkeypatch)
    url = new_url()
    for location in (url, fast_folder / "store"):
        with open_writer(location, compression="zstd") as writer:
            append(writer, 0, ROWS)
            writer.finish()
    assert_same_objects(url, fast_folder / "store")
    for hook in HOOKS:
        assert np.array_equal(open_store(url).read_rows(hook.name, 0, ROWS), stored(hook, 0, ROWS))


@pytest.fixture(scope="module")
def remote(s3_server):
    """A finished small store in the bucket. Not to be changed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        s3_server.use(monkeypatch)
        url = new_url("small")
        make(url)
    return url


@pytest.mark.parametrize("verify_reads", [False, True])
def test_everything_reads_the_same(remote, small, s3_server, monkeypatch, verify_reads):
    s3_server.use(monkeypatch)
    store = open_store(remote, verify_reads=verify_reads)
    assert (store.name, store.location, store.rows) == ("small", remote, ROWS)
    assert store.manifest == small.manifest and store.document_table == small.document_table
    rows = np.random.default_rng(0).integers(0, ROWS, 300)
    for hook in small.hooks:
        assert np.array_equal(store.read_rows(hook, 3, ROWS - 5), small.read_rows(hook, 3, ROWS - 5))
        assert np.array_equal(store.take(hook, rows), small.take(hook, rows))
        assert np.array_equal(store.norms(hook, 0, ROWS), small.norms(hook, 0, ROWS))
        assert np.array_equal(store.take_norms(hook, rows), small.take_norms(hook, rows))
        found, wanted = vars(store.statistics(hook)), vars(small.statistics(hook))
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    for name in ("token_ids", "positions", "documents"):
        assert np.array_equal(getattr(store, name)(0, ROWS), getattr(small, name)(0, ROWS))
    assert np.array_equal(store.text_around(200, 9, 9).token_ids, small.text_around(200, 9, 9).token_ids)
    assert np.array_equal(store.split_ranges("held-out"), small.split_ranges("held-out"))


def test_the_loader_delivers_the_same_batches(remote, small, s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    settings = dict(hooks=[hook.name for hook in HOOKS], batch_size=32, buffer_rows=128, seed=5, epochs=1)
    far, near = (list(Loader(store, **settings)) for store in (open_store(remote), small))
    assert len(far) == len(near) > 5
    for one, other in zip(far, near, strict=True):
        assert all((one[hook] == other[hook]).all() for hook in settings["hooks"])


def test_zarr_opens_it_too(remote, small, s3_server):
    import zarr

    group = zarr.open_group(zarr.storage.ObjectStore(client(remote, s3_server.environment()), read_only=True), mode="r")
    hook = HOOKS[2].name
    assert np.array_equal(group[f"activations/{hook}"][:], small.read_rows(hook, 0, ROWS))


def test_verify_names_what_was_changed_in_the_bucket(s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    url = new_url()
    make(url)
    assert verify(url) == []
    bucket = client(url)
    shard, stray = f"activations/{HOOKS[1].name}/c.2.0.0", "norms/what is this"
    content = bytearray(bucket.get(shard).bytes())
    content[77] ^= 4
    bucket.put(shard, bytes(content))
    bucket.delete("token_ids/c.1")
    bucket.put(stray, b"")
    damaged = {damage.part: damage.problem for damage in verify(url)}
    assert damaged.keys() == {shard, "token_ids/c.1", stray}
    assert "checksum" in damaged[shard] and "missing" in damaged["token_ids/c.1"]
    with pytest.raises(UserError, match=re.escape(f"{url}/{shard} is damaged")):
        open_store(url, verify_reads=True).read_rows(HOOKS[1].name, 256, 257)
    with pytest.raises(UserError, match="token_ids/c.1 is missing"):
        open_store(url).token_ids(128, 129)


def test_a_reader_asks_for_no_more_than_it_needs(remote, network):
    store = open_store(remote)
    hook = HOOKS[0]
    store.read_rows(hook.name, 0, 10)
    network.requests.clear()
    before = network.received
    store.read_rows(hook.name, 4 * GEOMETRY.rows_per_chunk, 6 * GEOMETRY.rows_per_chunk)
    assert len(network.requests) == 1
    assert network.received - before < 2 * GEOMETRY.rows_per_chunk * hook.array.row_bytes + 1000
    store.read_rows(hook.name, 0, 6)  # is there already
    assert len(network.requests) == 1


# --- kills ------------------------------------------------------------------------------------------------------------


def run(url, kill_at=None):
    environment = os.environ | ({KILL_VARIABLE: kill_at} if kill_at else {})
    command = [sys.executable, "-m", "tests.activation_store.small_store", url]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("kill_at", ["shard.put:12", "manifest.put:3", "statistics.put:9"])
def test_a_process_killed_at_a_named_point_is_made_good_by_the_next(s3_server, monkeypatch, small_path, kill_at):
    s3_server.use(monkeypatch)
    url = new_url()
    killed = run(url, kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    allowed = batches_missing(url)
    assert make(url) <= allowed <= BATCHES
    assert_same_objects(url, small_path)


def killed_and_made_again(small_path, operations):
    for number in operations:
        url = new_url(f"killed-{number}")
        with pytest.raises(Killed):
            make(url, KillingDisk("*", number, by_signal=False))
        allowed = batches_missing(url)
        assert make(url) <= allowed, f"killed at operation {number}"
        assert_same_objects(url, small_path)


def count_operations():
    recording = RecordingDisk()
    make(new_url(), recording)
    return len(recording.points)


def test_killed_at_some_operations_and_made_again(s3_server, monkeypatch, short_lease, small_path):
    s3_server.use(monkeypatch)
    killed_and_made_again(small_path, range(5, count_operations(), 40))


@pytest.mark.heavy
def test_killed_at_every_second_operation_and_made_again(s3_server, monkeypatch, short_lease, small_path):
    s3_server.use(monkeypatch)
    killed_and_made_again(small_path, range(1, count_operations() + 1, 2))


@pytest.mark.heavy
def test_killed_again_and_again_at_random_instants_it_still_ends_well(server, small_path):
    chance = random.Random(0)
    for _ in range(10):
        url = new_url()
        for _ in range(100):
            allowed = batches_missing(url)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.activation_store.small_store", url], stdout=subprocess.PIPE, text=True
            )
            time.sleep(chance.uniform(0.3, 1.6))
            process.kill()
            computed, _ = process.communicate()
            if process.returncode == 0:
                assert int(computed) <= allowed
                break
        make(url)
        assert_same_objects(url, small_path)


# --- owners -----------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_the_name_of_the_first(server, short_lease, small_path):
    url = new_url()
    with open_writer(url) as first:
        append(first, 0, 200)
        with pytest.raises(UserError, match=f"{url} is being written by process {os.getpid()} on .*; wait for it"):
            open_writer(url)
        append(first, 200, ROWS)
        first.finish()
    assert_same_objects(url, small_path)


def test_an_owner_that_is_renewed_is_alive_though_nobody_knows_its_machine(s3_server, monkeypatch, short_lease):
    s3_server.use(monkeypatch)
    url = new_url()
    bucket = client(url)
    gone = threading.Event()

    def renew():
        count = 0
        while not gone.wait(0.1):
            count += 1
            bucket.put(".owner", f"17 on a far machine\ntoken\n{count}\n".encode())

    owner = threading.Thread(target=renew)
    owner.start()
    try:
        time.sleep(0.3)
        with pytest.raises(UserError, match="is being written by process 17 on a far machine"):
            make(url)
    finally:
        gone.set()
        owner.join()
    assert objects_of(url).keys() == {".owner"}


def test_an_owner_that_is_not_renewed_is_taken_over_after_its_lease(server, monkeypatch, short_lease, small_path):
    url = new_url()
    bucket = client(url)
    bucket.put(".owner", b"17 on a far machine\ntoken\n3\n")
    start = time.monotonic()
    assert make(url) == BATCHES
    assert time.monotonic() - start > object_folder.LEASE
    assert_same_objects(url, small_path)


def test_an_owner_cut_off_for_longer_than_its_lease_finds_itself_replaced(
    network, s3_server, monkeypatch, short_lease, small_path
):
    url = new_url()
    first = open_writer(url)
    append(first, 0, 200)
    network.cut()
    s3_server.use(monkeypatch)  # the second has a network of its own
    second = open_writer(url)
    append(second, 128, 300)
    network.restore()
    with pytest.raises(UserError, match="is being written by|was changed by somebody else"):
        append(first, 200, ROWS)
    first.close()
    append(second, 300, ROWS)
    second.finish()
    assert_same_objects(url, small_path)


def test_a_manifest_that_somebody_else_has_replaced_is_not_overwritten(s3_server, monkeypatch):
    """Even a writer that everybody takes for the owner."""
    s3_server.use(monkeypatch)
    url = new_url()
    with open_writer(url) as writer:
        append(writer, 0, 200)
        theirs = client(url).get("zarr.json").bytes().to_bytes() + b" "
        client(url).put("zarr.json", theirs)
        with pytest.raises(UserError, match=re.escape(f"{url}/zarr.json was changed by somebody else")):
            append(writer, 200, ROWS)
    assert objects_of(url)["zarr.json"] == theirs


def test_an_owner_whose_renewal_was_done_but_not_answered_goes_on(network, short_lease, small_path):
    url = new_url()
    with open_writer(url) as writer:
        append(writer, 0, 200)
        network.cut_after(received=0)
        assert network.was_cut.wait(5)
        time.sleep(1.0)  # until the renewal has been given up
        network.restore()
        time.sleep(0.3)  # for the next, which finds what the one before has done
        append(writer, 200, ROWS)
        writer.finish()
    assert_same_objects(url, small_path)


def test_an_owner_is_renewed_however_often_it_commits(s3_server, monkeypatch, small_path):
    """Commits look at the owner's object while a thread renews it; neither may mistake the other for somebody else."""
    s3_server.use(monkeypatch)
    monkeypatch.setattr(object_folder, "RENEWED_EVERY", 0.001)
    for _ in range(2):
        url = new_url()
        make(url)
        assert_same_objects(url, small_path)


def test_a_server_without_conditional_writes_still_refuses_a_second_owner(monkeypatch, short_lease, small_path):
    with ObjectServer(unconditional=True) as server:
        server.use(monkeypatch)
        url = new_url()
        with open_writer(url) as first:
            append(first, 0, 200)
            with pytest.raises(UserError, match="is being written by process"):
                open_writer(url)
            client(url).put(".owner", b"17 on a far machine\ntoken\n3\n")
            with pytest.raises(UserError, match="is being written by process 17 on a far machine"):
                append(first, 200, ROWS)
        make(url)
        assert_same_objects(url, small_path)


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_harvest_goes_on_when_the_network_comes_back(network, small_path):
    chance = random.Random(0)
    url = new_url()
    amounts = [chance.choice([1, -1]) * chance.randrange(500, 20_000) for _ in range(6)]
    with cuts(network, amounts, seconds=0.3) as trouble:
        assert make(url) == BATCHES
    assert trouble.times >= 4
    assert_same_objects(url, small_path)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(4))
def test_a_harvest_goes_on_through_many_cuts_of_seconds(network, small_path, seed):
    chance = random.Random(seed)
    amounts = [chance.choice([1, -1]) * chance.randrange(1, 15_000) for _ in range(12)]
    url = new_url()
    with cuts(network, amounts, seconds=1.5) as trouble:
        assert make(url) == BATCHES
    assert trouble.times > 5
    assert_same_objects(url, small_path)


def test_a_lost_answer_to_the_manifest_is_not_taken_for_somebody_else(network, small_path):
    """The request is then repeated, and refused because it has been done already."""
    url = new_url()
    writer = open_writer(url)
    committing = writer.place.commit

    def commit(key, content, expected):
        network.cut_after(received=0)
        restoring = threading.Thread(target=lambda: network.was_cut.wait(5) and network.restore())
        restoring.start()
        committing(key, content, expected)
        restoring.join()

    append(writer, 0, 100)
    writer.place.commit = commit
    append(writer, 100, ROWS)
    writer.place.commit = committing
    writer.finish()
    assert_same_objects(url, small_path)


def test_a_network_away_for_too_long_is_one_sentence_and_the_rerun_goes_on(
    network, monkeypatch, short_lease, small_path
):
    monkeypatch.setattr(object_folder, "PATIENCE", 2.0)
    url = new_url()
    with open_writer(url) as writer:
        append(writer, 0, 200)
        network.cut()
        start = time.monotonic()
        with pytest.raises(UserError) as refusal:
            append(writer, 200, ROWS)
        assert 1 < time.monotonic() - start < 10
        start = time.monotonic()
        with pytest.raises(UserError):
            writer.close()
        assert time.monotonic() - start < 1.5  # it is not waited for again
    said = str(refusal.value)
    assert said.startswith(f"{url} cannot be written: the server http://127.0.0.1:{network.port} cannot be reached")
    assert "The 128 rows committed so far are safe, and the same command continues from there." in said
    assert "\n" not in said
    network.restore()
    assert make(url) <= -(-(ROWS - 128) // BATCH_ROWS) + 1
    assert_same_objects(url, small_path)


def test_reading_goes_on_when_the_network_comes_back(remote, small, network):
    store = open_store(remote)
    with cuts(network, [-3000, -2000, 700, -3000], seconds=0.3) as trouble:
        for hook in HOOKS:
            assert np.array_equal(store.read_rows(hook.name, 0, ROWS), small.read_rows(hook.name, 0, ROWS))
    assert trouble.times >= 2


def test_reading_without_a_network_is_one_sentence(remote, network, monkeypatch):
    monkeypatch.setattr(object_folder, "PATIENCE", 1.0)
    store = open_store(remote)
    network.cut()
    with pytest.raises(UserError, match=f"^{remote}/.* cannot be read: the server [^ ]* cannot be reached[^\n]*$"):
        store.read_rows(HOOKS[0].name, 0, ROWS)
    network.restore()
    store.read_rows(HOOKS[0].name, 0, ROWS)


# --- the server itself ------------------------------------------------------------------------------------------------


def test_a_harvest_goes_on_when_the_server_was_killed_and_started_again(durable_s3_server, monkeypatch, small_path):
    durable_s3_server.use(monkeypatch)
    url = new_url()
    with kills(durable_s3_server, [0.15, 0.2, 0.25], seconds=0.1) as trouble:
        assert make(url) == BATCHES
    assert trouble.times >= 2
    assert_same_objects(url, small_path)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(4))
def test_a_harvest_goes_on_through_many_kills_of_the_server(durable_s3_server, monkeypatch, small_path, seed):
    durable_s3_server.use(monkeypatch)
    # kills begin at once: on a busy machine the server may not live to its first answer in the ten seconds it is given
    monkeypatch.setattr(object_folder, "FIRST_PATIENCE", object_folder.PATIENCE)
    chance = random.Random(seed)
    url = new_url()
    with kills(durable_s3_server, [chance.uniform(0.0, 0.3) for _ in range(12)], seconds=0.5) as trouble:
        assert make(url) == BATCHES
    assert trouble.times >= 3
    assert_same_objects(url, small_path)


@pytest.mark.heavy
def test_harvester_and_server_are_both_killed_at_random_instants(durable_s3_server, monkeypatch, small_path):
    durable_s3_server.use(monkeypatch)
    chance = random.Random(7)
    for _ in range(5):
        url = new_url()
        with kills(durable_s3_server, [chance.uniform(0.5, 1.5) for _ in range(6)], seconds=0.3):
            for _ in range(5):
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.activation_store.small_store", url], stdout=subprocess.DEVNULL
                )
                time.sleep(chance.uniform(0.6, 2.0))
                process.kill()
                process.wait()
        make(url)
        assert_same_objects(url, small_path)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_readers_see_committed_rows_only_and_may_follow(server):
    url = new_url()
    seen = []
    with open_writer(url) as writer:
        follower = open_store(url)
        for start in range(0, ROWS, BATCH_ROWS):
            append(writer, start, min(ROWS, start + BATCH_ROWS))
            follower = follower.refresh()
            assert follower.rows == writer.committed_rows and not follower.complete
            hook = HOOKS[len(seen) % len(HOOKS)]
            assert np.array_equal(follower.read_rows(hook.name, 0, follower.rows), stored(hook, 0, follower.rows))
            seen.append(follower.rows)
        writer.finish()
    assert set(seen) == {0, 128, 256, 384, 430}
    assert follower.refresh().complete


@pytest.mark.parametrize("point", ["shard.put:16", "metadata.put:40", "manifest.put:3"])
def test_what_a_killed_writer_had_not_committed_is_not_seen(s3_server, monkeypatch, point):
    s3_server.use(monkeypatch)
    url = new_url()
    name, _, count = point.partition(":")
    with pytest.raises(Killed):
        make(url, KillingDisk(name, int(count), by_signal=False))
    store = open_store(url)
    assert store.rows == 128 and not store.complete
    for hook in HOOKS:
        assert np.array_equal(store.read_rows(hook.name, 0, 128), stored(hook, 0, 128))
    with pytest.raises(IndexError):
        store.read_rows(HOOKS[0].name, 128, 129)
    assert verify(url) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusals(url):
    """What reading, auditing and writing say, and how long they took."""
    for attempt in (open_store, verify, make):
        start = time.monotonic()
        with pytest.raises(UserError) as refusal:
            attempt(url)
        said = str(refusal.value)
        assert said.startswith(url) and said.endswith(".") and "\n" not in said and len(said) < 200, said
        yield said, time.monotonic() - start


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_one_sentence_at_once(s3_server, monkeypatch, wrong):
    s3_server.use(monkeypatch)
    monkeypatch.setenv(wrong, "somebody-elses")
    for said, seconds in refusals(new_url()):
        assert f"the server http://127.0.0.1:{s3_server.port} refuses our credentials (" in said
        assert seconds < 3


def test_a_missing_bucket_is_one_sentence_at_once(s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    for said, seconds in refusals("s3://no-such-bucket/store"):
        assert "there is no such bucket" in said
        assert seconds < 3


def test_no_server_is_one_sentence_soon(network, monkeypatch):
    assert object_folder.FIRST_PATIENCE <= 15
    monkeypatch.setattr(object_folder, "FIRST_PATIENCE", 1.0)
    network.cut()
    for said, seconds in refusals(new_url()):
        assert f"the server http://127.0.0.1:{network.port} cannot be reached or fails (Connection refused)" in said
        assert seconds < 5


def test_no_credentials_are_one_sentence(s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # rather than that of a cloud we may be in
    for said, _ in refusals(new_url()):
        assert "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


def test_no_store_there_is_one_sentence(s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    url = new_url()
    with pytest.raises(UserError, match=f"There is no activation store at {url}"):
        open_store(url)


def test_a_prefix_that_holds_something_else_is_refused(s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    url = new_url()
    client(url).put("holiday/picture.jpg", b"")
    with pytest.raises(UserError, match=r"is not empty and is not an activation store \(it holds holiday\)"):
        make(url)
    assert objects_of(url).keys() == {"holiday/picture.jpg"}


def test_a_forked_process_is_told_rather_than_kept_waiting(remote, s3_server, monkeypatch):
    s3_server.use(monkeypatch)
    program = f"""
import os, sys
from activation_store.errors import UserError
from activation_store.store import open_store
open_store({remote!r})
pid = os.fork()
if not pid:
    try:
        open_store({remote!r})
    except UserError as refusal:
        print(refusal, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert "cannot be reached from a process forked after it was" in said.stdout, said.stderr
