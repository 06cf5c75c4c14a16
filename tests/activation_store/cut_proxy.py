"""A TCP proxy that can be cut and restored: the network between a client and a server, in the hands of a test."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Coroutine
from typing import Any

REQUEST = re.compile(rb"(?:GET|HEAD|PUT|POST|DELETE) [^ \r\n]+ HTTP/1\.1\r\n")
LONGEST_REQUEST_LINE = 1024


def reserve_port() -> socket.socket:
    """A free port of this machine, kept free for us: whoever sets SO_REUSEADDR may listen there, again and again."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


class CutProxy:
    """Passes connections to ``port`` on to ``server_port``, both on this machine, until it is told otherwise.

    Attributes:
        port: connect here.
        requests: every HTTP request that went through, as "PUT /bucket/key"; also one that was then cut off.
        sent, received: bytes that went to the server and came back.
        cuts: how often the connections were cut.
        was_cut: set when they are, for tests that wait for a cut to happen.
    """

    def __init__(self, server_port: int):
        self.requests: list[str] = []
        self.sent = self.received = self.cuts = 0
        self.was_cut = threading.Event()
        self._server_port = server_port
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._left: dict[str, int] = {}
        self._listening: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.restore()

    def cut(self) -> None:
        """Drop all connections and refuse new ones."""
        self._do(self._cut())

    def cut_after(self, *, sent: int | None = None, received: int | None = None) -> None:
        """`cut` when so many more bytes have gone to the server, or would come from it. ``received=0`` loses the
        answer to a request that has arrived."""
        self.was_cut.clear()
        wanted = {"sent": sent, "received": received}
        self._left = {way: left for way, left in wanted.items() if left is not None}

    def restore(self) -> None:
        """Accept connections again, and let bytes flow."""
        self._do(self._restore())

    def stall(self) -> None:
        """Hold back all bytes, in both directions, and keep the connections."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _restore(self) -> None:
        self._flowing.set()
        self._left = {}
        if self._listening is None:
            self._listening = socket.socket()
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listening.setblocking(False)
            self._listening.bind(("127.0.0.1", self.port))
            self._listening.listen(64)
            self._loop.add_reader(self._listening, self._accept)

    async def _cut(self) -> None:
        if self._listening is None:
            return
        self._loop.remove_reader(self._listening)
        self._listening.close()
        self._listening = None
        self._left = {}
        self.cuts += 1
        for writer in self._writers:
            writer.close()
        self._writers.clear()
        self.was_cut.set()

    async def _end(self) -> None:
        self._flowing.set()
        await self._cut()
        if self._connections:
            await asyncio.wait(self._connections)

    def _accept(self) -> None:
        # Not asyncio.start_server: closed while it accepts, it leaves a connection that nobody serves and nobody ends.
        assert self._listening is not None
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listening.accept()
            client.setblocking(False)
            connection = self._loop.create_task(self._connect(client))
            self._connections.add(connection)
            connection.add_done_callback(self._connections.discard)

    async def _connect(self, client: socket.socket) -> None:
        from_client, to_client = await asyncio.open_connection(sock=client)
        self._writers.add(to_client)
        with contextlib.suppress(OSError):  # nobody there
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
            self._writers.add(to_server)
            if self._listening is None:  # cut meanwhile
                to_server.close()
            await asyncio.gather(
                self._pass_on("sent", from_client, to_server), self._pass_on("received", from_server, to_client)
            )
            self._writers.discard(to_server)
        to_client.close()
        self._writers.discard(to_client)

    async def _pass_on(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        with contextlib.suppress(OSError):
            while content := await reader.read(1 << 16):
                await self._flowing.wait()
                left = self._left.get(way, len(content) + 1)
                content, is_last = content[:left], left <= len(content)
                if way in self._left:
                    self._left[way] -= len(content)
                setattr(self, way, getattr(self, way) + len(content))
                if way == "sent":
                    seen = self._note_requests(seen + content)
                if writer.is_closing():
                    break
                writer.write(content)
                if is_last:
                    await self._cut()
                    break
                await writer.drain()
        writer.close()

    def _note_requests(self, seen: bytes) -> bytes:
        """Notes request lines; returns the end of what was seen, in which one may have begun."""
        end = 0
        for found in REQUEST.finditer(seen):
            method, target, _ = found.group().split(b" ")
            self.requests.append(f"{method.decode()} {target.decode()}")
            end = found.end()
        return seen[max(end, len(seen) - LONGEST_REQUEST_LINE) :]
