"""The inbox in a simulation: thousands of schedules of deliveries, handlers and faults, none of which breaks a promise.

A failure names the seed of its schedule; to see it again: RELAY_SIMULATION_SEED=<seed> pytest -n 0 -k inbox_seed
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.faults.simulation.connection import FATES
from tests.faults.simulation.explorer import explore, quiet, replay, simulated
from tests.faults.simulation.inbox_schedules import NAMES, SETTINGS, play
from tests.faults.simulation.inbox_world import KINDS, MOODS, InboxWorld
from tests.faults.simulation.mutants import INBOX, Mutant, acknowledge_before_commit, no_dedup, no_reorder
from tests.faults.simulation.violation import Violation, told

SCHEDULES = range(6_000)
MORE_SCHEDULES = range(6_000, 16_000)
WITHIN = 500
"""Every mutant is found within so many schedules: most within twenty."""


def test_six_thousand_schedules_give_each_event_its_effect_once_and_in_order() -> None:
    assert _played(SCHEDULES) == 6_000


@pytest.mark.soak
def test_ten_thousand_other_schedules_give_each_event_its_effect_once_and_in_order() -> None:
    assert _played(MORE_SCHEDULES) == 10_000


def _played(seeds: range) -> int:
    """How many schedules were played, none of which broke a promise."""
    played = 0

    def counted(seed: int) -> InboxWorld:
        nonlocal played
        world = play(seed)
        played += 1
        return world

    found = explore(counted, seeds)
    assert found is None, _told(found)
    return played


@pytest.mark.skipif("RELAY_SIMULATION_SEED" not in os.environ, reason="plays the schedule that a failure has named")
def test_inbox_seed_is_played_again() -> None:
    with simulated():
        print(told(replay(play, int(os.environ["RELAY_SIMULATION_SEED"])).journal))


def test_where_an_event_fails_what_is_held_under_its_number_is_tried_at_once_not_at_the_next_sweep() -> None:
    """Found by the explorer: a contradiction was held early; the original failed, was put into quarantine, and nobody tried either."""
    with simulated():
        world = InboxWorld(1, SETTINGS[0], consumers=1)
        try:
            world.run(0.5)
            world.send("order", "a", lost=True)
            world.send("order", "a", lost=True)
            world.contradict("order", "a", 2)
            world.run(0.5)
            world.upset("order", "a", 2, "raises")
            world.repair()
            world.run(0.5)
            world.soothe()
            world.run(1.0)
            assert world.applied == {("order", "a"): [1, 2]}
            world.finish()
        finally:
            world.close()


@pytest.mark.parametrize("mutant", INBOX, ids=lambda mutant: mutant.__name__)
def test_an_inbox_that_is_broken_on_purpose_is_found_out(mutant: Mutant) -> None:
    with mutant():
        found = explore(play, range(WITHIN))
    assert found is not None, f"{mutant.__name__} survived {WITHIN} schedules: {mutant.__doc__}"


def test_the_same_seed_is_the_same_run() -> None:
    with simulated():
        for seed in range(30):
            assert replay(play, seed).journal == replay(play, seed).journal


def test_the_schedules_do_what_their_names_say() -> None:
    """Faults that never strike would prove nothing."""
    acts: dict[str, int] = {}
    with simulated():
        for seed in range(400):
            for entry in replay(play, seed).journal:
                acts[entry[1]] = acts.get(entry[1], 0) + 1
    faults = {"kill", "struck", "broker down", "shuffle", "handler", "soothe", "lost", "repair", "again"}
    faults |= {"contradiction", "tombstone", "effect"}
    assert {name for name in faults if acts.get(name, 0) < 10} == set(), acts


class Consumers(RuleBasedStateMachine):
    """The same world, played by Hypothesis: a failing schedule is shrunk to the few acts that it takes."""

    kinds = st.sampled_from(tuple(KINDS))
    names = st.sampled_from(NAMES)
    numbers = st.integers(1, 4)
    positions = st.none() | st.integers(0, 9)
    seconds = st.sampled_from((0.002, 0.05, 0.5, 3.0))

    def __init__(self) -> None:
        super().__init__()
        self._silence = quiet()
        self._silence.__enter__()
        random.seed(0)
        self.world: InboxWorld | None = None

    @initialize(seed=st.integers(0, 99), configured=st.sampled_from(SETTINGS), consumers=st.integers(1, 2))
    def start(self, seed: int, configured: Any, consumers: int) -> None:
        self.world = InboxWorld(seed, configured, consumers=consumers)
        self.world.run(0.2)

    def _do(self, act: Callable[[InboxWorld], None]) -> None:
        assert self.world is not None
        act(self.world)
        self.world.run(0.005)

    @rule(kind=kinds, name=names, position=positions, lost=st.booleans())
    def send(self, kind: str, name: str, position: int | None, lost: bool) -> None:
        self._do(lambda world: world.send(kind, name, position=position, lost=lost))

    @rule(kind=kinds, name=names, seq=numbers, position=positions)
    def send_again(self, kind: str, name: str, seq: int, position: int | None) -> None:
        self._do(lambda world: world.send_again(kind, name, seq, position))

    @rule(kind=kinds, name=names, seq=numbers)
    def contradict(self, kind: str, name: str, seq: int) -> None:
        self._do(lambda world: world.contradict(kind, name, seq))

    @rule(kind=kinds, name=names, seq=numbers)
    def bury(self, kind: str, name: str, seq: int) -> None:
        self._do(lambda world: world.bury(kind, name, seq))

    @rule()
    def repair(self) -> None:
        self._do(lambda world: world.repair())

    @rule()
    def shuffle(self) -> None:
        self._do(lambda world: world.shuffle())

    @rule(kind=kinds, name=names, seq=numbers, mood=st.sampled_from(MOODS))
    def upset(self, kind: str, name: str, seq: int, mood: Any) -> None:
        self._do(lambda world: world.upset(kind, name, seq, mood))

    @rule()
    def soothe(self) -> None:
        self._do(lambda world: world.soothe())

    @rule(seconds=seconds)
    def wait(self, seconds: float) -> None:
        self._do(lambda world: world.run(seconds))

    @rule(consumer=st.integers(0, 1))
    def kill(self, consumer: int) -> None:
        self._do(lambda world: world.kill(consumer % len(world.processes)))

    @rule(consumer=st.integers(0, 1), operations=st.integers(1, 14), fate=st.sampled_from(FATES))
    def strike(self, consumer: int, operations: int, fate: Any) -> None:
        self._do(lambda world: world.strike(consumer % len(world.processes), operations, fate))

    @rule(down_for=seconds, in_disorder=st.booleans())
    def cut_broker(self, down_for: float, in_disorder: bool) -> None:
        self._do(lambda world: world.cut_broker(down_for=down_for, in_disorder=in_disorder))

    @invariant()
    def holds(self) -> None:
        if self.world is not None and self.world.violation is not None:
            raise self.world.violation

    def teardown(self) -> None:
        try:
            if self.world is not None and self.world.violation is None:
                self.world.run(0.3)
                self.world.finish()
        finally:
            if self.world is not None:
                self.world.close()
            self._silence.__exit__(None, None, None)


_AS_OFTEN = settings(
    max_examples=100, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
)
TestConsumers = Consumers.TestCase
TestConsumers.settings = _AS_OFTEN


@pytest.mark.parametrize("mutant", [no_reorder, no_dedup, acknowledge_before_commit], ids=lambda m: m.__name__)
def test_hypothesis_finds_an_inbox_that_is_broken_on_purpose(mutant: Mutant) -> None:
    with mutant(), pytest.raises(Violation):
        run_state_machine_as_test(Consumers, settings=settings(_AS_OFTEN, phases=[Phase.generate], print_blob=False))


def _told(found: Any) -> str:
    return "" if found is None else f"seed {found.seed}: {found.violation}\n" + "\n".join(found.violation.__notes__)
