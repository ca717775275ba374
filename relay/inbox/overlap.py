"""What is done while a handler waits for PostgreSQL: the next deliveries are understood, one for each call, so that both are at work.

A portion of them takes several times as long as a statement: its answer would wait for us, and the server for the next one.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST = 8
"""Steps in one turn of the loop, where several appliers or handlers that did not wait have begun calls since the last. One takes a
hundredth of a millisecond, a message of a megabyte a whole one. What is left over has the next turn."""


class Overlap:
    """Between those who call handlers one by one and the intake. Without an intake nothing is done.

    The intake begins none of its own portions meanwhile: see `rests` and `rested`. All of it is for one event loop.
    """

    def __init__(self) -> None:
        self._step: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context = contextvars.copy_context()
        self._due = 0
        self._calling = 0  # several appliers may be at work
        self._rested = asyncio.Event()
        self._rested.set()

    @contextmanager
    def stepping(self, step: Callable[[], None]) -> Iterator[None]:
        """Within it `step` is what is done. It must return soon and raise nothing."""
        self._step, self._loop, self._context = step, asyncio.get_running_loop(), contextvars.copy_context()
        try:
            yield
        finally:
            self._step, self._loop, self._due = None, None, 0

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Within it handlers are called one by one, `begins` before each."""
        self._calling += 1
        self._rested.clear()
        try:
            yield
        finally:
            self._calling -= 1
            if not self._calling:
                self._due = 0
                self._rested.set()

    def begins(self) -> None:
        """Do a step as soon as the caller waits for something: for a handler, once it has sent its statement."""
        if self._loop is None:
            return
        self._due += 1
        if self._due == 1:
            self._soon(self._loop)

    @property
    def rests(self) -> bool:
        """Whether handlers are being called one by one."""
        return self._calling > 0

    async def rested(self) -> None:
        """Until they are not."""
        await self._rested.wait()

    def _do(self) -> None:
        if self._step is None or self._loop is None:
            return
        steps = min(self._due, _MOST)
        self._due -= steps
        for _ in range(steps):
            self._step()
        if self._due:
            self._soon(self._loop)

    def _soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the context of the intake: what a handler has bound for its log lines is not for those about other messages."""
        loop.call_soon(self._do, context=self._context)
