"""Nothing that one handler, one message or one consumer does stops the others; and what waits is always found again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import aiormq
import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from relay.errors import PostgresUnavailable
from relay.inbox import Event, Inbox, Stats, apply, consumer, pace, storable, store
from relay.inbox.apply import Applier
from relay.inbox.database import Database
from relay.inbox.failures import MOVED
from relay.inbox.sequencer import Arrival
from relay.inbox.store import Stranger
from relay.inbox.work import Batch, Rules
from relay.message import TOMBSTONE, content_digest
from relay.postgres.connect import Connection
from relay.settings import InboxSettings, PostgresSettings
from tests.integration.inbox_harness import Sent, World, eventually, record, recording, stream, world

EFFECT = "CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, aggregate text, seq bigint, event_type text)"
FAIL_AT_COMMIT = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'not this one' USING ERRCODE = '{state}'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW {when} EXECUTE FUNCTION refuse()
"""


@dataclass
class Bench:
    """An applier without a broker, on a database of its own."""

    applier: Applier
    db: Connection
    tag: int = 0

    def arrival(self, seq: int, aggregate: str = "1", *, body: bytes = b"{}", event_type: str = "T") -> Arrival:
        self.tag += 1
        event = Event(
            source="shop",
            aggregate_type="order",
            aggregate_id=aggregate,
            seq=seq,
            event_type=event_type,
            message_id=f"{aggregate}/{seq}/{body.decode()}",
            content_type="application/json",
            headers={"traceparent": "00-x"},
            body=body,
            digest=content_digest(event_type, "application/json", body),
        )
        return Arrival(event=event, tag=self.tag, exchange="relay.events", routing_key="order.T")

    async def apply(self, *arrivals: Arrival, strangers: Sequence[Stranger] = ()) -> None:
        async with asyncio.timeout(20):
            await self.applier.apply(Batch(arrivals=arrivals, strangers=strangers))

    async def effects(self) -> list[tuple[str, int]]:
        return [tuple(r.values()) for r in await self.db.fetch("SELECT aggregate, seq FROM effect ORDER BY id")]

    async def held(self) -> list[tuple[str, int, str, str]]:
        rows = await self.db.fetch(
            "SELECT aggregate_id, seq, reason, state FROM relay.inbox_held ORDER BY aggregate_id, seq"
        )
        return [tuple(r.values()) for r in rows]

    async def quarantine(self) -> list[tuple[str, bytes]]:
        rows = await self.db.fetch("SELECT reason, body FROM relay.inbox_quarantine ORDER BY id")
        return [tuple(r.values()) for r in rows]


@asynccontextmanager
async def bench(
    dsn: str, inbox: Inbox | None = None, *, command_timeout_s: float = 60, **settings: Any
) -> AsyncIterator[Bench]:
    values: dict[str, Any] = {"retry_first_s": 0.05, "retry_max_s": 0.1} | settings
    rules = Rules(consumer="shop", inbox=inbox or recording(), settings=InboxSettings(**values))
    connection = await asyncpg.connect(dsn)
    postgres = PostgresSettings(dsn=SecretStr(dsn), command_timeout_s=command_timeout_s)
    database = Database(postgres, application="bench")
    try:
        await connection.execute(EFFECT)
        yield Bench(applier=Applier(database, rules), db=connection)
    finally:
        await database.close()
        await connection.close()


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the limit of what may follow were used up already."""
    monkeypatch.setitem(Applier._attempt.__kwdefaults__ or {}, "follow", 0)


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every body were as large as a portion."""
    monkeypatch.setattr(store, "PORTION_BYTES", 1)


# What waits is found again


@pytest.mark.usefixtures("no_room", "one_row")
async def test_each_line_that_may_not_follow_now_is_made_due_however_large_its_successor_is(database: str) -> None:
    async with bench(database) as b:
        await b.apply(*(b.arrival(seq, name) for name in "abc" for seq in (2, 3)))
        await b.apply(*(b.arrival(1, name) for name in "abc"))
        assert {row[:2]: row[2:] for row in await b.held() if row[1] == 2} == {
            (name, 2): ("behind", "retrying") for name in "abc"
        }
        assert await b.db.fetchval("SELECT bool_and(blocked) FROM relay.inbox_aggregate")
        async with asyncio.timeout(20):
            while await b.held():  # one portion of one row, and then of one follower, at a time
                await b.applier.retry_due()
        assert sorted(await b.effects()) == [(name, seq) for name in "abc" for seq in (1, 2, 3)]


@pytest.mark.usefixtures("one_row")
async def test_a_portion_that_leaves_lines_out_is_asked_again(database: str) -> None:
    async with bench(database) as b:
        await b.apply(*(b.arrival(seq, name) for name in "abc" for seq in (2, 3)))
        await b.apply(*(b.arrival(1, name) for name in "abc"))
        assert sorted(await b.effects()) == [(name, seq) for name in "abc" for seq in (1, 2, 3)]
        assert await b.held() == []


@pytest.mark.usefixtures("no_room")
async def test_what_may_not_follow_now_follows_at_once_in_the_next_transaction(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "LOOK_INTERVAL_S", 1000.0)
    async with world(database, broker) as w, w.running(recording()):
        await w.publish(stream("1", 4)[1:])
        await w.until(lambda s: s.early == 3)
        await w.publish([Sent(seq=1)])
        await w.until(lambda s: s.applied == 4)
        assert await w.effects() == [1, 2, 3, 4]
        assert await w.held() == []


async def test_slow_followers_are_left_to_the_next_transaction(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.inbox.work.FOLLOW_S", -1.0)
    async with bench(database) as b:
        await b.apply(b.arrival(2), b.arrival(3))
        await b.apply(b.arrival(1))
        rounds = [(b.applier.left_due, len(await b.effects()))]
        for _ in range(2):
            await b.applier.retry_due()
            rounds.append((b.applier.left_due, len(await b.effects())))
        assert rounds == [(True, 1), (True, 2), (False, 3)]


async def test_a_follower_that_takes_too_long_is_the_last_in_its_transaction_however_many_are_held(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.inbox.work.FOLLOW_S", 0.01)
    inbox = Inbox("shop")

    @inbox.on("T")
    async def slowly(event: Event, tx: Connection) -> None:
        await record(event, tx)
        await asyncio.sleep(0.02)

    async with bench(database, inbox) as b:
        await b.apply(*(b.arrival(seq, name) for name in "ab" for seq in range(2, 12)))
        await b.apply(b.arrival(1, "a"), b.arrival(1, "b"))
        assert sorted(await b.effects()) == [("a", 1), ("a", 2), ("b", 1)]
        assert b.applier.left_due


async def test_of_failed_messages_whose_handlers_are_slow_few_are_tried_at_a_time_however_fast_new_ones_are(
    database: str,
) -> None:
    """New ones wait for all that are tried at a time."""
    tried: set[str | None] = set()
    inbox = Inbox("shop")

    @inbox.on("T")
    async def failing(event: Event, tx: Connection) -> None:
        tried.add(event.aggregate_id)
        b.applier._database.waited_s -= took_s  # by its clock
        raise RuntimeError("no answer")

    async def tried_again() -> int:
        tried.clear()
        await b.applier.retry_due(500)
        return len(tried)

    async with bench(database, inbox, retry_first_s=1e-6, retry_max_s=1e-6) as b:
        took_s = 2.0
        await b.apply(*(b.arrival(1, name) for name in "abcdefgh"))
        assert [await tried_again() for _ in range(4)] == [8, 1, 1, 1]
        took_s = -100.0  # no time at all
        assert [await tried_again() for _ in range(5)] == [1, 2, 4, 8, 8]


FORGOTTEN = "UPDATE relay.inbox_aggregate SET last_seq = 1, blocked = $1"
"""What no transaction of ours leaves: the next one waits, and nothing will wake it."""


@pytest.mark.parametrize("blocked", [False, True])
async def test_an_inbox_that_starts_finds_what_waits_although_its_turn_has_come(
    blocked: bool, database: str, broker: str
) -> None:
    async with world(database, broker) as w:
        async with w.running(recording()):
            await w.publish([Sent(seq=seq, aggregate=name) for name in "ab" for seq in (2, 3)])
            await w.until(lambda s: s.early == 4)
        await w.db.execute(FORGOTTEN, blocked)
        async with w.running(recording()):
            await w.until(lambda s: s.applied == 4)
            assert await w.held() == []
            assert [await w.effects(name) for name in "ab"] == [[2, 3], [2, 3]]


async def test_a_running_inbox_sweeps_with_every_look(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "LOOK_INTERVAL_S", 0.05)
    async with world(database, broker) as w, w.running(recording()):
        await w.publish([Sent(seq=2)])
        await w.until(lambda s: s.early == 1)
        await w.db.execute(FORGOTTEN, False)
        await w.until(lambda s: s.applied == 1)


async def test_a_sweep_goes_on_where_the_last_one_ended_and_touches_nothing_else(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply, "_SWEEP_AGGREGATES", 2)
    async with bench(database) as b:
        await b.apply(*(b.arrival(seq, name) for name in "abcde" for seq in (2, 3)))
        await b.db.execute(
            "INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, state) "
            "SELECT 'other', source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, state FROM relay.inbox_held"
        )
        assert [await b.applier.sweep() for _ in range(3)] == [0, 0, 0]
        await b.db.execute("UPDATE relay.inbox_aggregate SET last_seq = 1 WHERE aggregate_id <> 'd'")
        assert [await b.applier.sweep() for _ in range(4)] == [2, 1, 1, 0]
        released = await b.db.fetch(
            "SELECT consumer, aggregate_id, seq FROM relay.inbox_held WHERE state <> 'waiting' ORDER BY 2"
        )
        assert [tuple(r.values()) for r in released] == [("shop", name, 2) for name in "abce"]


# Poison

Poison = Callable[[Event, Connection], Awaitable[None]]
STATE = "DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{}'; END $$"
KILL = "SELECT pg_terminate_backend(pg_backend_pid())"


async def raises_serialization_failures(event: Event, tx: Connection) -> None:
    await tx.execute(STATE.format("40001"))


async def raises_deadlocks_of_its_own(event: Event, tx: Connection) -> None:
    raise asyncpg.DeadlockDetectedError("of another database")


async def supplies_a_wrong_number_to_its_own_outbox(event: Event, tx: Connection) -> None:
    await tx.execute(
        "INSERT INTO relay.outbox (aggregate_type, aggregate_id, seq, event_type) VALUES ('o', 'x', 7, 'E')"
    )


async def raises_what_a_dying_server_says(event: Event, tx: Connection) -> None:
    await tx.execute(STATE.format("57P01"))


async def has_a_broken_connection_of_its_own(event: Event, tx: Connection) -> None:
    raise asyncpg.AdminShutdownError("terminating connection") from asyncpg.ConnectionDoesNotExistError("closed")


async def kills_its_backend(event: Event, tx: Connection) -> None:
    await tx.execute(KILL)


async def kills_its_backend_and_says_nothing(event: Event, tx: Connection) -> None:
    try:
        await tx.execute(KILL)
    except asyncpg.PostgresError:
        return


POISONS: list[Poison] = [
    raises_serialization_failures,
    raises_deadlocks_of_its_own,
    supplies_a_wrong_number_to_its_own_outbox,
    raises_what_a_dying_server_says,
    has_a_broken_connection_of_its_own,
    kills_its_backend,
    kills_its_backend_and_says_nothing,
]


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
async def test_a_handler_that_blames_the_server_fails_alone_and_its_attempts_count(
    poison: Poison, database: str, broker: str
) -> None:
    calls: list[int] = []
    inbox = recording()

    @inbox.on("P")
    async def handle(event: Event, tx: Connection) -> None:
        calls.append(1)
        await record(event, tx)
        await poison(event, tx)

    async with world(database, broker, max_attempts=2, delivery_limit=8) as w, w.running(inbox):
        await w.publish([*stream("a", 3), Sent(seq=1, event_type="P"), Sent(seq=2), *stream("b", 3)])
        await w.until(lambda s: s.stuck == 1 and s.applied >= 6)
        assert await w.held() == [(1, "failed", "stuck", 2), (2, "behind", "waiting", 0)]
        assert await w.effects("a") == await w.effects("b") == [1, 2, 3]
        assert await w.effects() == []
        assert await dead_letters(w) == 0
        assert 2 <= len(calls) <= 20
        await w.publish(stream("c", 3))
        await w.until(lambda s: s.applied >= 9)


async def dead_letters(w: World) -> int | None:
    async with w.channel() as channel:
        answer: aiormq.spec.Queue.DeclareOk = await channel.queue_declare("shop.dead", passive=True)
        return answer.message_count


async def test_a_follower_that_kills_its_backend_fails_alone(database: str, broker: str) -> None:
    inbox = recording()
    inbox.on("P")(kills_its_backend)
    async with world(database, broker, max_attempts=1) as w, w.running(inbox):
        await w.publish([Sent(seq=2, event_type="P"), Sent(seq=3)])
        await w.until(lambda s: s.early == 2)
        await w.publish([Sent(seq=1), *stream("a", 3)])
        await w.until(lambda s: s.stuck == 1 and s.applied >= 4)
        assert await w.effects() == [1]
        assert await w.effects("a") == [1, 2, 3]
        assert await w.held() == [(2, "failed", "stuck", 1), (3, "behind", "waiting", 0)]


@pytest.mark.parametrize("state", ["40001", "57P01"])
async def test_a_commit_that_collides_for_ever_is_charged_to_its_message(state: str, database: str) -> None:
    async with bench(database, max_attempts=1) as b:
        when = "WHEN (NEW.aggregate = 'bad')"
        await b.db.execute(FAIL_AT_COMMIT.format(state=state, table="effect", when=when))
        await b.apply(b.arrival(1, "a"), b.arrival(1, "bad"), b.arrival(2, "bad"), b.arrival(2, "a"))
        assert await b.effects() == [("a", 1), ("a", 2)]
        assert await b.held() == [("bad", 1, "failed", "stuck"), ("bad", 2, "behind", "waiting")]


@pytest.mark.parametrize(
    "statement", ["UPDATE relay.inbox_aggregate SET blocked = blocked", "DELETE FROM relay.inbox_aggregate"]
)
async def test_a_handler_that_writes_its_cursor_is_held_with_the_reason_and_takes_nobody_with_it(
    statement: str, database: str
) -> None:
    inbox = recording()

    @inbox.on("W")
    async def write(event: Event, tx: Connection) -> None:
        await record(event, tx)
        await tx.execute(f"{statement} WHERE aggregate_id = $1", event.aggregate_id)

    async with bench(database, inbox, max_attempts=1) as b:
        await b.apply(b.arrival(1, "a"), b.arrival(1, "bad"))
        with capture_logs() as logs:
            await b.apply(
                b.arrival(2, "a"), b.arrival(2, "bad", event_type="W"), b.arrival(3, "bad"), b.arrival(3, "a")
            )
        assert await b.effects() == [("a", 1), ("bad", 1), ("a", 2), ("a", 3)]
        assert await b.held() == [("bad", 2, "failed", "stuck"), ("bad", 3, "behind", "waiting")]
        assert await b.db.fetchval("SELECT error FROM relay.inbox_held WHERE seq = 2") == MOVED
        assert {line["error"] for line in logs if "error" in line} == {MOVED}


async def test_a_handler_may_wait_longer_than_the_servers_time_outs_for_idle_transactions(
    database: str, broker: str
) -> None:
    inbox = recording()

    @inbox.on("W")
    async def wait(event: Event, tx: Connection) -> None:
        await record(event, tx)
        await asyncio.sleep(0.4)

    async with world(database, broker) as w:
        name = urlsplit(database).path[1:]
        await w.db.execute(f"ALTER DATABASE {name} SET idle_in_transaction_session_timeout = '100ms'")
        if w.db.get_server_version().major >= 17:
            await w.db.execute(f"ALTER DATABASE {name} SET transaction_timeout = '200ms'")
        with capture_logs() as logs:
            async with w.running(inbox):
                await w.publish([Sent(seq=1, event_type="W"), Sent(seq=2)])
                await w.until(lambda s: s.applied == 2)
        assert "session_failed" not in {line["event"] for line in logs}


async def test_a_commit_that_strangers_alone_make_fail_ends_the_session_after_the_events_are_durable(
    database: str,
) -> None:
    stranger = Stranger(
        reason="foreign", detail="", message_id=None, exchange="", routing_key="", properties="{}", body=b""
    )
    async with bench(database) as b:
        await b.db.execute(FAIL_AT_COMMIT.format(state="23514", table="relay.inbox_quarantine", when=""))
        with pytest.raises(PostgresUnavailable, match="a transaction fails without any handler's doing"):
            await b.apply(strangers=[stranger])
        with pytest.raises(PostgresUnavailable, match="a transaction fails without any handler's doing"):
            await b.apply(b.arrival(1), b.arrival(2), strangers=[stranger])
        assert await b.effects() == [("1", 1), ("1", 2)]


# Competing consumers


async def test_waiting_for_a_competitors_cursor_is_not_bounded_by_the_time_out_of_a_statement(database: str) -> None:
    async with bench(database, command_timeout_s=1) as b:
        await b.apply(b.arrival(1))
        async with b.db.transaction():
            await b.db.execute("SELECT FROM relay.inbox_aggregate FOR UPDATE")
            waiting = asyncio.create_task(b.apply(b.arrival(2)))

            async def has_waited() -> object:
                return waiting.done() or await b.db.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'bench' AND wait_event_type = 'Lock' "
                    "AND clock_timestamp() - query_start > '1.2 s'"
                )

            await eventually(has_waited)
            assert not waiting.done()
        await waiting
        assert await b.effects() == [("1", 1), ("1", 2)]


async def test_a_batch_that_took_too_long_is_followed_by_smaller_ones(
    database: str, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "LONG_S", -1.0)
    sizes: list[int] = []
    async with world(database, broker) as w:
        count = w.committed

        def committed(stats: Stats) -> None:
            if stats.received:
                sizes.append(stats.received)
            count(stats)

        monkeypatch.setattr(w, "committed", committed)
        async with w.running(recording()):
            await w.publish(stream("1", 60))
            await w.until(lambda s: s.applied == 60)
    assert all(after <= max(1, before // 2) for before, after in pairwise(sizes)), sizes
    assert sum(sizes) == 60


# The same number twice


async def test_what_is_held_is_not_thrown_away_unread_when_something_else_takes_its_number(database: str) -> None:
    async with bench(database) as b:
        first = b.arrival(2, body=b'"first"')
        await b.apply(first)
        with capture_logs() as logs:
            await b.apply(b.arrival(1), b.arrival(2, body=b'"other"'), b.arrival(3))
        assert await b.effects() == [("1", 1), ("1", 2), ("1", 3)]
        assert await b.held() == []
        row = await b.db.fetchrow("SELECT * FROM relay.inbox_quarantine")
        assert row is not None
        assert (row["reason"], row["body"], row["message_id"]) == ("conflict", b'"first"', first.event.message_id)
        assert "order/1 seq 2" in row["detail"]
        assert json.loads(row["properties"]) == json.loads(storable.properties_of_event(first.event))
        assert conflicts(logs) == [(2, first.event.message_id)]


@pytest.mark.parametrize("sql", ["COMMIT", "COMMIT; BEGIN"])
async def test_a_follower_that_commits_takes_no_cursor_with_it_and_what_is_held_is_still_compared(
    sql: str, database: str
) -> None:
    """Cursors that are committed before all is settled make what is held look as if it had been compared and applied."""
    inbox = recording()

    @inbox.on("E")
    async def end(event: Event, tx: Connection) -> None:
        await tx.execute(sql)

    async with bench(database, inbox, retry_first_s=300, retry_max_s=300) as b:
        await b.apply(b.arrival(4, event_type="E"), b.arrival(2, body=b"[]"))
        await b.apply(*(b.arrival(seq) for seq in (1, 2, 3)), b.arrival(1, "other"))
        cursors = await b.db.fetch("SELECT aggregate_id, last_seq, blocked FROM relay.inbox_aggregate ORDER BY 1")
        assert [tuple(row) for row in cursors] == [("1", 3, True), ("other", 1, False)]
        assert await b.held() == [("1", 4, "failed", "retrying")]
        assert await b.quarantine() == [("conflict", b"[]")]


async def test_what_takes_the_number_of_a_tombstone_or_of_its_twin_is_no_conflict(database: str) -> None:
    async with bench(database) as b:
        await b.apply(b.arrival(2), b.arrival(3), b.arrival(4, event_type=TOMBSTONE, body=b""))
        twin = b.arrival(2)
        await b.apply(b.arrival(1), twin, b.arrival(3, event_type=TOMBSTONE, body=b""), b.arrival(4))
        assert await b.held() == []
        assert await b.quarantine() == []


async def test_of_two_that_wait_under_one_number_the_first_stays_and_one_goes_to_the_quarantine(database: str) -> None:
    """The held one follows a predecessor that fails, while the other one waits in the same batch."""
    inbox = recording()

    @inbox.on("F")
    async def fail(event: Event, tx: Connection) -> None:
        raise ValueError

    async with bench(database, inbox, max_attempts=1) as b:
        await b.apply(b.arrival(2, event_type="F"), b.arrival(3, body=b'"first"'))
        await b.apply(b.arrival(1), b.arrival(3, body=b'"other"'))
        assert await b.quarantine() == [("conflict", b'"other"')]
        assert [row[1:] for row in await b.held()] == [(2, "failed", "stuck"), (3, "early", "waiting")]


async def test_a_message_that_waited_and_fails_when_it_is_delivered_again_has_failed(database: str) -> None:
    """Its ack was lost; the copy arrives together with the missing predecessor, and its handler raises."""
    inbox = recording()

    @inbox.on("F")
    async def fail(event: Event, tx: Connection) -> None:
        raise ValueError

    async with bench(database, inbox, max_attempts=1) as b:
        early = b.arrival(2, event_type="F")
        await b.apply(early)
        assert [row[1:] for row in await b.held()] == [(2, "early", "waiting")]
        await b.apply(b.arrival(1), b.arrival(2, event_type="F"))
        assert [row[1:] for row in await b.held()] == [(2, "failed", "stuck")]


def conflicts(logs: Sequence[Any]) -> list[tuple[int, str]]:
    found = [line for line in logs if line["event"] == "conflict"]
    assert all((line["log_level"], line["source"], line["aggregate"]) == ("error", "shop", "order/1") for line in found)
    assert "other" not in str(found).replace("other content", "")
    return [(line["seq"], line["message_id"]) for line in found]


async def test_a_conflict_and_a_stuck_message_are_errors_in_the_log_once(database: str) -> None:
    inbox = recording()

    @inbox.on("F")
    async def fail(event: Event, tx: Connection) -> None:
        raise ValueError

    async with bench(database, inbox, max_attempts=2) as b:
        with capture_logs() as logs:
            await b.apply(b.arrival(1))
            other = b.arrival(1, body=b"[]")
            await b.apply(other, b.arrival(2, event_type="F"))
            await eventually(lambda: due(b))
            await b.applier.retry_due()
        assert conflicts(logs) == [(1, other.event.message_id)]
        assert [(line["log_level"], line["state"]) for line in logs if line["event"] == "handler_failed"] == [
            ("warning", "retrying"),
            ("error", "stuck"),
        ]


async def due(b: Bench) -> bool:
    n: int = await b.db.fetchval("SELECT count(*) FROM relay.inbox_held WHERE next_attempt_at <= clock_timestamp()")
    return n == 1
