"""A broker that does what a test says: AMQP 0-9-1 in asyncio, on a free port of 127.0.0.1, frames by pamqp.

It shakes hands, opens channels, declares whatever it is asked to, and writes down what it saw. What is published to it is
answered by a script (a function, called for each publish), or by the test itself. A real broker cannot be asked to be
silent, to nack the second of three, or to send what no library would encode; this one can.

    async with stub_broker(script=ack) as broker:
        publisher = await StockPublisher.open(broker.settings(), confirm_timeout_s=1, name="test")
        ...
        broker.last.nack(2)
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import psutil
from pamqp import body, commands, constants, frame, heartbeat
from pamqp.base import Frame
from pamqp.common import FieldTable

from relay.settings import RabbitmqSettings

FRAME_MAX = 131072
_HEAD = struct.Struct(">BHI")
_CAPABILITIES: FieldTable = {
    "publisher_confirms": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "authentication_failure_close": True,
}

_ANSWERS: dict[type[Frame], Callable[[Any], Frame]] = {
    commands.Channel.Open: lambda _: commands.Channel.OpenOk(),
    commands.Channel.Close: lambda _: commands.Channel.CloseOk(),
    commands.Confirm.Select: lambda _: commands.Confirm.SelectOk(),
    commands.Exchange.Declare: lambda _: commands.Exchange.DeclareOk(),
    commands.Queue.Declare: lambda asked: commands.Queue.DeclareOk(asked.queue, 0, 0),
    commands.Queue.Bind: lambda _: commands.Queue.BindOk(),
    commands.Basic.Qos: lambda _: commands.Basic.QosOk(),
    commands.Basic.Consume: lambda asked: commands.Basic.ConsumeOk(asked.consumer_tag),
}
"""What is asked for is granted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One message as it came in."""

    tag: int  # the broker's own count on its channel: what an ack of it must say
    channel: int
    message_id: str
    routing_key: str
    properties: commands.Basic.Properties
    body: bytes


class Line:
    """One connection of a client, seen from the broker."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, script: Script, settled: asyncio.Condition
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._script = script
        self._settled = settled
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._silent = False
        self._blocked_from_the_start = False
        self._tags: dict[int, int] = {}
        self.seen: list[str] = []  # names of the methods that came in, in order
        self.tuned: commands.Connection.TuneOk | None = None  # what was negotiated
        self.published: list[Published] = []
        self.acknowledged: list[tuple[int, bool]] = []  # a consumer's: tag, multiple
        self.consumer_tag: str | None = None
        self.consumer_channel = 0
        self.ended = False  # the client is gone, or was cut
        self.ignores: frozenset[str] = frozenset()  # names of methods that get no answer

    # --- what the broker says

    def ack(self, tag: int, *, multiple: bool = False, channel: int = 1) -> None:
        """Take responsibility for a message."""
        self._send(commands.Basic.Ack(tag, multiple), channel)

    def nack(self, tag: int, *, multiple: bool = False, channel: int = 1) -> None:
        """Refuse responsibility for a message."""
        self._send(commands.Basic.Nack(tag, multiple, False), channel)

    def give_back(self, message: Published) -> None:
        """`basic.return`: no queue is bound. As a real broker does, the test acks it afterwards."""
        self._send(commands.Basic.Return(312, "NO_ROUTE", "relay.events", message.routing_key), message.channel)
        self._send_content(message.channel, message.properties.marshal(), message.body)

    def deliver(self, tag: int, content: bytes, properties: bytes = b"\0\0", *, routing_key: str = "order.X") -> None:
        """Deliver to the consumer; `properties` as they stand on the wire: two bytes of flags, then the values."""
        assert self.consumer_tag is not None, "nobody consumes"
        method = commands.Basic.Deliver(self.consumer_tag, tag, False, "relay.events", routing_key)
        self._send(method, self.consumer_channel)
        self._send_content(self.consumer_channel, properties, content)

    def block(self) -> None:
        """`connection.blocked`, as with a memory alarm: and from now on nothing is read."""
        self._send(commands.Connection.Blocked("low on memory"), 0)
        self.stop_reading()

    def grant_and_block(self) -> None:
        """Have an alarm from the moment on in which the connection is open, before its client has written anything more."""
        self._blocked_from_the_start = True

    def unblock(self) -> None:
        """The alarm is over."""
        self._send(commands.Connection.Unblocked(), 0)
        self.read_on()

    def beat(self) -> None:
        """Send a heartbeat. The stub sends none by itself."""
        self._write(heartbeat.Heartbeat.marshal())

    def cancel_consumer(self) -> None:
        """As when its queue was deleted."""
        self._send(commands.Basic.Cancel(self.consumer_tag or "", True), self.consumer_channel)

    def close_channel(self, code: int, text: str, *, channel: int = 1) -> None:
        """End a channel, and with it its numbering."""
        self._send(commands.Channel.Close(code, text, 0, 0), channel)

    def close_connection(self, code: int, text: str) -> None:
        """End the connection politely."""
        self._send(commands.Connection.Close(code, text, 0, 0), 0)

    def say_nothing_more(self) -> None:
        """From now on the socket stays open and silent: as a half-open connection looks from the client."""
        self._silent = True

    def stop_reading(self) -> None:
        """Take nothing more from the socket: the client's writer stalls as soon as the buffers are full."""
        self._may_read.clear()
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def read_on(self) -> None:
        """Take what has gathered, and go on."""
        self._may_read.set()
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    def cut(self) -> None:
        """Reset the connection."""
        self._writer.transport.abort()

    # --- what the test waits for

    async def until(self, question: Callable[[Line], bool], *, timeout_s: float = 10) -> None:
        """Return when `question(line)` is true; asked again after each frame. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._settled:
            await self._settled.wait_for(lambda: question(self))

    # --- the machinery

    async def serve(self) -> None:
        """Answer until the client is gone."""
        try:
            if await self._reader.readexactly(8) != b"AMQP\0\0\x09\x01":
                return
            self._send(commands.Connection.Start(0, 9, {"capabilities": _CAPABILITIES}, "PLAIN", "en_US"), 0)
            while True:
                await self._may_read.wait()
                kind, channel, content = await self._frame()
                if kind != constants.FRAME_HEARTBEAT:
                    await self._answer(channel, content)
                async with self._settled:
                    self._settled.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is gone: which is for the test to judge
        finally:
            self.ended = True
            self._writer.transport.abort()
            async with self._settled:
                self._settled.notify_all()

    async def _frame(self) -> tuple[int, int, Any]:
        head = await self._reader.readexactly(_HEAD.size)
        kind, channel, size = _HEAD.unpack(head)
        rest = await self._reader.readexactly(size + 1)
        if kind == constants.FRAME_BODY:
            return kind, channel, rest[:-1]
        return kind, channel, frame.unmarshal(head + rest)[2]

    async def _answer(self, channel: int, asked: Any) -> None:
        self.seen.append(asked.name)
        if asked.name in self.ignores:
            return
        match asked:
            case commands.Connection.StartOk():
                self._send(commands.Connection.Tune(2047, FRAME_MAX, 60), 0)
            case commands.Connection.TuneOk():
                self.tuned = asked
            case commands.Connection.Open():
                self._send(commands.Connection.OpenOk(), 0)
                if self._blocked_from_the_start:
                    self.block()
            case commands.Connection.Close():
                self._send(commands.Connection.CloseOk(), 0)
            case commands.Basic.Publish():
                await self._take(channel, asked)
            case commands.Basic.Ack():
                self.acknowledged.append((asked.delivery_tag, asked.multiple))
            case _:
                if isinstance(asked, commands.Basic.Consume):
                    self.consumer_tag, self.consumer_channel = asked.consumer_tag, channel
                if (answer := _ANSWERS.get(type(asked))) is not None:
                    self._send(answer(asked), channel)

    async def _take(self, channel: int, method: commands.Basic.Publish) -> None:
        """A publish is never interleaved with anything else on its connection: aiormq writes all its frames at once."""
        _, _, head = await self._frame()
        content = b""
        while len(content) < head.body_size:
            content += (await self._frame())[2]
        self._tags[channel] = self._tags.get(channel, 0) + 1
        message = Published(
            tag=self._tags[channel],
            channel=channel,
            message_id=head.properties.message_id or "",
            routing_key=method.routing_key,
            properties=head.properties,
            body=content,
        )
        self.published.append(message)
        self._script(self, message)

    def _send_content(self, channel: int, properties: bytes, content: bytes) -> None:
        """Header and body by hand: the point may be that no library would encode these properties."""
        payload = struct.pack(">HHQ", 60, 0, len(content)) + properties
        self._write(_HEAD.pack(constants.FRAME_HEADER, channel, len(payload)) + payload + b"\xce")
        if content:
            self._write(frame.marshal(body.ContentBody(content), channel))

    def _send(self, method: Frame, channel: int) -> None:
        self._write(frame.marshal(method, channel))

    def _write(self, octets: bytes) -> None:
        if not self._silent and not self._writer.transport.is_closing():
            self._writer.write(octets)


Script: TypeAlias = Callable[[Line, Published], None]
"""What becomes of a message that was published."""


def ack(line: Line, message: Published) -> None:
    """The script of a broker that is well."""
    line.ack(message.tag, channel=message.channel)


def silence(_line: Line, _message: Published) -> None:
    """The script of a broker that takes and never answers, or of a test that answers by itself."""


class StubBroker:
    """All connections that were made to one port."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._settled = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.lines: list[Line] = []
        self.on_connect: Callable[[Line], None] = lambda _line: None

    @property
    def last(self) -> Line:
        """The newest connection."""
        return self.lines[-1]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"amqp://stub:stub@127.0.0.1:{self.port}/"

    def settings(self, **changes: Any) -> RabbitmqSettings:
        """Settings that lead here."""
        return RabbitmqSettings(url=self.url, **changes)

    def client_sockets(self) -> int:
        """The clients' open ends, in this process: what a client forgot to close stays among them.

        The broker's own ends do not tell: one that does not read does not notice that its client is gone.
        """
        ends = psutil.Process().net_connections("tcp4")
        return sum(bool(end.raddr) and end.raddr.port == self.port for end in ends)

    async def start(self) -> None:
        """Listen. A small receive buffer, so that a client notices soon that nothing is read."""
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        listening.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._accept, sock=listening)
        self.port = listening.getsockname()[1]

    async def close(self) -> None:
        """Cut everybody and stop listening."""
        assert self._server is not None
        self._server.close()
        for line in self.lines:
            line.cut()  # also one whose task has not begun: cancelled, it never would
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer, self._script, self._settled)
        self.lines.append(line)
        self.on_connect(line)
        task = asyncio.create_task(line.serve())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def stub_broker(script: Script = ack) -> AsyncIterator[StubBroker]:
    """A broker for the length of a test."""
    broker = StubBroker(script)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


def props(flags: int, values: bytes) -> bytes:
    """Properties as they stand on the wire."""
    return struct.pack(">H", flags) + values
