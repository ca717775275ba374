"""Property blocks of messages that are alike, read by their layout: where the values are is worked out once, and checked for each. Pure.

The messages of one producer differ in what they say, seldom in how long the parts are: names and kinds of the headers, every
length, everything but the values is the same bytes at the same places. A block that has these bytes is read in one piece; any other
is for `relay.rabbitmq.wire.properties` to read step by step, which finds the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Values = tuple[str, dict[str, Any], int, str, int, str, str]
"""(content type, headers, delivery mode, message id, timestamp, type, app id): what is in a block with the flags of a relay's message."""

_REMEMBERED = 256
"""Layouts, of a producer perhaps a dozen: as many as its ids and types have lengths. Then the memory starts anew."""

_ALIKE = 4
"""Layouts with the same outer lengths that are tried one after the other; of more, the others are read step by step."""

_MOST_HEADERS = 32

_EVERY = 16
"""So many blocks that have no known layout come before the next one is worked out: it costs as much as reading a few, and a stream
without any order must not have to pay for each."""

_STRING, _INT64 = 0x53, 0x6C  # S, l
_u32 = struct.Struct(">I").unpack_from


class _Layout(NamedTuple):
    unpack: Callable[[bytes], tuple[Any, ...]]  # what is fixed and what is a value in turn
    fixed: tuple[bytes, ...]
    names: tuple[str, ...]
    texts: tuple[int, ...]  # which of the headers are texts; the others are whole numbers
    mode: int


class Layouts:
    """The layouts of a stream, learned as it goes. Whatever it is given, it raises nothing."""

    def __init__(self) -> None:
        self._known: dict[
            tuple[int, bytes], list[_Layout]
        ] = {}  # by the lengths of the block and, as on the wire, its headers
        self._count = 0
        self._until = 1

    def read(self, block: bytes) -> Values | None:
        """The values of a block whose layout is known. None: it is not, or there is a text in it that is no UTF-8."""
        try:
            at = block[2] + 3
            for unpack, fixed, names, texts, mode in self._known.get((len(block), block[at : at + 4]), ()):
                parts = unpack(block)
                if parts[::2] == fixed:
                    content_type, *values, message_id, seconds, event_type, source = parts[1::2]
                    for place in texts:
                        values[place] = values[place].decode()
                    headers = dict(zip(names, values))  # noqa: B905 - asking for it costs as much again
                    return (
                        content_type.decode(),
                        headers,
                        mode,
                        message_id.decode(),
                        seconds,
                        event_type.decode(),
                        source.decode(),
                    )
        except (UnicodeDecodeError, IndexError):
            return None
        return None

    def missed(self, block: bytes) -> None:
        """A block that `read` did not know, and that can be read: remember the layout of some of them."""
        self._until -= 1
        if self._until <= 0:
            self._until = _EVERY
            self.learn(block)

    def learn(self, block: bytes) -> None:
        """Remember the layout of a block that can be read and has the flags of a relay's message, if it is simple enough."""
        if (layout := _layout(block)) is None:
            return
        if self._count >= _REMEMBERED:
            self._known.clear()
            self._count = 0
        at = block[2] + 3
        alike = self._known.setdefault((len(block), block[at : at + 4]), [])
        if len(alike) < _ALIKE and all(other.fixed != layout.fixed for other in alike):
            alike.append(layout)
            self._count += 1


def _layout(block: bytes) -> _Layout | None:
    """The same way through the block as `properties` goes."""
    values = [_text(3, 3 + block[2])]
    at = values[0].end + 4
    end = at + _u32(block, at - 4)[0]
    names: list[bytes] = []
    while at < end:
        kind_at = at + 1 + block[at]
        names.append(block[at + 1 : kind_at])
        if block[kind_at] == _STRING:
            values.append(_text(kind_at + 5, kind_at + 5 + _u32(block, kind_at + 1)[0]))
        elif block[kind_at] == _INT64:
            values.append(_Value(kind_at + 1, kind_at + 9, "q"))
        else:
            return None
        at = values[-1].end
    if len(names) > _MOST_HEADERS:
        return None
    texts = [place for place, value in enumerate(values[1:]) if value.form != "q"]
    message_id = _text(end + 2, end + 2 + block[end + 1])
    seconds = _Value(message_id.end, message_id.end + 8, "Q")
    event_type = _text(seconds.end + 1, seconds.end + 1 + block[seconds.end])
    source = _text(event_type.end + 1, event_type.end + 1 + block[event_type.end])
    unpack = _unpacker([*values, message_id, seconds, event_type, source])
    decoded = tuple(name.decode("utf-8", "backslashreplace") for name in names)
    return _Layout(unpack, unpack(block)[::2], decoded, tuple(texts), block[end])


class _Value(NamedTuple):
    start: int
    end: int
    form: str  # as struct has it


def _text(start: int, end: int) -> _Value:
    return _Value(start, end, f"{end - start}s")


def _unpacker(values: Sequence[_Value]) -> Callable[[bytes], tuple[Any, ...]]:
    """Takes a block to pieces: what is before a value, the value, and so on. The last one ends the block."""
    befores = [0, *(value.end for value in values[:-1])]
    form = "".join(f"{value.start - before}s{value.form}" for before, value in zip(befores, values, strict=True))
    return struct.Struct(">" + form).unpack
