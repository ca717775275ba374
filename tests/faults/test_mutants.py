"""The checker kills every mutant of the product, by name, and nothing but mutants."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from relay.sandbox import RabbitMQ
from tests.faults.lab.scene import Scene, scene
from tests.faults.mutants import MUTANTS, Mutant

NAMES = [mutant.name for mutant in MUTANTS]

ASKED_FOR = {
    "checkpoint before confirm",
    "ignore nack",
    "ignore return",
    "id > cursor",
    "ack before commit",
    "no deduplication",
    "no reordering",
    "unfenced checkpoint",
    "no fallback of LISTEN",
    "deduplication without digest",
    "truncate without the check under lock",
    "barrier lock dropped from the wake-up",
}


@pytest.fixture
async def small(database: str, consumer_database: str, broker: str) -> AsyncIterator[Scene]:
    async with scene(database, consumer_database, broker) as made:
        yield made


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
async def test_the_mutant_is_killed(
    mutant: Mutant, small: Scene, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant.patch(monkeypatch)
    with contextlib.suppress(TimeoutError):  # it may well not get through its own story
        await mutant.story(small, rabbitmq)
    verdict = await small.verdict()
    found = {check.name for check in verdict.findings}
    assert verdict.outcome == "failed", "the checker saw nothing wrong"
    assert found & mutant.killed_by, verdict.findings


STORIES = {mutant.story.__name__: mutant.story for mutant in MUTANTS}


@pytest.mark.parametrize("story", STORIES, ids=[name.replace("_", " ") for name in STORIES])
async def test_the_product_survives_the_same_story(story: str, small: Scene, rabbitmq: RabbitMQ) -> None:
    small.settle_s = 60
    await STORIES[story](small, rabbitmq)
    async with small.consumer():  # the story ends with the last effect: copies may be behind it in the queue
        verdict = await small.verdict()
    assert verdict.outcome == "passed", verdict.findings


def test_every_mutant_that_was_asked_for_is_there() -> None:
    assert set(NAMES) >= ASKED_FOR
    assert len(set(NAMES)) == len(NAMES)
