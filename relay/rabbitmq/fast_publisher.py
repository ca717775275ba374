"""The publisher seam on the fast lane: our frames in few large writes, confirms straight from the stream.

aiormq keeps the connection (handshake, TLS, heartbeats) and the channel's opening and closing. Nothing is published through it:
the channel is ours alone, and so are its delivery tags.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from aio_pika.abc import AbstractChannel, AbstractExchange
from aiormq.abc import AbstractChannel as Channel

from relay.errors import BrokerError, BrokerUnavailable
from relay.message import Message
from relay.rabbitmq.blame import blames_the_message
from relay.rabbitmq.contract import Confirmed, Nacked, Outcome, Refused, Returned, Unknown
from relay.rabbitmq.session import Session, broker_errors, close, connect, reply_text, translated
from relay.rabbitmq.topology import exchange
from relay.rabbitmq.transport import SplitTransport
from relay.rabbitmq.wire.encoding import Encoder, Unencodable
from relay.rabbitmq.wire.frames import Content, Sink
from relay.rabbitmq.wire.ledger import ACKED, NACKED, Batch, Ledger, Violation
from relay.rabbitmq.wire.methods import returned
from relay.rabbitmq.wire.properties import Malformed, read
from relay.settings import RabbitmqSettings

IN_FLIGHT = 4000
"""Messages written and not yet confirmed, over all calls. From 2 000 on the broker is never idle (PERFORMANCE A); as much again lets
the next page be written while one is confirmed. More would only be more to publish again after a broken connection."""

IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""The same in bytes: what a broker with an alarm can make us keep. A message larger than that goes alone."""

_WRITE = 256
_WRITE_BYTES = 256 * 1024
"""One write: so many messages, or at least so many bytes. Encoding them takes a millisecond, in which nothing else runs; larger
writes are no faster."""

_LAST_WORDS_S = 1.0
"""How long aiormq may take to read what the broker said before it closed the socket: that may be the reason."""

_FRAME_MAX = 131072  # RabbitMQ's own; 0 is said by a broker that has no limit
_ENVELOPE = 8  # of a frame: all that is around its payload

_CONFIRMED = Confirmed()
_NACKED = Nacked()


class _Call:
    """One call of `publish`: what of it was written, and what was not."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []  # in the order of its messages
        self.refused: dict[int, Refused] = {}  # by position in the call, ascending; not written
        self.timer: asyncio.TimerHandle | None = None
        self.due_at = 0.0  # when it goes off, by the loop's clock
        self.left_s: float | None = None  # of the time for its answers, which an alarm has stopped; None: it runs
        self.timed_out = False
        self._open = 0  # batches that are not answered
        self._waiting: asyncio.Future[None] | None = None

    def opened(self, batch: Batch) -> None:
        """A batch was written."""
        self.batches.append(batch)
        self._open += 1

    def settled(self) -> None:
        """A batch was answered, or never will be."""
        self._open -= 1
        if not self._open and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait_settled(self) -> None:
        """Return when no batch is open."""
        if self._open:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


class FastPublisher:
    """Implements `relay.rabbitmq.contract.Publisher`. One channel on a connection of its own."""

    def __init__(
        self, session: Session, transport: SplitTransport, channel: Channel, encoder: Encoder, confirm_timeout_s: float
    ) -> None:
        self._session = session
        self._transport = transport
        self._encode = encoder.encode
        self._confirm_timeout_s = confirm_timeout_s
        self._loop = asyncio.get_running_loop()
        self._ledger = Ledger()
        self._turn = asyncio.Lock()  # fair: calls are written in the order in which they were begun
        self._calls: set[_Call] = set()  # whose time is counted
        self._ids: set[str] = set()  # of all that is being published
        self._bytes = 0  # of the batches in flight
        self._freed: asyncio.Future[None] | None = None  # somebody waits for room
        self._lost: BrokerError | None = None
        self._ended = asyncio.Event()
        self._suspect = False
        self._culprit: Refused | None = None  # the only message in flight ended the session
        transport.register(channel.number, Sink(on_confirm=self._confirm, on_return=self._return, max_body=0))
        transport.notify_blocked(self._blocked)
        transport.lost.add_done_callback(self._socket_lost)
        for closing in (session.closing, channel.closing):  # asked for once: each look costs memory until the end
            closing.add_done_callback(self._closed)

    @classmethod
    async def open(
        cls,
        settings: RabbitmqSettings,
        *,
        confirm_timeout_s: float,
        name: str,
        target: Callable[[AbstractChannel, RabbitmqSettings], Awaitable[AbstractExchange]] = exchange,
    ) -> FastPublisher:
        """Connect, open a confirm channel, see to the exchange. Raises BrokerRefused or BrokerUnavailable.

        `target` says which exchange: relay's own by default; `relay.rabbitmq.topology.queues` to publish to queues by name.
        """
        transport = SplitTransport()
        session = await connect(settings, name=name, transport=transport)
        try:
            with broker_errors("opening a channel"):
                async with asyncio.timeout(settings.connect_timeout_s):
                    opened = await session.channel(publisher_confirms=True)
            publishing_to = await target(opened, settings)
            with broker_errors("opening a channel"):
                channel = await opened.get_underlay_channel()
            max_payload = (channel.connection.connection_tune.frame_max or _FRAME_MAX) - _ENVELOPE
            encoder = Encoder(channel=channel.number, exchange=publishing_to.name, max_payload=max_payload)
            return cls(session, transport, channel, encoder, confirm_timeout_s)
        except BaseException:
            await close(session)
            raise

    @property
    def lost(self) -> BaseException | None:
        """Why the session ended, None while it is usable."""
        return self._lost

    async def wait_lost(self) -> None:
        """See the contract."""
        await self._ended.wait()

    @property
    def message_is_suspect(self) -> bool:
        """See the contract."""
        return self._suspect

    async def publish(self, messages: Sequence[Message]) -> list[Outcome]:
        """See the contract. A returned message is told by its id, so the ids in flight must be distinct."""
        ids = {message.message_id for message in messages}
        if len(ids) != len(messages):
            raise ValueError("two messages of one batch have the same message_id")
        if not self._ids.isdisjoint(ids):
            raise ValueError("a message with the same message_id is being published")
        call = _Call()
        self._ids |= ids
        try:
            async with self._turn:
                await self._write(call, messages)
            await call.wait_settled()
            return self._outcomes(call, len(messages))
        except asyncio.CancelledError:
            self._end(BrokerUnavailable("publishing was cancelled"))
            raise
        finally:
            self._stop(call)
            call.batches.clear()  # each knows its call: a circle, which only the garbage collector would find
            self._ids -= ids

    async def close(self) -> None:
        """See the contract."""
        try:
            await close(self._session)
        finally:
            self._end(BrokerUnavailable("the publisher was closed"))

    # --- writing

    async def _write(self, call: _Call, messages: Sequence[Message]) -> None:
        """Write a call's messages, as far as the session lasts. The time for the answers counts from the last write."""
        self._start(call)
        position = 0
        while position < len(messages) and self._lost is None:
            frames, ids, size, position = self._take(call, messages, position)
            if frames:
                await self._room(len(ids), size)
                await self._drain()
                self._send(call, frames, ids, size)
            if position < len(messages):
                await asyncio.sleep(
                    0
                )  # the answers to what was written come in meanwhile, and everybody else has a turn

    def _take(self, call: _Call, messages: Sequence[Message], position: int) -> tuple[list[bytes], list[str], int, int]:
        """Encode the messages of one write: (frames of each, their ids, bytes, position of the next message)."""
        frames: list[bytes] = []
        ids: list[str] = []
        size = 0
        encode = self._encode
        for at in range(position, len(messages)):
            message = messages[at]
            try:
                octets = encode(message)
            except Unencodable as exc:
                call.refused[at] = exc.refused
                continue
            frames.append(octets)
            ids.append(message.message_id)
            size += len(octets)
            if size >= _WRITE_BYTES or len(frames) == _WRITE:
                return frames, ids, size, at + 1
        return frames, ids, size, len(messages)

    async def _room(self, count: int, size: int) -> None:
        """Wait until so much more may be in flight, or the session has ended."""
        while self._lost is None and (unanswered := self._ledger.unanswered):
            if unanswered + count <= IN_FLIGHT and self._bytes + size <= IN_FLIGHT_BYTES:
                return
            self._freed = self._loop.create_future()
            await self._freed

    async def _drain(self) -> None:
        """Wait until the socket has taken what was written before, or the session has ended."""
        if self._lost is None:
            try:
                await self._transport.writer.drain()
            except OSError:  # the socket is gone: why is told by `_closed`, or `_socket_lost`
                await self._ended.wait()

    def _send(self, call: _Call, frames: list[bytes], ids: list[str], size: int) -> None:
        """Nothing is awaited in here: the tags that the ledger gives are those that the broker counts."""
        if self._lost is not None:
            return
        call.opened(self._ledger.write(ids, size, partial(self._settled, call)))
        self._bytes += size
        self._transport.writer.write(b"".join(frames))
        self._start(call)

    # --- what the broker says

    def _confirm(self, tag: int, multiple: bool, acked: bool) -> None:
        if self._lost is not None:
            return
        try:
            self._ledger.confirm(tag, multiple, acked)
        except Violation as exc:
            self._end(BrokerUnavailable(f"RabbitMQ answered wrongly: {exc}"))
        if self._freed is not None:
            self._wake()

    def _return(self, content: Content) -> None:
        if self._lost is not None:
            return
        method, properties, _ = content
        _, text, _, key = returned(method)
        try:
            self._ledger.returned(read(properties).message_id, f"{text} {key}")
        except (Violation, Malformed) as exc:
            self._end(BrokerUnavailable(f"RabbitMQ answered wrongly: {exc}"))

    def _settled(self, call: _Call, batch: Batch) -> None:
        self._bytes -= batch.size
        call.settled()

    def _wake(self) -> None:
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)
        self._freed = None

    # --- how a session ends

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        """The connection or the channel has ended."""
        exc = None if closing.cancelled() else closing.exception()
        if isinstance(exc, asyncio.CancelledError):  # how aiormq tells it
            exc = BrokerUnavailable("the connection died (no heartbeat)")
        self._end(exc or BrokerUnavailable("the connection to RabbitMQ has ended"))

    def _socket_lost(self, lost: asyncio.Future[BrokerUnavailable]) -> None:
        reason = lost.result()
        if reason.__cause__ is None or isinstance(reason.__cause__, OSError):
            self._loop.call_later(_LAST_WORDS_S, self._end, reason)
        else:
            self._end(reason)  # it is us who cut it

    def _start(self, call: _Call) -> None:
        """The time for the answers counts anew, from now on or from the end of the alarm."""
        call.left_s = self._confirm_timeout_s if self._transport.blocked else None
        self._calls.add(call)
        self._wind(call, self._confirm_timeout_s)

    def _stop(self, call: _Call) -> None:
        self._calls.discard(call)
        if call.timer is not None:
            call.timer.cancel()

    def _blocked(self, blocked: bool) -> None:
        """An alarm has begun, or ended. While it lasts the broker confirms nothing, so the time for the answers stands still.

        It goes on where it stood: alarms that come and go do not hide that a queue hangs. Each is waited for as long as for answers.
        """
        for call in self._calls:
            if blocked and call.left_s is None and call.timer is not None:
                call.left_s = call.due_at - self._loop.time()
                self._wind(call, self._confirm_timeout_s)
            elif not blocked and call.left_s is not None:
                left_s, call.left_s = call.left_s, None
                self._wind(call, left_s)

    def _wind(self, call: _Call, seconds: float) -> None:
        if call.timer is not None:
            call.timer.cancel()
        call.due_at = self._loop.time() + seconds  # uvloop's timers cannot all tell it
        call.timer = self._loop.call_later(seconds, self._time_out, call)

    def _time_out(self, call: _Call) -> None:
        """With an alarm the broker takes nothing: then being late is no message's fault."""
        call.timed_out = not self._transport.blocked
        late = sum(batch.left for batch in call.batches)
        self._end(BrokerUnavailable(f"{late} messages were not confirmed within {self._confirm_timeout_s:g} s"))

    def _end(self, cause: BaseException) -> None:
        """A session that failed once is never used again: cut it, so that nothing waits on it any more."""
        if self._lost is not None:
            return
        self._lost = _told(cause)
        self._suspect = blames_the_message(cause)
        if self._suspect and self._ledger.unanswered == 1:
            self._culprit = Refused("refused", reply_text(cause))
        self._session.abort()
        self._ledger.fail()
        self._wake()
        self._ended.set()

    # --- outcomes

    def _outcomes(self, call: _Call, count: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for batch in call.batches:
            outcomes += [_CONFIRMED] * len(batch.ids) if batch.all_acked else self._various(call, batch)
        unsent = count - len(outcomes) - len(call.refused)
        if unsent:
            outcomes += [Unknown(str(self._lost))] * unsent
        for position, refused in call.refused.items():
            outcomes.insert(position, refused)
        return outcomes

    def _various(self, call: _Call, batch: Batch) -> list[Outcome]:
        unanswered = self._culprit or Unknown(str(self._lost), timed_out=call.timed_out)
        answers: dict[int, Outcome] = {ACKED: _CONFIRMED, NACKED: _NACKED}
        outcomes = [answers.get(state, unanswered) for state in batch.states]
        for position, reason in batch.returned.items():
            outcomes[position] = Returned(reason)
        return outcomes


def _told(cause: BaseException) -> BrokerError:
    """The end of a session in relay's words."""
    if isinstance(cause, BrokerError):
        return cause
    error = translated(cause, "publishing") or BrokerUnavailable(f"publishing: {reply_text(cause)}")
    error.__cause__ = cause
    return error
