"""Crash-only sessions: any failure destroys the session, and the next one starts from what PostgreSQL says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog
from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_exponential, wait_random

from relay.errors import PostgresRefused, PrivilegeError, RelayError, UnreadableMessage
from relay.settings import DaemonSettings

WRONG_AT_START = (PrivilegeError, PostgresRefused)
"""A running daemon waits for rights or a password to come back; one that starts without them was set up wrongly."""

_INSIST_S = 1.0
"""Time between two cancellations of a task that goes on."""

HEALTHY_S = 30.0
"""A session that lasted this long was healthy: the next failure starts again with the shortest delay."""


async def supervise(
    session: Callable[[], Awaitable[None]],
    *,
    name: str,
    settings: DaemonSettings,
    stop: asyncio.Event,
    log: structlog.typing.FilteringBoundLogger,
    fatal: tuple[type[RelayError], ...] = (),
) -> None:
    """Run `session` until it returns or `stop` is set; after a retryable error run it again after a back-off.

    Raises whatever is not retryable, or is `fatal` here: a wrong setting does not become right by waiting.
    """
    backoff = Backoff(settings)
    while not stop.is_set():
        started = asyncio.get_running_loop().time()
        try:
            await session()
        except RelayError as exc:
            if not exc.retryable or isinstance(exc, fatal):
                raise
            if asyncio.get_running_loop().time() - started > HEALTHY_S:
                backoff = Backoff(settings)
            # Waiting longer would not heal an unreadable message: only being delivered again ends it.
            delay_s = settings.backoff_first_s if isinstance(exc, UnreadableMessage) else backoff.next_s()
            log.warning(
                "session_failed", session=name, error=type(exc).__name__, reason=str(exc), retry_in_s=round(delay_s, 2)
            )
            await wait_for(stop, delay_s)
        else:
            return


async def until_stopped(
    session: Coroutine[Any, Any, None],
    *,
    stop: asyncio.Event,
    grace_s: float,
    log: structlog.typing.FilteringBoundLogger,
) -> None:
    """Run a session; after `stop` let it end by itself, but not for longer than the grace period, then cancel it."""
    work = asyncio.create_task(session)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([work, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            await asyncio.wait([work], timeout=grace_s)
        if not work.done():
            log.warning("grace_over", grace_s=grace_s, reason="what was in flight is done again by the next session")
            return
        await work
    finally:
        await ended(work, stopping)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end, whatever they raise.

    Insists: a library that is just connecting can swallow a cancellation and report the broker's refusal instead, and the task
    goes on (seen: a session whose end waited for ever for a service beside it). Insists also when it is cancelled itself, by one
    that insists on the end of all this: it is raised when they have ended, not before (seen: appliers that went on after their
    session, and connected again, since a handler had swallowed the cancellation).
    """
    pending = {task for task in tasks if not task.done()}
    cancelled: asyncio.CancelledError | None = None
    while pending:
        for task in pending:
            task.cancel()
        try:
            _, pending = await asyncio.wait(pending, timeout=_INSIST_S)
        except asyncio.CancelledError as exc:
            cancelled = exc
            pending = {task for task in pending if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: nobody else will
    if cancelled is not None:
        raise cancelled


async def wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until the event is set, at most `timeout_s` seconds. True if it is."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


class Backoff:
    """Delays that double with jitter, from tenacity's own arithmetic."""

    def __init__(self, settings: DaemonSettings) -> None:
        self._wait = wait_exponential(multiplier=settings.backoff_first_s, max=settings.backoff_max_s) + wait_random(
            0, settings.backoff_first_s
        )
        self._state = RetryCallState(Retrying(), None, (), {})

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        delay_s = self._wait(self._state)
        self._state.attempt_number += 1
        return float(delay_s)
