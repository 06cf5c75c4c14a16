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
import errno
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from activation_store.disk import Disk, default_disk
from activation_store.errors import UserError
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


class Unreachable(OSError):
    """What went wrong, in words, as an OSError: the writer and the reader say what it means for the store."""

    def __init__(self, sentence: str):
        super().__init__(errno.EIO, sentence)


class ObjectFolder(Place):
    """The objects of ``store`` (an obstore store), whose prefix is the location."""

    def __init__(self, store: Any, location: str, disk: Disk | None = None):
        self.location = location
        self._store = store
        self._disk = disk or default_disk()  # only for its named points, at which tests kill us
        self._tags: dict[str, str | None] = {}  # of the objects that are replaced conditionally
        self._reached = False

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
            raise UserError(f"{url} cannot be opened: {_first_line(problem)}.") from problem
        return cls(store, url, disk)

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
            pages: list[Any] = self._patiently(partial(list, obstore.list(self._store, key)))
            below = [entry["path"] for page in pages for entry in page]
            for path in [*below, key]:  # listing a prefix does not give the object of that very name
                with contextlib.suppress(FileNotFoundError):
                    self._patiently(partial(obstore.delete, self._store, path))

    # --- patience -----------------------------------------------------------------------------------------------------

    def tag(self, key: str) -> str | None:
        """The entity tag of the object as we last read or wrote it."""
        return self._tags.get(key)

    def _patiently(self, request: Callable[[], Result]) -> Result:
        """The answer to a request, repeated while the server or the network is away."""
        from obstore.exceptions import BaseError, GenericError

        _refuse_fork(self.location)
        give_up = time.monotonic() + (PATIENCE if self._reached else FIRST_PATIENCE)
        pause = 0.2
        while True:
            try:
                answer = request()
            except (FileNotFoundError, PermissionError, FileExistsError, BaseError, OSError) as problem:
                refused = not isinstance(problem, GenericError) and not _is_away(problem)
                if refused or _is_final(problem) or time.monotonic() + pause > give_up:
                    raise self._in_words(problem) from problem
                time.sleep(pause)
                pause = min(5.0, pause * 2)
                continue
            self._reached = True
            return answer

    def _in_words(self, problem: Exception) -> Exception:
        from obstore.exceptions import (
            AlreadyExistsError,
            NotSupportedError,
            PermissionDeniedError,
            PreconditionError,
            UnauthenticatedError,
        )

        said = str(problem)
        if "NoSuchBucket" in said or "bucket does not exist" in said:
            return Unreachable("there is no such bucket; make it first")
        if isinstance(problem, (FileNotFoundError, FileExistsError, AlreadyExistsError, PreconditionError)):
            return problem
        if isinstance(problem, (NotSupportedError, NotImplementedError)):
            return problem
        if isinstance(problem, (PermissionDeniedError, UnauthenticatedError)) or "403 Forbidden" in said:
            return Unreachable(f"the server refuses our credentials ({_first_line(problem)})")
        if "169.254.169.254" in said or "InstanceMetadata" in said or "task-creds" in said:
            return Unreachable("there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return Unreachable(f"the server cannot be reached or fails ({_first_line(problem)})")


def _is_away(problem: Exception) -> bool:
    return isinstance(problem, (ConnectionError, TimeoutError))


def _is_final(problem: Exception) -> bool:
    """Whether an error that says nothing by its type is one that repeating does not help."""
    return re.search(r"status 4(?!08|29)\d\d|NoSuchBucket|builder error", str(problem)) is not None


_process: int | None = None


def _refuse_fork(location: str) -> None:
    """obstore's threads do not live on in a forked process: every request would wait for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise UserError(
            f"{location} cannot be reached from a process forked after it was; start worker processes by spawn."
        )


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".")


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
    """The right to write, held by renewing the object ``.owner``: its content is a name, a token and a counter."""

    def __init__(self, place: ObjectFolder, name: str):
        self._place = place
        self._name = name
        self._token = uuid.uuid4().hex
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
        if self._lost is None and (now is None or self._token.encode() not in now):
            self._lost = _written_by(self._place, now)
        if self._lost is not None:
            raise UserError(self._lost)

    def release(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost is None:
            with contextlib.suppress(OSError):
                self._place.remove([OWNER_FILE], "owner")

    def _read(self) -> bytes | None:
        try:
            return self._place.read(OWNER_FILE)
        except FileNotFoundError:
            return None

    def _content(self) -> bytes:
        return f"{self._name}\n{self._token}\n{self._count}\n".encode()

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY):
            self._count += 1
            try:
                if not self._place.put_if(OWNER_FILE, self._content(), self._place.tag(OWNER_FILE), new=False):
                    self._lost = _written_by(self._place, self._read())
                    return
            except OSError:
                continue  # the network is away; whoever writes meanwhile will be told, and we look again


def _written_by(place: ObjectFolder, owner: bytes | None) -> str:
    name = (owner or b"").split(b"\n")[0].decode(errors="replace") or "that has just started"
    return f"{place.location} is being written by process {name}; wait for it to end, or stop it and run this again."


def _is_gone(owner: bytes) -> bool:
    """Whether the owner was a process of this machine that is no longer there: no need to wait for its lease."""
    name = owner.split(b"\n")[0].decode(errors="replace")
    pid, _, host = name.partition(" on ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
