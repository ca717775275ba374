"""As asyncio.timeout, for many short stretches one after the other: one timer looks after all of them.

A timer of its own for each call of a handler costs more than a round of the sequencer: it goes into the event loop's heap, and
stays there, cancelled, for as long as the time-out is.
"""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Any, Self

_LOOK_S = 1.0
"""The timer is set for no later, so that one that nobody needs any more is gone a second later."""


class Deadline:
    """A context manager, to be entered again and again by the same task, not within itself.

    What takes longer than `seconds` is cancelled, and `expired` is true until the next stretch begins. Our cancellation does not
    leave the context; one that comes from outside does.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._owner: asyncio.Task[Any] | None = None  # who enters: asked for once, which costs as much as all the rest
        self._task: asyncio.Task[Any] | None = None  # None: outside
        self._asked = 0  # cancellations of the task from outside, when it entered
        self._until = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.expired = False

    def __enter__(self) -> Self:
        task = self._owner = self._owner or asyncio.current_task()
        if task is None:
            raise RuntimeError("a Deadline is for a task")
        self._task, self._asked, self.expired = task, task.cancelling(), False
        self._until = self._loop.time() + self._seconds
        if self._timer is None:
            self._set(self._seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if not self.expired or task is None:
            return False
        only_ours = task.uncancel() <= self._asked
        return only_ours and kind is asyncio.CancelledError

    def _set(self, seconds: float) -> None:
        self._timer = self._loop.call_later(min(seconds, _LOOK_S), self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None or self.expired:
            return
        left = self._until - self._loop.time()
        if left > 0:
            self._set(left)
        else:
            self.expired = True
            self._task.cancel()
