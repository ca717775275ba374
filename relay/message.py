"""The event and its wire contract, in both directions. Pure: no clock, no I/O.

A committed outbox row (`Row`) becomes a `Message`, what any AMQP 0-9-1 client sees; a `Delivery` from the broker
becomes an `Event`, what a handler sees, or is refused as `NotAnEvent` with the reason.

The contract, stable (README, "Wire contract"): properties `message_id`, `type` = event type, `app_id` = source,
`timestamp` (s), `content_type`, `delivery_mode` 2; headers `x-aggregate-type`, `x-aggregate-id`, `x-sequence` (int64),
`x-content-digest`, and the row's own headers (`traceparent` among them).
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Header = str | int | bool

AGGREGATE_TYPE = "x-aggregate-type"
AGGREGATE_ID = "x-aggregate-id"
SEQUENCE = "x-sequence"
CONTENT_DIGEST = "x-content-digest"
OWN_HEADERS = frozenset((AGGREGATE_TYPE, AGGREGATE_ID, SEQUENCE, CONTENT_DIGEST))

_BROKERS_HEADERS = re.compile(r"x-(delivery-count|acquired-count|death|(first|last)-death-.*)")
"""What RabbitMQ adds when it delivers a message again, or dead-letters it."""

TOMBSTONE = "relay.tombstone"
"""Type of the message that takes the place of a skipped or purged event: same sequence number, no body."""

TOMBSTONE_CONTENT_TYPE = "application/octet-stream"

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Largest payload or body: the rule `outbox_size_is_at_most_16_mib` of relay.outbox; RabbitMQ 4's own default is the same."""

MAX_SEQUENCE = 2**63 - 1

_new = tuple.__new__
_NAMESPACE = hashlib.sha1(uuid.UUID("5a3c6f0e-64a8-5d5e-9b0c-3b1a7d1e2f40").bytes, usedforsecurity=False)
"""Hashed so far: every id goes on from a copy, which costs less than to begin anew."""
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
"""The hexadecimal digit that holds the variant of a UUID (RFC 4122), by what the hash had there."""

_DIGEST_PREFIX = "sha256:"


class Row(NamedTuple):
    """A committed row of relay.outbox, as the reader hands it on: the columns of its queries, in this order.

    A named tuple, as `Message` is: one of each is made for every event, and a frozen dataclass costs three times as much.
    """

    id: int  # relay.outbox.id; within one aggregate, order of id = order of seq
    aggregate_type: str | None
    aggregate_id: str | None  # None: an event without order
    seq: int | None  # 1, 2, 3 ... without a hole; None exactly when aggregate_id is
    event_type: str
    content_type: str  # never empty: a default stands for what the producer left out
    headers: Mapping[str, Header]  # shared between rows that have the same: never changed
    routing_key: str | None  # the row's own; None: by the template
    created_at: datetime  # to the second at least: a message says no more
    body: bytes
    is_tombstone: bool = False  # an operator skipped or purged it: its number is published, its content is not

    @property
    def aggregate(self) -> Aggregate | None:
        """The key that order is kept for; None for an event without order."""
        if self.aggregate_type is None or self.aggregate_id is None:
            return None
        return (self.aggregate_type, self.aggregate_id)


Aggregate = tuple[str, str]
"""(aggregate type, aggregate id)."""


class Message(NamedTuple):
    """One AMQP message to publish: persistent and mandatory, always."""

    message_id: str
    event_type: str
    source: str
    content_type: str
    occurred_at: datetime
    routing_key: str
    headers: Mapping[str, Header]
    body: bytes


class Delivery(NamedTuple):
    """One message as the broker delivered it, not yet believed in anything."""

    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    message_id: str | None
    event_type: str | None
    source: str | None
    content_type: str | None
    occurred_at: datetime | None
    headers: Mapping[str, Any]
    body: bytes
    others: Mapping[str, Any] = MappingProxyType({})  # properties of no meaning to us: kept in the quarantine
    fault: str | None = (
        None  # why its properties cannot be read: then it has none, `others` their bytes, and it is no event
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event as a handler sees it."""

    source: str
    aggregate_type: str | None
    aggregate_id: str | None
    seq: int | None
    event_type: str
    message_id: str
    content_type: str
    headers: Mapping[str, Header] = field(default_factory=dict)  # the producer's own; ours are the fields
    occurred_at: datetime | None = None  # when the producer inserted it, to the second
    body: bytes = b""
    digest: bytes = b""  # SHA-256, see content_digest

    @property
    def aggregate(self) -> Aggregate | None:
        """The key that order is kept for, within the source; None for an event without order."""
        if self.aggregate_type is None or self.aggregate_id is None:
            return None
        return (self.aggregate_type, self.aggregate_id)

    @property
    def is_tombstone(self) -> bool:
        """True when the event was skipped or purged by an operator: it only takes its place in the sequence."""
        return self.event_type == TOMBSTONE

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is not."""
        return json.loads(self.body)


class NotAnEvent(ValueError):
    """A delivery that does not keep the wire contract. `reason` is `foreign` (none of our headers) or `malformed`."""

    def __init__(self, reason: Literal["foreign", "malformed"], detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def content_digest(event_type: str, content_type: str, body: bytes) -> bytes:
    """SHA-256 over type, NUL, content type, NUL, body: what must be equal when a sequence number is seen twice."""
    h = _hashed(event_type, content_type).copy()
    h.update(body)
    return h.digest()


@lru_cache(maxsize=1000)
def _hashed(event_type: str, content_type: str) -> hashlib._Hash:
    """What comes before the body. Remembered, to go on from a copy: a stream has few types."""
    return hashlib.sha256(b"%b\0%b\0" % (event_type.encode(), content_type.encode()))


def message_id(row: Row, source: str, digest: bytes) -> str:
    """The id of a row's message: the same after a crash, a replay, a restore.

    With an aggregate it names the place in the sequence. Without one only the row's own id is left, which a lossy
    fail-over of PostgreSQL can give out again, so the content goes in as well.
    """
    if row.seq is None:
        return _uuid5(f"{source}//{row.id}/{digest.hex()}")
    return _uuid5(f"{source}/{row.aggregate_type}/{row.aggregate_id}/{row.seq}")


def _uuid5(name: str) -> str:
    """str(uuid.uuid5(our namespace, name)), in a fifth of the time."""
    sha1 = _NAMESPACE.copy()
    sha1.update(name.encode())
    h = sha1.hexdigest()
    return f"{h[:8]}-{h[8:12]}-5{h[13:16]}-{_VARIANT[h[16]]}{h[17:20]}-{h[20:32]}"


def to_message(row: Row, *, source: str, routing_key: str) -> Message:
    """The message of a row. Total: whatever PostgreSQL accepted as a row has a message.

    A tombstone goes where the event would have gone, under the same message id, without anything of its content.
    """
    if row.is_tombstone:
        row = row._replace(event_type=TOMBSTONE, content_type=TOMBSTONE_CONTENT_TYPE, headers={}, body=b"")
    _, aggregate_type, aggregate_id, seq, event_type, content_type, own, _, created_at, body, _ = row
    digest = content_digest(event_type, content_type, body)
    told = _DIGEST_PREFIX + digest.hex()
    headers: dict[str, Header]
    if own or aggregate_type is None or aggregate_id is None or seq is None:
        headers = {**own, CONTENT_DIGEST: told}
        if aggregate_type is not None:
            headers[AGGREGATE_TYPE] = aggregate_type
        if aggregate_id is not None and seq is not None:
            headers[AGGREGATE_ID] = aggregate_id
            headers[SEQUENCE] = seq
    else:  # the usual event, at once
        headers = {CONTENT_DIGEST: told, AGGREGATE_TYPE: aggregate_type, AGGREGATE_ID: aggregate_id, SEQUENCE: seq}
    return _new(
        Message,
        (message_id(row, source, digest), event_type, source, content_type, created_at, routing_key, headers, body),
    )


def to_event(delivery: Delivery) -> Event:
    """The event of a delivery. Raises NotAnEvent when the delivery does not keep the wire contract, and nothing else."""
    _, _, _, _, message_id, event_type, source, content_type, occurred_at, headers, body, _, fault = delivery
    if CONTENT_DIGEST not in headers and SEQUENCE not in headers:
        if fault is not None:
            raise NotAnEvent("malformed", fault)
        raise NotAnEvent("foreign", f"no {CONTENT_DIGEST} header: not published by a relay")
    event_type, content_type, hashed = _typed(event_type, content_type)
    h = hashed.copy()
    h.update(body)
    digest = h.digest()
    claimed = headers.get(CONTENT_DIGEST)
    if claimed != _DIGEST_PREFIX + digest.hex() and digest != _digest(claimed):
        raise NotAnEvent("malformed", f"{CONTENT_DIGEST} does not match the content")
    aggregate_type, aggregate_id, seq = _place(headers)
    made: Any = _Draft()
    made.source = _name("app_id", source)
    made.aggregate_type = aggregate_type
    made.aggregate_id = aggregate_id
    made.seq = seq
    made.event_type = event_type
    made.message_id = _text("message_id", message_id, 255)
    made.content_type = content_type
    # Then all of them are ours:
    made.headers = {} if seq is not None and len(headers) == len(OWN_HEADERS) else _producers(headers)
    made.occurred_at = occurred_at
    made.body = body
    made.digest = digest
    made.__class__ = Event
    event: Event = made
    return event


class _Draft:
    """An Event that is being made: the same slots, open. The constructor of a frozen value costs five times as much."""

    __slots__ = tuple(each.name for each in fields(Event))


@lru_cache(maxsize=1000)
def _typed(event_type: str | None, content_type: str | None) -> tuple[str, str, hashlib._Hash]:
    """(event type, content type, what `content_digest` hashes of them). What is refused is not remembered."""
    checked = _name("type", event_type)
    told = _name("content_type", content_type) if content_type else ""
    return checked, told, _hashed(checked, told)


def _producers(headers: Mapping[str, Any]) -> dict[str, Header]:
    """What is left of the headers of an event without ours and the broker's."""
    rest = {**headers}
    rest.pop(CONTENT_DIGEST, None)
    rest.pop(AGGREGATE_TYPE, None)
    rest.pop(AGGREGATE_ID, None)
    rest.pop(SEQUENCE, None)
    for name, value in rest.items():
        if not _is_producers(name, value):
            return {name: value for name, value in rest.items() if _is_producers(name, value)}
    return rest


def _is_producers(name: str, value: object) -> bool:
    """Whether a header that is not ours is the producer's own."""
    return isinstance(value, str | int) and not (name.startswith("x-") and _BROKERS_HEADERS.fullmatch(name))


def _place(headers: Mapping[str, Any]) -> tuple[str | None, str | None, int | None]:
    aggregate_type = headers.get(AGGREGATE_TYPE)
    if aggregate_type is not None:
        aggregate_type = _text(AGGREGATE_TYPE, aggregate_type, 100)
    if AGGREGATE_ID not in headers and SEQUENCE not in headers:
        return aggregate_type, None, None
    aggregate_id = _text(AGGREGATE_ID, headers.get(AGGREGATE_ID), 512)
    seq = headers.get(SEQUENCE)
    if type(seq) is not int or not 1 <= seq <= MAX_SEQUENCE:
        raise NotAnEvent("malformed", f"{SEQUENCE} is {_shown(seq)}, not a whole number from 1")
    if aggregate_type is None:
        raise NotAnEvent("malformed", f"{AGGREGATE_ID} without {AGGREGATE_TYPE}")
    return aggregate_type, aggregate_id, seq


@lru_cache(maxsize=1000)
def _name(name: str, value: str | None) -> str:
    """A property that is the same in many messages. What is refused is not remembered."""
    return _text(name, value, 255)


def _text(name: str, value: object, limit: int) -> str:
    if not isinstance(value, str) or not value:
        raise NotAnEvent("malformed", f"{name} is {_shown(value)}, not a text")
    if "\0" in value:
        raise NotAnEvent("malformed", f"{name} contains NUL")
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        raise NotAnEvent("malformed", f"{name} is not valid Unicode") from None
    if size > limit:
        raise NotAnEvent("malformed", f"{name} is {size} bytes, at most {limit} are allowed")
    return value


def _digest(value: object) -> bytes:
    if not isinstance(value, str) or not value.startswith(_DIGEST_PREFIX):
        raise NotAnEvent("malformed", f"{CONTENT_DIGEST} is {_shown(value)}, not {_DIGEST_PREFIX}<hex>")
    try:
        digest = bytes.fromhex(value.removeprefix(_DIGEST_PREFIX))
    except ValueError:
        raise NotAnEvent("malformed", f"{CONTENT_DIGEST} is not hexadecimal") from None
    return digest


def _shown(value: object) -> str:
    """A value from outside, short and printable: it ends up in a log."""
    return "missing" if value is None else repr(value)[:60]
