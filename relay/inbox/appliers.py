"""Several appliers on one batch: the aggregates are divided among them, each works on a connection of its own.

It pays for handlers that wait for their statements one by one: while one waits, the others go on. What order is kept for, and
what fails together, is always in one part.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from relay.inbox.apply import Applier
from relay.inbox.sequencer import Arrival, Unit
from relay.inbox.stats import Stats
from relay.inbox.store import Due
from relay.inbox.work import Batch, Rules
from relay.supervisor import ended

_MOST_ALONE = 64
"""Batches that are not divided after a collision, at most; at first it is one, and twice as many each time. Handlers that write rows
which aggregates share block each other with the locks of whole parts, and PostgreSQL takes a second to notice a deadlock: going on
like that costs a hundred times what dividing wins. A few chance collisions cost next to nothing."""


class Appliers:
    """As one Applier: when `apply` returns, everything in the batch is durable. When it raises, parts of it may be.

    After parts that collided some batches are not divided, see _MOST_ALONE.
    What is not divided (marks and answers of relays, held messages that are due, sweeping, purging) is the first one's.
    """

    def __init__(self, appliers: Sequence[Applier], rules: Rules) -> None:
        self._appliers = appliers
        self._first = appliers[0]
        self._rules = rules
        self.done = Stats()  # what the last `apply` or `retry_due` has committed, also when it raised
        self.left_due = False  # the last `apply` left something to `retry_due` that can be tried at once
        self.worked_s = 0.0  # how long the longest part of the last `apply` took, without its waits: see Applier
        self._alone = 0  # so many batches are the first one's alone now
        self._next_alone = 1

    async def probe(self) -> None:
        """Raise what writing would raise, before any message is taken: also what keeps one of the connections from opening."""
        for applier in self._appliers:
            await applier.probe()

    async def apply(self, batch: Batch) -> Stats:
        """Apply a batch, in parts at the same time, and then heed its controls. Raises PostgresError.

        A part that fails leaves the others to their work: what they commit is recognised when it is delivered again.
        Cancelled, all are.
        """
        self.done = Stats()
        self.left_due = False
        parts = divided(batch, self._rules, 1 if self._alone else len(self._appliers))
        at_work = [(applier, part) for applier, part in zip(self._appliers, parts, strict=False) if part]
        tasks = [asyncio.create_task(applier.apply(part)) for applier, part in at_work]
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            await ended(*tasks)
            for applier, _ in at_work:
                self.done += applier.done
                self.left_due |= applier.left_due
        self._learn(at_work)
        for task in tasks:
            task.result()
        self.worked_s = max((applier.worked_s for applier, _ in at_work), default=0.0)
        if batch.controls:
            self.done += await self._first.apply(Batch(controls=batch.controls))
            self.worked_s += self._first.worked_s
        return self.done

    def _learn(self, at_work: Sequence[tuple[Applier, Batch]]) -> None:
        """How many batches to leave undivided. Nothing is learned from one that was."""
        if self._alone:
            self._alone -= 1
        elif len(at_work) > 1 and any(applier.collided for applier, _ in at_work):
            self._alone, self._next_alone = self._next_alone, min(2 * self._next_alone, _MOST_ALONE)
        elif len(at_work) > 1:
            self._next_alone = max(1, self._next_alone // 2)

    async def retry_due(self, rows: int) -> Stats:
        """See Applier."""
        try:
            return await self._first.retry_due(rows)
        finally:
            self.done = self._first.done
            self.left_due = self._first.left_due

    async def sweep(self) -> int:
        """See Applier."""
        return await self._first.sweep()

    async def next_due_s(self) -> float | None:
        """See Applier."""
        return await self._first.next_due_s()

    async def purge_seen(self) -> None:
        """See Applier."""
        await self._first.purge_seen()


def divided(batch: Batch, rules: Rules, parts: int) -> list[Batch]:
    """The batch without its controls in so many parts, some of them empty; what is no event is in the first.

    An aggregate is always in the same part (a message without order by its id), also in another process or batch.
    """
    arrivals: list[list[Arrival]] = [[] for _ in range(parts)]
    for arrival in batch.arrivals:
        arrivals[_part(rules.unit(arrival), parts)].append(arrival)
    due: list[list[Due]] = [[] for _ in range(parts)]
    for one in batch.due:
        due[_part(rules.unit_of_due(one), parts)].append(one)
    strangers = [batch.strangers, *[()] * (parts - 1)]
    return [Batch(arrivals=a, due=d, strangers=s) for a, d, s in zip(arrivals, due, strangers, strict=True)]


def _part(unit: Unit, parts: int) -> int:
    return zlib.crc32("\0".join(unit).encode()) % parts
