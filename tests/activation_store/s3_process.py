"""An S3 server in a process of its own: moto's, which checks signatures and honours conditional writes.

    python s3_process.py PORT [--journal FILE] [--unconditional]

It prints its port when it listens (0: any free one), has one bucket and one user, both named below, and ends when its
standard input does, so that it outlives nobody who started it. With
``--journal`` it keeps what it holds on disk: every request that changes something is written there whole before it is
carried out, and carried out again by the next process that is given the file. So a kill -9 loses nothing that was
answered, a put that was cut off leaves nothing, and one whose answer was lost may have happened: what S3 promises.
With ``--unconditional`` it ignores If-Match and If-None-Match of writes, as some servers do, and signatures.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

BUCKET = "bucket"
ACCESS_KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
REGION = "us-east-1"

Environ = dict[str, Any]
App = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


def prepared_moto(check_signatures: bool) -> App:
    """moto's S3 with the bucket and the user in it."""
    from moto import settings
    from moto.iam.models import iam_backends
    from moto.moto_server.werkzeug_app import create_backend_app
    from moto.s3.models import s3_backends

    account = "123456789012"
    s3_backends[account]["aws"].create_bucket(BUCKET, REGION)
    users = iam_backends[account]["aws"]
    users.create_user(REGION, "tester")
    key = users.create_access_key("tester")
    key.access_key_id, key.secret_access_key = ACCESS_KEY, SECRET_KEY
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    users.put_user_policy("tester", "everything", json.dumps(everything))
    if check_signatures:
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    return create_backend_app("s3")


class Journal:
    """``app`` whose changes outlive the process.

    The file holds records: length and CRC-32 of what follows, then JSON (the time and the WSGI environment) and the
    body. A record that a kill has cut short ends the file.
    """

    def __init__(self, app: App, file: Path):
        self._app = app
        self._lock = threading.Lock()
        self._count = 0
        kept = 0
        if file.exists():
            for record, end in records(file.read_bytes()):
                self._again(record)
                kept = end
        self._file = file.open("ab", buffering=0)
        self._file.truncate(kept)

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._app(environ, start_response)
        from moto.core.utils import utcnow
        from werkzeug.wsgi import get_input_stream

        body = get_input_stream(environ).read()  # raises, and so ends the connection, if the client is cut off
        plain = {name: value for name, value in environ.items() if isinstance(value, str)}
        now = utcnow()
        told = json.dumps({"time": now.isoformat(), "environ": plain}).encode()
        record = struct.pack("<I", len(told)) + told + body
        with self._lock:
            self._file.write(struct.pack("<II", len(record), zlib.crc32(record)) + record)
            return self._carry_out(now, environ, body, start_response)

    def _carry_out(
        self, now: datetime, environ: Environ, body: bytes, start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Always the same for the same journal, times of objects and names of multipart uploads included."""
        self._count += 1
        with (
            mock.patch("moto.s3.models.utcnow", return_value=now),
            mock.patch("os.urandom", random.Random(self._count).randbytes),
        ):
            return list(self._app(environ | {"wsgi.input": io.BytesIO(body)}, start_response))

    def _again(self, record: bytes) -> None:
        (length,) = struct.unpack_from("<I", record)
        told = json.loads(record[4 : 4 + length])
        environ = told["environ"] | {
            "wsgi.version": (1, 0),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
        }
        self._carry_out(datetime.fromisoformat(told["time"]), environ, record[4 + length :], lambda *_: None)


def records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The whole records of a journal, each with where it ends."""
    start = 0
    while len(content) - start >= 8:
        length, crc = struct.unpack_from("<II", content, start)
        record = content[start + 8 : start + 8 + length]
        if len(record) < length or zlib.crc32(record) != crc:
            return
        start += 8 + length
        yield record, start


def without_conditions(app: App) -> App:
    def without(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT":
            conditions = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")
            environ = {name: value for name, value in environ.items() if name not in conditions}
        return app(environ, start_response)

    return without


def end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--unconditional", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=end_with_input, daemon=True).start()

    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    app = prepared_moto(check_signatures=not options.unconditional)  # the conditions are part of what is signed
    if options.unconditional:
        app = without_conditions(app)
    if options.journal:
        app = Journal(app, options.journal)
    server = make_server("127.0.0.1", options.port, app, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
