"""How much of a socket is read while what was read before waits to be worked off: bounded in bytes, without losing the connection.

RabbitMQ bounds what is on its way to a consumer by count alone (the prefetch). Bytes are bounded by not reading: then the
sockets' buffers fill, and the broker keeps the rest in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HELD_BYTES = 64 * 1024 * 1024
"""Above this nothing more is read but a little now and then."""

OVERSHOOT_BYTES = 64 * 1024 * 1024
"""And after so much more nothing at all: that is 35 s of a relay's largest messages (16 MiB), 3.5 minutes of 1 MiB, 5 of 64 KiB. Small
messages count for many times what they take on the wire: twenty seconds, with a prefetch of more thousands than the default."""

_EVERY_S = 1.0
"""Time between two times that something is let in."""

_WRITES_S = 20.0
"""In this time two messages as large as the largest so far are let in, and _SOCKETS_BYTES. RabbitMQ ends a connection that has not taken
what was written to it for 30 s (measured with 3.10.8, none of its settings changed: `{writer,send_failed,{error,timeout}}`), and
Erlang may have taken a second message before it makes the writer wait: with one every 20 s it ended connections. aiormq takes one on
which it sees nothing for 3 x (heartbeat + 1) s for dead, 18 s at least; what is let in tells it otherwise."""

_SOCKETS_BYTES = 4 * 1024 * 1024
"""What must be read of full sockets until their writer may write again: they are not filled up byte by byte, but when a third or so of
them is free. Linux's own limits (tcp_wmem, tcp_rmem) are 4 and 6 MiB."""


class Backpressure:
    """Counts the bytes that are held; stops reading above `bound`, and starts again when they are released.

    What is held is at most `bound` and what comes to its end in one more piece of the stream (256 KiB, with TLS up to 1 MiB). While it
    holds back, for each second a twentieth of 4 MiB and of two of the largest messages is read: until there is more than `bound` and
    OVERSHOOT_BYTES, so that what comes to its end in one more piece is the end of it, however long it lasts. At that limit nothing is read, and within 30 s the broker ends the connection, or aiormq: that costs a redelivery.

    The end of a connection, and that the broker has cancelled the consumer, is seen when it has been read: later, while this holds
    back. Nobody may wait for an answer of the broker meanwhile: `end` it before.
    """

    def __init__(self, pause: Callable[[], object], resume: Callable[[], object], *, bound: int) -> None:
        """`pause` and `resume` reading of the socket; both may be called twice, and at any time."""
        self._pause = pause
        self._resume = resume
        self._bound = bound
        self._loop = asyncio.get_running_loop()
        self._largest = 0
        self._timer: asyncio.TimerHandle | None = None
        self._may_read = 0  # bytes, while it holds back
        self._ended = False
        self.held = 0
        self.is_holding_back = False
        self.times = 0  # that it began to hold back

    def hold(self, size: int, largest: int) -> None:
        """Count messages in: what they take here, and the largest body among them. Only `settle` acts on it."""
        self.held += size
        self._largest = max(self._largest, largest)

    def release(self, size: int) -> None:
        """Count out what is not needed any more, and read on if that is enough."""
        self.held -= size
        if self.is_holding_back:
            self.settle(0)

    def settle(self, received: int) -> None:
        """Call it after each piece of the stream, with its length in bytes."""
        if self._ended:
            return
        if self.held > self._bound:
            self._hold_back(received)
        elif self.is_holding_back:
            self._read_on()

    def end(self) -> None:
        """Read everything from here on: what comes is thrown away, or the answer to a goodbye."""
        self._ended = True
        self._read_on()

    def _hold_back(self, received: int) -> None:
        if self.is_holding_back:
            self._may_read -= received
        else:
            self.is_holding_back = True
            self.times += 1
            self._may_read = 0
        if self._may_read <= 0:
            self._pause()  # also when it is paused: aiormq's reader may have resumed it
        if self._timer is None and self.held <= self._bound + OVERSHOOT_BYTES:
            self._timer = self._loop.call_later(_EVERY_S, self._let_in)

    def _let_in(self) -> None:
        """So many bytes, whenever they come: `settle` is called then. What was read beyond it the last time counts."""
        self._timer = None
        self._may_read = min(self._may_read, 0) + int((2 * self._largest + _SOCKETS_BYTES) * _EVERY_S / _WRITES_S)
        if self._may_read > 0:
            self._resume()
        else:
            self._hold_back(0)

    def _read_on(self) -> None:
        self.is_holding_back = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._resume()
