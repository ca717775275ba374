"""A message's property block, read from the wire: flags, then the values of the properties whose flags are set. Pure.

Total: whatever anybody has put into it, `read` returns or raises Malformed, in time that its length bounds; it never recurses.
Malformed is what cannot be told apart (a length that leads out of the block, an unknown type), a property of ours that is no
text, a header of ours that is there twice. Everything else is a value, also what AMQP libraries die of: a header's name that is
no UTF-8, a time in the year 300 000, tables in tables without end. Whether it means anything is for `relay.message` to say.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

from relay.message import OWN_HEADERS
from relay.rabbitmq.wire.layouts import Layouts, Values


class Malformed(ValueError):
    """The block cannot be read. The text says where."""


class Properties(NamedTuple):
    """What a property block says; None for a property that it does not have."""

    message_id: str | None
    event_type: str | None
    source: str | None
    content_type: str | None
    occurred_at: datetime | None  # None also when it is out of a datetime's range: then `others` has the number
    headers: Mapping[str, Any]
    others: Mapping[str, Any]  # by AMQP's names; only what is there


_DEEPEST = 32
"""Tables and arrays in each other that are read; what is deeper stays bytes. The quarantine shows no more than that."""

_LAST_S = 253_402_300_800  # the year 10 000, in seconds
_TEXT, _TABLE, _OCTET, _TIME = range(4)
_PROPERTIES = (
    (15, "content_type", _TEXT),
    (14, "content_encoding", _TEXT),
    (13, "headers", _TABLE),
    (12, "delivery_mode", _OCTET),
    (11, "priority", _OCTET),
    (10, "correlation_id", _TEXT),
    (9, "reply_to", _TEXT),
    (8, "expiration", _TEXT),
    (7, "message_id", _TEXT),
    (6, "timestamp", _TIME),
    (5, "type", _TEXT),
    (4, "user_id", _TEXT),
    (3, "app_id", _TEXT),
    (2, "cluster_id", _TEXT),
)
"""Bit of the flags, name, kind, in the order on the wire. The two lowest bits announce more flags: AMQP has none to announce."""

_OURS = ("message_id", "type", "app_id", "content_type", "timestamp", "headers")
_USUAL = b"\xb0\xe8"  # what a relay sends: content type, headers, delivery mode, message id, timestamp, type, app id
_MODES = tuple(MappingProxyType({"delivery_mode": mode}) for mode in range(256))
_NOTHING: Mapping[str, Any] = MappingProxyType({})

_STRING, _INT64, _ARRAY, _FIELDS = 0x53, 0x6C, 0x41, 0x46  # S, l, A, F
_layouts = Layouts()
_properties = partial(tuple.__new__, Properties)
"""Properties of a tuple: half of the time that the constructor takes, which is a function of Python's."""

_u32 = struct.Struct(">I").unpack_from
_u64 = struct.Struct(">Q").unpack_from
_i64 = struct.Struct(">q").unpack_from


def read(block: bytes) -> Properties:
    """The properties in a header frame's block. Raises Malformed, and nothing else."""
    return by_layout(block) or step_by_step(block)


def by_layout(block: bytes) -> Properties | None:
    """The same as `read`, for a block with the flags of a relay's message and a layout that is known; None for any other.

    Its headers are few, texts and whole numbers, and share their names with other messages. It raises nothing.
    """
    values = _layouts.read(block) if block[:2] == _USUAL else None
    return None if values is None else _usual(values)


def step_by_step(block: bytes) -> Properties:
    """The same as `read`, for a block that `by_layout` does not know; it may do so the next time. Raises Malformed."""
    try:
        if block[:2] != _USUAL:
            return _any(block)
        values = _usual_values(block)
    except UnicodeDecodeError:
        raise Malformed("a property is not UTF-8") from None
    except (IndexError, struct.error):
        raise Malformed("a value leads out of the property block") from None
    _layouts.missed(block)
    return _usual(values)


def _usual(values: Values) -> Properties:
    content_type, headers, mode, message_id, seconds, event_type, source = values
    others = _MODES[mode]
    if (occurred_at := _instant(seconds)) is None:
        others = MappingProxyType({"delivery_mode": mode, "timestamp": seconds})
    return _properties((message_id, event_type, source, content_type, occurred_at, headers, others))


def _usual_values(block: bytes) -> Values:
    """What `_any` reads, for the flags of a relay's message, which all that matters here has: several times faster."""
    at = 3 + block[2]
    content_type = block[3:at].decode()
    end = at + 4 + _u32(block, at)[0]
    headers = _headers(block, at + 4, end)
    mode = block[end]
    at = end + 2 + block[end + 1]
    message_id = block[end + 2 : at].decode()
    seconds = _u64(block, at)[0]
    end = at + 9 + block[at + 8]
    event_type = block[at + 9 : end].decode()
    at = end + 1 + block[end]
    source = block[end + 1 : at].decode()
    if at != len(block):
        raise Malformed("the property block has another length than its values")
    return content_type, headers, mode, message_id, seconds, event_type, source


def _any(block: bytes) -> Properties:
    flags = block[0] << 8 | block[1]
    if flags & 3:
        raise Malformed("unknown property flags")
    found: dict[str, Any] = {}
    at = 2
    for bit, name, kind in _PROPERTIES:
        if not flags >> bit & 1:
            continue
        if kind == _TEXT:
            end = at + 1 + block[at]
            found[name] = block[at + 1 : end].decode()
        elif kind == _TABLE:
            end = at + 4 + _u32(block, at)[0]
            found[name] = _headers(block, at + 4, end)
        elif kind == _OCTET:
            end = at + 1
            found[name] = block[at]
        else:
            end = at + 8
            found[name] = _u64(block, at)[0]
        at = end
    if at != len(block):
        raise Malformed("the property block has another length than its values")
    message_id, event_type, source, content_type, seconds, headers = (found.pop(name, None) for name in _OURS)
    occurred_at = None if seconds is None else _instant(seconds)
    if seconds is not None and occurred_at is None:
        found["timestamp"] = seconds
    return Properties(
        message_id, event_type, source, content_type, occurred_at, _NOTHING if headers is None else headers, found
    )


def _headers(block: bytes, at: int, end: int) -> dict[str, Any]:
    """Headers by name. Of one that is there twice the last counts, as with any client; of ours none would."""
    headers: dict[str, Any] = {}
    count = 0
    start = at
    while at < end:
        count += 1
        kind_at = at + 1 + block[at]
        name = block[at + 1 : kind_at].decode("utf-8", "backslashreplace")
        kind = block[kind_at]
        if kind == _STRING:
            at = kind_at + 5 + _u32(block, kind_at + 1)[0]
            raw = block[kind_at + 5 : at]
            try:
                headers[name] = raw.decode()
            except UnicodeDecodeError:
                headers[name] = raw
        elif kind == _INT64:
            headers[name] = _i64(block, kind_at + 1)[0]
            at = kind_at + 9
        else:
            headers[name], at = _value(block, kind, kind_at + 1)
    if at != end:
        raise Malformed("a header leads out of the table")
    if count != len(headers):
        _refuse_ours_twice(block, start, end)
    return headers


def _name(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _refuse_ours_twice(block: bytes, at: int, end: int) -> None:
    seen: set[str] = set()
    while at < end:
        kind_at = at + 1 + block[at]
        name = _name(block[at + 1 : kind_at])
        if name in OWN_HEADERS and name in seen:
            raise Malformed(f"the header {name} is there twice")
        seen.add(name)
        _, at = _value(block, block[kind_at], kind_at + 1)


def _text(raw: bytes) -> str | bytes:
    """Bytes when they are no text: then it is not a value that any header of ours may have."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


@lru_cache(maxsize=1000)
def _instant(seconds: int) -> datetime | None:
    """A timestamp; None if it is out of range. Some clients send milliseconds."""
    if seconds >= _LAST_S:
        if seconds >= _LAST_S * 1000:
            return None
        return datetime.fromtimestamp(seconds // 1000, UTC) + timedelta(milliseconds=seconds % 1000)
    return datetime.fromtimestamp(seconds, UTC)


_FIXED: dict[int, tuple[int, Callable[[bytes, int], tuple[Any, ...]]]] = {
    ord(letter): (struct.calcsize(form), struct.Struct(form).unpack_from)
    for letter, form in {
        "t": ">?",
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "l": ">q",
        "L": ">q",
        "f": ">f",
        "d": ">d",
    }.items()
}
"""Numbers, by RabbitMQ's letters (https://www.rabbitmq.com/docs/amqp-0-9-1-errata), not by those of AMQP's own text."""


def _value(block: bytes, kind: int, at: int) -> tuple[Any, int]:
    """(the value that begins at `at`, where the next begins): beyond the end of what it is in, if its length says so."""
    if (fixed := _FIXED.get(kind)) is not None:
        size, unpack = fixed
        return unpack(block, at)[0], at + size
    if kind in (_STRING, 0x78):  # x: bytes
        start, at = at + 4, at + 4 + _u32(block, at)[0]
        return (_text(block[start:at]) if kind == _STRING else block[start:at]), at
    if kind == 0x54:  # T: time
        seconds = _u64(block, at)[0]
        return _instant(seconds) or seconds, at + 8
    if kind in (0x56, 0):  # V: nothing
        return None, at
    if kind == 0x44:  # D: decimal
        return Decimal(_u32(block, at + 1)[0]).scaleb(-block[at]), at + 5
    if kind in (_FIELDS, _ARRAY):
        start, at = at + 4, at + 4 + _u32(block, at)[0]
        return _nested(block, kind, start, at), at
    raise Malformed(f"a value of the unknown type 0x{kind:02x}")


def _nested(block: bytes, kind: int, at: int, end: int) -> Any:
    """A table as a dict, an array as a list, and what is in them; as its bytes if that cannot be read."""
    try:
        return _container(block, kind, at, end)
    except (Malformed, IndexError, struct.error):
        return block[at:end]


def _container(block: bytes, kind: int, at: int, end: int) -> Any:
    """Without recursion: a stack of what is open, innermost last."""
    outermost: dict[str, Any] | list[Any] = {} if kind == _FIELDS else []
    stack = [(outermost, end)]
    while stack:
        inside, stop = stack[-1]
        if at >= stop:
            if at > stop:
                raise Malformed("a value leads out of its table or array")
            stack.pop()
            continue
        name = ""
        if isinstance(inside, dict):
            start, at = at + 1, at + 1 + block[at]
            name = _name(block[start:at])
        kind, at = block[at], at + 1
        value: Any
        if kind not in (_FIELDS, _ARRAY):
            value, at = _value(block, kind, at)
        else:
            start, at = at + 4, at + 4
            end = start + _u32(block, start - 4)[0]
            if len(stack) < _DEEPEST:
                value = {} if kind == _FIELDS else []
                stack.append((value, end))
            else:
                value, at = block[start:end], end
        if isinstance(inside, dict):
            inside[name] = value
        else:
            inside.append(value)
    return outermost
