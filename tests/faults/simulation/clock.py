"""An event loop in virtual time: single-threaded, without sockets, and it never waits. The same calls give the same run."""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any, TypeVar

from tests.faults.simulation.violation import Violation

_T = TypeVar("_T")
_STEPS_AT_ONE_MOMENT = 20_000


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as tasks, futures, events and time-outs need. What is ready runs in the order it became so."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle | asyncio.Future[None]]] = []
        self._count = 0
        self.steps = 0
        self.errors: list[str] = []
        """What nobody retrieved: an exception in a callback, or in a task that nobody awaited."""

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def sleep(self, seconds: float) -> asyncio.Future[None]:
        """To be awaited: asyncio.sleep at half the price, for the models, which do little else."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self._count += 1
        heapq.heappush(self._timers, (self._now + seconds, self._count, future))
        return future

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, _T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[_T]:
        return asyncio.Task(coro, loop=self, name=name or "task", context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Called by asyncio; a cancelled timer is left where it is, and passed over."""

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within it, this is the running loop: tasks can be created."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(before)

    def run_until(self, deadline: float) -> None:
        """Run everything that happens up to this moment."""
        with self.current():
            self._run_until(deadline)
        self._now = max(self._now, deadline)

    def _run_until(self, deadline: float) -> None:
        ready, timers = self._ready, self._timers
        while True:
            since = self.steps
            while ready:
                handle = ready.popleft()
                if not handle.cancelled():
                    self.steps += 1
                    handle._run()
                    if self.steps - since > _STEPS_AT_ONE_MOMENT:
                        raise Violation(f"it spins: {_STEPS_AT_ONE_MOMENT} steps at {self._now:.3f} s without a pause")
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers or timers[0][0] > deadline:
                return
            self._now = max(self._now, timers[0][0])
            while timers and timers[0][0] <= self._now:
                timer = heapq.heappop(timers)[2]
                if isinstance(timer, asyncio.TimerHandle):
                    if not timer.cancelled():
                        ready.append(timer)
                elif not timer.done():
                    timer.set_result(None)
