"""Store mode: what a handler would get lies in relay.inbox instead, once, in order, in the transaction of the cursors."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from relay.errors import ConfigError, PrivilegeError
from relay.inbox import Inbox
from relay.inbox.stored import Stored, let_first_lead
from relay.message import Event, content_digest
from relay.postgres.connect import Connection
from relay.sandbox import Postgres
from relay.settings import InboxSettings, Settings
from tests.harness.logins import Logins
from tests.harness.outbox import connected, until
from tests.integration.inbox_harness import DEADLINE_S, Sent, World, eventually, recording, stream, tombstone, world

ANYBODY = Inbox("shop")


async def stored(on: World, aggregate: str = "1") -> list[int]:
    rows = await on.db.fetch("SELECT seq FROM relay.inbox WHERE aggregate_id = $1 ORDER BY id", aggregate)
    return [r["seq"] for r in rows]


async def leaders(on: World) -> list[tuple[str, int]]:
    rows = await on.db.fetch("SELECT aggregate_id, seq FROM relay.inbox WHERE leads ORDER BY id")
    return [tuple(r.values()) for r in rows]


class TestWhatIsStored:
    async def test_events_of_all_types_once_and_in_order_whatever_arrives(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store") as on, on.running(ANYBODY):
            events = [dataclasses.replace(e, event_type=f"Type{e.seq}") for e in stream("1", 6)]
            await on.publish([events[i] for i in (0, 3, 2, 1, 1, 4, 0, 5, 3)])
            await on.until(lambda total: total.received == 9)
            assert await stored(on) == [1, 2, 3, 4, 5, 6]
            # Whether the copy of number 4 comes while that is held is chance: then it is applied, and its twin goes uncounted (see Stats).
            assert (on.total.applied, on.total.duplicates) in ((6, 3), (6, 2))
            assert await on.held() == []

    async def test_a_message_with_everything_that_it_came_with(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store") as on, on.running(ANYBODY):
            await on.publish([Sent(seq=1, body=b'{"amount": 100}'), Sent(seq=None, id=7, body=b"\xff")])
            await on.until(lambda total: total.applied == 2)
            first, second = await on.db.fetch("SELECT * FROM relay.inbox_take(10, 'shop')")
            assert (
                first["consumer"],
                first["source"],
                first["aggregate_type"],
                first["aggregate_id"],
                first["seq"],
            ) == (*("shop", "shop", "order", "1", 1),)
            assert (first["event_type"], first["content_type"], first["payload"], first["body"]) == (
                *("T", "application/json", '{"amount": 100}', b'{"amount": 100}'),
            )
            assert first["headers"] == '{"traceparent": "00-x"}'
            assert first["message_id"]
            assert first["occurred_at"] is not None
            assert (second["aggregate_id"], second["seq"], second["payload"], second["body"]) == (
                None,
                None,
                None,
                b"\xff",
            )

    async def test_a_tombstone_advances_and_is_not_stored(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store") as on, on.running(ANYBODY):
            await on.publish([Sent(seq=1), tombstone(2), Sent(seq=3)])
            await on.until(lambda total: total.received == 3)
            assert await stored(on) == [1, 3]
            assert await on.db.fetchval("SELECT last_seq FROM relay.inbox_aggregate") == 3

    async def test_by_policy_latest_the_stale_are_not_stored(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store", policy="latest") as on, on.running(ANYBODY):
            await on.publish([Sent(seq=3)])
            await on.until(lambda total: total.applied == 1)
            await on.publish([Sent(seq=2), Sent(seq=7)])
            await on.until(lambda total: total.received == 3)
            assert await stored(on) == [3, 7]

    async def test_nothing_is_stored_twice_when_three_consumers_compete_for_a_shuffled_queue(
        self, database: str, broker: str
    ) -> None:
        streams = [stream(str(a), 40) for a in range(10)]
        shuffled = [s[i] for i in sorted(range(40), key=lambda i: (i * 7) % 11) for s in streams]
        async with world(database, broker, mode="store", batch=20, prefetch=20) as on:
            async with on.running(ANYBODY, consumers=3):
                await on.publish(shuffled + shuffled[::3])
                await on.until(lambda total: total.received == len(shuffled + shuffled[::3]))
                await on.until(lambda total: total.applied == 400)
            for aggregate in range(10):
                assert await stored(on, str(aggregate)) == list(range(1, 41))


class TestLeading:
    async def test_what_follows_a_row_that_waits_does_not_lead(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store") as on, on.running(ANYBODY):
            for seq in (1, 2, 3):
                await on.publish([Sent(seq=seq)])
                await on.until(lambda total, seq=seq: total.applied == seq)  # type: ignore[misc]
            await on.publish([Sent(seq=1, aggregate="2"), Sent(seq=2, aggregate="2")])
            await on.until(lambda total: total.applied == 5)
            assert await leaders(on) == [("1", 1), ("2", 1)]

    async def test_a_taker_that_has_the_first_at_that_moment_does_not_strand_what_comes(
        self, database: str, broker: str
    ) -> None:
        async with world(database, broker, mode="store") as on, on.running(ANYBODY), connected(database) as taker:
            await on.publish([Sent(seq=1)])
            await on.until(lambda total: total.applied == 1)
            async with taker.transaction():
                assert [r["seq"] for r in await taker.fetch("SELECT * FROM relay.inbox_take()")] == [1]
                await on.publish([Sent(seq=2), Sent(seq=3)])  # the store does not wait for the taker
                await on.until(lambda total: total.applied == 3)
            assert (await leaders(on))[0] == ("1", 2)
            assert [r["seq"] for r in await taker.fetch("SELECT * FROM relay.inbox_take()")] == [2, 3]

    async def test_a_lower_number_that_comes_later_leads_as_well(self, database: str) -> None:
        """By policy none; so the first row of an aggregate always leads."""
        async with connected(database) as db:
            for batch in ((5, 4), (3,), (6, 2)):
                async with db.transaction():
                    shelf = Stored(db, "c")
                    for seq in batch:
                        await shelf.add(_event(seq))
                    await shelf.write()
                assert await db.fetchval("SELECT leads FROM relay.inbox ORDER BY seq LIMIT 1")
            assert await db.fetchval("SELECT array_agg(seq ORDER BY seq) FROM relay.inbox WHERE leads") == [2, 3, 4, 5]
            assert [r["seq"] for r in await db.fetch("SELECT seq FROM relay.inbox_take(10)")] == [2, 3, 4, 5, 6]

    async def test_large_bodies_are_written_in_portions_that_are_still_one_line(self, database: str) -> None:
        async with connected(database) as db:
            async with db.transaction():
                shelf = Stored(db, "c")
                for seq in range(1, 4):
                    await shelf.add(_event(seq, bytes(16 * 1024 * 1024)))
                await shelf.write()
            rows = await db.fetch("SELECT seq, leads FROM relay.inbox ORDER BY id")
            assert [tuple(r.values()) for r in rows] == [(1, True), (2, False), (3, False)]
            taken = await db.fetch("SELECT seq FROM relay.inbox_take(10)")
            assert [r["seq"] for r in taken] == [1, 2, 3]


class TestTheSweep:
    async def test_lets_first_rows_lead_that_do_not_and_wakes_takers(self, database: str, broker: str) -> None:
        async with world(database, broker, mode="store") as on, connected(database) as taker:
            for consumer, name in (("shop", "1"), ("shop", "2"), ("other", "1")):
                await _strand(on.db, consumer, name)
            woken = asyncio.Event()
            await taker.add_listener("relay_inbox", lambda *_: woken.set())
            async with on.running(ANYBODY), asyncio.timeout(DEADLINE_S):
                await woken.wait()
            assert await leaders(on) == [("1", 2), ("2", 2)]
            rows = await taker.fetch("SELECT consumer, aggregate_id, seq FROM relay.inbox_take(10)")
            assert [tuple(r) for r in rows] == [("shop", a, seq) for a in "12" for seq in (2, 3)]

    async def test_walks_on_from_where_it_ended_and_leaves_alone_what_is_locked(self, database: str) -> None:
        async with connected(database) as db, connected(database) as other:
            for name in "abcd":
                await _strand(db, "c", name)
            async with other.transaction():
                await other.execute("SELECT FROM relay.inbox WHERE aggregate_id = 'b' FOR UPDATE")
                mended, end = await let_first_lead(db, "c", after=None, aggregates=3)
                assert (sorted(mended), end) == (["order/a", "order/c"], ("c", "order", "shop", "c"))
            assert await let_first_lead(db, "c", after=end, aggregates=3) == (["order/d"], None)
            assert await let_first_lead(db, "c", after=None, aggregates=9) == (["order/b"], None)
            assert await let_first_lead(db, "c", after=None, aggregates=9) == ([], None)


async def _strand(db: Connection, consumer: str, name: str) -> None:
    await db.execute(
        "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, leads)"
        " SELECT $1, 'shop', 'order', $2, n, 'T', n::text, '', '{}', '{}', false FROM generate_series(2, 3) AS n",
        consumer,
        name,
    )


async def test_takers_are_woken_once_a_batch_and_only_by_a_batch_that_stored_something(
    database: str, broker: str
) -> None:
    told: list[Any] = []
    async with world(database, broker, mode="store") as on, connected(database) as taker:
        await taker.add_listener("relay_inbox", lambda *notification: told.append(notification[-1]))
        async with on.running(ANYBODY):
            await on.publish([Sent(seq=2)])  # early: nothing to take
            await on.until(lambda total: total.early == 1)
            await taker.execute("SELECT")  # whatever was sent before has been read by now
            assert told == []
            await on.publish([Sent(seq=1)])
            await on.until(lambda total: total.applied == 2)
        await eventually(lambda: _said(bool(told)))
        await taker.execute("SELECT")
        assert told == ["shop"]


class TestAContradiction:
    @pytest.mark.parametrize(
        ("inbox", "flags", "message"),
        [
            (recording(), {}, "calls nobody: Inbox\\('shop'\\) must have no handlers"),
            (ANYBODY, {"functions": {"T": "a.b"}}, "calls nobody: leave out inbox.functions"),
        ],
    )
    async def test_of_store_mode_and_handlers_is_refused_before_any_socket(
        self, inbox: Inbox, flags: dict[str, Any], message: str
    ) -> None:
        settings = Settings(inbox=InboxSettings(mode="store", **flags))
        with pytest.raises(ConfigError, match=message):
            await inbox.run(settings)

    async def test_of_role_and_mode_is_said_at_the_start(self, database: str, broker: str, postgres: Postgres) -> None:
        with Logins(postgres) as logins:
            login = logins.create(database, "relay_consumer")
            async with connected(database) as owner:
                await owner.execute("REVOKE INSERT ON relay.inbox FROM relay_consumer")
            async with world(database, broker, mode="store") as on:
                settings = on.settings.model_copy(
                    update={"postgres": on.settings.postgres.model_validate({"dsn": login})}
                )
                with pytest.raises(PrivilegeError, match="permission denied for table inbox"):
                    async with asyncio.timeout(DEADLINE_S):
                        await ANYBODY.run(settings)


class TestStartingFromNow:
    async def test_is_refused_until_somebody_has_said_where(self, database: str, broker: str) -> None:
        async with world(database, broker, start_from="now") as on:
            with pytest.raises(ConfigError, match=r"nobody has said where shop starts: run `relay inbox seed`"):
                async with asyncio.timeout(DEADLINE_S):
                    await recording().run(on.settings)
            assert await on.db.fetchval("SELECT count(*) FROM relay.inbox_aggregate") == 0

    async def test_goes_on_from_where_the_cursors_were_put(self, database: str, broker: str) -> None:
        async with world(database, broker, start_from="now") as on:
            await on.db.execute(
                "INSERT INTO relay.inbox_seed (consumer, source, aggregates) VALUES ('shop', 'shop', 1)"
            )
            await on.db.execute(
                "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq)"
                " VALUES ('shop', 'shop', 'order', '1', 41)"
            )
            async with on.running(recording()):
                await on.publish([Sent(seq=41), Sent(seq=42), Sent(seq=1, aggregate="new")])
                await on.until(lambda total: total.received == 3)
            assert (await on.effects(), await on.effects("new")) == ([42], [1])


class TestTheFigures:
    async def test_of_competing_consumers_add_up(self, database: str, broker: str) -> None:
        async with world(database, broker, batch=10, prefetch=10) as on:
            async with on.running(recording(), consumers=2):
                await on.publish([e for a in range(20) for e in stream(str(a), 10)])
                await on.until(lambda total: total.applied == 200)
            row = await on.db.fetchrow("SELECT * FROM relay.inbox_progress")
        assert row is not None
        assert (row["consumer"], row["applied"], row["last_error"]) == ("shop", 200, None)
        assert row["rate"] > 0
        assert ":" in row["owner"]

    async def test_tell_what_ended_the_last_session(self, database: str, broker: str) -> None:
        async with world(database, broker) as on, on.running(recording()):
            await on.db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'relay inbox shop'"
                " AND datname = current_database()"
            )
            error = await until(lambda: on.db.fetchval("SELECT last_error FROM relay.inbox_progress"))
        assert error.startswith("PostgresUnavailable: ")

    async def test_that_cannot_be_written_do_not_hold_up_an_event(self, database: str, broker: str) -> None:
        async with world(database, broker) as on, on.running(recording()), connected(database) as other:
            async with other.transaction():
                await other.execute("SELECT FROM relay.inbox_progress FOR UPDATE")
                for seq in (1, 2):
                    await on.publish([Sent(seq=seq)])
                    await on.until(lambda total, seq=seq: total.applied == seq)  # type: ignore[misc]
            assert on.errors == []


async def test_an_operator_is_heard_at_once(database: str, broker: str) -> None:
    failing = True

    async def handle(event: Event, tx: Any) -> None:
        if failing:
            raise RuntimeError

    inbox = Inbox("shop")
    inbox.on("T")(handle)
    async with world(database, broker, retry_first_s=3600, retry_max_s=3600) as on, on.running(inbox):
        await on.publish([Sent(seq=1)])
        await on.until(lambda total: total.failed == 1)
        failing = False
        async with on.db.transaction():
            await on.db.execute("UPDATE relay.inbox_held SET next_attempt_at = now()")
            await on.db.execute("SELECT pg_notify('relay_inbox_operate', 'somebody else')")
            await on.db.execute("SELECT pg_notify('relay_inbox_operate', 'shop')")
        async with asyncio.timeout(5):  # the next look by itself would come after ten
            await on.until(lambda total: total.applied == 1)


def _event(seq: int, body: bytes = b"{}") -> Event:
    return Event(
        source="s",
        aggregate_type="order",
        aggregate_id="1",
        seq=seq,
        event_type="T",
        message_id=str(seq),
        content_type="",
        body=body,
        digest=content_digest("T", "", body),
    )


async def _said(value: bool) -> bool:
    return value
