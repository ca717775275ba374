"""Events as JSON Lines: one object a line, with the names of NewEvent's fields. Reads bytes, yields events with line numbers.

A payload is inserted as the text that stands in the line, so no number loses a digit on the way.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from relay.errors import InputError
from relay.producer.event import ABSENT, NewEvent
from relay.producer.payload import STRICT, JsonText

MAX_LINE_BYTES = 64 * 1024 * 1024
"""Longest line that is read. A payload of 16 MiB fits with room for escapes; anything longer is not JSON Lines."""

KEYS = (
    "aggregate_type",
    "aggregate_id",
    "event_type",
    "payload",
    "headers",
    "routing_key",
    "seq",
    "body_base64",
    "content_type",
)

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An event and where it stood."""

    number: int  # from 1, blank lines counted
    size: int  # bytes, with the newline
    event: NewEvent


class BadLine(InputError):
    """A line that is no event. `line` is its number, from 1."""

    def __init__(self, line: int, detail: str) -> None:
        super().__init__(f"line {line}: {detail}")
        self.line = line


def read_lines(source: BinaryIO, *, first: int = 1, seen: Callable[[int], object] = lambda _: None) -> Iterator[Line]:
    """The events from line `first` on; blank lines are skipped. Holds one line at a time.

    `seen` is told the bytes of every line. Raises BadLine at the first line that is no event, InputError if the input ends
    before line `first - 1` does.
    """
    for skipped in range(1, first):
        size = _skip_line(source)
        if not size:
            raise InputError(f"--from-line {first}: the input has only {skipped - 1} lines")
        seen(size)
    number = first
    while raw := source.readline(MAX_LINE_BYTES + 1):
        if len(raw) > MAX_LINE_BYTES:
            raise BadLine(number, f"is longer than {MAX_LINE_BYTES} bytes; is this JSON Lines, one event a line?")
        seen(len(raw))
        if raw.strip():
            yield Line(number=number, size=len(raw), event=_event(number, raw))
        number += 1


def parse(text: str) -> NewEvent:
    """The event of a line. Raises InputError, which names the key."""
    values = _members(text)
    for key in values:
        if key not in KEYS:
            raise InputError(f"unknown key {key[:60]!a}{_suggestion(key)}")
    if "event_type" not in values:
        raise InputError("event_type: is missing")
    body = values.pop("body_base64", None)
    payload = values.pop("payload", ABSENT)
    return NewEvent(**values, payload=payload, body=None if body is None else _body(body))


def _skip_line(source: BinaryIO) -> int:
    """Bytes of the next line, however long; 0 at the end."""
    size = 0
    while part := source.readline(MAX_LINE_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _event(number: int, raw: bytes) -> NewEvent:
    try:
        return parse(raw.removeprefix(_BOM if number == 1 else b"").decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise BadLine(number, f"is not valid UTF-8 at byte {exc.start + 1}") from None
    except RecursionError:
        raise BadLine(number, "is nested too deep to be read; flatten it") from None
    except json.JSONDecodeError as exc:
        raise BadLine(number, f"is not valid JSON: {exc.msg} at character {exc.pos + 1}") from None
    except (InputError, ValueError) as exc:
        raise BadLine(number, str(exc)) from None


def _members(text: str) -> dict[str, Any]:
    """The members of the one object in a text: decoded, but a payload as the text it is."""
    values: dict[str, Any] = {}
    at = _expect(text, _space(text, 0), "{")
    closed = text.startswith("}", at)
    while not closed:
        key, at = STRICT.raw_decode(text, at)
        if not isinstance(key, str):
            raise json.JSONDecodeError("Expecting a key in double quotes", text, at)
        start = _expect(text, _space(text, at), ":")
        value, end = _value(text, start, key)
        if key in values:
            raise InputError(f"the key {key[:60]!a} stands twice in the line")
        values[key] = JsonText(text[start:end]) if key == "payload" else value
        at = _space(text, end)
        closed = text.startswith("}", at)
        if not closed:
            at = _expect(text, at, ",")
    if (end := _space(text, at + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, end)
    return values


def _value(text: str, start: int, key: str) -> tuple[Any, int]:
    """A value and where it ends."""
    try:
        return STRICT.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError as exc:
        raise InputError(f"{key[:60]!a}: {exc}" if key not in KEYS else f"{key}: {exc}") from None


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, sign: str) -> int:
    """The place after a sign and the space behind it."""
    if not text.startswith(sign, at):
        raise json.JSONDecodeError(f"Expecting '{sign}'", text, at)
    return _space(text, at + 1)


def _body(value: object) -> bytes:
    if not isinstance(value, str):
        raise InputError(f"body_base64: is of type {type(value).__name__}, not a string")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("body_base64: is not valid base64") from None


def _suggestion(key: str) -> str:
    near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(KEYS)}"
