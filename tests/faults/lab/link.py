"""A client's connection through a proxy, and the one to the server that belongs to it: bytes go on, are late, or are lost."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from tests.faults.lab.proxy import TcpProxy

_DIAL_TIMEOUT_S = 10.0
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close() sends RST, and drops what was not sent


class End(asyncio.Protocol):
    """One of the two connections of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._transport: asyncio.Transport | None = None
        self._late: deque[tuple[float, bytes | None]] = deque()  # what is to be written when; None: the end
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False  # the connection has ended

    @property
    def transport(self) -> asyncio.Transport:
        """Its socket. Before it is connected there is none."""
        if self._transport is None:
            raise RuntimeError("not connected yet")
        return self._transport

    @property
    def is_connected(self) -> bool:
        """True while there is a socket."""
        return self._transport is not None and not self.gone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls it."""
        self._transport = cast(asyncio.Transport, transport)
        self._link.made(self)
        if self._late:
            self._catch_up()

    def data_received(self, data: bytes) -> None:
        """asyncio calls it."""
        self._link.received(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls it: both for a goodbye and for a reset."""
        self.gone = True
        if self._timer is not None:
            self._timer.cancel()
        self._late.clear()
        self._link.lost()

    def pause_writing(self) -> None:
        """Its peer reads too slowly: nothing more is read for it."""
        self._link.other(self).pause(True)

    def resume_writing(self) -> None:
        """The opposite."""
        self._link.other(self).pause(False)

    def pause(self, paused: bool) -> None:
        """Stop reading, or go on."""
        if self._transport is not None and not self._transport.is_closing():
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def send(self, data: bytes, delay_s: float) -> None:
        """Write, or write later: never before what was sent before."""
        if self.gone or (self._transport is not None and self._transport.is_closing()):
            return
        if self._transport is None:  # some versions of asyncio read once although they were told to pause
            self._late.append((0.0, data))
        elif delay_s or self._late:
            self._postpone(data, delay_s)
        else:
            self._transport.write(data)

    def finish(self) -> None:
        """Close after all that was sent."""
        if self._transport is None:
            return
        if self._late:
            self._postpone(None, 0)
        else:
            self._transport.close()

    def reset(self) -> None:
        """RST at once."""
        if self._transport is not None and not self.gone:
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()

    def _postpone(self, data: bytes | None, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._late.append((loop.time() + delay_s, data))
        if self._timer is None:
            self._timer = loop.call_at(self._late[0][0], self._catch_up)

    def _catch_up(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._late and self._late[0][0] <= loop.time():
            _, data = self._late.popleft()
            if data is None:
                self.transport.close()
            else:
                self.transport.write(data)
        if self._late:
            self._timer = loop.call_at(self._late[0][0], self._catch_up)


class Link:
    """A client's connection, and the one to the server that was opened for it.

    Subclasses look at what passes: `from_client` and `from_server` get all bytes in order and return what goes on.
    """

    def __init__(self, proxy: TcpProxy) -> None:
        self._proxy = proxy
        self.client = End(self)
        self.server = End(self)
        self.silent = False  # bytes were lost: nothing passes any more
        self.deaf = False  # neither end hears of the other's end
        self.doomed: str | None = (
            None  # set by a subclass, "reset" or "let the server read": cut after what it returned now
        )
        self._dial: asyncio.Task[None] | None = None

    def from_client(self, data: bytes) -> bytes:
        """What of it goes to the server."""
        return data

    def from_server(self, data: bytes) -> bytes:
        """What of it goes to the client."""
        return data

    def other(self, end: End) -> End:
        """The opposite end."""
        return self.server if end is self.client else self.client

    def made(self, end: End) -> None:
        """One end is connected: the client's is first."""
        if end is self.client:
            self._proxy.accepted(self)
        elif self.client.gone:
            self.server.finish()
        else:
            self.client.pause(False)

    def dial(self, port: int) -> None:
        """Connect to the server; the client is not read until then."""
        self.client.pause(True)
        self._dial = asyncio.create_task(self._connect(port))
        self._dial.add_done_callback(self._dialled)

    def received(self, end: End, data: bytes) -> None:
        """Bytes have come: see which go on."""
        if self._proxy.hole is not None:
            self.fall_silent()
        kept = b""
        if end is self.server:  # it did answer, whether the answer goes on or not
            kept = self.from_server(data)
        elif not self.silent:
            kept = self.from_client(data)
        if self.silent:
            self._proxy.swallowed(len(data))
            return
        if kept:
            self._proxy.passed()
            self.other(end).send(kept, self._proxy.delay_s)
        if self.doomed is not None:
            self.cut(server_reads=self.doomed == "let the server read")

    def lost(self) -> None:
        """One end has ended: so does the other, unless nothing gets through."""
        if self._proxy.hole is not None:
            self.fall_silent()
        if self.client.gone and (self.server.gone or not self.is_dialled):
            self._proxy.forget(self)
        elif not self.deaf:
            self.settle()

    @property
    def is_dialled(self) -> bool:
        """True when there is, or was, or will be a connection to the server."""
        return self._dial is not None

    def fall_silent(self) -> None:
        """From now on nothing passes, and no end of a connection is noticed until `settle`."""
        self.silent = self.deaf = True

    def settle(self) -> None:
        """An end is told that the other is gone. What was lost stays lost: a silent link stays silent."""
        self.deaf = False
        if self.client.gone:
            self.server.finish()
        elif self.server.gone:
            self.client.finish()

    def cut(self, *, server_reads: bool = False) -> None:
        """Reset both connections; or let the server read all that was sent, and then the end."""
        self.deaf = False
        if self._dial is not None:
            self._dial.cancel()
        self.client.reset()
        if server_reads:
            self.server.finish()
        else:
            self.server.reset()

    async def wait_dialled(self) -> None:
        """Until no task of this link is left."""
        if self._dial is not None:
            await asyncio.wait([self._dial])

    async def _connect(self, port: int) -> None:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            await asyncio.get_running_loop().create_connection(lambda: self.server, "127.0.0.1", port)
        self._proxy.seen["connection"] += 1

    def _dialled(self, dial: asyncio.Task[None]) -> None:
        """No server there, not in time (TimeoutError is an OSError), or cut meanwhile.

        Not in the task itself: one that is cancelled before its first step runs nothing, and the proxy would wait for it for ever.
        """
        if dial.cancelled() or isinstance(dial.exception(), OSError):
            self.server.gone = not self.server.is_connected
            self.cut()
            if self.client.gone:
                self.lost()
