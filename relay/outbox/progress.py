"""What a shard did: for the log, the tests and the benchmark, and what one session remembers for the next."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from relay.outbox.doubt import Doubts
from relay.outbox.recent import Recent

_RATE_S = 10.0
"""What "lately" means for a rate."""

Suspicion = Literal["closed", "late"]
"""Why a row is tried alone: it, or one beside it, closed the channel; or it was not confirmed in time."""


class Rate:
    """Rows a second over the last 10 seconds, from a count that only grows. Pure: the caller brings the clock."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # (when, count), the first one 10 s ago or earlier

    def at(self, now: float, count: int) -> float:
        """The rate, when `count` is reached `now`."""
        seen = self._seen
        seen.append((now, count))
        while len(seen) > 2 and seen[1][0] <= now - _RATE_S:
            seen.popleft()
        since, before = seen[0]
        return (count - before) / min(_RATE_S, max(1.0, now - since))


@dataclass(frozen=True, slots=True)
class Failure:
    """What ended a session."""

    error: str  # its class, and what it said
    at: float  # by the event loop's clock


@dataclass(slots=True)
class Progress:
    """Counts rows; the counts only ever grow. `changed` is set whenever one does."""

    published: int = 0
    parked: int = 0
    unparked: int = 0
    pages: int = 0
    checkpoints: int = 0
    sleeps: int = 0
    looks: int = 0  # at what operators did
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    confirmed: int = 0  # published and unparked, at once: the others are counted when the database knows
    rate: Rate = field(default_factory=Rate)
    recent: Recent = field(default_factory=Recent)  # for the marks
    failure: Failure | None = None  # that the database has not been told of
    shard_is_paused: bool = False  # by an operator

    # What the next session must know, because the last one broke over a row.
    careful: int = 0  # rows still to be published one at a time, to find the one that closes the channel
    suspects: dict[int, Suspicion] = field(default_factory=dict)  # by id: parked rows to be tried alone
    doubts: Doubts = field(default_factory=Doubts)  # about queues that are said to be full
    unconfirmed: dict[int, int] = field(
        default_factory=dict
    )  # row id: how often it was not confirmed while others were
