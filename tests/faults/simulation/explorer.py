"""Plays thousands of schedules, each from a seed of its own: whoever knows the seed plays the same schedule again."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import relay.daemon
import relay.inbox.apply
import relay.inbox.consumer
import relay.inbox.figures
import relay.inbox.work
import relay.outbox.lease
import relay.outbox.shard
from tests.faults.simulation.silence import SILENCE
from tests.faults.simulation.violation import Violation

Play = Callable[[int], Any]

_LOGGING: Sequence[Any] = (
    relay.daemon,
    relay.outbox.shard,
    relay.outbox.lease,
    relay.inbox.apply,
    relay.inbox.consumer,
    relay.inbox.figures,
    relay.inbox.work,
)
_COLLECT_AFTER = 250
_NAPS_S: dict[str, Any] = {"_BACKOFF_FIRST_S": 0.005, "_BACKOFF_LAST_S": 0.05}
"""Of a relay that is awake and idle: five times as long as it naps in life, and a third of the simulation's time is saved."""


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule in which a promise is broken."""

    seed: int
    violation: Violation


@contextmanager
def quiet() -> Iterator[None]:
    """Within it relay does not log, and naps longer; what it draws at random comes from whoever seeds `random`."""
    logs = [module.log for module in _LOGGING]
    dice = random.getstate()
    for module in _LOGGING:
        module.log = SILENCE
    try:
        with patch.multiple(relay.outbox.shard, **_NAPS_S):
            yield
    finally:
        random.setstate(dice)
        for module, log in zip(_LOGGING, logs, strict=True):
            module.log = log


@contextmanager
def simulated() -> Iterator[None]:
    """`quiet`, and garbage is not collected, which would cost a third of the simulation."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with quiet():
            yield
    finally:
        gc.enable()
        gc.unfreeze()


def explore(play: Play, seeds: Sequence[int]) -> Found | None:
    """Play the schedules of these seeds; the first that breaks a promise, or None."""
    with simulated():
        for count, seed in enumerate(seeds):
            if count % _COLLECT_AFTER == _COLLECT_AFTER - 1:
                gc.collect()
            try:
                replay(play, seed)
            except Violation as violation:
                return Found(seed, violation)
    return None


def replay(play: Play, seed: int) -> Any:
    """Play one. Also the jitter of relay's own delays comes from the seed."""
    random.seed(seed)
    return play(seed)
