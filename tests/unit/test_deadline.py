"""A deadline for many stretches: each has its whole time, only what takes longer is cancelled, and only our cancellation ends there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from relay.inbox.deadline import Deadline
from tests.harness.loop_clock import LoopClock, loop_clock


@pytest.fixture
async def clock() -> AsyncIterator[LoopClock]:
    with loop_clock() as clock:
        yield clock


async def stretch(deadline: Deadline, clock: LoopClock, seconds: float) -> bool:
    """Whether a stretch of so long was cut."""
    with deadline:
        await clock.forward(seconds)
    return deadline.expired


async def test_what_takes_too_long_is_cut_and_what_does_not_is_left_alone(clock: LoopClock) -> None:
    deadline = Deadline(5)
    assert [await stretch(deadline, clock, s) for s in (1, 4, 7, 0, 4, 4, 7)] == [
        False,
        False,
        True,
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("seconds", [0.6, 3.0, 30.0])
async def test_each_stretch_has_its_whole_time_wherever_the_timer_is(clock: LoopClock, seconds: float) -> None:
    deadline = Deadline(seconds)
    started = asyncio.get_running_loop().time()
    for _ in range(5):
        assert not await stretch(deadline, clock, seconds / 2)
    before = asyncio.get_running_loop().time()
    with deadline:
        await asyncio.gather(asyncio.Event().wait(), clock.forward(10 * seconds, step_s=0.25))
    took = asyncio.get_running_loop().time() - before
    assert deadline.expired
    assert seconds <= took < seconds + 0.5
    assert before - started > 2 * seconds


async def test_a_cancellation_from_outside_goes_through(clock: LoopClock) -> None:
    deadline = Deadline(5)
    inside = asyncio.Event()

    async def work() -> None:
        with deadline:
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not deadline.expired


async def test_a_cancellation_from_outside_goes_through_also_when_the_time_is_over(clock: LoopClock) -> None:
    deadline = Deadline(5)
    late = asyncio.Event()

    async def work() -> None:
        with deadline:
            try:
                await asyncio.Event().wait()
            finally:
                late.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    while not late.is_set():
        await clock.forward(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert deadline.expired


async def test_who_swallows_the_cancellation_has_still_taken_too_long_and_can_go_on(clock: LoopClock) -> None:
    deadline = Deadline(2)
    with deadline:
        try:
            await clock.forward(10)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
    assert deadline.expired
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not await stretch(deadline, clock, 1)


async def test_an_exception_is_nobody_elses_and_goes_through(clock: LoopClock) -> None:
    deadline = Deadline(2)
    with pytest.raises(ZeroDivisionError), deadline:
        raise ZeroDivisionError
    assert not deadline.expired


async def test_nothing_is_cancelled_after_the_last_stretch(clock: LoopClock) -> None:
    deadline = Deadline(2)
    assert not await stretch(deadline, clock, 1)
    await clock.forward(10)
    assert not deadline.expired
