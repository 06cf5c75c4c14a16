"""What the tests of object stores rely on: that their servers behave as S3 does, and that the cuts really cut."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time

import pytest

from tests.activation_store.cut_proxy import CutProxy
from tests.activation_store.object_servers import ObjectServer, client, new_url, objects_of

pytestmark = pytest.mark.needs("s3")


@pytest.fixture
def bare(s3_server):
    """A client of the server that the session shares."""
    return client(new_url(), s3_server.environment())


def content(store, key):
    return bytes(store.get(key).bytes())


# --- the server -------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_s3(bare):
    bare.put("key", bytes(range(100)))
    assert [bytes(part) for part in bare.get_ranges("key", starts=[0, 90], ends=[2, 200], coalesce=0)] == [
        bytes([0, 1]),
        bytes(range(90, 100)),
    ]
    for suffix, expected in ((3, bytes([97, 98, 99])), (500, bytes(range(100)))):
        assert bytes(bare.get("key", options={"range": {"suffix": suffix}}).bytes()) == expected


def test_conditional_writes_are_honoured(bare):
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    first = bare.put("key", b"first", mode="create")
    with pytest.raises(AlreadyExistsError):
        bare.put("key", b"second", mode="create")
    bare.put("key", b"third", mode={"e_tag": first["e_tag"]})
    with pytest.raises(PreconditionError):
        bare.put("key", b"fourth", mode={"e_tag": first["e_tag"]})
    assert content(bare, "key") == b"third"


def test_a_server_that_ignores_conditions_can_be_had():
    with ObjectServer(unconditional=True) as server:
        store = client(new_url(), server.environment())
        store.put("key", b"first", mode="create")
        store.put("key", b"second", mode="create")
        store.put("key", b"third", mode={"e_tag": '"of another"'})
        assert content(store, "key") == b"third"


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_refused(s3_server, wrong):
    from obstore.exceptions import PermissionDeniedError

    store = client(new_url(), s3_server.environment() | {wrong: "somebody else's"})
    with pytest.raises(PermissionDeniedError):
        store.get("key")


# --- what is on disk --------------------------------------------------------------------------------------------------


def test_a_killed_server_has_everything_when_it_is_started_again(tmp_path):
    from obstore.exceptions import AlreadyExistsError

    large = random.Random(0).randbytes(12 << 20)  # put in parts
    with ObjectServer(tmp_path / "journal") as server:
        store = client(new_url(), server.environment())
        store.put("a/b", b"old")
        store.put("a/b", b"new")
        store.put("gone", b"gone")
        store.delete("gone")
        store.put("large", large)
        before = {entry["path"]: entry for page in store.list() for entry in page}
        server.kill()
        server.start()
        assert {entry["path"]: entry for page in store.list() for entry in page} == before
        assert before.keys() == {"a/b", "large"}
        assert content(store, "a/b") == b"new" and content(store, "large") == large
        with pytest.raises(AlreadyExistsError):
            store.put("a/b", b"mine", mode="create")


def test_killed_in_the_middle_of_puts_it_has_each_object_whole_and_all_it_answered_for(tmp_path):
    from obstore.exceptions import GenericError

    chance = random.Random(1)
    versions = [bytes([version]) * (1 << 20) for version in range(100)]
    with ObjectServer(tmp_path / "journal") as server:
        store = client(new_url(), server.environment())
        done, interrupted = -1, 0
        for _ in range(3):
            threading.Timer(chance.uniform(0.02, 0.2), server.kill).start()
            version = done
            try:
                for version in range(done + 1, 100):
                    store.put("key", versions[version])
                    done = version
            except GenericError:
                interrupted += 1
            server.process.wait()
            server.start()
            if done >= 0:
                found = content(store, "key")
                assert found in versions[done : version + 1]
                done = versions.index(found)
        assert interrupted and done > 0


def test_the_end_of_a_journal_that_a_kill_cut_short_is_not_taken_for_a_change(tmp_path):
    journal = tmp_path / "journal"
    url = new_url()
    with ObjectServer(journal) as server:
        store = client(url, server.environment())
        store.put("key", b"old")
        kept = journal.stat().st_size
        store.put("key", b"new" * 1000)
        server.kill()
        for size in (kept + 100, journal.stat().st_size - 1):
            os.truncate(journal, size)
            server.start()
            assert content(store, "key") == b"old"
            assert journal.stat().st_size == kept
            store.put("key", b"new" * 1000)
            server.kill()


@pytest.mark.usefixtures("s3_server")
def test_a_server_ends_with_the_process_that_started_it():
    program = (
        "import os; from tests.activation_store.object_servers import ObjectServer\n"
        "print(ObjectServer().process.pid, flush=True); os._exit(1)"
    )
    started = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    pid = int(started.stdout)
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as state:  # nobody has waited for it
            if state.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(s3_server, s3_proxy):
    """A client by way of the proxy, and what is really there."""
    url = new_url()
    return client(url, s3_server.environment(s3_proxy.port)), client(url, s3_server.environment())


def test_what_goes_through_is_counted(proxied, s3_proxy):
    through, direct = proxied
    through.put("key", b"x" * 100_000)
    assert content(through, "key") == b"x" * 100_000
    methods = [request.split("/")[0].strip() for request in s3_proxy.requests]
    assert methods == ["PUT", "GET"] and s3_proxy.requests[0].endswith("/store/key")
    assert 100_000 < s3_proxy.sent < 110_000 and 100_000 < s3_proxy.received < 110_000
    assert content(direct, "key") == b"x" * 100_000


def test_a_cut_network_refuses_and_a_restored_one_goes_on(proxied, s3_proxy):
    through, direct = proxied
    through.put("key", b"1")
    for _ in range(3):
        s3_proxy.cut()
        with pytest.raises(Exception, match="error sending request"):
            through.put("key", b"2")
        assert content(direct, "key") == b"1"
        s3_proxy.restore()
        assert content(through, "key") == b"1"
    assert s3_proxy.cuts == 3


def test_a_put_cut_in_the_middle_changes_nothing(proxied, s3_proxy):
    through, direct = proxied
    through.put("key", b"old")
    s3_proxy.cut_after(sent=300_000)
    with pytest.raises(Exception, match="error sending request"):
        through.put("key", b"new" * 1_000_000, use_multipart=False)
    assert s3_proxy.was_cut.wait(5)
    time.sleep(0.1)  # time enough to do something wrong
    assert content(direct, "key") == b"old"


def test_a_put_whose_answer_is_lost_has_happened(proxied, s3_proxy):
    through, direct = proxied
    s3_proxy.cut_after(received=0)
    with pytest.raises(Exception, match="error sending request"):
        through.put("key", b"new")
    assert content(direct, "key") == b"new"


def test_a_stalled_network_keeps_everybody_waiting(proxied, s3_proxy):
    through, _ = proxied
    through.put("key", b"1")
    s3_proxy.stall()
    answers = []
    reader = threading.Thread(target=lambda: answers.append(content(through, "key")))
    reader.start()
    reader.join(0.5)
    assert reader.is_alive() and not answers
    s3_proxy.restore()
    reader.join(5)
    assert answers == [b"1"]


def test_without_a_server_the_proxy_hangs_up():
    server = ObjectServer()
    with server, CutProxy(server.port) as proxy:
        store = client(new_url(), server.environment(proxy.port))
        store.put("key", b"1")
        server.kill()
        with pytest.raises(Exception, match="error sending request"):
            store.get("key")
        server.start()
        with pytest.raises(FileNotFoundError):  # without a journal it has forgotten
            store.get("key")


def test_objects_are_listed_with_their_content(s3_server):
    url = new_url()
    store = client(url, s3_server.environment())
    store.put("a/b", b"1")
    store.put("c", b"2")
    client(url + "-other", s3_server.environment()).put("a/b", b"3")
    assert objects_of(url, s3_server.environment()) == {"a/b": b"1", "c": b"2"}
