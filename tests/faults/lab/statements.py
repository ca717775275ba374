"""PostgreSQL's messages as they lie on the wire (protocol 3.0): split, and the text of every statement that a client runs. Pure."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_SIZE = struct.Struct(">I")
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104

STARTUP = b""
"""The kind of what has none: a client's first message, and the one byte that answers a request for encryption."""

_BOUNDARY = re.compile(r"\s*(BEGIN|START|COMMIT|END|ROLLBACK|ABORT)\b(?!\s+(TO|PREPARED)\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Message:
    """One message, whole."""

    kind: bytes
    start: int  # where it lies in what `feed` returned with it
    data: memoryview


class Splitter:
    """Cuts what comes in pieces of any size into messages. One that is not complete yet is kept until it is."""

    def __init__(self, *, starts: bool) -> None:
        self._kept = bytearray()
        self.starting = starts  # the next message of the client has no kind
        self.expects_answer = False  # the server's next message is one byte, about encryption

    def feed(self, data: bytes) -> tuple[bytes, list[Message]]:
        """(all complete messages as they came, the same one by one). After a STARTUP message feed it b"": there may be more."""
        self._kept += data
        found: list[tuple[bytes, int, int]] = []
        at = 0
        while (taken := self._next(at)) is not None:
            kind, end = taken
            found.append((kind, at, end))
            at = end
            if kind == STARTUP:  # what follows depends on it: whoever reads this decides
                break
        whole = bytes(self._kept[:at])
        del self._kept[:at]
        view = memoryview(whole)
        return whole, [Message(kind, start, view[start:end]) for kind, start, end in found]

    def rest(self) -> bytes:
        """What is kept, and kept no longer."""
        kept = bytes(self._kept)
        self._kept.clear()
        return kept

    def _next(self, at: int) -> tuple[bytes, int] | None:
        """(kind, end) of the message that starts here; None if it is not complete."""
        left = len(self._kept) - at
        if self.expects_answer and left:
            self.expects_answer = False
            return STARTUP, at + 1
        head = 0 if self.starting else 1
        if left < head + _SIZE.size:
            return None
        end = at + head + int(_SIZE.unpack_from(self._kept, at + head)[0])
        if len(self._kept) < end:
            return None
        if self.starting:
            return STARTUP, end
        return bytes(self._kept[at : at + 1]), end


def asks_for_encryption(startup: memoryview) -> bool:
    """True for an SSLRequest or GSSENCRequest: the answer is one byte, and then comes another first message."""
    return len(startup) == 8 and _SIZE.unpack_from(startup, 4)[0] in (_SSL_REQUEST, _GSS_REQUEST)


class Statements:
    """Of one session: which texts its names stand for, and what it has run in its transaction."""

    def __init__(self) -> None:
        self._prepared: dict[str, str] = {}
        self._portals: dict[str, str] = {}
        self.in_transaction: list[str] = []  # texts since the last BEGIN or COMMIT

    def run_by(self, message: Message) -> str | None:
        """The text that the server runs when it gets this message of the client; None if it runs nothing."""
        kind = message.kind
        if kind not in (b"Q", b"E", b"P", b"B", b"C"):
            return None
        data = bytes(message.data)
        if kind == b"Q":
            return data[5:].rstrip(b"\0").decode(errors="replace")
        if kind == b"E":
            return self._portals.get(_names(data, 1)[0], "")
        if kind == b"P":
            name, text = _names(data, 2)
            self._prepared[name] = text
        elif kind == b"B":
            portal, name = _names(data, 2)
            self._portals[portal] = self._prepared.get(name, "")
        elif kind == b"C" and data[5:6] == b"S":
            self._prepared.pop(data[6:].rstrip(b"\0").decode(errors="replace"), None)
        return None

    def note(self, text: str) -> None:
        """It was run."""
        if _BOUNDARY.match(text):
            self.in_transaction.clear()
        else:
            self.in_transaction.append(text)


def _names(data: bytes, count: int) -> list[str]:
    """The zero-terminated strings that a message begins with."""
    found, at = [], 5
    for _ in range(count):
        end = data.index(b"\0", at)
        found.append(data[at:end].decode(errors="replace"))
        at = end + 1
    return found
