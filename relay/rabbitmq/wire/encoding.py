"""The frames of a message, as they go to RabbitMQ: basic.publish, content header, body. Pure.

Always mandatory and persistent. What seldom changes (routing keys, types, names of headers, the second) is encoded once and remembered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import NamedTuple, TypeVar

from relay.message import AGGREGATE_ID, AGGREGATE_TYPE, CONTENT_DIGEST, MAX_BODY_BYTES, SEQUENCE, Header, Message
from relay.rabbitmq.contract import Refused
from relay.rabbitmq.refusals import DAYS, EPOCH, HEADER_NAME_BYTES, TEXT_BYTES, unsendable

K = TypeVar("K")
V = TypeVar("V")

_REMEMBERED = 1024
"""Entries of each memory; then it starts anew. Routing keys may be as many as there are aggregates."""

_SURELY_ALLOWED = 12_000
"""Bytes of encoded headers that are within `refusals.HEADER_BYTES` whatever they are. It counts at most 33 bytes more for a header
than are sent, which are four at least: 12 000 may count as 111 000."""

_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
_BASIC = 60
_PUBLISH = b"\x00\x3c\x00\x28\x00\x00"  # class and method, and two bytes that are reserved
_MANDATORY = b"\x01"

# Flags of the properties that are present, and in this order they follow. A text that is empty is left out, as pamqp does.
_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE, _MESSAGE_ID = 1 << 15, 1 << 13, 1 << 12, 1 << 7
_TIMESTAMP, _TYPE, _APP_ID = 1 << 6, 1 << 5, 1 << 3
_PERSISTENT = b"\x02"

_frame = struct.Struct(">BHI").pack  # type, channel, bytes of payload
_header = struct.Struct(">BHIHHQH").pack  # the same; class, weight, bytes of body, flags
_body = struct.Struct(">cBHI").pack  # the end of the frame before; type, channel, bytes of payload
_i64 = struct.Struct(">q").pack
_u64 = struct.Struct(">Q").pack
_u32 = struct.Struct(">I").pack

_U8 = [bytes((n,)) for n in range(TEXT_BYTES + 1)]  # IndexError for the length of a text that is too long
_PERSISTENT_AND_LENGTH = [
    _PERSISTENT,
    *(_PERSISTENT + octet for octet in _U8[1:]),
]  # of the message id, if there is one
_OURS = (CONTENT_DIGEST, AGGREGATE_TYPE, AGGREGATE_ID, SEQUENCE)
"""The headers of an event whose producer gave none, in the order of `relay.message.to_message`."""

_FIXED = 12 + 2 + 4 + 8
"""Bytes of a header's payload that are always there: class to size of the body, flags, length of the headers, timestamp."""


class Unencodable(Exception):
    """The message must not be sent; `refused` says why, in the same words as the stock publisher does."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.detail)
        self.refused = refused


class _Memory(dict[K, V]):
    """What `make` made of a key, remembered; bounded. Raises what `make` raises."""

    def __init__(self, make: Callable[[K], V]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> V:
        if len(self) >= _REMEMBERED:
            self.clear()
        made = self[key] = self._make(key)
        return made


class _Kind(NamedTuple):
    """What messages with the same content type, event type and source have in common."""

    flags: int  # without the message id's
    content_type: bytes
    tail: bytes  # what follows the timestamp: type and app_id
    size: int  # of a header's payload, without headers, delivery mode and message id


class Encoder:
    """Encodes the messages that one channel publishes to one exchange."""

    def __init__(self, *, channel: int, exchange: str, max_payload: int) -> None:
        """`max_payload`: bytes that a frame may carry, the negotiated frame_max less its envelope.

        Raises LookupError for an exchange whose name is longer than 255 bytes.
        """
        self._channel = channel
        self._max_payload = max_payload
        self._exchange = _short(exchange)
        self._methods: _Memory[str, bytes] = _Memory(self._method)
        self._kinds: _Memory[tuple[str, str, str], _Kind] = _Memory(_kind)
        self._texts: _Memory[str, bytes] = _Memory(lambda name: _name(name) + b"S")
        self._numbers: _Memory[str, bytes] = _Memory(lambda name: _name(name) + b"l")
        self._lengths: _Memory[int, bytes] = _Memory(_u32)
        self._aggregate_types: _Memory[str, bytes] = _Memory(_aggregate_type)
        self._times: _Memory[datetime, bytes] = _Memory(_time)

    def encode(self, message: Message) -> bytes:
        """All frames of a message. Raises Unencodable for exactly those messages that `refusals.unsendable` refuses.

        Written out nearly in one piece: it runs for each message, and a call costs as much as a header does. It has no rules
        of its own: what does not fit into its place raises, and what fits but may be too much is asked about.
        """
        message_id, event_type, source, content_type, occurred_at, routing_key, given, body = message
        try:
            headers = self._ours(given) if (*given,) == _OURS else self._fields(given)
            if len(headers) > _SURELY_ALLOWED or len(body) > MAX_BODY_BYTES:
                _ask_about(message)
            flags, before_headers, tail, size = self._kinds[content_type, event_type, source]
            own_id = message_id.encode()
            before_id = _PERSISTENT_AND_LENGTH[len(own_id)]
            if own_id:
                flags |= _MESSAGE_ID
            size += len(headers) + len(before_id) + len(own_id)
            if 0 < len(body) <= self._max_payload:
                before_body = _body(_END, _BODY, self._channel, len(body))
                content = body
            else:
                before_body, content = b"", self._split(body)
            return b"".join(
                (
                    self._methods[routing_key],
                    _header(_HEADER, self._channel, size, _BASIC, 0, len(body), flags),
                    before_headers,
                    _u32(len(headers)),
                    headers,
                    before_id,
                    own_id,
                    self._times[occurred_at],
                    tail,
                    before_body,
                    content,
                    _END,
                )
            )
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as exc:
            told = Refused("unencodable", f"{type(exc).__name__}: {exc}"[:300])
            raise Unencodable(unsendable(message) or told) from exc

    def _ours(self, given: Mapping[str, Header]) -> bytes:
        """What `_fields` makes of our own headers, in half of the time: nearly all events have these and no others."""
        digest, aggregate_type, aggregate_id, seq = given.values()
        if not (type(digest) is type(aggregate_type) is type(aggregate_id) is str and type(seq) is int):
            return self._fields(given)
        told, name = digest.encode(), aggregate_id.encode()
        return b"".join(
            (
                _DIGEST,
                self._lengths[len(told)],
                told,
                self._aggregate_types[aggregate_type],
                self._lengths[len(name)],
                name,
                _SEQUENCE,
                _i64(seq),
            )
        )

    def _fields(self, given: Mapping[str, Header]) -> bytes:
        """Any headers."""
        fields: list[bytes] = []
        add, texts, numbers, lengths = fields.append, self._texts, self._numbers, self._lengths
        for name, value in given.items():
            if isinstance(value, str):
                text = value.encode()
                add(texts[name])
                add(lengths[len(text)])
                add(text)
            elif type(value) is int:
                add(numbers[name])
                add(_i64(value))
            else:
                add(_odd_field(name, value))
        return b"".join(fields)

    def _split(self, body: bytes) -> bytes:
        """The body in as many frames as it needs, none for an empty one; the end of the last one is still to come."""
        whole = memoryview(body)  # so that its pieces are not copied
        frames: list[bytes | memoryview] = []
        for start in range(0, len(body), self._max_payload):
            piece = whole[start : start + self._max_payload]
            frames += (_body(_END, _BODY, self._channel, len(piece)), piece)
        return b"".join(frames)

    def _method(self, routing_key: str) -> bytes:
        payload = _PUBLISH + self._exchange + _short(routing_key) + _MANDATORY
        return _frame(_METHOD, self._channel, len(payload)) + payload + _END


def _kind(of: tuple[str, str, str]) -> _Kind:
    content_type, event_type, source = map(_optional, of)
    flags = _HEADERS | _DELIVERY_MODE | _TIMESTAMP
    for text, flag in ((content_type, _CONTENT_TYPE), (event_type, _TYPE), (source, _APP_ID)):
        if text:
            flags |= flag
    return _Kind(flags, content_type, event_type + source, _FIXED + len(content_type + event_type + source))


def _time(moment: datetime) -> bytes:
    """Whole seconds since 1970. Raises TypeError for a time without a zone, ValueError for one that has no AMQP timestamp."""
    since = moment - EPOCH
    if not 0 <= since.days < DAYS:
        raise ValueError("a time that has no AMQP timestamp")
    return _u64(since.days * 86400 + since.seconds)


def _odd_field(name: str, value: object) -> bytes:
    """A header that is neither a text nor a plain whole number. Raises TypeError for what AMQP would not keep as it is."""
    if isinstance(value, bool):
        return _name(name) + (b"t\x01" if value else b"t\x00")
    if isinstance(value, int):
        return _name(name) + b"l" + _i64(value)
    raise TypeError(f"a header that is a {type(value).__name__}")


def _ask_about(message: Message) -> None:
    """Raise ValueError if the message must be refused: it may be too much, or not."""
    if (refused := unsendable(message)) is not None:
        raise ValueError(refused.detail)


def _name(name: str) -> bytes:
    octets = name.encode()
    if len(octets) > HEADER_NAME_BYTES:
        raise ValueError("a header's name that is too long")
    return _U8[len(octets)] + octets


def _aggregate_type(text: str) -> bytes:
    """Its header, and what comes before the aggregate id."""
    octets = text.encode()
    return _name(AGGREGATE_TYPE) + b"S" + _u32(len(octets)) + octets + _name(AGGREGATE_ID) + b"S"


def _optional(text: str) -> bytes:
    return _short(text) if text else b""


def _short(text: str) -> bytes:
    """AMQP's short string. Raises IndexError if it is longer than 255 bytes, UnicodeEncodeError if it is not valid Unicode."""
    octets = text.encode()
    return _U8[len(octets)] + octets


_DIGEST = _name(CONTENT_DIGEST) + b"S"
_SEQUENCE = _name(SEQUENCE) + b"l"
