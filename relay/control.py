"""The control messages between inboxes and relays, in both directions. Pure: no clock, no I/O.

    relay.repair   inbox -> relay   "send me these numbers again", to the exchange `relay.repair`, routing key = source
    relay.gone     relay -> inbox   "these numbers are not retained any more", straight to the queue that asked
    relay.marks    relay -> inboxes the newest published number of some aggregates, to the exchange `<events>.marks`

They are AMQP messages like events (`type`, `app_id`, `x-content-digest`), with a JSON body:

    relay.repair   {"consumer": "billing", "reply_to": "billing", "ranges": [["order", "42", 3, 7], ...]}
    relay.gone     {"reason": "not_retained" | "unknown" | "beyond", "ranges": [["order", "42", 3, 7], ...]}
    relay.marks    {"marks": [["order", "42", 17], ...], "retained": true}

A range is [aggregate type, aggregate id, first number, last number]. Other members of the objects are ignored, so that
later versions can add some. Reading one raises NotAnEvent for anything else, and nothing but that.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from relay.message import (
    CONTENT_DIGEST,
    MAX_SEQUENCE,
    Aggregate,
    Delivery,
    Message,
    NotAnEvent,
    content_digest,
)

REPAIR = "relay.repair"
GONE = "relay.gone"
MARKS = "relay.marks"

MAX_RANGES = 500
"""Ranges in one request or answer."""

MAX_NUMBERS = 5000
"""Numbers of one request that a relay looks at: nobody keeps the others waiting by asking for everything at once."""

MAX_MARKS = 500

MAX_CONTROL_BYTES = 4 * 1024 * 1024
"""Largest body that is looked at: 500 ids of 512 bytes, each byte written as an escape of six, are less than half of it."""

_MAX_SEQ = MAX_SEQUENCE - 1
"""One less than an event's, so that the number after it is still a bigint."""

_CONTENT_TYPE = "application/json"
_NAMESPACE = uuid.UUID("8d0c5f9b-5b0e-5c52-9d4f-0f6c1b7a9e11")

_T = TypeVar("_T")

Reason = Literal["not_retained", "unknown", "beyond"]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers of one aggregate, both ends included."""

    aggregate_type: str
    aggregate_id: str
    from_seq: int
    to_seq: int

    @property
    def aggregate(self) -> Aggregate:
        """Whose numbers they are."""
        return (self.aggregate_type, self.aggregate_id)

    def __len__(self) -> int:
        return self.to_seq - self.from_seq + 1


@dataclass(frozen=True, slots=True)
class Mark:
    """The newest number of an aggregate that has been published."""

    aggregate_type: str
    aggregate_id: str
    last_seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairRequest:
    """An inbox misses these numbers; they are to be sent to the queue `reply_to`."""

    consumer: str
    reply_to: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """Numbers that a source published and does not retain any more, that are of aggregates that it has never heard of (`unknown`),
    or that it has not given out (`beyond`).
    """

    source: str
    reason: Reason
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How far a source has published."""

    source: str
    marks: tuple[Mark, ...]
    retained: bool = (
        True  # False: nothing of these aggregates is retained; whoever has applied nothing of them need not miss it
    )


Control = Gone | Marks
"""What an inbox may find in its queue beside events."""


def repair_message(request: RepairRequest, *, source: str, at: datetime) -> Message:
    """The request as it is published to the exchange `relay.repair`."""
    content = {"consumer": request.consumer, "reply_to": request.reply_to, "ranges": _listed(request.ranges)}
    return _message(REPAIR, content, sender=request.consumer, routing_key=source, at=at)


def gone_message(gone: Gone, *, reply_to: str, at: datetime) -> Message:
    """The answer as it is published to the queue that asked."""
    content = {"reason": gone.reason, "ranges": _listed(gone.ranges)}
    return _message(GONE, content, sender=gone.source, routing_key=reply_to, at=at)


def marks_message(marks: Marks, *, routing_key: str, at: datetime) -> Message:
    """Marks of aggregates whose last events were published under `routing_key`."""
    content: dict[str, Any] = {"marks": [[m.aggregate_type, m.aggregate_id, m.last_seq] for m in marks.marks]}
    if not marks.retained:
        content["retained"] = False
    return _message(MARKS, content, sender=marks.source, routing_key=routing_key, at=at)


def is_control(delivery: Delivery) -> bool:
    """True when the delivery says that it is for the inbox itself and not for a handler."""
    return delivery.event_type in (GONE, MARKS)


def to_control(delivery: Delivery) -> Control:
    """The marks or the answer of a delivery that `is_control`. Raises NotAnEvent."""
    sender, content = _opened(delivery)
    if delivery.event_type == MARKS:
        retained = content.get("retained", True)
        if not isinstance(retained, bool):
            raise _malformed("retained is neither true nor false")
        return Marks(source=sender, marks=_items("marks", content, _mark, MAX_MARKS), retained=retained)
    reason = content.get("reason")
    if reason not in ("not_retained", "unknown", "beyond"):
        raise _malformed("reason is none of not_retained, unknown and beyond")
    return Gone(source=sender, reason=reason, ranges=_items("ranges", content, _range, MAX_RANGES))


def to_repair_request(delivery: Delivery) -> RepairRequest:
    """The request of a delivery. Raises NotAnEvent."""
    if delivery.event_type != REPAIR:
        raise NotAnEvent("foreign", f"not of the type {REPAIR}")
    _, content = _opened(delivery)
    reply_to = _text("reply_to", content.get("reply_to"), limit=255)
    if reply_to.startswith("amq."):
        raise _malformed("reply_to is one of the broker's own queues")
    return RepairRequest(
        consumer=_text("consumer", content.get("consumer"), limit=100),
        reply_to=reply_to,
        ranges=_items("ranges", content, _range, MAX_RANGES),
    )


def _message(kind: str, content: dict[str, Any], *, sender: str, routing_key: str, at: datetime) -> Message:
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    digest = content_digest(kind, _CONTENT_TYPE, body).hex()
    return Message(
        message_id=str(uuid.uuid5(_NAMESPACE, f"{kind}/{sender}/{routing_key}/{at.isoformat()}/{digest}")),
        event_type=kind,
        source=sender,
        content_type=_CONTENT_TYPE,
        occurred_at=at,
        routing_key=routing_key,
        headers={CONTENT_DIGEST: f"sha256:{digest}"},
        body=body,
    )


def _listed(ranges: Sequence[Range]) -> list[list[Any]]:
    return [[r.aggregate_type, r.aggregate_id, r.from_seq, r.to_seq] for r in ranges]


def _opened(delivery: Delivery) -> tuple[str, dict[str, Any]]:
    """(who sent it, the object in its body), as far as both can be believed."""
    if len(delivery.body) > MAX_CONTROL_BYTES:
        raise _malformed(f"the body is {len(delivery.body)} bytes, at most {MAX_CONTROL_BYTES} are read")
    sender = _text("app_id", delivery.source, limit=255)
    digest = content_digest(_plain(delivery.event_type), _plain(delivery.content_type), delivery.body).hex()
    if delivery.headers.get(CONTENT_DIGEST) != f"sha256:{digest}":
        raise _malformed(f"{CONTENT_DIGEST} does not match the content")
    try:
        content = json.loads(delivery.body)
    except (ValueError, RecursionError):
        raise _malformed("the body is not JSON") from None
    if not isinstance(content, dict):
        raise _malformed("the body is not a JSON object")
    return sender, content


def _items(name: str, content: dict[str, Any], item: Callable[[Any], _T], limit: int) -> tuple[_T, ...]:
    found = content.get(name)
    if not isinstance(found, list) or not 1 <= len(found) <= limit:
        raise _malformed(f"{name} is not a list of 1 to {limit}")
    return tuple(item(one) for one in found)


def _range(value: Any) -> Range:
    if not isinstance(value, list) or len(value) != 4:
        raise _malformed("a range is not [type, id, first, last]")
    kind, name = _aggregate(value)
    first, last = _seq(value[2]), _seq(value[3])
    if first > last:
        raise _malformed("a range ends before it begins")
    return Range(kind, name, first, last)


def _mark(value: Any) -> Mark:
    if not isinstance(value, list) or len(value) != 3:
        raise _malformed("a mark is not [type, id, number]")
    return Mark(*_aggregate(value), _seq(value[2]))


def _aggregate(value: list[Any]) -> tuple[str, str]:
    return _text("aggregate type", value[0], limit=100), _text("aggregate id", value[1], limit=512)


def _seq(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_SEQ:
        raise _malformed("a number is not a whole number from 1")
    return value


def _text(name: str, value: object, *, limit: int) -> str:
    if not isinstance(value, str) or not value:
        raise _malformed(f"{name} is not a text")
    if "\0" in value:
        raise _malformed(f"{name} contains NUL")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise _malformed(f"{name} is not valid Unicode") from None
    if size > limit:
        raise _malformed(f"{name} is {size} bytes, at most {limit} are allowed")
    return value


def _plain(value: str | None) -> str:
    """A property as text that can be hashed; one that is not valid Unicode then matches no digest."""
    return (value or "").encode("utf-8", "replace").decode()


def _malformed(detail: str) -> NotAnEvent:
    return NotAnEvent("malformed", detail)
