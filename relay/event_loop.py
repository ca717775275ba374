"""The event loop in the process of a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from relay.errors import ConfigError

EventLoop = Literal["uvloop", "asyncio"]
"""uvloop is the same loop in C on libuv. Beside asyncio's own (`relay bench --event-loop`, one run after the other on an idle machine): end to
end at 1 000 events a second a median of 7.5 ms instead of 9.3; of the daemons' CPU a message 11 % less live, 13 % less where each message has
a statement of its own, 5 % less with a batch handler, and no less where a backlog is drained."""

_T = TypeVar("_T")


def run_on(event_loop: EventLoop, main: Coroutine[Any, Any, _T]) -> _T:
    """Like `asyncio.run`, on this kind of loop. Raises ConfigError where uvloop cannot be imported."""
    try:
        factory = _factory(event_loop)
    except ConfigError:
        main.close()  # or Python would warn of a coroutine that was never awaited
        raise
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def _factory(event_loop: EventLoop) -> Callable[[], asyncio.AbstractEventLoop]:
    if event_loop == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop  # 40 ms that a command of one question does without
    except ImportError as exc:
        raise ConfigError(
            f'daemon.event_loop is "uvloop", which cannot be imported here ({exc}): install uvloop, or set it to "asyncio"'
        ) from exc
    return uvloop.new_event_loop
