"""A connection whose messages and confirms do not go through aiormq: the rest of it does, by aiormq's public transport factory.

aiormq keeps what it is good at (handshake, TLS, heartbeats, opening and closing of channels, topology). It costs 50 to 150 us for
each message that passes through it; what is taken off the stream before it costs 2 (FASTLANE 0).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import aiormq
from aiormq.exceptions import AMQPConnectionError
from yarl import URL

from relay.errors import BrokerUnavailable
from relay.rabbitmq.wire.frames import FrameError, Sink, Splitter

_HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_HEARTBEAT_S = 1.0
"""How long aiormq may get nothing while the broker sends. It takes a connection for dead on which it sees no frame for
3 x (heartbeat + 1) s, and a broker that is sending messages sends no heartbeats beside them (FASTLANE 9)."""

_READER_LIMIT = 64 * 1024
"""asyncio's default: aiormq's part of the stream is small."""


class SplitTransport(aiormq.TransportFactory):
    """The transport of one connection: give it to `session.connect`, then `register` a sink for a channel at any time.

    `lost` is done as soon as the socket is gone, with the reason in relay's words; it never carries an exception. A stream that
    cannot be followed and a sink that raises cut the connection: then `broken` says so, in the same words, with what was raised
    as its cause. Any other end aiormq tells as well, and more exactly if the broker said a word.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._writer: asyncio.StreamWriter | None = None
        self.lost: asyncio.Future[BrokerUnavailable] = self._loop.create_future()
        self.broken: BrokerUnavailable | None = None
        self.after_data: Callable[[int], object] | None = None
        """Called once after each piece of the stream, with its length, when the sinks have got what was in it. Like a sink, it may raise."""

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What aiormq's own factories do, around our protocol."""
        provider = kwargs.pop("ssl_context_provider")
        context = await provider.get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(limit=_READER_LIMIT, loop=self._loop)
        host, port = url.host or "localhost", url.port or 0  # aiormq has filled in the port
        try:
            transport, protocol = await self._loop.create_connection(
                lambda: _Protocol(self, reader, self._loop), host, port, ssl=context, **kwargs
            )
        except OSError as exc:
            raise AMQPConnectionError(*exc.args) from exc
        self._writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        return reader, self._writer

    def register(self, channel: int, sink: Sink) -> None:
        """The sink gets this channel's messages and confirms until the channel is closed."""
        self._splitter.register(channel, sink)

    @property
    def writer(self) -> asyncio.StreamWriter:
        """For whole frames only, with nothing awaited between two writes that belong together: aiormq writes here as well.

        Raises BrokerUnavailable before the connection is open.
        """
        if self._writer is None:
            raise BrokerUnavailable("the connection was never opened")
        return self._writer

    def pause(self) -> None:
        """Read nothing more of the socket until `resume`. Both are safe at any time, and twice.

        A broker ends a connection on which nothing is read for long: see relay.rabbitmq.backpressure.
        """
        if (socket := self._open_socket()) is not None:
            socket.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if (socket := self._open_socket()) is not None:
            socket.resume_reading()

    def _open_socket(self) -> asyncio.Transport | None:
        """None before it was opened and after its end: uvloop's transports raise then."""
        if self._writer is None or self._writer.is_closing():
            return None
        return cast("asyncio.Transport", self._writer.transport)

    @property
    def blocked(self) -> bool:
        """True while RabbitMQ has an alarm and takes no messages. It says so only after the first one that it does not take."""
        return self._splitter.blocked

    def notify_blocked(self, callback: Callable[[bool], object]) -> None:
        """Call it whenever `blocked` changes. Like a sink, it may raise."""
        self._splitter.on_blocked = callback

    def feed(self, data: bytes) -> bytes:
        """For the protocol: take what has arrived, return what is aiormq's."""
        rest = self._splitter.feed(data)
        if self.after_data is not None:
            self.after_data(len(data))
        return rest


class _Protocol(asyncio.StreamReaderProtocol):
    """Between the socket and aiormq's reader."""

    def __init__(self, owner: SplitTransport, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self._owner = owner
        self._clock = loop
        self._passed_on_at = loop.time()
        self._socket: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast("asyncio.WriteTransport", transport)  # no isinstance: uvloop's are not of asyncio's classes
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._owner.broken is not None:
            return
        try:
            rest = self._owner.feed(data)
        except Exception as exc:  # noqa: BLE001 - asyncio would log what a sink raises, and go on without its message
            self._cut(exc)
            return
        now = self._clock.time()
        if not rest and now - self._passed_on_at > _HEARTBEAT_S:
            rest = _HEARTBEAT  # only when bytes have come: it hides no silence
        if rest:
            self._passed_on_at = now
            super().data_received(rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._owner.lost.done():
            self._owner.lost.set_result(self._owner.broken or _ended(exc))
        super().connection_lost(exc)

    def _cut(self, exc: Exception) -> None:
        if isinstance(exc, FrameError):
            broken = BrokerUnavailable(f"what RabbitMQ sent cannot be followed: {exc}")
        else:
            broken = BrokerUnavailable(f"the connection was cut, what RabbitMQ sent could not be taken: {exc!r}")
        broken.__cause__ = exc
        self._owner.broken = broken
        if self._socket is not None:
            self._socket.abort()


def _ended(exc: Exception | None) -> BrokerUnavailable:
    error = BrokerUnavailable(f"the connection to RabbitMQ has ended{f': {exc}' if exc else ''}")
    error.__cause__ = exc
    return error
