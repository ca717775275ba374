"""One plain connection to RabbitMQ: never the robust one, every wait bounded, errors told in relay's words.

A session is crash-only: whatever goes wrong destroys it, and its owner starts the next one from what PostgreSQL says.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aio_pika
import aiormq
import aiormq.exceptions
from aiormq.channel import EXCEPTION_MAPPING as CHANNEL_CODES
from aiormq.connection import EXCEPTION_MAPPING as CONNECTION_CODES
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from yarl import URL

from relay.errors import BrokerError, BrokerRefused, BrokerUnavailable, UnreadableMessage
from relay.settings import RabbitmqSettings

CLOSE_TIMEOUT_S = 3.0
"""Longest goodbye: aiormq drains its write buffer on close, which a blocked or half-open broker never takes."""

_CUT_S = 1.0
"""Longest wait for aiormq to notice that its socket was cut: a few turns of the loop, or something is wrong with it."""

_USER_TIMEOUT_MS = 15_000
"""Longest time for the peer to acknowledge bytes. Linux ends by it a healthy connection too, whose broker has an alarm and reads
nothing while more than the sockets hold is on its way. That is one paced reconnect earlier than `outbox.confirm_timeout_s` would
bring, and no message is to blame for it."""

_NO_VHOST = (
    "the virtual host does not exist, the user may not use it, or its limit of connections is reached "
    "(RabbitMQ's own log says which: aiormq keeps its answer to itself)"
)
_REFUSED = (402, 403, 404, 405, 406, 530)


_ASYNCIO_ONLY = ("happy_eyeballs_delay", "interleave")
"""Parameters of a URL that aiormq hands to the event loop, and uvloop does not know: it tries a host's addresses one after the other."""


class _Transport(aiormq.TransportFactory):
    """A transport, remembered: aiormq keeps no handle on it, and a half-open connection can only be cut by one."""

    def __init__(self, inner: aiormq.TransportFactory) -> None:
        self._inner = inner
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the socket; let the kernel notice a dead peer as well: unacknowledged bytes end the connection."""
        if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            kwargs = {name: value for name, value in kwargs.items() if name not in _ASYNCIO_ONLY}
        reader, self.writer = await self._inner.create(url, **kwargs)
        sock = self.writer.get_extra_info("socket")
        if sock is None:  # so uvloop tells it, where asyncio's sockets raise
            raise ConnectionResetError("the connection ended as soon as it was open")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        return reader, self.writer


class Session(aio_pika.Connection):
    """aio-pika's plain connection, with a way to cut it."""

    def __init__(self, url: URL, transport: aiormq.TransportFactory | None = None) -> None:
        super().__init__(url)
        usual = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        self._remembered = _Transport(transport or usual)
        self.kwargs["transport_factory"] = self._remembered  # a public attribute that aio-pika hands to aiormq.connect

    def abort(self) -> None:
        """Cut the socket at once: nothing that was confirmed is lost by it."""
        if self._remembered.writer is not None:
            self._remembered.writer.transport.abort()

    @property
    def closing(self) -> asyncio.Future[Any]:
        """Done when the connection has ended; may carry CancelledError as its exception (the heartbeat died).

        Look once and keep it: aiormq makes a new future for each look, and lets go of none before the connection ends.
        """
        if self.transport is None:
            raise BrokerUnavailable("the connection was never opened")
        return self.transport.connection.closing


async def connect(
    settings: RabbitmqSettings, *, name: str, transport: aiormq.TransportFactory | None = None
) -> Session:
    """A new connection that appears under `name` in RabbitMQ's list. Raises BrokerRefused or BrokerUnavailable.

    `transport` is for this connection alone, and does TLS where the URL asks for it: see relay.rabbitmq.transport.
    """
    url = URL(settings.url.get_secret_value()).update_query(heartbeat=str(settings.heartbeat_s), name=name)
    with broker_errors(f"connecting to {_shown(url)}"):
        async with asyncio.timeout(settings.connect_timeout_s):
            connection = Session(url, transport)
            # No time-out of aio-pika's beside ours: its wait_for would leave what a cancelled connect fails with to nobody
            # ("Task exception was never retrieved", found by the fault laboratory).
            await connection.connect()
    return connection


async def close(connection: Session) -> None:
    """Close within CLOSE_TIMEOUT_S; what remains is cut by dropping the socket. Never raises for the broker's sake.

    Cancelling aiormq's close does not end it: it waits for its writer, which waits for the socket to take what it holds, and
    a broker with an alarm takes nothing. Only cutting the socket does.
    """
    goodbye = asyncio.create_task(connection.close())
    goodbye.add_done_callback(_forget)
    try:
        await asyncio.wait([goodbye], timeout=CLOSE_TIMEOUT_S)
    finally:
        connection.abort()
        goodbye.cancel()
        await asyncio.wait([goodbye], timeout=_CUT_S)


@contextmanager
def broker_errors(doing: str) -> Iterator[None]:
    """Within it, every error of aiormq or its socket leaves as a BrokerError with the original as its cause.

    aiormq ends its waiting calls with CancelledError when the heartbeat dies; that is told apart from a real cancellation.
    """
    try:
        yield
    except asyncio.CancelledError as exc:
        if _being_cancelled():
            raise
        raise BrokerUnavailable(f"{doing}: the connection died (no heartbeat)") from exc
    except Exception as exc:
        if isinstance(exc, BrokerError) or (error := translated(exc, doing)) is None:
            raise
        raise error from exc


def translated(exc: BaseException, doing: str) -> BrokerError | None:
    """The relay error for an exception of aiormq or the socket; None if it is neither."""
    if isinstance(exc, TimeoutError):
        return BrokerUnavailable(f"{doing}: no answer in time")
    if isinstance(exc, aiormq.exceptions.InvalidFrameError) and "got <Connection.Close" in str(exc):
        return BrokerRefused(f"{doing}: RabbitMQ refused: {_NO_VHOST}")
    if isinstance(exc, aiormq.exceptions.AMQPError):
        code = reply_code(exc)
        text = reply_text(exc)
        if code in _REFUSED or isinstance(
            exc, aiormq.exceptions.ProbableAuthenticationError | aiormq.exceptions.IncompatibleProtocolError
        ):
            return BrokerRefused(f"{doing}: RabbitMQ refused: {text}", reply_code=code)
        return BrokerUnavailable(f"{doing}: {text}", reply_code=code)
    if isinstance(exc, OSError):
        file = f": {exc.filename}" if exc.filename else ""  # of a certificate that the URL names
        return BrokerUnavailable(f"{doing}: {exc.strerror or exc}{file}")
    if isinstance(exc, RuntimeError):  # aio-pika's own: "connection/channel is closed"
        return BrokerUnavailable(f"{doing}: {exc}")
    if (
        type(exc) is Exception and not exc.args
    ):  # aiormq ends waiting calls so when it knows no reason (base.py, reject_all)
        return BrokerUnavailable(f"{doing}: the connection to RabbitMQ has ended")
    return None


def unreadable(exc: BaseException) -> UnreadableMessage | None:
    """The error for what a consumer's reader fails with when it cannot decode a frame; None for any other end of it."""
    if isinstance(exc, aiormq.exceptions.InvalidFrameError | RecursionError | UnicodeError):
        detail = reply_text(exc.__cause__ or exc)
        return UnreadableMessage(f"a message in the queue cannot be decoded and ends the connection: {detail}")
    return None


_CODES: dict[type[BaseException], int] = {
    kind: code for codes in (CONNECTION_CODES, CHANNEL_CODES) for code, kind in codes.items()
}


def reply_code(exc: BaseException) -> int | None:
    """The AMQP reply code of an aiormq exception: told by its class, or as its first argument."""
    if (code := _CODES.get(type(exc))) is not None:
        return code
    first = exc.args[0] if exc.args else None
    return first if isinstance(first, int) and 200 <= first < 600 else None


def reply_text(exc: BaseException) -> str:
    """What the broker said, on one line."""
    text = " ".join(str(part) for part in (exc.args or (type(exc).__name__,)))
    return " ".join(text.split())[:300]


def _forget(goodbye: asyncio.Task[None]) -> None:
    """What a goodbye failed with is nobody's concern."""
    if not goodbye.cancelled():
        goodbye.exception()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _shown(url: URL) -> str:
    return str(url.with_user(None).with_password(None).with_query(None))
