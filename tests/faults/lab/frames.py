"""AMQP 0-9-1 frames as they lie on the wire: split, named, and two of them built. Pure; bodies are never copied nor decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

PROTOCOL = -1
"""The kind of what a client says first ("AMQP" and a version), which is no frame."""
METHOD, HEADER, BODY = 1, 2, 3
_PROTOCOL_SIZE = 8
_END = 0xCE

_HEAD = struct.Struct(">BHI")  # kind, channel, size of the payload
_METHOD = struct.Struct(">I")  # class and method, as one number
_SIZE = struct.Struct(">Q")  # of a body
_TAG = struct.Struct(">QB")  # delivery tag, bits
_ANSWER = struct.Struct(">BHIIQBB")


class Method(IntEnum):
    """The methods that the proxy knows, as class << 16 | method."""

    CONNECTION_CLOSE = 10 << 16 | 50
    CONNECTION_BLOCKED = 10 << 16 | 60
    CHANNEL_OPEN = 20 << 16 | 10
    CHANNEL_CLOSE = 20 << 16 | 40
    PUBLISH = 60 << 16 | 40
    RETURN = 60 << 16 | 50
    DELIVER = 60 << 16 | 60
    ACK = 60 << 16 | 80
    REJECT = 60 << 16 | 90
    NACK = 60 << 16 | 120
    CONFIRM_SELECT = 85 << 16 | 10


class NotAmqp(Exception):
    """The bytes are no frames: TLS, or nonsense. They can only be passed on."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, whole."""

    kind: int
    channel: int
    data: memoryview | bytes  # with its envelope

    @property
    def method(self) -> int:
        """Class << 16 | method; 0 if it is no method."""
        return int(_METHOD.unpack_from(self.data, 7)[0]) if self.kind == METHOD else 0

    @property
    def tag(self) -> tuple[int, bool]:
        """(delivery tag, whether it stands for all up to it) of an ack or nack."""
        tag, bits = _TAG.unpack_from(self.data, 11)
        return tag, bool(bits & 1)

    @property
    def exchange(self) -> str:
        """Where a publish goes; empty for the default exchange."""
        size = self.data[13]
        return bytes(self.data[14 : 14 + size]).decode(errors="replace")

    @property
    def redelivered(self) -> bool:
        """Of a deliver: the broker has handed it out before."""
        return bool(self.data[12 + self.data[11] + 8] & 1)

    @property
    def body_size(self) -> int:
        """Bytes that follow a content header."""
        return int(_SIZE.unpack_from(self.data, 11)[0])

    @property
    def message_id(self) -> str | None:
        """Of a content header; None if it has none."""
        return _message_id(self.data)


class Splitter:
    """Cuts what comes in pieces of any size into frames. A frame that is not complete yet is kept until it is."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, list[Frame]]:
        """(all complete frames as they came, the same one by one). Raises NotAmqp; `rest` has the bytes then."""
        self._kept += data
        ends: list[tuple[int, int, int, int]] = []
        at = 0
        while (found := self._next(at)) is not None:
            ends.append(found)
            at = found[3]
        whole = bytes(self._kept[:at])
        del self._kept[:at]
        view = memoryview(whole)
        return whole, [Frame(kind, channel, view[start:end]) for kind, channel, start, end in ends]

    def rest(self) -> bytes:
        """What is kept, and kept no longer."""
        kept = bytes(self._kept)
        self._kept.clear()
        return kept

    def _next(self, at: int) -> tuple[int, int, int, int] | None:
        """(kind, channel, start, end) of the frame that starts here; None if it is not complete."""
        left = len(self._kept) - at
        if left < _HEAD.size:
            return None
        if self._kept.startswith(b"AMQP", at):
            return (PROTOCOL, 0, at, at + _PROTOCOL_SIZE) if left >= _PROTOCOL_SIZE else None
        kind, channel, size = _HEAD.unpack_from(self._kept, at)
        if kind not in (METHOD, HEADER, BODY, 8):
            raise NotAmqp(f"a frame of kind {kind}")
        end = at + _HEAD.size + size + 1
        if len(self._kept) < end:
            return None
        if self._kept[end - 1] != _END:
            raise NotAmqp("a frame without its end")
        return kind, channel, at, end


def ack(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    """A frame with Basic.Ack."""
    return _ANSWER.pack(METHOD, channel, 13, Method.ACK, tag, multiple, _END)


def nack(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    """A frame with Basic.Nack, as a broker sends it to a publisher."""
    return _ANSWER.pack(METHOD, channel, 13, Method.NACK, tag, multiple, _END)


def joined(parts: Iterable[memoryview | bytes]) -> bytes:
    """Frames in a row."""
    return b"".join(parts)


# The properties before message-id, in the order of the flags from the highest bit on (AMQP 0-9-1, 4.2.6.1 and Basic's class).
_SHORT, _TABLE, _OCTET = "short", "table", "octet"
_BEFORE = ((15, _SHORT), (14, _SHORT), (13, _TABLE), (12, _OCTET), (11, _OCTET), (10, _SHORT), (9, _SHORT), (8, _SHORT))
_MESSAGE_ID = 7


def _message_id(data: memoryview | bytes) -> str | None:
    """Steps over what comes before it: decoding a hostile table is not this proxy's business."""
    at = 7 + 2 + 2 + 8  # envelope; class, weight, size of the body
    flags = int.from_bytes(data[at : at + 2], "big")
    at += 2
    if flags & 1 or not flags >> _MESSAGE_ID & 1:  # a second word of flags: nothing of Basic needs one
        return None
    for bit, kind in _BEFORE:
        if flags >> bit & 1:
            if kind == _SHORT:
                at += 1 + data[at]
            elif kind == _TABLE:
                at += 4 + int.from_bytes(data[at : at + 4], "big")
            else:
                at += 1
    return bytes(data[at + 1 : at + 1 + data[at]]).decode(errors="replace")
