"""What is done beside a call of a handler: one step for each, while the handler waits, and nothing when nobody offers one."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from itertools import pairwise

from relay.inbox.overlap import Overlap


async def test_a_step_is_done_while_the_handler_waits_and_not_before() -> None:
    overlap, happened = Overlap(), list[str]()

    async def handler() -> None:
        happened.append("sent")
        await asyncio.sleep(0)
        happened.append("answered")

    with overlap.stepping(lambda: happened.append("step")), overlap.calls():
        for _ in range(2):
            overlap.begins()
            await handler()
    assert happened == ["sent", "step", "answered", "sent", "step", "answered"]


async def test_handlers_that_did_not_wait_get_their_steps_when_one_does_a_few_in_each_turn_of_the_loop() -> None:
    overlap, steps = Overlap(), list[int]()
    with overlap.stepping(lambda: steps.append(1)), overlap.calls():
        for _ in range(100):
            overlap.begins()
        done = [0]
        while done[-1] < 100:
            await asyncio.sleep(0)
            done.append(len(steps))
        await asyncio.sleep(0)
    assert len(steps) == 100
    assert max(after - before for before, after in pairwise(done)) == 8


async def test_what_is_left_when_the_calls_are_over_is_for_the_portions() -> None:
    overlap, steps = Overlap(), list[int]()
    with overlap.stepping(lambda: steps.append(1)):
        with overlap.calls():
            for _ in range(100):
                overlap.begins()
        for _ in range(20):
            await asyncio.sleep(0)
        assert steps == []
        with overlap.calls():
            overlap.begins()
            await asyncio.sleep(0)
        assert steps == [1]


async def test_a_step_does_not_see_what_a_handler_has_bound_in_its_context() -> None:
    bound = ContextVar("bound", default="nothing")
    overlap, seen = Overlap(), list[str]()
    with overlap.stepping(lambda: seen.append(bound.get())), overlap.calls():
        bound.set("by a handler")
        overlap.begins()
        await asyncio.sleep(0)
    assert seen == ["nothing"]


async def test_appliers_at_the_same_time_get_a_step_for_each_of_their_calls() -> None:
    overlap, steps = Overlap(), list[int]()

    async def applier() -> None:
        with overlap.calls():
            for _ in range(5):
                overlap.begins()
                await asyncio.sleep(0)

    with overlap.stepping(lambda: steps.append(1)):
        await asyncio.gather(*(applier() for _ in range(3)))
    assert len(steps) == 15


async def test_the_portions_rest_until_the_last_of_several_has_called_its_handlers() -> None:
    overlap, rests = Overlap(), list[bool]()
    rests.append(overlap.rests)
    await overlap.rested()
    with overlap.calls():
        with overlap.calls():
            rests.append(overlap.rests)
        rests.append(overlap.rests)
        waiting = asyncio.create_task(overlap.rested())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    rests.append(overlap.rests)
    assert rests == [False, True, True, False]


async def test_nothing_is_done_once_the_intake_has_ended() -> None:
    overlap, steps = Overlap(), list[int]()
    with overlap.stepping(lambda: steps.append(1)):
        overlap.begins()
    await asyncio.sleep(0)
    overlap.begins()
    await asyncio.sleep(0)
    assert steps == []
    with overlap.stepping(lambda: steps.append(1)):  # the next session's
        overlap.begins()
        await asyncio.sleep(0)
    assert steps == [1]
