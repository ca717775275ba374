"""What runs beside a pipeline: each service has connections and a task of its own, and can neither end nor slow what it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import structlog

from relay.errors import RelayError
from relay.settings import DaemonSettings
from relay.supervisor import HEALTHY_S, Backoff, ended

Service = Callable[[], Awaitable[None]]
"""Runs until it is cancelled. Called again, after a back-off, when it raises or returns."""

_REFUSED = DaemonSettings(backoff_first_s=1.0, backoff_max_s=60.0)


def refusals() -> Backoff:
    """Delays between two looks for what this user may not use: it may be a right that was taken away for a moment, or for good."""
    return Backoff(_REFUSED)


@asynccontextmanager
async def beside(
    services: Mapping[str, Service], *, settings: DaemonSettings, log: structlog.typing.FilteringBoundLogger
) -> AsyncIterator[None]:
    """Within it, the services run, by name. Their errors are logged and they begin again; at the end they are cancelled.

    A service must not block the event loop, and must give up what it waits for when it is cancelled.
    """
    tasks = [
        asyncio.create_task(_again_and_again(name, service, settings, log), name=name)
        for name, service in services.items()
    ]
    try:
        yield
    finally:
        await ended(*tasks)


async def _again_and_again(
    name: str, service: Service, settings: DaemonSettings, log: structlog.typing.FilteringBoundLogger
) -> None:
    backoff = Backoff(settings)
    clock = asyncio.get_running_loop().time
    while True:
        started = clock()
        failure: Exception | None = None
        try:
            await service()
        except Exception as exc:  # noqa: BLE001 - also a mistake in a service is its own, not the pipeline's
            failure = exc
        if clock() - started > HEALTHY_S:
            backoff = Backoff(settings)
        delay_s = backoff.next_s()
        if failure is not None:
            log.warning(
                "service_failed",
                service=name,
                error=type(failure).__name__,
                reason=str(failure),
                retry_in_s=round(delay_s, 2),
                exc_info=None if isinstance(failure, RelayError) else failure,
            )
        await asyncio.sleep(delay_s)
