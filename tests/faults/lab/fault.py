"""What a fault is, and the catalogue of all there are."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.lab.stage import Stage

Act = Callable[["Stage", random.Random], Awaitable[int]]
"""Injects, waits, heals in a `finally`, and returns how often the fault has bitten: a count of effects that were seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault."""

    kind: str
    rows: tuple[int, ...]  # of the fault matrix
    touches: frozenset[str]  # what it breaks; two faults overlap only if these are disjoint
    act: Act
    smoke: bool  # is part of the smoke profile
    confined_to: str | None
    recovery_s: float  # longest time from its heal to the last effect of what was committed before
    loses: bool  # takes messages from the broker for good: only repair brings them back
    needs_repair: bool  # breaks what there is only for repair, or shows itself by that
    needs: Callable[[], bool]  # False: this machine cannot do it (a program is missing)


class Broken(AssertionError):
    """A fault has seen relay break a promise that no table tells of: an exit code, a password in a log. The run has failed."""


CATALOGUE: dict[str, Fault] = {}


def fault(
    kind: str,
    *,
    rows: tuple[int, ...],
    touches: tuple[str, ...],
    smoke: bool = False,
    confined_to: str | None = None,
    recovery_s: float = 15.0,
    loses: bool = False,
    needs_repair: bool = False,
    needs: Callable[[], bool] = lambda: True,
) -> Callable[[Act], Act]:
    """Put an act into the catalogue under its kind.

    `touches`: out of relay, consumer, broker, producer-db, consumer-db, producers, relay-amqp, relay-pg, consumer-amqp, consumer-pg.
    """

    def enter(act: Act) -> Act:
        if kind in CATALOGUE:
            raise ValueError(f"two faults are called {kind!r}")
        CATALOGUE[kind] = Fault(
            kind=kind,
            rows=rows,
            touches=frozenset(touches),
            act=act,
            smoke=smoke,
            confined_to=confined_to,
            recovery_s=recovery_s,
            loses=loses,
            needs_repair=needs_repair,
            needs=needs,
        )
        return act

    return enter
