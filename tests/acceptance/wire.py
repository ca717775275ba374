"""A TCP connection that the test holds in its hands: what goes to the broker can be lost on the way, and the line cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

DEADLINE_S = 20.0


class Wire:
    """Forwards connections to the broker, until told otherwise. `url` is the broker's address by this way."""

    def __init__(self, broker: str) -> None:
        self._broker = urlsplit(broker)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._losing = False
        self._lost = bytearray()
        self._more = asyncio.Event()
        self.url = ""

    def lose_what_is_sent(self) -> None:
        """From now on nothing that is sent arrives, as on a line that has died without a word. `cut` ends it."""
        self._losing = True

    async def until_lost(self, text: bytes) -> None:
        """Wait until something with this text in it was sent and lost."""
        async with asyncio.timeout(DEADLINE_S):
            while text not in self._lost:
                self._more.clear()
                await self._more.wait()

    def cut(self) -> None:
        """Break all connections; new ones are good."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()
        self._losing = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_broker = None
        try:
            from_broker, to_broker = await asyncio.open_connection(self._broker.hostname, self._broker.port)
            self._open |= {writer, to_broker}
            there = self._start(self._forward(reader, to_broker, outgoing=True))
            back = self._start(self._forward(from_broker, writer, outgoing=False))
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in (writer, to_broker):
                if end is not None:
                    self._open.discard(end)
                    end.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, outgoing: bool) -> None:
        try:
            while data := await reader.read(65536):
                if outgoing and self._losing:
                    self._lost += data
                    self._more.set()
                else:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            return  # cut

    def _start(self, work: object) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task  # type: ignore[no-any-return]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(reader, writer))

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        credentials = self._broker.netloc.rpartition("@")[0]
        self.url = urlunsplit(self._broker._replace(netloc=f"{credentials}@127.0.0.1:{port}"))
        try:
            yield
        finally:
            server.close()
            self.cut()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def wire(broker: str) -> AsyncIterator[Wire]:
    """A way to the broker; all its connections are cut at the end."""
    made = Wire(broker)
    async with made._listening():
        yield made
