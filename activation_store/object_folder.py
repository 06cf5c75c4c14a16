"""A store under a prefix of an object store (S3 and whatever speaks it, Google Cloud, Azure), by way of obstore.

An object appears whole or not at all, so nothing is renamed: a file is gathered in a temporary file of this machine and
put under its key when it is published. What a local folder does with a lock is done by two conditional writes. The
object ``.owner`` names who writes and is renewed every few seconds; one that is not renewed belongs to a process that
is gone, and is taken over. The manifest is replaced only if it is still the one we know, so that even two writers that
take each other for dead cannot mix their commits.

A network that fails is waited for, but not for ever: `PATIENCE` seconds, or `FIRST_PATIENCE` before the first answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from activation_store.disk import Disk, default_disk
from activation_store.errors import UserError
from activation_store.object_errors import in_short, in_words, is_final
from activation_store.place import OpenFile, Place
from activation_store.spec import OWNER_FILE

PATIENCE = 180.0
FIRST_PATIENCE = 10.0
"""Seconds for which a request is repeated that fails for want of a network or a server."""

LEASE = 20.0
RENEWED_EVERY = 4.0
"""Seconds: an owner that has not renewed its object for a lease is gone."""

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
KEPT_IN_MEMORY = 8 << 20
BLOCK_BYTES = 4 << 20
PUT_AT_ONCE = 8

Result = TypeVar("Result")


class ObjectFolder(Place):
    """The objects of ``store`` (an obstore store), whose prefix is the location."""

    def __init__(self, store: Any, location: str, disk: Disk | None = None):
        self.location = location
        self._store = store
        self._disk = disk or default_disk()  # only for its named points, at which tests kill us
        self._tags: dict[str, str | None] = {}  # of the objects that are replaced conditionally
        self._waits = True
        self._answered: bool | None = None  # whether the last request was; None: there was none yet

    @classmethod
    def of_url(cls, url: str, disk: Disk | None = None) -> ObjectFolder:
        """The objects below ``url``; credentials and endpoint come from the usual variables (AWS_ENDPOINT_URL, ...).

        Raises:
            UserError: obstore is not installed, or does not understand the URL.
        """
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise UserError(f"{url} needs the package obstore: pip install 'dictlearn-lab[s3]'.") from None
        client: Any = {"timeout": "60s", "connect_timeout": "5s"}
        if any(os.environ.get(name, "").startswith("http://") for name in ENDPOINT_VARIABLES):
            client["allow_http"] = True  # who names such an endpoint means it
        retries: Any = {
            "max_retries": 2,  # `_patiently` repeats; this is for a hiccup
            "retry_timeout": timedelta(seconds=5),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
        }
        try:
            store = from_url(url.rstrip("/"), client_options=client, retry_config=retries)
        except (BaseError, ValueError, TypeError, OSError) as problem:
            raise UserError(f"{url} cannot be opened: {in_short(problem)}.") from problem
        return cls(store, url, disk)

    def impatient(self) -> ObjectFolder:
        """The same place for another thread: it knows its own tags, and does not wait for a network that is away."""
        other = ObjectFolder(self._store, self.location, self._disk)
        other._tags, other._waits = dict(self._tags), False
        return other

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, key: str) -> bytes:
        import obstore

        def get() -> tuple[bytes, str | None]:
            found = obstore.get(self._store, key)
            return bytes(found.bytes()), found.meta["e_tag"]

        content, self._tags[key] = self._patiently(get)
        return content

    def read_ranges(self, key: str, starts: Sequence[int], stops: Sequence[int]) -> Sequence[Any]:
        import obstore

        found = self._patiently(lambda: obstore.get_ranges(self._store, key, starts=starts, ends=stops))
        return [memoryview(content) for content in found]

    def tail(self, key: str, length: int) -> tuple[bytes, int]:
        import obstore

        def get() -> tuple[bytes, int]:
            found = obstore.get(self._store, key, options={"range": {"suffix": length}})
            return bytes(found.bytes()), found.meta["size"]

        return self._patiently(get)

    def blocks(self, key: str) -> Iterator[Any]:
        import obstore

        size = self._patiently(lambda: obstore.head(self._store, key))["size"]
        for start in range(0, size, BLOCK_BYTES):
            yield self.read_ranges(key, [start], [min(size, start + BLOCK_BYTES)])[0]

    def sizes(self) -> dict[str, int]:
        import obstore

        return self._patiently(
            lambda: {found["path"]: found["size"] for page in obstore.list(self._store) for found in page}
        )

    def names(self, folder: str = "") -> set[str]:
        import obstore

        found = self._patiently(lambda: obstore.list_with_delimiter(self._store, folder or None))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}

    # --- writing ------------------------------------------------------------------------------------------------------

    def own(self) -> Lease:
        return Lease.take(self)

    def create(self, name: str, subject: str) -> OpenFile:
        return _Gathered()

    def publish(self, files: Mapping[str, OpenFile], subject: str) -> None:
        def put(key: str, file: OpenFile) -> None:
            import obstore

            assert isinstance(file, _Gathered)
            self._disk.reach(f"{subject}.put")

            def from_the_start() -> None:
                file.content.seek(0)
                obstore.put(self._store, key, file.content)

            self._patiently(from_the_start)
            file.discard()

        _at_once(put, list(files.items()))

    def replace(self, contents: Mapping[str, bytes], subject: str, durable: bool = True) -> None:
        def put(key: str, content: bytes) -> None:
            import obstore

            self._disk.reach(f"{subject}.put")
            self._patiently(lambda: obstore.put(self._store, key, content))

        _at_once(put, list(contents.items()))

    def commit(self, key: str, content: bytes, expected: bytes | None) -> None:
        self._disk.reach("manifest.put")
        if not self.put_if(key, content, None if expected is None else self._tags.get(key), new=expected is None):
            raise UserError(
                f"{self.where(key)} was changed by somebody else while we were writing; nothing of theirs was touched. "
                "Make sure that one process writes this store, and run the same command again."
            )

    def put_if(self, key: str, content: bytes, tag: str | None, new: bool) -> bool:
        """Put an object if it is still the one of ``tag`` (``new``: if there is none); whether it is there now.

        An answer lost on its way makes us repeat what has been done already, which is then refused: we look.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        mode: Any = "create" if new else {"e_tag": tag} if tag is not None else "overwrite"
        try:
            put = self._patiently(lambda: obstore.put(self._store, key, content, mode=mode, use_multipart=False))
        except (AlreadyExistsError, PreconditionError, FileExistsError):
            return self.read(key) == content
        except (NotSupportedError, NotImplementedError):  # a server without conditional writes: the lease has to do
            put = self._patiently(lambda: obstore.put(self._store, key, content))
        self._tags[key] = put["e_tag"]
        return True

    def remove(self, keys: Sequence[str], subject: str) -> None:
        import obstore

        for key in keys:
            self._disk.reach(f"{subject}.remove")
            below = self._patiently(partial(self._listed, key))
            for path in [*below, key]:  # listing a prefix does not give the object of that very name
                with contextlib.suppress(FileNotFoundError):
                    self._patiently(partial(obstore.delete, self._store, path))

    def _listed(self, folder: str) -> list[str]:
        import obstore

        return [found["path"] for page in obstore.list(self._store, folder) for found in page]

    # --- patience -----------------------------------------------------------------------------------------------------

    def tag(self, key: str) -> str | None:
        """The entity tag of the object as we last read or wrote it."""
        return self._tags.get(key)

    def _patiently(self, request: Callable[[], Result]) -> Result:
        """The answer to a request, repeated while the server or the network is away.

        Once we have given it up, what follows (closing, letting go of the owner) is tried, but not waited for.
        """
        from obstore.exceptions import BaseError

        _refuse_fork(self.location)
        patience = {None: FIRST_PATIENCE, True: PATIENCE, False: 0.0}[self._answered] if self._waits else 0.0
        give_up = time.monotonic() + patience
        pause = 0.2
        while True:
            try:
                answer = request()
            except (BaseError, OSError, NotImplementedError) as problem:
                final = is_final(problem)
                if final or time.monotonic() + pause > give_up:
                    self._answered = final
                    raise in_words(problem) from problem
                time.sleep(pause)
                pause = min(5.0, pause * 2)
                continue
            self._answered = True
            return answer


_process: int | None = None


def _refuse_fork(location: str) -> None:
    """obstore's threads do not live on in a forked process: every request would wait for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise UserError(
            f"{location} cannot be reached from a process forked after it was; start worker processes by spawn."
        )


def _at_once(do: Callable[[str, Any], None], items: Sequence[tuple[str, Any]]) -> None:
    if len(items) == 1:
        do(*items[0])
    elif items:
        with ThreadPoolExecutor(PUT_AT_ONCE) as pool:
            for done in [pool.submit(do, *item) for item in items]:
                done.result()


class _Gathered:
    """The content of an object in the making: in memory while it is small, else in a temporary file."""

    def __init__(self) -> None:
        self.content = tempfile.SpooledTemporaryFile(KEPT_IN_MEMORY)  # noqa: SIM115  closed by `discard`

    def write(self, content: bytes | memoryview) -> None:
        self.content.write(content)

    def discard(self) -> None:
        self.content.close()


class Lease:
    """The right to write, held by renewing the object ``.owner``: lines of a name, a token, a machine and a counter."""

    def __init__(self, place: ObjectFolder, name: str):
        self._place = place
        self._renewed = place  # what the thread has to itself, once it runs
        self._name = name
        self._token = uuid.uuid4().hex
        self._machine = _machine()
        self._count = 0
        self._lost: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="activation store owner", daemon=True)

    @classmethod
    def take(cls, place: ObjectFolder) -> Lease:
        """Raises UserError when a live process has it."""
        lease = cls(place, f"{os.getpid()} on {socket.gethostname()}")
        if lease._read() is not None or not place.put_if(OWNER_FILE, lease._content(), None, new=True):
            lease._wait_until_it_is_free()
        lease._renewed = place.impatient()
        lease._thread.start()
        return lease

    def _wait_until_it_is_free(self) -> None:
        """Take over an owner that does not renew; refuse when it does."""
        seen = self._read()
        tag = self._place.tag(OWNER_FILE)
        if seen is not None and not _is_gone(seen):
            give_up = time.monotonic() + LEASE
            while time.monotonic() < give_up:
                time.sleep(RENEWED_EVERY / 4)
                now = self._read()
                if now != seen and now is not None:
                    raise UserError(_written_by(self._place, now))
                if now is None:
                    break
                tag = self._place.tag(OWNER_FILE)
        still = self._read()
        if not self._place.put_if(OWNER_FILE, self._content(), tag, new=still is None):
            raise UserError(_written_by(self._place, self._read()))

    def check(self) -> None:
        now = self._read()  # also for servers that ignore the conditions of our writes
        if self._lost is None and not self._is_ours(now):
            self._lost = _written_by(self._place, now)
        if self._lost is not None:
            raise UserError(self._lost)

    def release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # an owner that stays behind is taken over
            if self._lost is None and self._is_ours(self._read()):
                self._place.remove([OWNER_FILE], "owner")

    def _read(self) -> bytes | None:
        try:
            return self._place.read(OWNER_FILE)
        except FileNotFoundError:
            return None

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and self._token.encode() in content

    def _content(self) -> bytes:
        return f"{self._name}\n{self._token}\n{self._machine}\n{self._count}\n".encode()

    def _renew(self) -> None:
        place = self._renewed
        while not self._stop.wait(RENEWED_EVERY):
            self._count += 1
            try:
                # Read first: a server that ignores the condition of the write would let us take it from another. And
                # the condition may fail on our own object, if the answer to the last renewal was lost on its way.
                now = place.read(OWNER_FILE)
                if self._is_ours(now) and place.put_if(OWNER_FILE, self._content(), place.tag(OWNER_FILE), new=False):
                    continue
                now = place.read(OWNER_FILE)
                if not self._is_ours(now):
                    self._lost = _written_by(place, now)
                    return
            except OSError:
                continue  # the network is away; whoever writes meanwhile will be told, and we look again


def _written_by(place: ObjectFolder, owner: bytes | None) -> str:
    name = (owner or b"").split(b"\n")[0].decode(errors="replace") or "that has just started"
    return f"{place.location} is being written by process {name}; wait for it to end, or stop it and run this again."


def _is_gone(owner: bytes) -> bool:
    """Whether the owner was a process of this machine that is no longer there: no need to wait for its lease."""
    lines = owner.decode(errors="replace").splitlines()
    pid = lines[0].partition(" on ")[0] if lines else ""
    if not pid.isdigit() or _machine() not in lines[1:]:
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    """Where a process id means the same process: this start of this machine, and this namespace of process ids.

    Containers may share a host's name. Where the system does not tell, every call gives another answer.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{start} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex
