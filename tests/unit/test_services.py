"""A service beside a pipeline: whatever it does, the pipeline does not notice."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import structlog
from structlog.testing import capture_logs

from relay.errors import PostgresUnavailable
from relay.services import beside
from relay.settings import DaemonSettings
from relay.supervisor import ended as end

SETTINGS = DaemonSettings(backoff_first_s=0.001, backoff_max_s=0.001)


@pytest.mark.parametrize("error", [PostgresUnavailable("gone"), ZeroDivisionError("a mistake")])
async def test_a_service_that_fails_is_told_and_begins_again_and_the_pipeline_goes_on(error: Exception) -> None:
    calls = 0
    thrice = asyncio.Event()

    async def service() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            thrice.set()
            await asyncio.Event().wait()
        raise error

    with capture_logs() as told:
        async with beside({"broken": service}, settings=SETTINGS, log=structlog.get_logger()):
            async with asyncio.timeout(5):
                await thrice.wait()
    assert [(t["event"], t["service"], t["reason"]) for t in told] == [("service_failed", "broken", str(error))] * 2


async def test_services_are_ended_with_what_they_run_beside() -> None:
    ended = asyncio.Event()

    async def service() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def session() -> None:
        async with beside({"endless": service}, settings=SETTINGS, log=structlog.get_logger()):
            await asyncio.sleep(0)
            raise KeyError

    with pytest.raises(KeyError):
        await session()
    assert ended.is_set()


async def test_a_service_that_swallows_its_cancellation_does_not_hold_up_the_end() -> None:
    """As a client library does that is cancelled while a broker refuses it."""
    started = asyncio.Event()

    async def service() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()  # goes on, and waits for something else

    async with asyncio.timeout(10):
        async with beside({"deaf": service}, settings=SETTINGS, log=structlog.get_logger()):
            await started.wait()


async def test_nothing_is_left_running_also_when_the_end_itself_is_insisted_on() -> None:
    """Whoever ends a task that is just ending others cancels it again and again: those others are not left behind for that."""
    started = asyncio.Event()
    journal: list[str] = []

    async def deaf() -> None:
        for _ in range(3):
            with contextlib.suppress(asyncio.CancelledError):
                started.set()
                await asyncio.sleep(0.5)
        journal.append("deaf")
        raise KeyError

    async def session() -> None:
        inner = asyncio.create_task(deaf())
        try:
            await asyncio.wait([inner])
        finally:
            await end(inner)

    outer = asyncio.create_task(session())
    await started.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relay.supervisor._INSIST_S", 0.01)
        async with asyncio.timeout(10):
            await end(outer)
    assert journal == ["deaf"]
    assert outer.cancelled()
