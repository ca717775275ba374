"""A TCP proxy that misbehaves on demand: cut, black hole, refusal, delay. What it carries, its subclasses know.

It does what a network does and no more: bytes arrive in order and whole, or late, or not at all. No task of its own runs while
bytes pass (transports call each other), so a proxy costs little, and `close` leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.faults.lab.link import Link


@dataclass(slots=True)
class Bites:
    """How often a mode has bitten since it was entered."""

    count: int = 0


class TcpProxy:
    """Listens on a port of its own and connects every client to the server, until told otherwise."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._server: asyncio.Server | None = None
        self._closing = False
        self._empty = asyncio.Event()
        self._refusing: Bites | None = None
        self._delaying: Bites | None = None
        self.hole: Bites | None = None
        self.delay_s = 0.0
        self.port = 0
        self.links: set[Link] = set()
        self.seen: Counter[str] = Counter()

    def link(self) -> Link:
        """For a new client."""
        return Link(self)

    async def start(self) -> int:
        """Listen; returns the port on 127.0.0.1."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: self.link().client, "127.0.0.1", 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def close(self) -> None:
        """Reset all connections and stop listening; nothing is left when it returns."""
        if self._server is None:
            return
        self._closing = True
        self._server.close()
        links = list(self.links)
        self.cut()
        for link in links:
            await link.wait_dialled()
        while self.links:
            self._empty.clear()
            await self._empty.wait()
        await self._server.wait_closed()
        self._server, self._closing = None, False

    def cut(self) -> int:
        """Reset all connections; returns how many there were."""
        links = list(self.links)
        for link in links:
            link.cut()
        return len(links)

    @asynccontextmanager
    async def black_hole(self) -> AsyncIterator[Bites]:
        """Nothing gets through: neither bytes nor the end of a connection; new ones are accepted and get no answer. Counts bytes.

        Afterwards new connections work. An old one that has lost bytes stays silent until one of its ends closes it: both have
        to find out for themselves.
        """
        if self.hole is not None:
            raise RuntimeError("there is a black hole already")
        bites = self.hole = Bites()
        try:
            yield bites
        finally:
            self.hole = None
            for link in list(self.links):
                link.settle()

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[Bites]:
        """All connections are reset, and new ones as soon as they come. Counts both."""
        if self._refusing is not None:
            raise RuntimeError("connections are being refused already")
        bites = self._refusing = Bites()
        try:
            bites.count += self.cut()
            yield bites
        finally:
            self._refusing = None

    @asynccontextmanager
    async def delaying(self, seconds: float) -> AsyncIterator[Bites]:
        """Everything is late by so much, each way. Counts what was (in reads)."""
        if self._delaying is not None:
            raise RuntimeError("everything is late already")
        bites = self._delaying = Bites()
        self.delay_s = seconds
        try:
            yield bites
        finally:
            self._delaying, self.delay_s = None, 0.0

    # --- what links tell

    def accepted(self, link: Link) -> None:
        """A client has come."""
        self.links.add(link)
        if self._refusing is not None or self._closing:
            if self._refusing is not None:
                self._refusing.count += 1
            link.client.reset()
        elif self.hole is not None:
            link.fall_silent()
        else:
            link.dial(self._upstream_port)

    def passed(self) -> None:
        """Bytes go on."""
        if self._delaying is not None:
            self._delaying.count += 1

    def swallowed(self, size: int) -> None:
        """Bytes go nowhere."""
        if self.hole is not None:
            self.hole.count += size

    def forget(self, link: Link) -> None:
        """Both of its connections have ended."""
        self.links.discard(link)
        if not self.links:
            self._empty.set()
