"""The event as a producer hands it over, checked where it is made. Pure.

What is checked here is what the constraint of relay.outbox checks again; here the error says which field of which event
it is and what to do, and comes before a statement could spoil the caller's transaction. An error never shows a payload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from relay.errors import InputError
from relay.message import MAX_BODY_BYTES, MAX_SEQUENCE, OWN_HEADERS, Header
from relay.producer.payload import JsonText, check, decoded, encoded, text_flaw

__all__ = ["ABSENT", "JsonText", "NewEvent"]

ABSENT: Final[Any] = type("Absent", (), {"__repr__": lambda _: "<absent>", "__slots__": ()})()
"""No payload was given. Not None: that is the JSON value null."""

MAX_HEADERS_BYTES = 16384
"""Of all headers together, as PostgreSQL prints the jsonb: the rule `outbox_headers_are_flat_small_and_not_ours`."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}")
_NAME_RULE = "1 to 100 letters, digits and _ . : - (not first . : -), for example order or order.paid"
_CONTENT_TYPE = re.compile(r"[ -~]{1,100}")
_HEADER_NAME = re.compile(r"[!-~]{1,128}")
_RESERVED_HEADERS = OWN_HEADERS | {"x-tag"}
_RESERVED_PREFIX = "x-relay-"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event to be inserted. One that exists can be inserted: every field was checked, and the payload encoded.

    Exactly one of `payload` and `body` is given. Changing a payload or headers afterwards changes nothing.
    Raises InputError, which begins with the name of the field. The database alone judges what needs its state: whether
    `seq` is the next one, and the size of a payload as jsonb, which is up to a few per cent more than its compact text.
    """

    event_type: str  # a name; not relay.*
    aggregate_type: str | None = None  # a name
    aggregate_id: str | None = None  # 1 to 512 bytes; None: an event without order
    payload: Any = field(default=ABSENT, repr=False, hash=False)  # any JSON value (None is null), or JsonText
    body: bytes | None = field(default=None, repr=False)  # instead of a payload, for what is not JSON
    content_type: str | None = None  # None: application/json for a payload, application/octet-stream for a body
    headers: Mapping[str, Header] | None = field(default=None, repr=False, hash=False)  # traceparent goes here
    routing_key: str | None = None  # 1 to 255 bytes; None: by the relay's template
    seq: int | None = None  # the aggregate's next number, for producers that count themselves; None: relay counts
    payload_json: str | None = field(init=False, repr=False, compare=False)  # as it will be inserted
    headers_json: str | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every field; encode payload and headers."""
        try:
            self._check_place()
            _content_type(self.content_type)
            object.__setattr__(self, "payload_json", _content(self.payload, self.body))
            object.__setattr__(self, "headers_json", _headers(self.headers))
        except _Refusal as refusal:
            raise InputError(f"{refusal.field}: {refusal.detail} ({_told(self)})") from None

    def _check_place(self) -> None:
        _name("event_type", self.event_type)
        if self.event_type.startswith("relay."):
            raise _Refusal("event_type", "names that begin with relay. are relay's own; choose another")
        if self.aggregate_type is not None:
            _name("aggregate_type", self.aggregate_type)
        if self.aggregate_id is not None:
            _sized("aggregate_id", self.aggregate_id, 512)
            if self.aggregate_type is None:
                raise _Refusal("aggregate_type", "is missing, but there is an aggregate_id: give both, or neither")
        if self.routing_key is not None:
            _sized("routing_key", self.routing_key, 255)
        if self.seq is not None:
            _sequence(self.seq, self.aggregate_id)


class _Refusal(Exception):
    """A field cannot be accepted."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(name, detail)
        self.field = name
        self.detail = detail


def _told(event: NewEvent) -> str:
    """The event, for an error: where it belongs and its type, shortened and escaped."""
    place = [_short(part) for part in (event.aggregate_type, event.aggregate_id) if part is not None]
    return f"event {_short(event.event_type)}" + (f" of {'/'.join(place)}" if place else "")


def _short(value: object) -> str:
    if not isinstance(value, str):
        return f"<{type(value).__name__}>"
    cut = value if len(value) <= 60 else value[:60] + "..."
    return ascii(cut)[1:-1]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Refusal(name, f"is of type {type(value).__name__}, not str; convert it with str(...)")
    if flaw := text_flaw(value):
        raise _Refusal(name, f"{flaw}; remove it, PostgreSQL cannot store it")
    return value


def _name(name: str, value: object) -> None:
    if not _NAME.fullmatch(_text(name, value)):
        raise _Refusal(name, f"is not a name; a name is {_NAME_RULE}")


def _sized(name: str, value: object, limit: int) -> None:
    size = len(_text(name, value).encode())
    if not 1 <= size <= limit:
        raise _Refusal(name, f"is {size} bytes, it must be 1 to {limit}" + ("" if size else "; leave it out instead"))


def _sequence(seq: object, aggregate_id: str | None) -> None:
    if type(seq) is not int:
        raise _Refusal("seq", f"is of type {type(seq).__name__}, not int")
    if not 1 <= seq <= MAX_SEQUENCE:
        raise _Refusal("seq", "must be 1 to 2^63 - 1; leave it out to let relay count")
    if aggregate_id is None:
        raise _Refusal("seq", "was given without an aggregate_id: only events of an aggregate are numbered")


def _content_type(value: object) -> None:
    if value is not None and not _CONTENT_TYPE.fullmatch(_text("content_type", value)):
        raise _Refusal("content_type", "must be 1 to 100 printable ASCII characters, for example application/json")


def _content(payload: object, body: object) -> str | None:
    """The payload's JSON text; None for a body."""
    if (payload is ABSENT) == (body is None):
        given = "neither was given" if body is None else "both were given"
        raise _Refusal("payload", f"exactly one of payload (JSON) and body (bytes) is needed, {given}")
    if payload is ABSENT:
        if not isinstance(body, bytes):
            raise _Refusal("body", f"is of type {type(body).__name__}, not bytes; convert it with bytes(...)")
        _bounded("body", len(body))
        return None
    try:
        if isinstance(payload, JsonText):
            check(decoded(payload))
            text = str(payload)
        else:
            text = encoded(payload)
    except ValueError as exc:
        raise _Refusal("payload", str(exc)) from None
    _bounded("payload", len(text.encode()))
    return text


def _bounded(name: str, size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise _Refusal(
            name,
            f"is {size} bytes, the limit is {MAX_BODY_BYTES} (16 MiB); store large content elsewhere and send a reference to it",
        )


def _headers(headers: object) -> str | None:
    if headers is None:
        return None
    if not isinstance(headers, Mapping):
        raise _Refusal("headers", f"is of type {type(headers).__name__}, not a mapping of names to values")
    _check_headers(headers.items())
    text = json.dumps(dict(headers), ensure_ascii=False)  # spaced as PostgreSQL prints jsonb, so of the same size
    if (size := len(text.encode())) > MAX_HEADERS_BYTES:
        raise _Refusal(
            "headers", f"are {size} bytes together, the limit is {MAX_HEADERS_BYTES}; move data to the payload"
        )
    return text


def _check_headers(items: Iterable[tuple[object, object]]) -> None:
    for name, value in items:
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise _Refusal("headers", "a name must be 1 to 128 printable ASCII characters without spaces")
        if name in _RESERVED_HEADERS or name.startswith(_RESERVED_PREFIX):
            raise _Refusal("headers", f"the name {name} is relay's own; choose another")
        if isinstance(value, str):
            if flaw := text_flaw(value):
                raise _Refusal("headers", f"the value of {name} {flaw}; remove it, PostgreSQL cannot store it")
        elif not isinstance(value, int):
            raise _Refusal(
                "headers", f"the value of {name} is of type {type(value).__name__}; it must be str, int or bool"
            )
        elif not -MAX_SEQUENCE - 1 <= value <= MAX_SEQUENCE:
            raise _Refusal("headers", f"the value of {name} does not fit 64 bits; send it as a string")
