"""Each role of sql/roles.sql can do its job and nothing else, shown by logging in as a member of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import asyncpg
import pytest
from structlog.testing import capture_logs

from relay.daemon import Outbox
from relay.errors import PrivilegeError
from relay.inbox.stored import Stored
from relay.message import Event
from relay.operate import inbox_acts
from relay.operate.audit import Operator
from relay.operate.inbox_cursors import Reset, SkipThrough
from relay.operate.outbox_acts import Purge, Retry, Skip, SkipNumber
from relay.operate.outbox_pauses import Pause, Resume
from relay.operate.replays import abandon, begin, find, got_to, resume, try_lock
from relay.operate.retained import Retained
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.queries import query
from relay.sandbox import Postgres
from tests.harness.acts import act_on
from tests.harness.audit import audit
from tests.harness.logins import Logins, role_of
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until

ROLES = ("relay_producer", "relay_daemon", "relay_consumer", "relay_taker", "relay_operator", "relay_monitor")
EMIT = "SELECT relay.emit('order', '1', 'Changed', '{}')"
INSERT = "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('order', '1', 'Changed', '{}')"
PLAIN_COLUMNS = {
    "aggregate_type",
    "aggregate_id",
    "seq",
    "event_type",
    "payload",
    "body",
    "content_type",
    "headers",
    "routing_key",
}

# role -> table -> rights on the whole table, as pg_catalog's ACL functions tell them. What is not here, it has not.
TABLE_RIGHTS: dict[str, dict[str, set[str]]] = {
    "relay_producer": {},
    "relay_daemon": {
        "migration": {"SELECT"},
        "outbox": {"SELECT", "TRUNCATE"},
        **{f"outbox_{slot}": {"TRUNCATE"} for slot in range(4)},
        "outbox_aggregate": {"SELECT"},
        "outbox_cursor": {"SELECT", "UPDATE"},
        "outbox_parked": {"SELECT", "INSERT", "UPDATE", "DELETE"},
        "outbox_pause": {"SELECT"},
        "outbox_replay": {"SELECT"},
        "outbox_tombstone": {"SELECT", "DELETE"},
    },
    "relay_consumer": {
        "migration": {"SELECT"},
        "inbox_aggregate": {"SELECT", "INSERT", "UPDATE"},
        "inbox_held": {"SELECT", "INSERT", "UPDATE", "DELETE"},
        "inbox_seen": {"SELECT", "INSERT", "DELETE"},
        "inbox_quarantine": {"INSERT"},
        "inbox_gap": {"SELECT", "INSERT", "UPDATE", "DELETE"},
        "inbox_progress": {"SELECT", "INSERT", "UPDATE"},
        "inbox_seed": {"SELECT"},
        "inbox": {"INSERT"},
    },
    "relay_taker": {
        "inbox": {"SELECT", "DELETE"},
    },
    "relay_monitor": {
        table: {"SELECT"}
        for table in (
            *("migration", "audit", "audit_aggregate", "outbox_aggregate", "outbox_cursor", "outbox_parked"),
            *(
                "outbox_pause",
                "outbox_tombstone",
                "outbox_replay",
                "inbox_aggregate",
                "inbox_gap",
                "inbox_progress",
                "inbox_seed",
            ),
        )
    },
}
OPERATOR_RIGHTS: dict[str, set[str]] = {  # beside SELECT on everything, and INSERT and UPDATE of some columns
    "audit_aggregate": {"INSERT"},
    "outbox_parked": {"INSERT", "DELETE"},
    "outbox_pause": {"INSERT", "DELETE"},
    "outbox_tombstone": {"INSERT"},
    "inbox_aggregate": {"INSERT"},
    "inbox_seed": {"INSERT", "UPDATE"},
    "inbox_held": {"DELETE"},
    "inbox_gap": {"DELETE"},
    "inbox": {"DELETE"},
    "inbox_seen": {"DELETE"},
    "inbox_quarantine": {"INSERT"},
}
OPERATOR_INSERTS = {
    "audit": {"who", "side", "act", "selection", "why", "rows"},  # when, and by which login, is not for it to say
    "outbox_replay": {"audit_id", "selection", "to_queue", "after_id", "last_id", "total"},
}
OPERATOR_UPDATES = {
    "outbox_cursor": {"rate"},  # for the row's lock
    "outbox_parked": {"state", "next_attempt_at", "attempts"},
    "outbox_replay": {"after_id", "sent", "state", "updated_at"},
    "inbox_aggregate": {"last_seq", "last_digest", "blocked"},
    "inbox_held": {
        *("event_type", "content_type", "headers", "body", "digest"),
        *("reason", "state", "attempts", "error", "next_attempt_at"),
    },
    "inbox_gap": {"state", "next_ask_at", "detail", "asks", "dead_letters"},
    "inbox": {"next_take_at", "leads"},
    "inbox_quarantine": {"dismissed_at"},
}
PAYLOADS = {
    ("outbox", "payload"),
    ("outbox", "body"),
    ("outbox", "headers"),
    ("inbox_held", "body"),
    ("inbox_held", "headers"),
}
PAYLOADS |= {("inbox_quarantine", "body"), ("inbox_quarantine", "properties"), ("inbox_held", "error")}
PAYLOADS |= {("inbox", "body"), ("inbox", "headers"), ("inbox", "error")}


PRODUCER_MAY_NOT = [
    "SELECT payload FROM relay.outbox",
    "SELECT * FROM relay.outbox",
    "SELECT aggregate_id FROM relay.outbox",
    "SELECT seq FROM relay.outbox_0",
    INSERT + " RETURNING payload",
    INSERT + " RETURNING *",
    "UPDATE relay.outbox SET payload = '{}'",
    "UPDATE relay.outbox SET seq = 2",
    "UPDATE relay.outbox SET xid = '1'",
    "DELETE FROM relay.outbox",
    "TRUNCATE relay.outbox",
    "TRUNCATE relay.outbox_0",
    "LOCK TABLE relay.outbox IN SHARE MODE",
    "ALTER TABLE relay.outbox DISABLE TRIGGER ALL",
    "DROP TABLE relay.outbox",
    "CREATE TABLE relay.mine ()",
    "SELECT nextval('relay.outbox_id_seq')",
    "SELECT setval('relay.outbox_id_seq', 1)",
    "TABLE relay.outbox_aggregate",
    "UPDATE relay.outbox_aggregate SET last_seq = 1",
    "INSERT INTO relay.outbox_aggregate VALUES ('order', '9', 7)",
    "TABLE relay.outbox_cursor",
    "UPDATE relay.outbox_cursor SET epoch = 9",
    "TABLE relay.outbox_parked",
    "TABLE relay.inbox_aggregate",
    "TABLE relay.migration",
    "INSERT INTO relay.outbox_0 (slot, event_type, payload) VALUES (0, 'Changed', '{}')",
    "SET session_replication_role = replica",
    *(
        f"INSERT INTO relay.outbox ({column}, event_type, payload) VALUES ({value}, 'Changed', '{{}}')"
        for column, value in (
            ("id", "1"),
            ("xid", "'1'"),
            ("shard", "0"),
            ("slot", "0"),
            ("size", "1"),
            ("created_at", "now()"),
        )
    ),
]
DAEMON_MAY_NOT = [
    INSERT,
    EMIT,
    "DELETE FROM relay.outbox",
    "UPDATE relay.outbox SET payload = '{}'",
    "UPDATE relay.outbox SET seq = 7",
    "UPDATE relay.outbox_aggregate SET last_seq = 7",
    "DELETE FROM relay.outbox_cursor",
    "INSERT INTO relay.outbox_cursor (shard) VALUES (1)",
    "DELETE FROM relay.migration",
    "DELETE FROM relay.outbox_pause",
    "INSERT INTO relay.outbox_tombstone VALUES (1, 0, 'skip', 1)",
    "TABLE relay.audit",
    "TABLE relay.inbox_held",
    "CREATE TABLE relay.mine ()",
]
CONSUMER_MAY_NOT = [
    INSERT,
    EMIT,
    "TABLE relay.outbox",
    "TABLE relay.outbox_aggregate",
    "UPDATE relay.outbox_cursor SET epoch = 9",
    "DELETE FROM relay.inbox_aggregate",
    "TRUNCATE relay.inbox_seen",
    "SELECT body FROM relay.inbox_quarantine",
    "DELETE FROM relay.inbox_quarantine",
    "SELECT body FROM relay.inbox",
    "UPDATE relay.inbox SET next_take_at = now()",
    "DELETE FROM relay.inbox",
    "SELECT * FROM relay.inbox_take()",
    "INSERT INTO relay.inbox_seed (consumer, source, aggregates) VALUES ('c', 's', 1)",
    "DELETE FROM relay.inbox_progress",
    "CREATE TABLE relay.mine ()",
]
TAKER_MAY_NOT = [
    INSERT,
    EMIT,
    "INSERT INTO relay.inbox (consumer, source, event_type, message_id, content_type, headers, body) VALUES ('c', 's', 'T', 'm', '', '{}', '')",
    "UPDATE relay.inbox SET body = ''",
    "UPDATE relay.inbox SET seq = 1",
    "TRUNCATE relay.inbox",
    "TABLE relay.inbox_aggregate",
    "TABLE relay.inbox_held",
    "TABLE relay.inbox_progress",
    "TABLE relay.outbox",
    "TABLE relay.migration",
    "CREATE TABLE relay.mine ()",
]
MONITOR_MAY_NOT = [
    INSERT,
    EMIT,
    "UPDATE relay.outbox SET payload = '{}'",
    "DELETE FROM relay.outbox_parked",
    "UPDATE relay.outbox_cursor SET epoch = 9",
    "UPDATE relay.inbox_aggregate SET last_seq = 9",
    "INSERT INTO relay.audit (who, side, act, selection, rows) VALUES ('w', 'outbox', 'retry', '{}', 1)",
    "INSERT INTO relay.outbox_pause (scope, shard, audit_id) VALUES ('shard', 0, 1)",
    "SELECT nextval('relay.outbox_id_seq')",
    "CREATE TABLE relay.mine ()",
]
OPERATOR_MAY_NOT = [
    INSERT,
    EMIT,
    "UPDATE relay.outbox SET payload = '{}'",
    "DELETE FROM relay.outbox",
    "TRUNCATE relay.outbox_0",
    "UPDATE relay.outbox_aggregate SET last_seq = 9",
    "UPDATE relay.outbox_cursor SET epoch = 9",
    "UPDATE relay.outbox_cursor SET snapshot = '1:1:'",
    "DELETE FROM relay.outbox_cursor",
    "UPDATE relay.outbox_parked SET id = 9",
    "DELETE FROM relay.outbox_tombstone",
    "UPDATE relay.audit SET who = 'somebody else'",
    *(
        f"INSERT INTO relay.audit ({column}, who, side, act, selection, rows) OVERRIDING SYSTEM VALUE VALUES ({value}, 'w', 'outbox', 'purge', '{{}}', 1)"
        for column, value in (("login", "'somebody else'"), ("at", "now() - interval '1 year'"), ("id", "7"))
    ),
    "UPDATE relay.outbox_replay SET last_id = 9",
    "UPDATE relay.outbox_replay SET audit_id = 9",
    "DELETE FROM relay.audit",
    "TRUNCATE relay.audit CASCADE",
    "DELETE FROM relay.audit_aggregate",
    "DELETE FROM relay.outbox_replay",
    "DELETE FROM relay.inbox_aggregate",
    "UPDATE relay.inbox_aggregate SET consumer = 'other'",
    "UPDATE relay.inbox_held SET seq = 9",
    "INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ('c', 's', 'm')",
    "INSERT INTO relay.inbox (consumer, source, event_type, message_id, content_type, headers, body) VALUES ('c', 's', 'T', 'm', '', '{}', '')",
    "UPDATE relay.inbox SET body = ''",
    "UPDATE relay.inbox_quarantine SET body = ''",
    "DELETE FROM relay.inbox_quarantine",
    "SELECT nextval('relay.outbox_id_seq')",
    "SELECT FROM relay.inbox_take(1)",
    "CREATE TABLE relay.mine ()",
]


@pytest.fixture
def logins(postgres: Postgres, database: str) -> Iterator[Logins]:
    with Logins(postgres) as made:
        yield made


class TestTheMatrix:
    @pytest.mark.parametrize("role", TABLE_RIGHTS)
    async def test_a_role_has_exactly_these_rights_on_whole_tables(self, database: str, role: str) -> None:
        async with connected(database) as connection:
            records = await connection.fetch(
                "SELECT c.relname, a.privilege_type FROM pg_class c, aclexplode(c.relacl) a"
                " WHERE c.relnamespace = 'relay'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.grantee = $1::text::regrole",
                role,
            )
        found: dict[str, set[str]] = {}
        for r in records:
            found.setdefault(r["relname"], set()).add(r["privilege_type"])
        assert found == TABLE_RIGHTS[role]

    async def test_an_operator_reads_everything_and_changes_exactly_this(self, database: str) -> None:
        async with connected(database) as connection:
            records = await connection.fetch(
                "SELECT c.relname, array_agg(a.privilege_type::text) AS rights FROM pg_class c LEFT JOIN aclexplode(c.relacl) a"
                " ON a.grantee = 'relay_operator'::regrole WHERE c.relnamespace = 'relay'::regnamespace AND c.relkind IN ('r', 'p') GROUP BY 1"
            )
        assert {r["relname"]: set(r["rights"]) for r in records} == {
            r["relname"]: {"SELECT"} | OPERATOR_RIGHTS.get(r["relname"], set()) for r in records
        }
        assert OPERATOR_RIGHTS.keys() <= {r["relname"] for r in records}

    @pytest.mark.parametrize(
        ("role", "table", "right", "columns"),
        [
            ("relay_producer", "outbox", "INSERT", PLAIN_COLUMNS),
            ("relay_producer", "outbox", "SELECT", {"id", "seq"}),
            ("relay_daemon", "outbox", "UPDATE", {"xid", "id"}),
            (
                "relay_consumer",
                "inbox",
                "SELECT",
                {"id", "consumer", "source", "aggregate_type", "aggregate_id", "seq", "leads"},
            ),
            ("relay_consumer", "inbox", "UPDATE", {"leads"}),
            ("relay_taker", "inbox", "UPDATE", {"attempts", "error", "next_take_at", "leads"}),
            *(("relay_operator", table, "INSERT", columns) for table, columns in OPERATOR_INSERTS.items()),
            *(("relay_operator", table, "UPDATE", columns) for table, columns in OPERATOR_UPDATES.items()),
        ],
    )
    async def test_a_role_has_exactly_these_rights_on_columns(
        self, database: str, role: str, table: str, right: str, columns: set[str]
    ) -> None:
        async with connected(database) as connection:
            assert await _columns(connection, role, table, right) == columns

    async def test_no_role_has_a_right_on_a_column_that_is_not_listed_here(self, database: str) -> None:
        async with connected(database) as connection:
            records = await connection.fetch(
                "SELECT DISTINCT a.grantee::regrole::text AS role, c.relname, a.privilege_type"
                " FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid, aclexplode(t.attacl) a WHERE c.relnamespace = 'relay'::regnamespace"
            )
        assert {(r["role"], r["relname"], r["privilege_type"]) for r in records} == {
            ("relay_producer", "outbox", "INSERT"),
            ("relay_producer", "outbox", "SELECT"),
            ("relay_daemon", "outbox", "UPDATE"),
            ("relay_consumer", "inbox", "SELECT"),
            ("relay_consumer", "inbox", "UPDATE"),
            ("relay_taker", "inbox", "UPDATE"),
            *(("relay_operator", table, "INSERT") for table in OPERATOR_INSERTS),
            *(("relay_operator", table, "UPDATE") for table in OPERATOR_UPDATES),
            ("relay_monitor", "inbox", "SELECT"),
            ("relay_monitor", "outbox", "SELECT"),
            ("relay_monitor", "inbox_held", "SELECT"),
            ("relay_monitor", "inbox_quarantine", "SELECT"),
        }

    async def test_a_monitor_sees_no_payload(self, database: str) -> None:
        async with connected(database) as connection:
            seen = {
                (table, column)
                for table in ("outbox", "inbox", "inbox_held", "inbox_quarantine")
                for column in await _columns(connection, "relay_monitor", table, "SELECT")
            }
        assert len(seen) > 30
        assert not seen & PAYLOADS

    async def test_public_can_do_nothing(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database)) as stranger:
            for statement in (
                "TABLE relay.outbox",
                INSERT,
                EMIT,
                "SELECT nextval('relay.outbox_id_seq')",
                "TABLE relay.inbox_held",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError, match="schema relay"):
                    await stranger.execute(statement)
        async with connected(database) as connection:
            granted = await connection.fetch(
                "SELECT c.relname AS name FROM pg_class c, aclexplode(c.relacl) a WHERE c.relnamespace = 'relay'::regnamespace AND a.grantee = 0"
                " UNION SELECT p.proname FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a"
                " WHERE p.pronamespace = 'relay'::regnamespace AND a.grantee = 0"
                " UNION SELECT nspname FROM pg_namespace, aclexplode(nspacl) a WHERE nspname = 'relay' AND a.grantee = 0"
            )
            assert [r["name"] for r in granted] == []

    @pytest.mark.parametrize("role", ROLES)
    async def test_a_role_cannot_log_in_create_or_hand_on(self, database: str, role: str) -> None:
        async with connected(database) as connection:
            attributes = await connection.fetchrow(
                "SELECT rolcanlogin, rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles WHERE rolname = $1",
                role,
            )
            assert attributes is not None
            assert not any(attributes.values())
            assert not await connection.fetchval("SELECT has_schema_privilege($1, 'relay', 'CREATE')", role)
            assert not await connection.fetchval(
                "SELECT count(*) FROM pg_auth_members WHERE member = $1::text::regrole", role
            )


class TestAProducer:
    async def test_inserts_with_the_plain_columns_and_reads_its_number(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_producer")) as producer:
            assert await producer.fetchval(INSERT + " RETURNING seq") == 1
            assert await producer.fetchval(EMIT) == 2
            assert (
                await producer.fetchval("SELECT relay.emit('order', '1', 'Changed', '{}', '{\"a\": 1}', 'key', 3)") == 3
            )
            event = ["order", "1", "Changed", None, b"bytes", "text/plain", '{"a": 1}', "key", 4]
            assert await producer.fetchval(query("insert_event"), *event) == 4
            assert [
                r["seq"] for r in await producer.fetch(query("insert_events"), *([v, v] for v in [*event[:8], None]))
            ] == [5, 6]
            columns = ["aggregate_type", "aggregate_id", "event_type", "payload"]
            await producer.copy_records_to_table(
                "outbox", schema_name="relay", columns=columns, records=[("order", "1", "Changed", "{}")]
            )
        async with connected(database) as connection:
            assert [r["seq"] for r in await connection.fetch("SELECT seq FROM relay.outbox ORDER BY id")] == [
                1,
                2,
                3,
                4,
                5,
                6,
                7,
            ]

    async def test_can_do_nothing_else(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_producer")) as connection:
            assert await _allowed(connection, PRODUCER_MAY_NOT) == []


class TestTheDaemon:
    async def test_runs_parks_and_retries_with_its_own_role(self, database: str, broker: str, logins: Logins) -> None:
        daemon = logins.create(database, "relay_daemon")
        async with connected(database) as producer, audit(broker, "order.#") as witness:
            await insert(producer, "order/1", count=3)
            await insert(producer, "nowhere/1", count=2)  # no queue is bound for it
            settings = settings_for(daemon, broker, outbox__retry_first_s=0.01, outbox__retry_max_s=0.01)
            outbox = Outbox(settings)
            await _drain(outbox)
            assert (outbox.progress[0].published, outbox.parked) == (3, 2)
            await witness.queue.bind(witness.exchange, "nowhere.#")
            await _until_due(producer)
            again = Outbox(settings)
            await _drain(again)
            assert (again.progress[0].unparked, again.parked) == (2, 0)
            await witness.wait_for(5)
            assert witness.sequences(first_only=False) == {"order/1": [1, 2, 3], "nowhere/1": [1, 2]}

    async def test_rebases_a_restored_log_with_its_own_role(self, database: str, broker: str, logins: Logins) -> None:
        daemon = logins.create(database, "relay_daemon")
        async with connected(database) as owner, audit(broker) as witness:
            await insert(owner, "order/1", count=2)
            await owner.execute(
                "UPDATE relay.outbox_cursor SET cluster_id = 1"
            )  # as a dump of another cluster would have it
            outbox = Outbox(settings_for(daemon, broker))
            await _drain(outbox)
            await witness.wait_for(2)
            assert witness.sequences(first_only=False) == {"order/1": [1, 2]}

    async def test_may_lock_and_empty_a_slot(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_daemon")) as daemon:
            async with daemon.transaction():
                await daemon.execute(query("lock_log"))

    async def test_cannot_write_events_nor_history(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_daemon")) as connection:
            assert await _allowed(connection, DAEMON_MAY_NOT) == []

    @pytest.mark.parametrize("role", ["relay_producer", "relay_consumer", "relay_monitor"])
    async def test_does_not_start_with_another_role_and_says_what_to_grant(
        self, database: str, broker: str, logins: Logins, role: str
    ) -> None:
        with pytest.raises(PrivilegeError, match=r"permission denied for table .* sql/roles\.sql"):
            await _drain(Outbox(settings_for(logins.create(database, role), broker)))

    async def test_waits_for_a_right_that_is_taken_away_and_goes_on_when_it_is_back(
        self, database: str, broker: str, logins: Logins
    ) -> None:
        login = logins.create(database, "relay_daemon")
        async with connected(database) as owner, audit(broker) as witness:
            with capture_logs() as told:
                async with outbox_running(settings_for(login, broker)):
                    await insert(owner, "order/1")
                    await witness.wait_for(1)
                    await owner.execute(f"REVOKE relay_daemon FROM {role_of(login)}")
                    await insert(owner, "order/1")
                    await until(lambda: _answer(any(entry["event"] == "session_failed" for entry in told)))
                    await owner.execute(f"GRANT relay_daemon TO {role_of(login)}")
                    await witness.wait_for(2)
            refused = next(entry for entry in told if entry["event"] == "session_failed")
            assert refused["error"] == PrivilegeError.__name__
            assert "permission denied for " in refused["reason"]  # table, or schema: whichever statement is the first
            assert witness.sequences() == {"order/1": [1, 2]}


class TestAConsumer:
    async def test_can_keep_its_inbox(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_consumer")) as consumer:
            for statement in (
                "SELECT * FROM relay.migration",
                "INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ('c', 's', 'order', '1', 1)",
                "SELECT * FROM relay.inbox_aggregate FOR UPDATE",
                "UPDATE relay.inbox_aggregate SET last_seq = 2",
                "INSERT INTO relay.inbox_held (consumer, source, message_id, event_type, content_type, body, digest, reason, state)"
                " VALUES ('c', 's', 'm', 'Changed', 'application/json', '', '', 'failed', 'stuck')",
                "SELECT * FROM relay.inbox_held",
                "DELETE FROM relay.inbox_held",
                "INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ('c', 's', 'm') ON CONFLICT DO NOTHING",
                "DELETE FROM relay.inbox_seen WHERE seen_at < now()",
                "INSERT INTO relay.inbox_quarantine (consumer, reason, detail, exchange, routing_key, properties, body)"
                " VALUES ('c', 'foreign', 'd', 'e', 'k', '{}', '')",
            ):
                await consumer.execute(statement)

    async def test_can_do_nothing_else(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_consumer")) as connection:
            assert await _allowed(connection, CONSUMER_MAY_NOT) == []

    async def test_can_store_and_tell_its_figures(self, database: str, logins: Logins) -> None:
        event = Event(
            source="s",
            aggregate_type="order",
            aggregate_id="1",
            seq=1,
            event_type="Changed",
            message_id="m",
            content_type="",
            body=b"{}",
        )
        async with connected(logins.create(database, "relay_consumer")) as consumer:
            for seq in (1, 2):
                async with consumer.transaction():
                    stored = Stored(consumer, "c")
                    await stored.add(replace(event, seq=seq))
                    await stored.write()
            for _ in range(2):
                await consumer.execute(query("write_figures"), "c", 1, "here", None)
            assert await consumer.fetchval(query("has_seed"), "c") is False
            assert await consumer.fetchval("SELECT relay.json_of('[1]')") == "[1]"


class TestATaker:
    async def test_takes_and_gives_back(self, database: str, logins: Logins) -> None:
        async with connected(database) as owner, connected(logins.create(database, "relay_taker")) as taker:
            await owner.execute(
                "INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, leads)"
                " SELECT 'c', 's', 'order', '1', i, 'Changed', i, '', '{}', '{}', i = 1 FROM generate_series(1, 3) i"
            )
            rows = await taker.fetch("SELECT id, seq FROM relay.inbox_take(1)")
            assert [r["seq"] for r in rows] == [1]
            assert await taker.fetchval("SELECT relay.inbox_fail(id, 'no', '0 s') FROM relay.inbox WHERE seq = 2")
            assert [r["seq"] for r in await taker.fetch("SELECT seq FROM relay.inbox_take(10, 'c')")] == [2, 3]

    async def test_can_do_nothing_else(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_taker")) as connection:
            assert await _allowed(connection, TAKER_MAY_NOT) == []


class TestAnOperator:
    async def test_does_every_act_of_the_outbox(self, database: str, logins: Logins) -> None:
        operator = settings_for(logins.create(database, "relay_operator"), "amqp://127.0.0.1:1/")
        async with connected(database) as owner:
            await insert(owner, "order/1", count=4)
            await owner.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ('Loose', '{}')")
            await owner.execute(
                "INSERT INTO relay.outbox_parked (id, shard, aggregate_type, aggregate_id, seq, reason, state)"
                " SELECT id, shard, CASE WHEN seq > 0 THEN aggregate_type END, aggregate_id, seq, CASE WHEN seq > 2 THEN 'behind' ELSE 'nacked' END,"
                " CASE WHEN seq > 2 THEN 'waiting' ELSE 'stuck' END FROM relay.outbox WHERE seq IS DISTINCT FROM 1"
            )
            await owner.execute("UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()")  # 1 is published
            one = Selection(aggregate="order/1")
            for act in (
                Retry(one),
                Skip(Selection(everything=True)),
                SkipNumber(Selection(aggregate="order/1", from_seq=1, to_seq=1)),
                Purge(one),
                Pause(one),
                Resume(one),
            ):
                assert (await act_on(operator, act)).rows > 0
            told = await owner.fetch("SELECT act, login FROM relay.audit ORDER BY id")
        acts = ["retry", "skip", "skip", "purge", "pause", "resume"]
        assert [(r["act"], r["login"]) for r in told] == [
            (a, role_of(operator.postgres.dsn.get_secret_value())) for a in acts
        ]

    async def test_does_every_act_of_an_inbox(self, database: str, logins: Logins) -> None:
        operator = settings_for(logins.create(database, "relay_operator"), "amqp://127.0.0.1:1/")
        async with connected(database) as owner:
            await owner.execute(_AN_INBOX)
            everything = Selection(everything=True)
            for act in (
                inbox_acts.Retry(everything),
                inbox_acts.Skip(Selection(cause="taken")),
                inbox_acts.Skip(Selection(aggregate="order/1")),
                inbox_acts.Purge(everything),
                SkipThrough(Selection(aggregate="order/9"), 2),
                Reset(everything),
                inbox_acts.Dismiss(everything),
            ):
                assert (await act_on(operator, act)).rows > 0
            assert await owner.fetchval("SELECT count(*) FROM relay.audit") == 7

    async def test_notes_replays(self, database: str, logins: Logins) -> None:
        async with connected(database) as owner, connected(logins.create(database, "relay_operator")) as operator:
            await insert(owner, "order/1", count=3)
            await owner.execute("UPDATE relay.outbox_cursor SET snapshot = pg_current_snapshot()")
            counted, me = await Retained(operator).count(Selection(aggregate="order/1")), Operator(who="me")
            for end in ("done", "abandoned"):
                replay = await begin(
                    operator, selection=Selection(aggregate="order/1"), count=counted, to_queue=None, operator=me
                )
                assert await try_lock(operator, replay.id)
                await resume(operator, replay, operator=me)
                assert await got_to(operator, replay.id, after_id=2, rows=2, state="unfinished") == 2
                if end == "done":
                    assert await got_to(operator, replay.id, after_id=3, rows=1, state=end) == 3
                else:
                    await abandon(operator, replay, operator=me)
                assert (await find(operator, replay.id)).state == end

    async def test_can_do_nothing_else(self, database: str, logins: Logins) -> None:
        async with connected(logins.create(database, "relay_operator")) as connection:
            assert await _allowed(connection, OPERATOR_MAY_NOT) == []


_AN_INBOX = """
INSERT INTO relay.inbox_aggregate (consumer, source, aggregate_type, aggregate_id, last_seq) VALUES ('c', 's', 'order', '1', 4);
INSERT INTO relay.inbox_held (consumer, source, aggregate_type, aggregate_id, seq, message_id, event_type, content_type, body, digest, reason, state)
SELECT 'c', 's', 'order', '1', n, n::text, 'T', '', '', '', CASE n WHEN 5 THEN 'failed' ELSE 'behind' END, CASE n WHEN 5 THEN 'stuck' ELSE 'waiting' END
FROM generate_series(5, 6) n;
INSERT INTO relay.inbox_held (consumer, source, message_id, event_type, content_type, body, digest, reason, state)
VALUES ('c', 's', 'm', 'T', '', '', '', 'failed', 'stuck');
INSERT INTO relay.inbox (consumer, source, aggregate_type, aggregate_id, seq, event_type, message_id, content_type, headers, body, attempts, error)
SELECT 'c', 's', 'order', '1', n, 'T', n::text, '', '{}', '', 4 - n, 'no' FROM generate_series(3, 4) n;
INSERT INTO relay.inbox_seen (consumer, source, message_id) VALUES ('c', 's', 'x');
INSERT INTO relay.inbox_gap (consumer, source, aggregate_type, aggregate_id, to_seq, found_by, state) VALUES ('c', 's', 'order', '9', 3, 'mark', 'stuck');
INSERT INTO relay.inbox_quarantine (consumer, reason, detail, exchange, routing_key, properties, body) VALUES ('c', 'foreign', '', '', '', '{}', '');
"""


async def test_a_monitor_changes_nothing(database: str, logins: Logins) -> None:
    async with connected(logins.create(database, "relay_monitor")) as onlooker:
        assert await _allowed(onlooker, MONITOR_MAY_NOT) == []


class TestSecurityDefiner:
    async def test_only_trigger_functions_are_and_their_search_path_is_pinned(self, database: str) -> None:
        async with connected(database) as connection:
            records = await connection.fetch(
                "SELECT proname, prorettype = 'trigger'::regtype AS is_trigger, proconfig FROM pg_proc"
                " WHERE pronamespace = 'relay'::regnamespace AND prosecdef"
            )
        assert [(r["proname"], r["is_trigger"], r["proconfig"]) for r in records] == [
            (
                "outbox_assign",
                True,
                [
                    "search_path=pg_catalog, pg_temp",
                    "enable_seqscan=off",
                    "enable_bitmapscan=off",
                    "enable_indexscan=on",
                ],
            )
        ]

    async def test_a_producer_cannot_call_it_directly_nor_hang_it_on_a_table_of_its_own(
        self, database: str, logins: Logins
    ) -> None:
        async with connected(logins.create(database, "relay_producer")) as producer:
            with pytest.raises(asyncpg.PostgresError, match=r"permission denied|can only be called as triggers"):
                await producer.execute("SELECT relay.outbox_assign()")
            await producer.execute("CREATE TEMP TABLE mine (id bigint)")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await producer.execute(
                    "CREATE TRIGGER t BEFORE INSERT ON mine FOR EACH ROW EXECUTE FUNCTION relay.outbox_assign()"
                )

    async def test_a_producer_with_a_schema_of_its_own_cannot_change_what_the_trigger_does(
        self, database: str, logins: Logins, postgres: Postgres
    ) -> None:
        dsn = logins.create(database, "relay_producer")
        async with connected(database) as owner, connected(dsn) as producer:
            await owner.execute(f"CREATE SCHEMA evil AUTHORIZATION {role_of(dsn)}")
            try:
                await producer.execute(_EVIL)
                await producer.execute("SET search_path = evil, pg_temp, pg_catalog")
                assert await producer.fetchval("SELECT 1 = 2"), (
                    "the attack is not one: the producer's own = is not used"
                )
                assert await producer.fetchval(INSERT + " RETURNING seq") == 1
                assert await producer.fetchval(EMIT) == 2
                with pytest.raises(asyncpg.SerializationError):
                    await producer.execute("SELECT relay.emit('order', '1', 'Changed', '{}', seq => 7)")
                for headers in ('{"x-sequence": 9}', '{"nested": {}}', '{"with space": 1}'):
                    with pytest.raises(asyncpg.CheckViolationError, match="outbox_headers_are_flat"):
                        await producer.execute(
                            "SELECT relay.emit('order', '1', 'Changed', '{}', $1::text::pg_catalog.jsonb)", headers
                        )
                assert await producer.fetchval("SELECT pg_catalog.count(*) FROM evil.called") == 0
                rows = await owner.fetch("SELECT id, shard, seq, xid::text FROM relay.outbox ORDER BY id")
                assert [(r["shard"], r["seq"]) for r in rows] == [(0, 1), (0, 2)]
                assert all(r["id"] > 0 and int(r["xid"]) > 700 for r in rows)
            finally:
                await owner.execute(f"DROP OWNED BY {role_of(dsn)} CASCADE")


# Everything the trigger and the checks use by name, in the producer's own version, which tells that it was called.
_EVIL = """
CREATE SEQUENCE evil.called_seq;
CREATE TABLE evil.called (name text);
GRANT ALL ON SCHEMA evil TO PUBLIC;
GRANT ALL ON evil.called TO PUBLIC;
CREATE FUNCTION evil.nextval(text) RETURNS bigint LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('nextval'); SELECT -1::bigint $$;
CREATE FUNCTION evil.nextval(regclass) RETURNS bigint LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('nextval'); SELECT -1::bigint $$;
CREATE FUNCTION evil.pg_current_xact_id() RETURNS xid8 LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('xid'); SELECT '1'::xid8 $$;
CREATE FUNCTION evil.octet_length(text) RETURNS integer LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('octet_length'); SELECT 1 $$;
CREATE FUNCTION evil.octet_length(bytea) RETURNS integer LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('octet_length'); SELECT 1 $$;
CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE sql AS $$ INSERT INTO evil.called VALUES ('pg_notify') $$;
CREATE FUNCTION evil.pg_try_advisory_xact_lock_shared(integer, integer) RETURNS boolean LANGUAGE sql
  AS $$ INSERT INTO evil.called VALUES ('lock'); SELECT true $$;
CREATE FUNCTION evil.jsonb_typeof(jsonb) RETURNS text LANGUAGE sql AS $$ SELECT 'string'::text $$;
CREATE FUNCTION evil.yes(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
CREATE FUNCTION evil.yes(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
CREATE FUNCTION evil.no(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE FUNCTION evil.everything_is_a_string(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE
  AS $$ SELECT $2 OPERATOR(pg_catalog.=) ANY (ARRAY['object', 'string']) $$;
CREATE FUNCTION evil.plus(bigint, integer) RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT 100::bigint';
CREATE OPERATOR evil.= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = evil.yes);
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.everything_is_a_string);
CREATE OPERATOR evil.!~ (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.no);
CREATE OPERATOR evil.~~ (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.no);
CREATE OPERATOR evil.+ (LEFTARG = bigint, RIGHTARG = integer, FUNCTION = evil.plus);
"""


async def _columns(connection: Connection, role: str, table: str, right: str) -> set[str]:
    records = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = ('relay.' || $2)::regclass AND attnum > 0 AND NOT attisdropped"
        " AND has_column_privilege($1, attrelid, attnum, $3)",
        role,
        table,
        right,
    )
    return {r["attname"] for r in records}


async def _answer(value: bool) -> bool:
    return value


async def _drain(outbox: Outbox) -> None:
    """Until nothing is left; what waiting does not heal fails here instead of being retried for ever."""
    async with asyncio.timeout(30):
        await outbox.run(drain=True)


async def _until_due(connection: Connection) -> None:
    """Until a parked row may be tried again, by the database's clock."""

    async def due() -> bool:
        wait_s: float = await connection.fetchval(query("next_parked_attempt"), 0, [])
        return wait_s <= 0

    await until(due)


async def _allowed(connection: Connection, statements: list[str]) -> list[str]:
    """Those of the statements that are not refused for want of a right: each is tried, and rolled back."""
    allowed = []
    for statement in statements:
        attempt = connection.transaction()
        await attempt.start()
        try:
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            pass
        except asyncpg.PostgresError as error:
            allowed.append(f"{statement}: {error}")
        else:
            allowed.append(statement)
        await attempt.rollback()
    return allowed
