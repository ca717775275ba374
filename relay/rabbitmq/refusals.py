"""Which messages are refused before they are sent. Pure.

The same for every publisher: what one refuses, the other refuses, for the same reason.
"""

from __future__ import annotations

from datetime import UTC, datetime

from relay.message import MAX_BODY_BYTES, Message
from relay.rabbitmq.contract import Refused

HEADER_BYTES = 131072 - 8 - 8192 - 1024
"""Largest headers: frame_max less its envelope, less what a quorum queue adds on redelivery (FASTLANE 1.3), less the other
properties. Larger ones close the connection, so they are refused before they are sent."""

HEADER_NAME_BYTES = 128
"""Longest name of a header in AMQP 0-9-1: pamqp cuts a longer one, with a line in its log."""

TEXT_BYTES = 255
"""Longest routing key, and longest text property: AMQP's short string has one byte for its length."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
"""AMQP's timestamps are whole seconds since then."""

DAYS = 253402300800 // 86400
"""From then to the year 10000, which no client library can decode: it would close the connection of whoever receives it."""


def unsendable(message: Message) -> Refused | None:
    """What must be refused before it is sent: the broker would close the connection over it, or AMQP has no form for it.

    Complete, also for what pamqp would quietly change: the name of a header that it cuts, a float that it rounds.
    """
    if len(message.body) > MAX_BODY_BYTES:
        return Refused("too_large", f"the body is {len(message.body)} bytes, the limit is {MAX_BODY_BYTES}")
    try:
        key = len(message.routing_key.encode())
        size = sum(len(k.encode()) + _value_bytes(v) + 16 for k, v in message.headers.items())
        texts = [
            len(t.encode()) for t in (message.message_id, message.event_type, message.source, message.content_type)
        ]
    except UnicodeEncodeError as exc:
        return Refused("unencodable", f"not valid Unicode: {exc.reason}")
    if key > TEXT_BYTES or max(texts) > TEXT_BYTES:
        return Refused("unencodable", f"the routing key or a property is longer than 255 bytes (routing key: {key})")
    if size > HEADER_BYTES:
        return Refused("too_large", f"the headers are about {size} bytes, the limit is {HEADER_BYTES}")
    if (detail := _unsendable_time(message.occurred_at)) is not None:
        return Refused("unencodable", detail)
    for name, value in message.headers.items():
        if (detail := _unsendable_header(name, value)) is not None:
            return Refused("unencodable", detail)
    return None


def _value_bytes(value: object) -> int:
    """About as much as the value needs. The digits of a whole number are not counted: Python refuses to write down very many."""
    return len(value.encode()) if isinstance(value, str) else 20


def _unsendable_time(at: datetime) -> str | None:
    if at.utcoffset() is None:
        return "a time without a zone has no AMQP timestamp"
    if at < EPOCH:
        return "a time before 1970 has no AMQP timestamp"
    if (at - EPOCH).days >= DAYS:
        return "a time after the year 9999 has an AMQP timestamp that nobody can read"
    return None


def _unsendable_header(name: str, value: object) -> str | None:
    if len(name.encode()) > HEADER_NAME_BYTES:
        return f"a header's name is longer than {HEADER_NAME_BYTES} bytes: {name[:40]!r}"
    if not isinstance(value, str | int):  # bool is an int
        return f"the header {name[:40]!r} is a {type(value).__name__}: only texts, whole numbers and booleans keep their value"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"the header {name[:40]!r} does not fit into 64 bits"
    return None
