"""The outbox in a simulation: thousands of schedules of producers, relays and faults, none of which breaks a promise.

A failure names the seed of its schedule; to see it again: RELAY_SIMULATION_SEED=<seed> pytest -n 0 -k outbox_seed
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
from tests.faults.simulation.mutants import (
    OUTBOX,
    Mutant,
    checkpoint_before_confirm,
    ignore_nack,
    successors_not_parked,
)
from tests.faults.simulation.outbox_schedules import NAMES, PRODUCERS, SETTINGS, play
from tests.faults.simulation.outbox_world import World
from tests.faults.simulation.violation import Violation, told

SCHEDULES = range(6_000)
MORE_SCHEDULES = range(6_000, 16_000)
WITHIN = 500
"""Every mutant is found within so many schedules: most within sixty."""


def test_six_thousand_schedules_lose_nothing_keep_the_order_and_heal() -> None:
    assert _played(SCHEDULES) == 6_000


@pytest.mark.soak
def test_ten_thousand_other_schedules_lose_nothing_either() -> None:
    assert _played(MORE_SCHEDULES) == 10_000


def _played(seeds: range) -> int:
    """How many schedules were played, none of which broke a promise."""
    played = 0

    def counted(seed: int) -> World:
        nonlocal played
        world = play(seed)
        played += 1
        return world

    found = explore(counted, seeds)
    assert found is None, _told(found)
    return played


@pytest.mark.skipif("RELAY_SIMULATION_SEED" not in os.environ, reason="plays the schedule that a failure has named")
def test_outbox_seed_is_played_again() -> None:
    with simulated():
        print(told(replay(play, int(os.environ["RELAY_SIMULATION_SEED"])).journal))


@pytest.mark.parametrize("mutant", OUTBOX, ids=lambda mutant: mutant.__name__)
def test_a_relay_that_is_broken_on_purpose_is_found_out(mutant: Mutant) -> None:
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
    faults = {"kill", "struck", "lose lease", "broker down", "broker blocked", "nacked", "returned", "unanswered"}
    faults |= {"closed", "pause", "resume", "roll back", "arrived", "written"}
    assert {name for name in faults if acts.get(name, 0) < 10} == set(), acts


class Outbox(RuleBasedStateMachine):
    """The same world, played by Hypothesis: a failing schedule is shrunk to the few acts that it takes."""

    producers = st.integers(0, PRODUCERS - 1)
    names = st.sampled_from(NAMES)
    seconds = st.sampled_from((0.001, 0.01, 0.05, 0.3, 2.0))

    def __init__(self) -> None:
        super().__init__()
        self._silence = quiet()
        self._silence.__enter__()
        random.seed(0)
        self.world: World | None = None

    @initialize(seed=st.integers(0, 99), configured=st.sampled_from(SETTINGS), relays=st.integers(1, 2))
    def start(self, seed: int, configured: Any, relays: int) -> None:
        self.world = World(seed, configured, relays=relays)
        self.world.run(0.4)

    def _do(self, act: Callable[[World], None]) -> None:
        assert self.world is not None
        act(self.world)
        self.world.run(0.01)

    @rule(producer=producers)
    def begin(self, producer: int) -> None:
        self._do(lambda world: world.begin(producer))

    @rule(producer=producers, name=names, event_type=st.sampled_from(("Booked", "Paid")))
    def emit(self, producer: int, name: str, event_type: str) -> None:
        self._do(lambda world: world.emit(producer, name, event_type))

    @rule(name=names)
    def book(self, name: str) -> None:
        self._do(lambda world: world.emit(PRODUCERS, name))
        self._do(lambda world: world.commit(PRODUCERS))

    @rule(producer=producers)
    def commit(self, producer: int) -> None:
        self._do(lambda world: world.commit(producer))

    @rule(producer=producers)
    def roll_back(self, producer: int) -> None:
        self._do(lambda world: world.roll_back(producer))

    @rule(seconds=seconds)
    def wait(self, seconds: float) -> None:
        self._do(lambda world: world.run(seconds))

    @rule(relay=st.integers(0, 1))
    def kill(self, relay: int) -> None:
        self._do(lambda world: world.kill(relay % len(world.processes)))

    @rule(relay=st.integers(0, 1), operations=st.integers(1, 12), fate=st.sampled_from(FATES))
    def strike(self, relay: int, operations: int, fate: Any) -> None:
        self._do(lambda world: world.strike(relay % len(world.processes), operations, fate))

    @rule(noticed_after=seconds)
    def lose_lease(self, noticed_after: float) -> None:
        self._do(lambda world: world.lose_lease(noticed_after))

    @rule(down_for=seconds)
    def cut_broker(self, down_for: float) -> None:
        self._do(lambda world: world.cut_broker(down_for=down_for))

    @rule(seconds=seconds)
    def block_broker(self, seconds: float) -> None:
        self._do(lambda world: world.block_broker(seconds))

    @rule(messages=st.integers(1, 3), kept=st.booleans())
    def nack(self, messages: int, kept: bool) -> None:
        self._do(lambda world: world.nack(messages, kept=kept))

    @rule(kind=st.sampled_from(("unbound", "full", "hanging")), name=names)
    def refuse(self, kind: str, name: str) -> None:
        self._do(lambda world: world.refuse(kind, name))

    @rule(name=names)
    def poison(self, name: str) -> None:
        self._do(lambda world: world.poison(name))

    @rule(name=names)
    def accept(self, name: str) -> None:
        self._do(lambda world: world.accept(name))

    @rule(name=names)
    def pause(self, name: str) -> None:
        self._do(lambda world: world.pause(name))

    @rule()
    def resume(self) -> None:
        self._do(lambda world: world.resume())

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
TestOutbox = Outbox.TestCase
TestOutbox.settings = _AS_OFTEN


@pytest.mark.parametrize(
    "mutant", [ignore_nack, successors_not_parked, checkpoint_before_confirm], ids=lambda m: m.__name__
)
def test_hypothesis_finds_a_relay_that_is_broken_on_purpose(mutant: Mutant) -> None:
    with mutant(), pytest.raises(Violation):
        run_state_machine_as_test(Outbox, settings=settings(_AS_OFTEN, phases=[Phase.generate], print_blob=False))


def _told(found: Any) -> str:
    return "" if found is None else f"seed {found.seed}: {found.violation}\n" + "\n".join(found.violation.__notes__)
