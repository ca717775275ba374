"""How long, how much, and which faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.lab.checker import EVERY_RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One way to run the laboratory."""

    name: str
    seconds: float  # of faults; 0: each fault once
    rate: float  # events a second
    producers: int
    gap_s: float  # mean time between the beginnings of two faults
    at_once: int  # faults at the same time
    alone: float  # share of the faults before which everybody is given time to recover
    kinds_needed: int  # different kinds of fault that must have bitten
    quiet_s: float = 10.0  # load without faults, before and after
    settle_s: float = 90.0  # longest time from the end of the load until everything is applied
    smoke: bool = False  # only the faults that are marked so
    examines: frozenset[str] = EVERY_RUN  # checks that must have had something to look at, or the run is inconclusive


PROFILES = {
    "smoke": Profile(
        name="smoke",
        seconds=0,
        rate=150,
        producers=4,
        gap_s=1,
        at_once=2,
        alone=0.6,
        kinds_needed=12,
        quiet_s=10,
        smoke=True,
    ),
    "standard": Profile(
        name="standard",
        seconds=30 * 60,
        rate=100,
        producers=6,
        gap_s=4,
        at_once=2,
        alone=0.6,
        kinds_needed=25,
        examines=EVERY_RUN | {"fairness"},
        quiet_s=20,
    ),
    "soak": Profile(
        name="soak",
        seconds=8 * 3600,
        rate=100,
        producers=6,
        gap_s=10,
        at_once=2,
        alone=0.6,
        kinds_needed=25,
        examines=EVERY_RUN | {"fairness"},
        quiet_s=60,
    ),
    "custom": Profile(
        name="custom",
        seconds=0,
        rate=150,
        producers=4,
        gap_s=1,
        at_once=1,
        alone=1,
        kinds_needed=1,
        quiet_s=3,
        examines=frozenset(),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What can be chosen."""

    profile: Profile
    seed: int
    postgres: str | None = None  # a major version; None: the first that is found
    kinds: Sequence[str] = ()  # only these; none: all of the profile
    repair: bool = True  # False: nobody heals what another mistake has lost, and faults that lose messages are left out
    folder: Path | None = None  # for the report, the history and the logs; None: a fresh one
