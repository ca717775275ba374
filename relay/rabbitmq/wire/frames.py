"""The stream from RabbitMQ, split: frames of a registered channel's messages and confirms go to its sink, all others on.

Pure: bytes in, bytes out. It must see a connection's stream from its first byte; sinks may come and go at any time.
Whatever arrives, `Splitter.feed` raises nothing but FrameError, and what a sink raises.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

MAX_FRAME_BYTES = 1024 * 1024
"""Largest payload of a frame that is believed, beyond the frame_max that the broker has announced. Not frame_max alone: a quorum
queue exceeds that itself when it delivers a message again whose header frame was as large as allowed, since it adds
x-delivery-count (FASTLANE 1.3). And not this alone: a broker may be configured to send larger frames, or without a limit."""

_LARGEST_BODY_BYTES = 512 * 1024 * 1024
"""RabbitMQ's largest max_message_size: where frame_max is 0, which means no limit, such a body comes in one frame."""

Content = tuple[bytes, bytes, bytes | None]
"""A message from the broker: (payload of its basic.deliver or basic.return, its property block as on the wire, body). The body is
None when it was larger than the sink's `max_body`: then it was received and thrown away."""

_METHOD, _HEADER, _BODY = 1, 2, 3
_HEAD = 7  # bytes before a frame's payload: type, channel, size
_END = 0xCE
_ENVELOPE = 8  # all that is around a payload
_HEADER_FIXED = 12  # of a header's payload: class, weight, size of the body; the property block follows
_HEADER_LEAST = _HEADER_FIXED + 2
_CONFIRM_LEAST = 13  # of a confirm's payload: class, method, tag, flags

_DELIVER = b"\x00\x3c\x00\x3c"  # class and method, as they stand at the front of a method's payload
_RETURN = b"\x00\x3c\x00\x32"
_GET_OK = b"\x00\x3c\x00\x47"
_BEGINS_A_MESSAGE = (_DELIVER, _RETURN, _GET_OK)
_ACK = b"\x00\x3c\x00\x50"
_NACK = b"\x00\x3c\x00\x78"
_CHANNEL_CLOSE = b"\x00\x14\x00\x28"
_CHANNEL_CLOSE_OK = b"\x00\x14\x00\x29"
_TUNE = b"\x00\x0a\x00\x1e"
_TUNE_LEAST = 10  # of its payload: class, method, channel_max, frame_max
_BLOCKED = b"\x00\x0a\x00\x3c"
_UNBLOCKED = b"\x00\x0a\x00\x3d"

_head = struct.Struct(">BHI").unpack_from
_u64 = struct.Struct(">Q").unpack_from
_u32 = struct.Struct(">I").unpack_from


class FrameError(Exception):
    """The stream is broken, or its frames come in an order that AMQP does not allow: nothing after it can be trusted."""


class Sink:
    """Where the messages and confirms of one channel go. What has no callback is passed on to whoever reads the rest.

    `on_delivery(content)` and `on_return(content)` get a whole message, `on_confirm(tag, multiple, acked)` a basic.ack or
    basic.nack. They are called in the order of the stream and must not wait; what they raise leaves `Splitter.feed`.
    """

    __slots__ = (
        "_got",
        "_method",
        "_parts",
        "_passing",
        "_properties",
        "_size",
        "_take",
        "max_body",
        "on_confirm",
        "on_delivery",
        "on_return",
    )

    def __init__(
        self,
        on_delivery: Callable[[Content], object] | None = None,
        on_confirm: Callable[[int, bool, bool], object] | None = None,
        on_return: Callable[[Content], object] | None = None,
        *,
        max_body: int,
    ) -> None:
        self.on_delivery = on_delivery
        self.on_confirm = on_confirm
        self.on_return = on_return
        self.max_body = max_body
        self._take: Callable[[Content], object] | None = None  # who gets the message that is being received
        self._method = b""
        self._properties: bytes | None = None  # None: its header has not come yet
        self._parts: list[bytes] | None = None  # None: too large, thrown away
        self._size = 0
        self._got = 0
        self._passing: int | None = None  # a message that is passed on: bytes still to come, -1 before its header

    def starts(self, method: bytes) -> Callable[[Content], object] | None:
        """Who gets the message that this method begins; None if it begins none for this sink. Raises FrameError."""
        kind = method[:4]
        if kind == _DELIVER:
            take = self.on_delivery
        elif kind == _RETURN:
            take = self.on_return
        else:
            return None
        if self._take is not None or self._passing is not None:
            raise FrameError("a message in the middle of a message")
        return take

    def begin(self, method: bytes, take: Callable[[Content], object]) -> bool:
        """The message comes frame by frame from here on. True: the method is taken."""
        self._method, self._take = method, take
        return True

    def method(self, kind: bytes, method: bytes) -> bool:
        """Any other method; True if it is taken, False if it is to be passed on. Raises FrameError."""
        if kind in (_ACK, _NACK):
            return self._confirm(method, acked=kind == _ACK)
        if self._take is not None or self._passing is not None:
            raise FrameError("a method in the middle of a message")
        if kind in _BEGINS_A_MESSAGE:
            self._passing = -1
        return False

    def content(self, kind: int, payload: bytes) -> bool:
        """A header or body frame; True if it is taken, False if it is to be passed on. Raises FrameError."""
        if kind == _HEADER:
            if len(payload) < _HEADER_LEAST:
                raise FrameError("a header frame without properties")
            return self._header(_u64(payload, 4)[0], payload)
        if kind == _BODY:
            return self._body(payload)
        raise FrameError(f"a frame of type {kind} on a channel")

    def _header(self, size: int, payload: bytes) -> bool:
        if self._passing is not None:
            if self._passing >= 0:
                raise FrameError("two headers of one message")
            self._passing = size or None
            return False
        if self._take is None or self._properties is not None:
            raise FrameError("a header without its message")
        self._properties = payload[_HEADER_FIXED:]
        self._size, self._got = size, 0
        self._parts = [] if size <= self.max_body else None
        if not size:
            self._end(self._properties, b"")
        return True

    def _body(self, payload: bytes) -> bool:
        if self._passing is not None:
            if len(payload) > self._passing:
                raise FrameError("a body without its header, or longer than announced")
            self._passing = self._passing - len(payload) or None
            return False
        if self._properties is None:
            raise FrameError("a body without its header")
        self._got += len(payload)
        if self._got > self._size:
            raise FrameError("a body longer than announced")
        if self._parts is not None:
            self._parts.append(payload)
        if self._got == self._size:
            self._end(self._properties, None if self._parts is None else b"".join(self._parts))
        return True

    def _end(self, properties: bytes, body: bytes | None) -> None:
        take = self._take
        self._take = self._properties = self._parts = None
        if take is not None:
            take((self._method, properties, body))

    def _confirm(self, payload: bytes, *, acked: bool) -> bool:
        if self.on_confirm is None:
            return False
        if len(payload) < _CONFIRM_LEAST:
            raise FrameError("a confirm without its tag")
        self.on_confirm(_u64(payload, 4)[0], payload[12] & 1 == 1, acked)
        return True


class Splitter:
    """One connection's stream. `blocked` is what RabbitMQ said last about an alarm (connection.blocked, unblocked)."""

    __slots__ = ("_have", "_limit", "_need", "_parts", "_sinks", "blocked", "on_blocked")

    def __init__(self, on_blocked: Callable[[bool], object] | None = None) -> None:
        self.on_blocked = on_blocked
        self.blocked = False
        self._limit = MAX_FRAME_BYTES  # until the broker says what its frames may carry
        self._sinks: dict[int, Sink] = {}
        self._parts: list[bytes] = []  # of a frame that has not arrived as a whole
        self._have = 0
        self._need = 0

    def register(self, channel: int, sink: Sink) -> None:
        """Send this channel's messages to the sink, until the channel is closed: its number may be given out again."""
        self._sinks[channel] = sink

    def feed(self, data: bytes) -> bytes:
        """Take what has arrived; return what is for somebody else: whole frames, in their order.

        Once it has raised it must not be called again.
        """
        if self._have:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return b""
            data = b"".join(self._parts)
            self._parts.clear()
            self._have = 0
        return self._split(data)

    def _split(self, data: bytes) -> bytes:
        """Written out in one loop: it runs for each frame, and a call costs as much as the rest of it."""
        size = len(data)
        start = kept = 0  # data[kept:start] is for somebody else, and not in `others` yet
        others: list[bytes] = []
        sinks, limit = self._sinks, self._limit
        while True:
            if size - start < _HEAD:
                self._need = _HEAD
                break
            kind, channel, length = _head(data, start)
            if length > limit:
                raise FrameError(f"a frame of {length} bytes")
            end = start + _ENVELOPE + length
            if end > size:
                self._need = _ENVELOPE + length
                break
            if data[end - 1] != _END:
                raise FrameError("a frame without its end")
            if channel in sinks:
                sink = sinks[channel]
                if kind == _METHOD:
                    method = data[start + _HEAD : end - 1]
                    if (take := sink.starts(method)) is None:
                        taken = self._method(channel, sink, method)
                    elif (rest := _message_at(data, end, channel, sink.max_body)) is None:
                        taken = sink.begin(method, take)
                    else:
                        taken = True
                        end, properties, body = rest
                        take((method, properties, body))
                else:
                    taken = sink.content(kind, data[start + _HEAD : end - 1])
                if taken:
                    if kept < start:
                        others.append(data[kept:start])
                    kept = end
            elif not channel and kind == _METHOD:
                self._notice(data[start + _HEAD : end - 1])
                limit = self._limit
            start = end
        if kept < start:
            others.append(data[kept:start])
        if start < size:
            self._parts.append(data[start:])
            self._have = size - start
        return b"".join(others)

    def _method(self, channel: int, sink: Sink, method: bytes) -> bool:
        """A method that begins no message for the sink; True if it was taken."""
        kind = method[:4]
        if kind in (_CHANNEL_CLOSE, _CHANNEL_CLOSE_OK):
            del self._sinks[channel]
            return False
        return sink.method(kind, method)

    def _notice(self, method: bytes) -> None:
        kind = method[:4]
        if kind == _TUNE and len(method) >= _TUNE_LEAST:  # aiormq accepts whatever the broker offers
            (frame_max,) = _u32(method, 6)
            self._limit = MAX_FRAME_BYTES + min(frame_max or _LARGEST_BODY_BYTES, _LARGEST_BODY_BYTES)
        elif kind in (_BLOCKED, _UNBLOCKED):
            self.blocked = kind == _BLOCKED
            if self.on_blocked is not None:
                self.on_blocked(self.blocked)


def _message_at(data: bytes, start: int, channel: int, max_body: int) -> tuple[int, bytes, bytes] | None:
    """The rest of a message whose method ends at `start`: (where it ends, properties, body).

    None if it is not there as a whole in the usual form, one header frame and one body frame; then frame by frame will tell.
    """
    size = len(data)
    if size - start < _HEAD + _HEADER_FIXED:
        return None
    kind, number, length = _head(data, start)
    end = start + _ENVELOPE + length
    if kind != _HEADER or number != channel or not _HEADER_LEAST <= length <= MAX_FRAME_BYTES or end > size:
        return None
    properties = data[start + _HEAD + _HEADER_FIXED : end - 1]
    (length,) = _u64(data, start + _HEAD + 4)
    if not length:
        return (end, properties, b"") if data[end - 1] == _END else None
    body_end = end + _ENVELOPE + length
    if (
        body_end > size
        or length > max_body
        or _head(data, end) != (_BODY, channel, length)
        or length > MAX_FRAME_BYTES
        or data[end - 1] != _END
        or data[body_end - 1] != _END
    ):
        return None
    return body_end, properties, data[end + _HEAD : body_end - 1]
