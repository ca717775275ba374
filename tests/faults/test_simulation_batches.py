"""The inbox in a simulation, with a batch handler: the same promises, however events are grouped and whatever fails among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest

from relay.inbox import handling
from relay.inbox.narrowing import Narrowing
from relay.inbox.plan import Call, Ready, calls
from relay.inbox.work import Batch
from tests.faults.simulation.explorer import explore, replay, simulated
from tests.faults.simulation.inbox_schedules import play
from tests.faults.simulation.inbox_world import InboxWorld

SCHEDULES = range(20_000, 21_000)
MORE_SCHEDULES = range(21_000, 31_000)
WITHIN = 500

_play = partial(play, in_batches=True)


def _played(seeds: range) -> None:
    found = explore(_play, seeds)
    assert found is None, f"seed {found.seed}: {found.violation}\n" + "\n".join(found.violation.__notes__)


def test_a_thousand_schedules_give_each_event_its_effect_once_and_in_order() -> None:
    _played(SCHEDULES)


@pytest.mark.soak
def test_ten_thousand_other_schedules_give_each_event_its_effect_once_and_in_order() -> None:
    _played(MORE_SCHEDULES)


def test_many_calls_have_several_events() -> None:
    """Calls of one event would prove nothing."""
    sizes: dict[int, int] = {}

    def counted(seed: int) -> InboxWorld:
        world = _play(seed)
        for entry in world.journal:
            if entry[1] == "call":
                sizes[entry[2]] = sizes.get(entry[2], 0) + 1
        return world

    with simulated():
        for seed in range(100):
            replay(counted, seed)
    assert sum(n for size, n in sizes.items() if size > 1) > 50, sizes


# Broken on purpose

Mutant = Callable[[], Any]


def no_order_in_a_call() -> Any:
    """Events come as they like."""

    def mutated(ready: Sequence[Ready]) -> Iterator[Call]:
        for call in calls(ready):
            yield Call(call.handler, call.arrivals[::-1])

    return patch.object(handling, "calls", mutated)


def the_limit_cuts_off() -> Any:
    """What is above the limit of a call is not handled."""

    def mutated(ready: Sequence[Ready]) -> Iterator[Call]:
        yield from list(calls(ready))[:1]

    return patch.object(handling, "calls", mutated)


def half_of_a_failed_batch_is_forgotten() -> Any:
    """Dividing loses a part, which is acknowledged with the rest."""
    taken = Narrowing.next

    def mutated(self: Narrowing) -> Batch | None:
        part = taken(self)
        return taken(self) if part is not None and self._divisions is not None else part

    return patch.object(Narrowing, "next", mutated)


MUTANTS: tuple[Mutant, ...] = (no_order_in_a_call, the_limit_cuts_off, half_of_a_failed_batch_is_forgotten)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_an_inbox_that_is_broken_on_purpose_is_found_out(mutant: Mutant) -> None:
    with mutant():
        found = explore(_play, range(WITHIN))
    assert found is not None, f"{mutant.__name__} survived {WITHIN} schedules: {mutant.__doc__}"
