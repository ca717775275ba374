"""Batch handlers: many events in one call, in one transaction; what fails among many is found, held, and costs the others nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from relay.errors import PostgresUnavailable
from relay.inbox import Event, Inbox
from relay.inbox.apply import Applier
from relay.postgres.connect import Connection
from tests.integration.inbox_harness import Sent, record, stream, world
from tests.integration.test_inbox_isolation import FAIL_AT_COMMIT, KILL, Bench, bench, dead_letters

INSERT = "INSERT INTO effect (aggregate, seq, event_type) SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[])"


class Together:
    """An inbox that records the events of type T in one statement a call; it fails `how` over what is `poison`."""

    def __init__(self, poison: str = "", how: Callable[[Connection], Any] | None = None, **more: Any) -> None:
        self.calls: list[list[tuple[str, int]]] = []
        self.poison = poison
        self._how = how
        self.inbox = Inbox("shop")
        self.inbox.on_batch("T", **more)(self.record_all)

    async def record_all(self, events: Sequence[Event], tx: Connection) -> None:
        self.calls.append([(str(e.aggregate_id), e.seq or 0) for e in events])
        columns = [(e.aggregate_id, e.seq, e.event_type) for e in events]
        await tx.execute(INSERT, *map(list, zip(*columns, strict=True)))
        if self._how is not None and any(f"{e.aggregate_id}/{e.seq}" == self.poison for e in events):
            await self._how(tx)

    @property
    def sizes(self) -> list[int]:
        return [len(call) for call in self.calls]

    @property
    def failed(self) -> int:
        """Calls with the poison."""
        return sum(1 for call in self.calls if any(f"{name}/{seq}" == self.poison for name, seq in call))


async def raises(_tx: Connection) -> None:
    raise ValueError("boom\nsecret: the payload")


async def hangs(_tx: Connection) -> None:
    await asyncio.sleep(60)


async def ends_the_transaction(tx: Connection) -> None:
    await tx.execute("ROLLBACK")


async def swallows_an_error(tx: Connection) -> None:
    try:
        await tx.execute("SELECT 1 / 0")
    except asyncpg.DivisionByZeroError:
        return


async def kills_its_backend(tx: Connection) -> None:
    await tx.execute(KILL)


async def applied(b: Bench) -> dict[str, list[int]]:
    """The effects of each aggregate, in the order in which they were written."""
    found: dict[str, list[int]] = {}
    for aggregate, seq in await b.effects():
        found.setdefault(aggregate, []).append(seq)
    return found


# As it should be


async def test_what_can_be_applied_comes_in_one_call_each_aggregate_in_its_order_and_once(database: str) -> None:
    together = Together()
    async with bench(database, together.inbox) as b:
        await b.apply(*(b.arrival(seq, name) for seq in (3, 1, 2, 2) for name in "abc"), b.arrival(5, "a"))
        assert together.sizes == [9]
        assert await applied(b) == {name: [1, 2, 3] for name in "abc"}
        assert [row[:3] for row in await b.held()] == [("a", 5, "early")]
        await b.apply(b.arrival(1, "a"), b.arrival(4, "a"))
        assert together.calls[1:] == [[("a", 4)], [("a", 5)]]  # what was held follows in a call of its own
        assert await b.held() == []


async def test_no_call_has_more_events_than_its_limit(database: str) -> None:
    together = Together(limit=4)
    async with bench(database, together.inbox) as b:
        await b.apply(*(b.arrival(seq, name) for seq in (1, 2, 3) for name in "abc"))
        assert together.sizes == [4, 4, 1]
        assert await applied(b) == {name: [1, 2, 3] for name in "abc"}


async def test_an_aggregates_order_is_kept_across_handlers_of_both_kinds(database: str) -> None:
    together = Together()
    together.inbox.on("U")(record)
    sizes: list[int] = []

    @together.inbox.on_batch("V")
    async def others(events: Sequence[Event], tx: Connection) -> None:
        sizes.append(len(events))
        for event in events:
            await record(event, tx)

    async with bench(database, together.inbox) as b:
        types = dict(enumerate("TTUVTWVU", 1))  # W has no handler
        await b.apply(*(b.arrival(seq, name, event_type=t) for seq, t in types.items() for name in "abc"))
        assert await applied(b) == {name: [1, 2, 3, 4, 5, 7, 8] for name in "abc"}
        assert together.sizes == [6, 3]
        assert sizes == [3, 3]


async def test_an_event_without_order_is_handled_once(database: str, broker: str) -> None:
    together = Together()
    async with world(database, broker) as w, w.running(together.inbox):
        await w.publish([Sent(seq=None, id=n, aggregate="") for n in (1, 2, 2, 3, 1)])
        await w.until(lambda s: s.received == 5)
        assert (w.total.applied, w.total.duplicates) == (3, 2)
        assert await w.db.fetchval("SELECT count(*) FROM effect") == 3


# One to blame among many


async def test_one_poison_event_among_a_thousand_aggregates_costs_the_logarithm_of_a_thousand_failed_calls(
    database: str,
) -> None:
    together = Together("321/1", raises)
    async with bench(database, together.inbox, max_attempts=1) as b:
        transactions = 0
        attempt = Applier._attempt

        async def counted(self: Applier, *args: Any, **kwargs: Any) -> None:
            nonlocal transactions
            transactions += 1
            await attempt(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Applier, "_attempt", counted)
            await b.apply(*(b.arrival(1, str(i)) for i in range(1000)), b.arrival(2, "321"), b.arrival(2, "322"))
        assert together.failed <= 12
        assert transactions <= 24
        assert await b.held() == [("321", 1, "failed", "stuck"), ("321", 2, "behind", "waiting")]
        assert await applied(b) == {str(i): [1, 2] if i == 322 else [1] for i in range(1000) if i != 321}
        assert await b.db.fetchval("SELECT error FROM relay.inbox_held WHERE reason = 'failed'") == "ValueError: boom"


async def test_a_poison_event_in_a_long_aggregate_is_found_in_savepoints_and_what_came_before_it_stays(
    database: str,
) -> None:
    together = Together("a/31", raises)
    async with bench(database, together.inbox, max_attempts=1) as b:
        await b.apply(*(b.arrival(seq, name) for seq in range(1, 51) for name in "ab"))
        assert await applied(b) == {"a": list(range(1, 31)), "b": list(range(1, 51))}
        assert (await b.held())[0] == ("a", 31, "failed", "stuck")
        assert len(await b.held()) == 20


async def test_a_poison_event_that_is_mended_is_applied_with_its_successors_at_a_retry(
    database: str, broker: str
) -> None:
    together = Together("7/2", raises)
    async with world(database, broker) as w, w.running(together.inbox):
        await w.publish([Sent(seq=seq, aggregate=str(i)) for seq in (1, 2, 3) for i in range(10)])
        await w.until(lambda s: s.applied == 28 and s.failed >= 2)
        together.poison = ""
        await w.until(lambda s: s.applied == 30)
        assert await w.effects("7") == [1, 2, 3]
        assert await w.held() == []


async def test_if_all_fail_all_are_held(database: str) -> None:
    inbox = Inbox("shop")
    calls = 0

    @inbox.on_batch("T")
    async def fail(events: Sequence[Event], tx: Connection) -> None:
        nonlocal calls
        calls += 1
        raise ValueError

    async with bench(database, inbox, max_attempts=1) as b:
        await b.apply(*(b.arrival(1, str(i)) for i in range(100)))
        assert {row[2:] for row in await b.held()} == {("failed", "stuck")}
        assert len(await b.held()) == 100
        assert calls <= 130


@pytest.mark.parametrize(
    ("how", "error"),
    [(hangs, "longer than 0.3 s"), (ends_the_transaction, "ended the transaction"), (swallows_an_error, "swallowed")],
)
async def test_a_handler_that_breaks_its_contract_over_one_event_is_found_out(
    how: Callable[[Connection], Any], error: str, database: str
) -> None:
    together = Together("77/1", how)
    async with bench(database, together.inbox, max_attempts=1, handler_timeout_s=0.3) as b:
        await b.apply(*(b.arrival(1, str(i)) for i in range(100)), b.arrival(2, "77"))
        assert await b.held() == [("77", 1, "failed", "stuck"), ("77", 2, "behind", "waiting")]
        assert error in await b.db.fetchval("SELECT error FROM relay.inbox_held WHERE reason = 'failed'")
        others = {name: seqs for name, seqs in (await applied(b)).items() if name != "77"}
        assert others == {str(i): [1] for i in range(100) if i != 77}
        assert together.failed <= (3 if how is hangs else 10)


async def test_a_commit_that_fails_through_one_event_of_many_is_divided_too(database: str) -> None:
    together = Together()
    async with bench(database, together.inbox, max_attempts=1) as b:
        when = "WHEN (NEW.aggregate = '77')"
        await b.db.execute(FAIL_AT_COMMIT.format(state="23514", table="effect", when=when))
        await b.apply(*(b.arrival(1, str(i)) for i in range(100)))
        assert await b.held() == [("77", 1, "failed", "stuck")]
        assert len(await applied(b)) == 99
        assert len(together.calls) <= 20


async def test_a_collision_is_redone_and_nobody_s_failure(database: str) -> None:
    times = 0

    async def collides(tx: Connection) -> None:
        nonlocal times
        times += 1
        if times <= 3:
            raise asyncpg.DeadlockDetectedError("x")

    together = Together("a/1", collides)
    async with bench(database, together.inbox) as b:
        await b.apply(*(b.arrival(1, name) for name in "abc"))
        assert together.sizes == [3] * 4
        assert await b.held() == []


async def test_collisions_that_never_end_are_charged_to_their_event(database: str) -> None:
    async def collides(tx: Connection) -> None:
        raise asyncpg.SerializationError("x")

    together = Together("5/1", collides)
    async with bench(database, together.inbox, max_attempts=1) as b:
        await b.apply(*(b.arrival(1, str(i)) for i in range(10)))
        assert await b.held() == [("5", 1, "failed", "stuck")]
        assert len(await applied(b)) == 9


async def test_a_handler_that_fails_only_over_several_events_is_told_as_it_holds_nothing(database: str) -> None:
    """What everybody writes once: an upsert that meets two events of one aggregate in one statement."""
    inbox = Inbox("shop")

    @inbox.on_batch("T")
    async def upsert(events: Sequence[Event], tx: Connection) -> None:
        await tx.execute(
            "INSERT INTO newest SELECT * FROM unnest($1::text[], $2::bigint[]) "
            "ON CONFLICT (aggregate) DO UPDATE SET seq = excluded.seq",
            [e.aggregate_id for e in events],
            [e.seq for e in events],
        )

    async with bench(database, inbox) as b:
        await b.db.execute("CREATE TABLE newest (aggregate text PRIMARY KEY, seq bigint)")
        with capture_logs() as logs:
            await b.apply(*(b.arrival(1, name) for name in "abc"))
            await b.apply(b.arrival(2, "a"), b.arrival(3, "a"), b.arrival(2, "b"))
        assert [tuple(r) for r in await b.db.fetch("TABLE newest ORDER BY 1")] == [("a", 3), ("b", 2), ("c", 1)]
        (told,) = [line for line in logs if line["log_level"] != "debug"]
        assert (told["event"], told["log_level"]) == ("batch_handler_failed_only_together", "warning")
        assert (told["events"], told["error"]) == (2, "CardinalityViolationError")


# A connection that breaks


async def test_an_event_that_breaks_every_connection_is_found_among_many_and_held(database: str, broker: str) -> None:
    together = Together("77/1", kills_its_backend)
    async with world(database, broker, max_attempts=2, batch=200, prefetch=400, delivery_limit=9) as w:
        with capture_logs() as logs:
            async with w.running(together.inbox):
                await w.publish([Sent(seq=seq, aggregate=str(i)) for seq in (1, 2) for i in range(100)])
                await w.until(lambda s: s.stuck == 1 and s.applied >= 198)
                assert await w.held() == [(1, "failed", "stuck", 2), (2, "behind", "waiting", 0)]
                assert await dead_letters(w) == 0
                await w.publish(stream("later", 3))
                await w.until(lambda s: s.applied >= 201)
        assert [line["event"] for line in logs].count("session_failed") <= 8
        assert await w.db.fetchval("SELECT count(*) FROM effect") == 201
        assert await w.db.fetchval("SELECT count(DISTINCT (aggregate, seq)) FROM effect") == 201


async def test_a_held_successor_that_breaks_every_connection_is_found_too(database: str, broker: str) -> None:
    together = Together("77/2", kills_its_backend)
    async with world(database, broker, max_attempts=1, batch=200, prefetch=400, delivery_limit=9) as w:
        async with w.running(together.inbox):
            await w.publish([Sent(seq=2, aggregate=str(i)) for i in range(100)])
            await w.until(lambda s: s.early == 100)
            await w.publish([Sent(seq=1, aggregate=str(i)) for i in range(100)])
            await w.until(lambda s: s.stuck == 1 and s.applied >= 199)
            assert await w.held() == [(2, "failed", "stuck", 1)]
            assert await dead_letters(w) == 0
        assert await w.db.fetchval("SELECT count(DISTINCT (aggregate, seq)) FROM effect") == 199
        assert await w.db.fetchval("SELECT count(*) FROM effect") == 199


async def test_a_connection_that_is_cut_by_chance_costs_nobody_more_than_one_batch_in_parts(database: str) -> None:
    async def once(tx: Connection) -> None:
        if together.failed == 1:
            await tx.execute(KILL)

    together = Together("77/1", once)
    async with bench(database, together.inbox) as b:
        arrivals = [b.arrival(1, str(i)) for i in range(100)]
        with pytest.raises(PostgresUnavailable):
            await b.apply(*arrivals)
        await b.apply(*arrivals)
        assert together.sizes == [100, *[4] * 25]
        assert len(await b.effects()) == 100
        assert await b.held() == []
        await b.apply(*(b.arrival(2, str(i)) for i in range(100)))
        assert together.sizes[26:] == [100]
        assert not b.applier._suspects
