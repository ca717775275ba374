"""What the assigning trigger promises to whoever INSERTs: numbers without a hole in order of commit, and nothing to forge."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import asyncpg
import pytest

from relay.postgres.connect import Connection
from tests.harness.outbox import connected, insert, until

INSERT = "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', $1, 'Changed', '{}') RETURNING seq"
WAKE_LOCK = 727002


async def test_events_of_an_aggregate_are_numbered_1_2_3(database: str) -> None:
    async with connected(database) as connection:
        assert [await connection.fetchval(INSERT, "1") for _ in range(5)] == [1, 2, 3, 4, 5]
        assert await connection.fetchval(INSERT, "2") == 1


async def test_the_same_id_under_another_type_is_another_aggregate(database: str) -> None:
    async with connected(database) as connection:
        await insert(connection, "order/1", count=2)
        await insert(connection, "invoice/1")
        assert await _numbers(connection) == {"order/1": [1, 2], "invoice/1": [1]}


async def test_a_rollback_leaves_no_hole(database: str) -> None:
    async with connected(database) as connection:
        await insert(connection, "order/1")
        undone = connection.transaction()
        await undone.start()
        assert await connection.fetchval(INSERT, "1") == 2
        await undone.rollback()
        assert await connection.fetchval(INSERT, "1") == 2


async def test_a_rolled_back_savepoint_leaves_no_hole(database: str) -> None:
    async with connected(database) as connection, connection.transaction():
        assert await connection.fetchval(INSERT, "1") == 1
        undone = connection.transaction()
        await undone.start()
        assert await connection.fetchval(INSERT, "1") == 2
        await undone.rollback()
        assert await connection.fetchval(INSERT, "1") == 2
        async with connection.transaction():
            assert await connection.fetchval(INSERT, "1") == 3


async def test_a_savepoint_counts_as_its_whole_transaction(database: str) -> None:
    async with connected(database) as connection:
        async with connection.transaction():
            async with connection.transaction():
                await insert(connection, "order/1")
            await insert(connection, "order/1")
            transaction = await connection.fetchval("SELECT pg_current_xact_id()::text")
        assert [r["xid"] for r in await connection.fetch("SELECT xid::text FROM relay.outbox")] == [transaction] * 2


async def test_concurrent_writers_who_also_roll_back_leave_no_hole(database: str) -> None:
    async def writer(number: int) -> int:
        dice, committed = random.Random(number), 0
        async with connected(database) as connection:
            for _ in range(25):
                transaction = connection.transaction()
                await transaction.start()
                await connection.fetchval(INSERT, str(dice.randrange(3)))
                if dice.random() < 0.3:
                    await transaction.rollback()
                else:
                    await transaction.commit()
                    committed += 1
        return committed

    committed = sum(await asyncio.gather(*map(writer, range(8))))
    async with connected(database) as connection:
        numbers = await _numbers(connection)
        assert sum(map(len, numbers.values())) == committed
        assert all(seqs == list(range(1, len(seqs) + 1)) for seqs in numbers.values()), "by id"


class TestASuppliedNumber:
    async def test_that_is_the_next_one_is_taken(self, database: str) -> None:
        async with connected(database) as connection:
            for seq in (1, 2):
                assert (
                    await connection.fetchval("SELECT relay.emit('order', '1', 'Changed', '{}', seq => $1)", seq) == seq
                )
            assert await connection.fetchval(INSERT, "1") == 3

    @pytest.mark.parametrize("seq", [1, 2, 4, 0, -1, 2**63 - 1])
    async def test_that_is_not_the_next_one_fails_as_a_serialization_failure_and_names_it(
        self, database: str, seq: int
    ) -> None:
        async with connected(database) as connection:
            await insert(connection, "order/1", count=2)
            with pytest.raises(
                asyncpg.SerializationError, match=f"seq {seq} was given for order/1, but the next one is 3"
            ) as caught:
                await connection.fetchval("SELECT relay.emit('order', '1', 'Changed', '{}', seq => $1)", seq)
            assert caught.value.sqlstate == "40001"
            assert "read it again and retry" in str(caught.value.hint)
            assert await connection.fetchval(INSERT, "1") == 3

    async def test_of_two_who_read_the_same_state_only_one_gets_through(self, database: str) -> None:
        emit = "SELECT relay.emit('order', '1', 'Changed', '{}', seq => 1)"
        async with connected(database) as first, connected(database) as second:
            async with first.transaction():
                await first.execute(emit)
                late = asyncio.create_task(second.execute(emit))
                await _until_it_waits(first, second)
            with pytest.raises(asyncpg.SerializationError, match="the next one is 2"):
                await late


class TestAnEventWithoutAnAggregate:
    async def test_has_no_number(self, database: str) -> None:
        async with connected(database) as connection:
            statement = (
                "INSERT INTO relay.outbox (aggregate_type, event_type, payload) VALUES ($1, 'Seen', '{}') RETURNING seq"
            )
            assert [await connection.fetchval(statement, kind) for kind in (None, None, "page")] == [None] * 3
            assert await connection.fetchval("SELECT count(*) FROM relay.outbox_aggregate") == 0

    async def test_waits_for_nobody(self, database: str) -> None:
        statement = "INSERT INTO relay.outbox (event_type, payload) VALUES ('Seen', '{}')"
        async with connected(database) as first, connected(database) as second, first.transaction():
            await first.execute(statement)
            await asyncio.wait_for(second.execute(statement), 10)


class TestTwoTransactionsOnOneAggregate:
    async def test_the_second_waits_and_gets_the_number_after(self, database: str) -> None:
        async with connected(database) as first, connected(database) as second:
            # The second has the older transaction id and still comes later: order of commit, not of beginning.
            late = second.transaction()
            await late.start()
            await second.execute("SELECT pg_current_xact_id()")
            async with first.transaction():
                assert await first.fetchval(INSERT, "1") == 1
                waiting = asyncio.create_task(second.fetchval(INSERT, "1"))
                await _until_it_waits(first, second)
            assert await waiting == 2
            await late.commit()
            by_id = await first.fetch("SELECT seq, xid::text::bigint AS xid FROM relay.outbox ORDER BY id")
            assert [r["seq"] for r in by_id] == [1, 2]
            assert by_id[0]["xid"] > by_id[1]["xid"]

    async def test_the_second_gets_the_same_number_when_the_first_rolls_back(self, database: str) -> None:
        async with connected(database) as first, connected(database) as second:
            undone = first.transaction()
            await undone.start()
            assert await first.fetchval(INSERT, "1") == 1
            waiting = asyncio.create_task(second.fetchval(INSERT, "1"))
            await _until_it_waits(first, second)
            await undone.rollback()
            assert await waiting == 1

    async def test_others_do_not_wait(self, database: str) -> None:
        async with connected(database) as first, connected(database) as second, first.transaction():
            await first.fetchval(INSERT, "1")
            assert await asyncio.wait_for(second.fetchval(INSERT, "2"), 10) == 1

    async def test_under_repeatable_read_the_second_is_told_to_retry(self, database: str) -> None:
        async with connected(database) as first, connected(database) as second:
            late = second.transaction(isolation="repeatable_read")
            await late.start()
            await second.fetchval("SELECT count(*) FROM relay.outbox")
            await insert(first, "order/1")
            with pytest.raises(asyncpg.SerializationError):
                await second.fetchval(INSERT, "1")
            await late.rollback()
            assert await second.fetchval(INSERT, "1") == 2


class TestWhatTheProducerCannotForge:
    async def test_id_xid_shard_and_size_are_assigned_whatever_is_given(self, database: str) -> None:
        async with connected(database) as connection, connection.transaction():
            row = await connection.fetchrow(
                "INSERT INTO relay.outbox (id, xid, shard, size, aggregate_type, aggregate_id, event_type, body)"
                " VALUES (-7, '999999', 9, 1, 'order', '1', 'Changed', 'four') RETURNING id, xid::text, shard, size"
            )
            assert row is not None
            assert row["id"] > 0
            assert row["xid"] == await connection.fetchval("SELECT pg_current_xact_id()::text")
            assert (row["shard"], row["size"]) == (0, 4)

    async def test_a_row_put_into_a_partition_by_name_is_assigned_alike(self, database: str) -> None:
        async with connected(database) as connection:
            for slot in range(4):
                statement = f"INSERT INTO relay.outbox_{slot} (slot, aggregate_type, aggregate_id, event_type, payload) VALUES ({slot}, 'order', '1', 'Changed', '{{}}')"
                await connection.execute(statement)
            assert await _numbers(connection) == {"order/1": [1, 2, 3, 4]}
            assert await connection.fetchval("SELECT count(DISTINCT id) FROM relay.outbox WHERE xid <> '0'") == 4


class TestManyRowsAtOnce:
    async def test_a_multi_row_insert_keeps_its_order(self, database: str) -> None:
        async with connected(database) as connection:
            await connection.execute(
                "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES"
                " ('order', 'a', 'First', '1'), ('order', 'b', 'First', '2'), ('order', 'a', 'Second', '3'), ('order', 'a', 'Third', '4')"
            )
            rows = await connection.fetch("SELECT aggregate_id, seq, event_type, payload FROM relay.outbox ORDER BY id")
            assert [(r["aggregate_id"], r["seq"], r["event_type"], r["payload"]) for r in rows] == [
                ("a", 1, "First", "1"),
                ("b", 1, "First", "2"),
                ("a", 2, "Second", "3"),
                ("a", 3, "Third", "4"),
            ]

    async def test_copy_works_and_keeps_its_order(self, database: str) -> None:
        columns = ["aggregate_type", "aggregate_id", "event_type", "payload", "headers"]
        records = [
            ("order", str(n % 7), "Changed", f'{{"n": {n}}}', '{"traceparent": "00-1-2-03"}') for n in range(1000)
        ]
        async with connected(database) as connection:
            await connection.copy_records_to_table("outbox", schema_name="relay", columns=columns, records=records)
            rows = await connection.fetch(
                "SELECT aggregate_id, seq, (payload ->> 'n')::int AS n FROM relay.outbox ORDER BY id"
            )
            assert [r["n"] for r in rows] == list(range(1000))
            assert [r["seq"] for r in rows] == [n // 7 + 1 for n in range(1000)]

    async def test_one_bad_row_of_a_copy_leaves_nothing(self, database: str) -> None:
        columns = ["aggregate_type", "aggregate_id", "event_type", "payload"]
        records: list[tuple[Any, ...]] = [("order", "1", "Changed", "{}"), ("order", "1", "not a name", "{}")]
        async with connected(database) as connection:
            with pytest.raises(asyncpg.CheckViolationError, match="outbox_event_type_is_a_name"):
                await connection.copy_records_to_table("outbox", schema_name="relay", columns=columns, records=records)
            assert await connection.fetchval(INSERT, "1") == 1


class TestTheWakeUpBarrier:
    async def test_while_the_relay_is_awake_nobody_notifies_and_it_cannot_fall_asleep(self, database: str) -> None:
        async with connected(database) as producer, connected(database) as relay:
            async with producer.transaction():
                await insert(producer, "order/1")
                assert not await relay.fetchval("SELECT pg_try_advisory_lock($1, 0)", WAKE_LOCK)
            assert await relay.fetchval("SELECT pg_try_advisory_lock($1, 0)", WAKE_LOCK)

    async def test_while_it_sleeps_a_commit_notifies_once_a_transaction(self, database: str) -> None:
        heard: asyncio.Queue[object] = asyncio.Queue()
        async with connected(database) as producer, connected(database) as relay:
            await relay.add_listener("relay_outbox", lambda *told: heard.put_nowait(told[-1]))
            await relay.execute("SELECT pg_advisory_lock($1, 0)", WAKE_LOCK)
            undone = producer.transaction()
            await undone.start()
            await insert(producer, "order/1")
            await undone.rollback()
            async with producer.transaction():
                await insert(producer, "order/1", count=10)
            assert await asyncio.wait_for(heard.get(), 10) == "0"
            await relay.fetchval("SELECT 1")  # whatever else was sent is here now
            assert heard.empty()

    async def test_prepare_transaction_works_while_the_relay_is_awake_and_keeps_it_awake(self, database: str) -> None:
        async with connected(database) as producer, connected(database) as relay:
            await _require_prepared_transactions(producer)
            await producer.execute("BEGIN")
            await insert(producer, "order/1")
            await producer.execute("PREPARE TRANSACTION 'relay_test_two_phase'")
            try:
                assert not await relay.fetchval("SELECT pg_try_advisory_lock($1, 0)", WAKE_LOCK)
                assert await relay.fetchval("SELECT count(*) FROM relay.outbox") == 0
            finally:
                await relay.execute("COMMIT PREPARED 'relay_test_two_phase'")
            assert await _numbers(relay) == {"order/1": [1]}
            assert await relay.fetchval("SELECT pg_try_advisory_lock($1, 0)", WAKE_LOCK)

    async def test_while_it_sleeps_prepare_transaction_fails_before_anything_is_promised(self, database: str) -> None:
        """PostgreSQL forbids NOTIFY there: two-phase producers need `outbox.wakeup = "poll"`, whose relay never sleeps."""
        async with connected(database) as producer, connected(database) as relay:
            await _require_prepared_transactions(producer)
            await relay.execute("SELECT pg_advisory_lock($1, 0)", WAKE_LOCK)
            await producer.execute("BEGIN")
            await insert(producer, "order/1")
            with pytest.raises(asyncpg.FeatureNotSupportedError, match="NOTIFY"):
                await producer.execute("PREPARE TRANSACTION 'relay_test_refused'")
            assert await relay.fetchval("SELECT count(*) FROM pg_prepared_xacts WHERE gid = 'relay_test_refused'") == 0


class TestTheRingOfSlots:
    @pytest.mark.parametrize("slot", range(4))
    async def test_every_slot_takes_rows(self, database: str, slot: int) -> None:
        async with connected(database) as connection:
            await connection.execute(
                "INSERT INTO relay.outbox (slot, aggregate_type, aggregate_id, event_type, payload) VALUES ($1, 'order', '1', 'Changed', '{}')",
                slot,
            )
            assert (
                await connection.fetchval("SELECT tableoid::regclass::text FROM relay.outbox") == f"relay.outbox_{slot}"
            )

    @pytest.mark.parametrize(
        ("moment", "slot"),
        [
            ("1970-01-01 00:00:00+00", 0),
            ("1970-01-02 23:59:59+00", 0),
            ("1970-01-03 00:00:00+00", 1),
            ("1970-01-05 00:00:00+00", 2),
            ("1970-01-07 00:00:00+00", 3),
            ("1970-01-08 23:59:59+00", 3),
            ("1970-01-09 00:00:00+00", 0),
            ("2026-01-15 12:00:00+00", 2),  # 1768478400 s // 172800 = 10234
            ("2038-01-19 03:14:08+00", 3),  # 2147483648 s // 172800 = 12427
            ("2262-04-11 23:47:16+00", 3),  # 9223372036 s // 172800 = 53375
        ],
    )
    async def test_the_clock_chooses_the_slot(self, database: str, moment: str, slot: int) -> None:
        async with connected(database) as connection:
            default = await connection.fetchval(
                "SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum"
                " WHERE d.adrelid = 'relay.outbox'::regclass AND a.attname = 'slot'"
            )
            assert "clock_timestamp()" in default
            assert (
                await connection.fetchval("SELECT " + default.replace("clock_timestamp()", f"'{moment}'::timestamptz"))
                == slot
            )

    async def test_the_default_is_todays_slot(self, database: str) -> None:
        async with connected(database) as connection:
            await insert(connection, "order/1")
            assert await connection.fetchval(
                "SELECT slot = extract(epoch FROM created_at)::bigint / 172800 % 4 FROM relay.outbox"
            )


async def _numbers(connection: Connection) -> dict[str, list[int]]:
    """The numbers of every aggregate's events, by id."""
    found: dict[str, list[int]] = {}
    for r in await connection.fetch(
        "SELECT aggregate_type || '/' || aggregate_id AS aggregate, seq FROM relay.outbox ORDER BY id"
    ):
        found.setdefault(r["aggregate"], []).append(r["seq"])
    return found


async def _until_it_waits(observer: Connection, waiting: Connection) -> None:
    """Until the other session waits for a lock."""
    pid = waiting.get_server_pid()
    await until(lambda: observer.fetchval("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))


async def _require_prepared_transactions(connection: Connection) -> None:
    if await connection.fetchval("SHOW max_prepared_transactions") == "0":
        pytest.skip("needs max_prepared_transactions > 0 on the server of RELAY_TEST_POSTGRES_DSN")
