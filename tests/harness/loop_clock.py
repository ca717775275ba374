"""The event loop's clock, put forward: what takes half a minute is seen in milliseconds, with real sockets.

Only what asks the loop is fooled: its timers, time-outs and sleeps, and so aiormq's heartbeats. The kernel and PostgreSQL keep
their own time, and so does `time.monotonic`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REALLY_S = 0.002
"""What a step really takes: bytes get to the other end of a local socket, are answered and read."""


class LoopClock:
    """Seconds that did not pass."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._really = loop.time
        self.ahead_s = 0.0

    def time(self) -> float:
        """What the loop is told."""
        return self._really() + self.ahead_s

    async def forward(self, seconds: float, *, step_s: float = 0.5) -> None:
        """Let `seconds` pass, in steps, so that what is due at different times happens in its order."""
        await self.until(lambda: False, at_most_s=seconds, step_s=step_s)

    async def until(self, question: Callable[[], bool], *, at_most_s: float, step_s: float = 0.5) -> float:
        """Let time pass until `question()` is true, at most so long. Returns how long it took."""
        took_s = 0.0
        while not question() and took_s < at_most_s:
            self.ahead_s += step_s
            took_s += step_s
            await asyncio.sleep(_REALLY_S)
        return took_s


@contextmanager
def loop_clock() -> Iterator[LoopClock]:
    """The running loop's clock in the test's hands; what was put forward stays so until the loop ends."""
    loop = asyncio.get_running_loop()
    clock = LoopClock(loop)
    loop.time = clock.time  # type: ignore[method-assign]
    yield clock
