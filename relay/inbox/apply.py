"""A batch, applied: first as a whole; if something in it fails, what failed is set apart and the rest still commits."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace

import structlog

from relay.errors import PostgresUnavailable
from relay.inbox import store
from relay.inbox.database import Database
from relay.inbox.failures import Collision, CommitFailed, HandlerFailed
from relay.inbox.sequencer import Unit
from relay.inbox.stats import Stats
from relay.inbox.work import FOLLOW_LIMIT, Batch, Rules, Work
from relay.postgres.errors import postgres_errors

log = structlog.get_logger()

_SPLITS = 4
"""After so many failing aggregates in one batch the rest is done aggregate by aggregate as well, not as a whole again."""

_REDOS = 20
_DUE_ROWS = 100
_PURGE_ROWS = 5000

Doomed = dict[tuple[str, int], str]


class Applier:
    """Applies batches in transactions of one database, for one consumer.

    When `apply` returns, everything in the batch is durable: applied, or in one of the tables. When it raises, parts
    of the batch may be; the rest is delivered again, and what was done already is recognised.
    """

    def __init__(self, database: Database, rules: Rules) -> None:
        self._database = database
        self._rules = rules

    async def apply(self, batch: Batch) -> Stats:
        """Apply a batch. Raises PostgresError; a handler's failure is not an error here but a held message."""
        total = Stats()
        doomed: Doomed = {}
        apart: list[Batch] = []
        while batch:
            try:
                total += await self._attempt(batch, doomed, careful=False)
                break
            except HandlerFailed as exc:
                self._note(exc, doomed)
                unit = self._rules.unit(exc.arrival)
                taken, batch = self._split(batch, lambda other, unit=unit: other == unit)  # type: ignore[misc]
                apart.append(taken)
            except CommitFailed as exc:
                log.warning("batch_failed_at_commit", error=exc.error, events=len(batch.arrivals))
                apart += self._units(batch)
                batch = Batch(strangers=batch.strangers)
            if len(apart) >= _SPLITS:
                apart += self._units(batch)
                batch = Batch(strangers=batch.strangers)
        for single in apart:
            total += await self._alone(single, doomed)
        return total

    async def retry_due(self) -> Stats:
        """Try the held messages whose time has come; what waits behind those that succeed now follows."""
        with postgres_errors():
            due = await store.due_held(await self._database.connection(), self._rules.consumer, _DUE_ROWS)
        return await self.apply(Batch(due=due))

    async def next_due_s(self) -> float | None:
        """Seconds until the next held message is due; None if there is none."""
        with postgres_errors():
            return await store.next_due_s(await self._database.connection(), self._rules.consumer)

    async def purge_seen(self) -> None:
        """Forget ids of unordered messages that are older than the retention."""
        with postgres_errors():
            await store.purge_seen(
                await self._database.connection(),
                self._rules.consumer,
                retention_s=self._rules.settings.seen_retention_s,
                rows=_PURGE_ROWS,
            )

    async def probe(self) -> None:
        """Raise what writing would raise, before any message is taken from the broker."""
        with postgres_errors():
            await store.probe(await self._database.connection(), self._rules.consumer)

    async def _alone(self, batch: Batch, doomed: Doomed) -> Stats:
        """One aggregate (or one message without order) in a transaction of its own, a savepoint a message."""
        while True:
            try:
                return await self._attempt(batch, doomed, careful=True)
            except HandlerFailed as exc:
                self._note(exc, doomed)
            except CommitFailed as exc:
                log.warning("aggregate_failed_at_commit", error=exc.error, events=len(batch.arrivals))
                return await self._one_by_one(batch, doomed)

    async def _one_by_one(self, batch: Batch, doomed: Doomed) -> Stats:
        """A transaction a message, so that a COMMIT that fails names the message. Held successors are left to the timer."""
        total = Stats()
        for single in _singles(batch):
            blamed = False
            while True:
                try:
                    total += await self._attempt(single, doomed, careful=True, follow=0)
                    break
                except HandlerFailed as exc:
                    self._note(exc, doomed)
                except CommitFailed as exc:
                    if blamed:
                        raise PostgresUnavailable(f"COMMIT fails without any handler's doing: {exc.error}") from exc
                    blamed = True
                    doomed[_name(single)] = exc.error
        return total

    async def _attempt(self, batch: Batch, doomed: Doomed, *, careful: bool, follow: int = FOLLOW_LIMIT) -> Stats:
        """One transaction; redone after a deadlock or serialization failure, which is nobody's fault."""
        for redo in range(_REDOS):
            try:
                async with self._database.transaction() as connection:
                    work = Work(connection, self._rules, careful=careful, doomed=doomed, follow=follow)
                    stats = await work.run(batch)
            except Collision as exc:
                log.info("transaction_redone", reason=str(exc))
                await asyncio.sleep(random.uniform(0, 0.01 * (redo + 1)))  # noqa: S311 - no secret
            else:
                return stats
        raise PostgresUnavailable(f"a batch was redone {_REDOS} times because of deadlocks or serialization failures")

    @staticmethod
    def _note(failure: HandlerFailed, doomed: Doomed) -> None:
        """A handler that made the connection unfit is not given a second chance in the same batch."""
        log.debug("handler_failed_in_batch", message_id=failure.arrival.event.message_id, error=failure.error)
        if failure.ends_transaction:
            doomed[failure.arrival.name] = failure.error

    def _split(self, batch: Batch, chosen: Callable[[Unit], bool]) -> tuple[Batch, Batch]:
        unit, of_due = self._rules.unit, self._rules.unit_of_due
        taken = Batch(
            arrivals=[a for a in batch.arrivals if chosen(unit(a))], due=[d for d in batch.due if chosen(of_due(d))]
        )
        rest = replace(
            batch,
            arrivals=[a for a in batch.arrivals if not chosen(unit(a))],
            due=[d for d in batch.due if not chosen(of_due(d))],
        )
        return taken, rest

    def _units(self, batch: Batch) -> list[Batch]:
        """The batch, aggregate by aggregate."""
        arrivals, due = defaultdict(list), defaultdict(list)
        for a in batch.arrivals:
            arrivals[self._rules.unit(a)].append(a)
        for d in batch.due:
            due[self._rules.unit_of_due(d)].append(d)
        return [Batch(arrivals=arrivals[unit], due=due[unit]) for unit in dict.fromkeys((*arrivals, *due))]


def _singles(batch: Batch) -> Iterator[Batch]:
    for arrival in batch.arrivals:
        yield Batch(arrivals=[arrival])
    for due in batch.due:
        yield Batch(due=[due])


def _name(single: Batch) -> tuple[str, int]:
    return single.arrivals[0].name if single.arrivals else ("held", single.due[0].held_id)
