"""A batch, applied: first as a whole; if something in it fails, what failed is set apart and the rest still commits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

import structlog

from relay.errors import PostgresError, PostgresUnavailable
from relay.failpoints import Point, reached
from relay.inbox import store, stored
from relay.inbox.charges import Charges, Suspects
from relay.inbox.database import Database
from relay.inbox.failures import Collision, CommitFailed, HandlerFailed, loggable
from relay.inbox.narrowing import Narrowing
from relay.inbox.overlap import Overlap
from relay.inbox.pace import Pace
from relay.inbox.sequencer import Arrival, Key
from relay.inbox.stats import Stats
from relay.inbox.work import FOLLOW_LIMIT, Batch, Rules, Work
from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors

log = structlog.get_logger()

_REDOS = 20
_DUE_ROWS = 100
_PURGE_ROWS = 5000

_COMMITS = 3
"""A COMMIT that collides oftener does not do so by chance: a deferred trigger raises it, and somebody's effects are to blame."""

_SWEEP_AGGREGATES = 2000
"""Aggregates that one sweep looks at: some 50 ms of the server's time. The next one goes on from there."""


class Applier:
    """Applies batches in transactions of one database, for one consumer.

    When `apply` returns, everything in the batch is durable: applied, or in one of the tables. When it raises, parts
    of the batch may be; the rest is delivered again, and what was done already is recognised.
    """

    def __init__(
        self, database: Database, rules: Rules, suspects: Suspects | None = None, overlap: Overlap | None = None
    ) -> None:
        self._database = database
        self._overlap = overlap or Overlap()
        self._rules = rules
        self._suspects = Suspects() if suspects is None else suspects
        self._swept: Key | None = None
        self._swept_stored: stored.Place | None = None
        self.done = Stats()  # what the last `apply` has committed, also when it raised
        self.left_due = False  # the last `apply` left something to `retry_due` that can be tried at once
        self.collided = False  # a transaction of the last `apply` had to be redone because of another one
        self.worked_s = 0.0  # how long the last `apply` took, without its waits: see Database
        self._due_pace = Pace(_DUE_ROWS)

    async def apply(self, batch: Batch) -> Stats:
        """Apply a batch. Raises PostgresError; a handler's failure is not an error here but a held message."""
        self.done = Stats()
        self.left_due = self.collided = False
        began = self._database.worked_s
        charges = Charges(self._suspects)
        narrowing = Narrowing(batch, self._rules, self._suspects)
        refused: CommitFailed | None = None
        together: HandlerFailed | None = None
        while (part := narrowing.next()) is not None:
            try:
                await self._attempt(part, charges, careful=False)
            except HandlerFailed as exc:
                reached(Point.SET_APART)
                self._note(exc, charges)
                together = exc if len(exc.arrivals) > 1 else together
                narrowing.failed(part, exc.arrivals, dear=exc.ends_transaction)
            except CommitFailed as exc:
                log.warning("batch_failed_at_commit", error=loggable(exc.error), events=len(part.arrivals))
                if not narrowing.refused(part):
                    refused = exc
        for single in narrowing.apart:
            await self._alone(single, charges)
        if together is not None and not self.done.failed:
            self._log_together(together)
        if refused is not None:
            raise PostgresUnavailable(
                f"a transaction fails without any handler's doing: {loggable(refused.error)}"
            ) from refused
        self.worked_s = self._database.worked_s - began
        return self.done

    async def retry_due(self, rows: int = _DUE_ROWS) -> Stats:
        """Try the held messages whose time has come; what waits behind those that succeed now follows.

        At most `rows`, and fewer where that takes long, whatever is learned of new ones: what fails again and again is often slow,
        as where each handler waits for a service that does not answer. New messages wait for all of it.
        """
        self.done = Stats()
        rows = min(rows, self._due_pace.limit)
        with postgres_errors():
            due = await store.due_held(await self._database.connection(), self._rules.consumer, rows)
        if due:
            reached(Point.RETRYING_HELD)
        stats = await self.apply(Batch(due=due))
        self._due_pace.took(len(due), self.worked_s)
        return stats

    async def sweep(self) -> int:
        """Make due what waits although its turn has come, a bounded number of aggregates a call. Returns how many were."""
        with postgres_errors():
            connection = await self._database.connection()
            released, self._swept = await self._database.patiently(
                store.release_waiting(connection, self._rules.consumer, after=self._swept, aggregates=_SWEEP_AGGREGATES)
            )
        if released:
            log.warning("waiting_released", consumer=self._rules.consumer, events=released)
        if self._rules.settings.mode == "store":
            await self._sweep_stored()
        return released

    async def _sweep_stored(self) -> None:
        """Let stored rows be seen by takers that are first of their aggregates and do not lead; as bounded."""
        with postgres_errors():
            connection = await self._database.connection()
            mended, self._swept_stored = await self._database.patiently(
                stored.let_first_lead(
                    connection, self._rules.consumer, after=self._swept_stored, aggregates=_SWEEP_AGGREGATES
                )
            )
        if mended:
            log.warning(
                "stranded_released", consumer=self._rules.consumer, aggregates=len(mended), sample=sorted(mended)[:10]
            )

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

    async def _alone(self, batch: Batch, charges: Charges) -> None:
        """One aggregate (or one message without order) in a transaction of its own, a savepoint a message."""
        while True:
            try:
                await self._attempt(batch, charges, careful=True)
                break
            except HandlerFailed as exc:
                self._note(exc, charges)
            except CommitFailed as exc:
                log.warning("aggregate_failed_at_commit", error=loggable(exc.error), events=len(batch.arrivals))
                await self._one_by_one(batch, charges)
                break

    async def _one_by_one(self, batch: Batch, charges: Charges) -> None:
        """A transaction a message, so that a COMMIT that fails names the message. Held successors are left to the timer."""
        for single in _singles(batch):
            blamed = False
            while True:
                try:
                    await self._attempt(single, charges, careful=True, follow=0)
                    break
                except HandlerFailed as exc:
                    self._note(exc, charges)
                except CommitFailed as exc:
                    if blamed:
                        raise PostgresUnavailable(
                            f"a transaction fails without any handler's doing: {loggable(exc.error)}"
                        ) from exc
                    blamed = True
                    charges.doom(_name(single), exc.error)

    async def _attempt(self, batch: Batch, charges: Charges, *, careful: bool, follow: int = FOLLOW_LIMIT) -> None:
        """One transaction; redone after a deadlock or serialization failure, which is nobody's fault.

        And with the tombstones that it has passed over: to look for them beforehand would cost every batch something.
        """
        at_commit = 0
        last: Collision | None = None
        given_up: list[int] = []
        for redo in range(_REDOS):
            try:
                await self._transaction(batch, charges, careful=careful, follow=follow, given_up=given_up)
            except store.GivenUp as exc:
                given_up += exc.held_ids
            except Collision as exc:
                log.info("transaction_redone", reason=loggable(exc.error))
                last = exc
                self.collided = True
                at_commit += exc.at_commit
                if at_commit > _COMMITS:
                    raise CommitFailed(exc.error) from exc
                await asyncio.sleep(random.uniform(0, 0.01 * (redo + 1)))  # noqa: S311 - no secret
            else:
                return
        if last is not None and last.arrivals:  # enough of it: the last one to collide is held, or done alone
            raise HandlerFailed(last.arrivals, last.error, ends_transaction=careful)
        raise PostgresUnavailable(f"a batch was redone {_REDOS} times because of deadlocks or serialization failures")

    async def _transaction(
        self, batch: Batch, charges: Charges, *, careful: bool, follow: int, given_up: Sequence[int]
    ) -> None:
        connection: Connection | None = None
        work: Work | None = None
        try:
            async with self._database.transaction() as connection:
                work = Work(
                    connection,
                    self._rules,
                    careful=careful,
                    charges=charges,
                    follow=follow,
                    given_up=given_up,
                    patiently=self._database.patiently,
                    overlap=self._overlap,
                )
                stats = await work.run(batch)
        except PostgresError:
            if work is not None and connection is not None and connection.is_closed():
                self._accuse(work.called)
            raise
        reached(Point.COMMITTED)
        work.committed()
        self.done += stats
        self.left_due |= work.leaves_due

    def _log_together(self, failure: HandlerFailed) -> None:
        """Nothing is held, so nobody would see it; and a handler that does so has every batch taken apart, slowly."""
        log.warning(
            "batch_handler_failed_only_together",
            consumer=self._rules.consumer,
            event_types=sorted({arrival.event.event_type for arrival in failure.arrivals})[:10],
            events=len(failure.arrivals),
            error=loggable(failure.error),
            reason="a call with these events failed, in smaller calls they were applied: it must not depend on how they are grouped",
        )

    def _accuse(self, called: Sequence[Arrival]) -> None:
        """The connection broke: of one message it is known whose handler was at work, of many it will be found out."""
        if len(called) == 1:
            self._suspects.accuse(called[0].message)
        elif called:
            units = {self._rules.unit(arrival) for arrival in called}
            self._suspects.accuse_one_of([arrival.message for arrival in called], len(units))

    @staticmethod
    def _note(failure: HandlerFailed, charges: Charges) -> None:
        """An event over which a handler made the connection unfit is not given a second chance in the same batch."""
        first, *others = failure.arrivals
        log.debug(
            "handler_failed_in_batch",
            message_id=first.event.message_id,
            events=1 + len(others),
            error=loggable(failure.error),
        )
        if failure.ends_transaction and not others:
            charges.doom(first.name, failure.error)


def _singles(batch: Batch) -> Iterator[Batch]:
    for arrival in batch.arrivals:
        yield Batch(arrivals=[arrival])
    for due in batch.due:
        yield Batch(due=[due])


def _name(single: Batch) -> tuple[str, int]:
    return single.arrivals[0].name if single.arrivals else ("held", single.due[0].held_id)
