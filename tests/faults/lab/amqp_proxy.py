"""A proxy before RabbitMQ that reads frames: it knows what was published and confirmed, and can lie about it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.faults.lab.frames import BODY, HEADER, METHOD, Frame, Method, NotAmqp, Splitter, ack, joined, nack
from tests.faults.lab.link import Link
from tests.faults.lab.proxy import Bites, TcpProxy

Bytes = memoryview | bytes

_FROM_BROKER: dict[int, str] = {
    Method.ACK: "ack",
    Method.NACK: "nack",
    Method.RETURN: "return",
    Method.DELIVER: "deliver",
    Method.CHANNEL_CLOSE: "channel_close",
    Method.CONNECTION_CLOSE: "connection_close",
    Method.CONNECTION_BLOCKED: "blocked",
}
_FROM_CLIENT: dict[int, str] = {
    Method.PUBLISH: "publish",
    Method.ACK: "consumer_ack",
    Method.NACK: "consumer_nack",
    Method.REJECT: "consumer_nack",
}


class AmqpProxy(TcpProxy):
    """Clients connect to RabbitMQ through it. What is not AMQP in the clear (TLS) passes unread.

    `seen` counts frames that went past, before any lie: publish, consumer_ack, consumer_nack from clients; ack, nack, return,
    deliver, channel_close, connection_close, blocked from the broker; and connection.

    A lie can be `about` one exchange: what was published elsewhere (marks, answers) is neither lied about nor counted then.
    """

    def __init__(self, upstream_port: int, *, dice: random.Random | None = None) -> None:
        super().__init__(upstream_port)
        self.dice = dice or random.Random(0)
        self.published: dict[str, int] = {}  # by message id: how often it was written to the broker
        self.confirmed: set[str] = set()  # message ids that the broker acked, whether the ack was passed on or not
        self.returned: Counter[str] = Counter()  # by message id: how often the broker gave it back; it acks it as well
        self.watches: list[Watch] = []
        self.dropping: Lie | None = None
        self.nacking: Nacking | None = None
        self.cut_at_ack: Limited | None = None
        self.cut_inside: Limited | None = None

    def link(self) -> Link:
        """See TcpProxy."""
        return AmqpLink(self)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Within it, what the broker hands out is counted by message id."""
        watch = Watch()
        self.watches.append(watch)
        try:
            yield watch
        finally:
            self.watches.remove(watch)

    @asynccontextmanager
    async def dropping_acks(self, *, about: str | None = None) -> AsyncIterator[Bites]:
        """Publishers get neither ack nor nack. Counts frames."""
        if self.dropping is not None:
            raise RuntimeError("acks are being dropped already")
        bites = self.dropping = Lie(about=about)
        try:
            yield bites
        finally:
            self.dropping = None

    @asynccontextmanager
    async def acks_as_nacks(
        self, share: float = 0.2, multiple: bool = False, *, about: str | None = None
    ) -> AsyncIterator[Bites]:
        """So many of the messages that the broker took are said to be refused. Counts messages.

        One by one, also out of an ack that stands for several; or, with `multiple`, all that one ack stands for, by one nack
        with that bit set. An ack that overtakes earlier ones is left alone then: such a nack would stand for those as well.
        """
        if self.nacking is not None:
            raise RuntimeError("acks are being turned into nacks already")
        bites = self.nacking = Nacking(share=share, multiple=multiple, about=about)
        try:
            yield bites
        finally:
            self.nacking = None

    @asynccontextmanager
    async def cutting_at_ack(self, times: int | None = 1, *, about: str | None = None) -> AsyncIterator[Bites]:
        """The next ack (None: each) is swallowed and its connection cut: the broker has the message, and nobody knows. Counts cuts."""
        if self.cut_at_ack is not None:
            raise RuntimeError("connections are being cut at an ack already")
        bites = self.cut_at_ack = Limited(times=times, about=about)
        try:
            yield bites
        finally:
            self.cut_at_ack = None

    @asynccontextmanager
    async def cutting_inside_publish(self, times: int | None = 1, *, about: str | None = None) -> AsyncIterator[Bites]:
        """The next publish (None: each) reaches the broker in part: without header, or up to the middle of its header or body. Counts cuts."""
        if self.cut_inside is not None:
            raise RuntimeError("connections are being cut inside a publish already")
        bites = self.cut_inside = Limited(times=times, about=about)
        try:
            yield bites
        finally:
            self.cut_inside = None


@dataclass(slots=True)
class Watch:
    """See `watching`. Each delivery of a message id, by whether the broker called it a redelivery."""

    first: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)


class _Sent(NamedTuple):
    """A message that waits for an answer."""

    message_id: str | None
    exchange: str


@dataclass(slots=True)
class Lie(Bites):
    """A mode that may be about one exchange only; None: about everything."""

    about: str | None = None

    def concerns(self, exchange: str) -> bool:
        """Whether what goes there is lied about."""
        return self.about is None or exchange == self.about

    def concerned(self, answered: dict[int, _Sent]) -> list[int]:
        """The tags of these that are lied about."""
        return [tag for tag, sent in answered.items() if self.concerns(sent.exchange)]


@dataclass(slots=True)
class Limited(Lie):
    """A mode that bites so many times."""

    times: int | None = None

    def bite(self) -> bool:
        """True, and counted, if it still does."""
        if self.times is not None and self.count >= self.times:
            return False
        self.count += 1
        return True


@dataclass(slots=True)
class Nacking(Lie):
    """See `acks_as_nacks`."""

    share: float = 0.0
    multiple: bool = False


@dataclass(slots=True)
class _Channel:
    """What is under way on a channel."""

    confirming: bool = False
    published: int = 0  # since confirm.select: the last tag
    outstanding: dict[int, _Sent] = field(default_factory=dict)  # by tag, in order, not answered yet
    expects_publish: bool = False  # the next header is that of a publish
    exchange: str = ""  # of that publish
    expects_return: bool = False
    expects_deliver: bool | None = None  # the next header is that of a deliver: whether it is a redelivery
    cut_at: int | None = None  # the kind of the frame of this publish at which the connection is to be cut


class AmqpLink(Link):
    """One connection to RabbitMQ."""

    def __init__(self, proxy: AmqpProxy) -> None:
        super().__init__(proxy)
        self._amqp = proxy
        self._splitters = {False: Splitter(), True: Splitter()}  # of the client, of the broker
        self._channels: dict[int, _Channel] = {}
        self._opaque = False

    def from_client(self, data: bytes) -> bytes:
        """See Link."""
        return self._look(self._splitters[False], data, self._client_frame)

    def from_server(self, data: bytes) -> bytes:
        """See Link."""
        return self._look(self._splitters[True], data, self._broker_frame)

    def _look(self, splitter: Splitter, data: bytes, at: Callable[[Frame], Bytes]) -> bytes:
        if self._opaque:
            return splitter.rest() + data
        try:
            whole, frames = splitter.feed(data)
        except NotAmqp:
            self._opaque = True
            return splitter.rest()
        kept: list[Bytes] = []
        changed = False
        for frame in frames:
            part = at(frame)
            changed = changed or part is not frame.data
            kept.append(part)
            if self.doomed is not None:
                changed = True  # what comes after this frame does not go on
                break
        return joined(kept) if changed else whole

    def _client_frame(self, frame: Frame) -> Bytes:
        channel = self._channel(frame.channel)
        if frame.kind == METHOD:
            return self._client_method(frame, channel)
        if frame.kind == channel.cut_at or (channel.cut_at == BODY and frame.kind == HEADER and frame.body_size == 0):
            self.doomed = "let the server read"
            return frame.data[: len(frame.data) // 2]
        if frame.kind == HEADER and channel.expects_publish:
            self._note_published(frame, channel)
        return frame.data

    def _client_method(self, frame: Frame, channel: _Channel) -> Bytes:
        method = frame.method
        if (name := _FROM_CLIENT.get(method)) is not None:
            self._amqp.seen[name] += 1
        if method == Method.CHANNEL_OPEN:
            self._channels[frame.channel] = _Channel()
        elif method == Method.CONFIRM_SELECT:
            channel.confirming = True
        elif method == Method.PUBLISH:
            channel.expects_publish, channel.exchange = True, frame.exchange
            trap = self._amqp.cut_inside
            if trap is not None and trap.concerns(channel.exchange) and trap.bite():
                channel.cut_at = self._amqp.dice.choice((METHOD, HEADER, BODY))
                if channel.cut_at == METHOD:
                    self.doomed = "let the server read"
        return frame.data

    def _note_published(self, frame: Frame, channel: _Channel) -> None:
        channel.expects_publish = False
        message_id = frame.message_id
        if channel.cut_at is None and message_id is not None:
            self._amqp.published[message_id] = self._amqp.published.get(message_id, 0) + 1
        if channel.confirming:
            channel.published += 1
            channel.outstanding[channel.published] = _Sent(message_id, channel.exchange)

    def _broker_frame(self, frame: Frame) -> Bytes:
        channel = self._channel(frame.channel)
        if frame.kind == HEADER and channel.expects_return:
            channel.expects_return = False
            if (message_id := frame.message_id) is not None:
                self._amqp.returned[message_id] += 1
        if frame.kind == HEADER and channel.expects_deliver is not None:
            self._note_delivered(frame.message_id, again=channel.expects_deliver)
            channel.expects_deliver = None
        if frame.kind != METHOD:
            return frame.data
        method = frame.method
        if (name := _FROM_BROKER.get(method)) is not None:
            self._amqp.seen[name] += 1
        if method == Method.RETURN:
            channel.expects_return = True
        elif method == Method.DELIVER:
            channel.expects_deliver = frame.redelivered if self._amqp.watches else None
        elif method == Method.ACK:
            return self._ack(frame, channel)
        elif method == Method.NACK:
            return self._dropped(frame, self._answered(channel, *frame.tag))
        return frame.data

    def _note_delivered(self, message_id: str | None, *, again: bool) -> None:
        if message_id is not None:
            for watch in self._amqp.watches:
                (watch.again if again else watch.first)[message_id] += 1

    def _ack(self, frame: Frame, channel: _Channel) -> Bytes:
        tag, multiple = frame.tag
        first = next(iter(channel.outstanding), tag)
        answered = self._answered(channel, tag, multiple)
        self._amqp.confirmed.update(sent.message_id for sent in answered.values() if sent.message_id is not None)
        trap = self._amqp.cut_at_ack
        if trap is not None and trap.concerned(answered) and trap.bite():
            self.doomed = "reset"
            return b""
        if self._amqp.dropping is None and (nacking := self._amqp.nacking) is not None and answered:
            if not nacking.multiple:
                return self._nacked_singly(nacking, frame, answered)
            if first in answered and self._amqp.dice.random() < nacking.share:
                nacking.count += len(nacking.concerned(answered))
                return nack(frame.channel, tag or max(answered), multiple=True)
        return self._dropped(frame, answered)

    def _nacked_singly(self, nacking: Nacking, frame: Frame, answered: dict[int, _Sent]) -> Bytes:
        """Some of the messages of an ack are nacked one by one, and one ack stands for the others, as before."""
        refused = [tag for tag in nacking.concerned(answered) if self._amqp.dice.random() < nacking.share]
        nacking.count += len(refused)
        if not refused:
            return frame.data
        taken = sorted(set(answered) - set(refused))
        parts = [nack(frame.channel, tag) for tag in refused]
        if taken:  # by a tag that is still unanswered: aiormq ignores a multiple ack whose own tag it does not know
            parts.append(ack(frame.channel, taken[-1], multiple=frame.tag[1]))
        return joined(parts)

    def _dropped(self, frame: Frame, answered: dict[int, _Sent]) -> Bytes:
        if self._amqp.dropping is None:
            return frame.data
        self._amqp.dropping.count += bool(self._amqp.dropping.concerned(answered))
        return b""

    def _answered(self, channel: _Channel, tag: int, multiple: bool) -> dict[int, _Sent]:
        """What the broker has answered for with this tag; 0 stands for all."""
        if not multiple:
            return {tag: channel.outstanding.pop(tag)} if tag in channel.outstanding else {}
        tags = [t for t in channel.outstanding if t <= tag or tag == 0]
        return {t: channel.outstanding.pop(t) for t in tags}

    def _channel(self, number: int) -> _Channel:
        channel = self._channels.get(number)
        if channel is None:
            channel = self._channels[number] = _Channel()
        return channel
