"""A log that was dumped and restored into another cluster, where its transaction ids mean nothing: nothing is lost.

Each test dumps a log in the middle of its work (published, unpublished, half of a window, parked) with the real pg_dump,
restores it into a fresh cluster with the real pg_restore, inserts there before any relay ran, and drains.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from relay.daemon import Outbox
from relay.errors import SandboxError
from relay.operate.outbox_acts import Skip
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.migrate import migrate, missing
from relay.sandbox import SandboxPostgres
from tests.harness.acts import act_on
from tests.harness.audit import Audit, audit
from tests.harness.outbox import connected, insert, settings_for

HALF = 100  # rows of a window of which only some pages are published
PAGE = 4
FAR = 300_000  # transaction ids: as if the cluster had lived long before


@pytest.fixture(scope="module")
def origin() -> Iterator[SandboxPostgres]:
    with SandboxPostgres("system" if _has("system") else None, fsync=False) as server:
        yield server


class Copy(SandboxPostgres):
    """A fresh cluster that is a copy of the first of its version from before its first start: initdb takes a second of CPU."""

    def __init__(self, select: str, kept: Path) -> None:
        super().__init__(select, fsync=False)
        self._kept = kept / self.binaries.version
        self._password = "the-same-in-all"

    def _initdb(self) -> None:
        data = self._home() / "data"
        if self._kept.exists():
            subprocess.run(["cp", "-a", self._kept, data], check=True)
            with (data / "postgresql.conf").open("a") as conf:
                conf.write(f"port = {self.port}\nunix_socket_directories = '{self._home()}'\n")
        else:
            super()._initdb()
            subprocess.run(["cp", "-a", data, self._kept], check=True)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first cluster of each version is kept as initdb made it."""
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(params=["system", "embedded"])
def elsewhere(request: pytest.FixtureRequest, kept: Path) -> Iterator[SandboxPostgres]:
    """A fresh cluster, of the same version and of a newer one."""
    if not _has(request.param):
        pytest.skip(f"no {request.param} PostgreSQL on this machine")
    with Copy(request.param, kept) as server:
        yield server


@pytest.fixture
async def log(origin: SandboxPostgres) -> AsyncIterator[str]:
    """A migrated database of the origin."""
    name = f"relay_restore_{secrets.token_hex(4)}"
    dsn = await asyncio.to_thread(origin.create_database, name)
    async with connected(dsn) as connection:
        await migrate(connection)
    yield dsn
    await asyncio.to_thread(origin.drop_database, name)


async def test_what_was_not_published_and_what_is_new_comes_out_in_order_and_nothing_else(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#", "late.#") as witness:
        async with connected(log) as producer:
            await _work_until_the_middle(producer, log, broker, witness)
        before = dict(witness.sequences(first_only=False))
        restored = await _move(log, elsewhere, tmp_path)

        async with connected(restored) as producer:
            assert await missing(producer) == []
            assert await _current_xid(producer) < await _highest_xid(producer), (
                "the restored ids are not from the future"
            )
            await insert(
                producer, "order/published"
            )  # before the relay runs: their ids are low, like any id ever published
            await insert(producer, "order/unpublished", count=2)
            await insert(producer, "order/new", count=3)
            await insert(producer, "nowhere/parked")
            expected = await _all(producer)
        with capture_logs() as told:
            outbox = await _drain(restored, broker)
        assert [entry["event"] for entry in told if entry["event"] == "rebased"] == ["rebased"]
        assert outbox.parked == 3

        await witness.wait_for_distinct(sum(len(seqs) for name, seqs in expected.items() if name != "nowhere/parked"))
        after = witness.sequences(first_only=False)
        assert {name: seqs for name, seqs in expected.items() if name != "nowhere/parked"} == after
        assert {name: after[name][: len(seqs)] for name, seqs in before.items()} == before, "published again"

        await _normal_life_goes_on(restored, broker, witness)


async def test_a_parked_aggregate_is_still_parked_and_comes_out_whole_when_its_queue_is_bound(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#", "late.#") as witness:
        async with connected(log) as producer:
            await _work_until_the_middle(producer, log, broker, witness)
        restored = await _move(log, elsewhere, tmp_path)
        async with connected(restored) as producer:
            await insert(producer, "nowhere/parked")
            await producer.execute("UPDATE relay.outbox_parked SET next_attempt_at = now() WHERE state = 'retrying'")
        await witness.queue.bind(witness.exchange, "nowhere.#")
        # The first drain finds the new one behind the parked ones; it goes out behind them, at the latest in the second.
        for _ in range(3):
            outbox = await _drain(restored, broker)
        assert outbox.parked == 0
        await witness.wait_for_distinct(len(await _ids(restored)))
        assert witness.sequences(first_only=False)["nowhere/parked"] == [1, 2, 3]


async def test_a_parked_event_without_an_aggregate_comes_out_once(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#") as witness:
        async with connected(log) as producer:
            await _consume_ids(producer, 3000)
            await insert(producer, "order/1")
            await producer.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ('Nowhere', '{}')")
            assert (await _drain(log, broker)).parked == 1  # and above high_id, for nothing after it was published
        restored = await _move(log, elsewhere, tmp_path)
        async with connected(restored) as producer:
            await producer.execute("UPDATE relay.outbox_parked SET next_attempt_at = now()")
        await witness.queue.bind(witness.exchange, "Nowhere")
        assert (await _drain(restored, broker)).parked == 0
        await witness.wait_for(2)
        await _normal_life_goes_on(restored, broker, witness)
        assert [message.type for message in witness.messages].count("Nowhere") == 1


async def test_a_skipped_event_without_an_aggregate_stays_skipped(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#") as witness:
        async with connected(log) as producer:
            await _consume_ids(producer, 3000)
            await insert(producer, "order/1")
            await _skip_one_without_an_aggregate(producer, log, broker)  # its id is above high_id, and it is not parked
        restored = await _move(log, elsewhere, tmp_path)
        await witness.queue.bind(witness.exchange, "Nowhere")
        await _drain(restored, broker)
        await _normal_life_goes_on(restored, broker, witness)
        assert [message.type for message in witness.messages].count("Nowhere") == 0


@pytest.mark.parametrize("given_out", ["before a relay ran", "after a relay ran"])
async def test_the_number_of_a_skipped_event_whose_slot_was_emptied_is_not_given_to_a_new_one(
    log: str, broker: str, given_out: str
) -> None:
    async with audit(broker, "order.#") as witness, connected(log) as producer:
        await insert(producer, "order/1")
        await _skip_one_without_an_aggregate(producer, log, broker)
        marked: int = await producer.fetchval("SELECT id FROM relay.outbox_tombstone")
        await producer.execute("DELETE FROM relay.outbox WHERE id = $1", marked)
        await producer.execute("UPDATE relay.outbox_cursor SET cluster_id = 1")  # as if restored elsewhere,
        await producer.execute("SELECT setval('relay.outbox_id_seq', $1)", marked - 1)  # and without the sequence
        if given_out == "before a relay ran":
            await insert(producer, "order/1", count=2)
        await _drain(log, broker)
        await insert(producer, "order/1", count=2)
        ids = [r["id"] for r in await producer.fetch("SELECT id FROM relay.outbox ORDER BY seq")]
        assert marked not in ids
        assert ids == sorted(ids)
        await _drain(log, broker)
        await witness.wait_for(len(ids))


async def _skip_one_without_an_aggregate(producer: Connection, dsn: str, broker: str) -> None:
    await producer.execute("INSERT INTO relay.outbox (event_type, payload) VALUES ('Nowhere', '{}')")
    assert (await _drain(dsn, broker)).parked == 1
    await act_on(settings_for(dsn, broker), Skip(Selection(everything=True)))
    assert await producer.fetchval("SELECT count(*) FROM relay.outbox_parked") == 0


async def test_a_cluster_that_is_far_ahead_of_the_dump_is_noticed_as_well(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    await _consume_transaction_ids(elsewhere, FAR)
    async with audit(broker, "order.#", "late.#") as witness:
        async with connected(log) as producer:
            await _work_until_the_middle(producer, log, broker, witness)
        published = dict(witness.sequences(first_only=False))
        restored = await _move(log, elsewhere, tmp_path)
        async with connected(restored) as producer:
            assert await _current_xid(producer) > FAR > await _highest_xid(producer), "the cluster is not ahead"
            await insert(producer, "order/new")
            expected = {name: seqs for name, seqs in (await _all(producer)).items() if name != "nowhere/parked"}
        with capture_logs() as told:
            await _drain(restored, broker)
        assert "rebased" in [entry["event"] for entry in told]
        await witness.wait_for_distinct(sum(map(len, expected.values())))
        assert witness.sequences(first_only=False) == expected
        assert all(expected[name][: len(seqs)] == seqs for name, seqs in published.items())
        await _normal_life_goes_on(restored, broker, witness)


async def test_a_log_that_no_relay_ever_read_comes_out_once(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with connected(log) as producer:
        await _consume_ids(producer, 3000)
        await insert(producer, "order/1", count=20)
    restored = await _move(log, elsewhere, tmp_path)
    async with audit(broker, "order.#") as witness:
        await _drain(restored, broker)
        await witness.wait_for(20)
        await _normal_life_goes_on(restored, broker, witness)
        assert witness.sequences(first_only=False)["order/1"] == list(range(1, 21))


async def test_rows_brought_in_without_their_cursor_come_out_instead_of_being_new_for_ever(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    """Only the events' tables restored into a log that is in use: their ids are from the future of this cluster."""
    async with connected(log) as producer:
        await _consume_ids(producer, 3000)
        await insert(producer, "order/brought", count=3)
    target = elsewhere.create_database("relay_target")
    await _relay(target, "migrate")
    async with audit(broker, "order.#") as witness:
        async with connected(target) as producer:
            await insert(producer, "order/own", count=2)
        await _drain(target, broker)
        tables = [f"--table=relay.outbox_{slot}" for slot in range(4)]
        _run(elsewhere, "pg_dump", "--data-only", "--format=plain", *tables, "-f", str(tmp_path / "rows.sql"), log)
        _run(
            elsewhere,
            "psql",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            "SET session_replication_role = replica",
            "-f",
            str(tmp_path / "rows.sql"),
            target,
        )
        await _drain(target, broker)
        await witness.wait_for_distinct(5)
        assert witness.sequences()["order/brought"] == [1, 2, 3]
        assert len(witness.messages) <= 7, "at most what was not sure to be published is published again"
        again = await _drain(target, broker)
        assert again.progress[0].published == 0


async def test_a_restore_into_the_same_cluster_needs_no_new_ids_and_repeats_nothing(
    log: str, origin: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#", "late.#") as witness:
        async with connected(log) as producer:
            await _work_until_the_middle(producer, log, broker, witness)
        restored = await _move(log, origin, tmp_path)
        async with connected(restored) as producer:
            await insert(producer, "order/new", count=2)
            expected = {name: seqs for name, seqs in (await _all(producer)).items() if name != "nowhere/parked"}
        with capture_logs() as told:
            await _drain(restored, broker)
        assert "rebased" not in [entry["event"] for entry in told]
        await witness.wait_for_distinct(sum(map(len, expected.values())))
        assert witness.sequences(first_only=False) == expected


async def _work_until_the_middle(producer: Connection, dsn: str, broker: str, witness: Audit) -> None:
    """Published rows, parked ones, half of a window, unpublished ones, and one of a transaction that was late."""
    await _consume_ids(producer, 3000)
    await insert(producer, "order/published", count=30)
    await insert(producer, "nowhere/parked", count=2)
    async with connected(dsn) as late, late.transaction():
        await insert(late, "late/1")
        await insert(producer, "order/published", count=5)
        outbox = await _drain(dsn, broker)
        assert (outbox.progress[0].published, outbox.parked) == (35, 2)
    await insert(producer, "order/half", count=HALF)
    published = await _publish_part(dsn, broker)
    cursor = await producer.fetchrow(
        "SELECT window_snapshot::text, after_id, pg_snapshot_xip(snapshot)::text AS late FROM relay.outbox_cursor"
    )
    assert cursor is not None
    assert cursor["window_snapshot"], "not in the middle of a window"
    assert cursor["late"], "no late transaction in the cursor"
    await insert(producer, "order/unpublished", count=4)
    await insert(producer, "order/published", count=2)
    await witness.wait_for(35 + published)


async def _publish_part(dsn: str, broker: str) -> int:
    """Publish some pages of a window, then stop as SIGTERM does: confirmed, checkpointed, the rest left. Returns how many rows."""
    outbox = Outbox(settings_for(dsn, broker, outbox__page_rows=PAGE, outbox__checkpoint_interval_s=0))
    running = asyncio.create_task(outbox.run())
    async with asyncio.timeout(30):
        await outbox.started.wait()
        await outbox.progress[0].changed.wait()
        outbox.stop.set()
        await running
    published = outbox.progress[0].published
    assert PAGE <= published < HALF
    return published


async def _drain(dsn: str, broker: str) -> Outbox:
    outbox = Outbox(settings_for(dsn, broker, outbox__page_rows=7, outbox__retry_first_s=60))
    async with asyncio.timeout(60):
        await outbox.run(drain=True)
    return outbox


async def _normal_life_goes_on(dsn: str, broker: str, witness: Audit) -> None:
    """Nothing is published twice, nothing is re-based again, and what comes next comes out."""
    told_before = len(witness.messages)
    with capture_logs() as told:
        assert (await _drain(dsn, broker)).progress[0].published == 0
        async with connected(dsn) as producer:
            await insert(producer, "order/afterwards", count=10)
        assert (await _drain(dsn, broker)).progress[0].published == 10
    assert "rebased" not in [entry["event"] for entry in told]
    await witness.wait_for(told_before + 10)
    assert witness.sequences(first_only=False)["order/afterwards"] == list(range(1, 11))


async def _move(dsn: str, target: SandboxPostgres, folder: Path) -> str:
    """Dump a database and restore it into another cluster, as an administrator would; the DSN of the copy."""
    name = f"relay_restored_{secrets.token_hex(4)}"
    dump = folder / "relay.dump"

    def move() -> str:
        _run(target, "pg_dump", "--format=custom", "-f", str(dump), dsn)  # the newer programs read the older server
        for role in ("producer", "daemon", "consumer", "taker", "operator", "monitor"):
            target.execute(
                f"DO $$ BEGIN CREATE ROLE relay_{role} NOLOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
            )
        restored = target.create_database(name)
        _run(target, "pg_restore", "--exit-on-error", "--single-transaction", "-d", restored, str(dump))
        return restored

    return await asyncio.to_thread(move)


def _run(server: SandboxPostgres, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [server.binaries.folder / program, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


async def _relay(dsn: str, command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        command,
        env=environment | {"RELAY_POSTGRES_DSN": dsn},
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0


def _has(kind: str) -> bool:
    try:
        SandboxPostgres(kind)
    except SandboxError:
        return False
    return True


async def _consume_transaction_ids(server: SandboxPostgres, count: int) -> None:
    async with connected(server.dsn()) as connection:
        await _consume_ids(connection, count)


async def _consume_ids(connection: Connection, count: int) -> None:
    """Use up transaction ids: each block with an exception handler that writes is a subtransaction with one of its own."""
    await connection.execute("CREATE TEMP TABLE IF NOT EXISTS used (n int)")
    await connection.execute(
        f"DO $$ BEGIN FOR i IN 1..{count} LOOP BEGIN INSERT INTO used VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$"
    )


async def _current_xid(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT pg_snapshot_xmax(pg_current_snapshot())::text"))


async def _highest_xid(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT max(xid::text::bigint) FROM relay.outbox"))


async def _all(connection: Connection) -> dict[str, list[int]]:
    """All events in the log, by aggregate, as they must have come out."""
    records = await connection.fetch(
        "SELECT aggregate_type || '/' || aggregate_id AS name, array_agg(seq ORDER BY seq) AS seqs FROM relay.outbox GROUP BY 1"
    )
    return {r["name"]: list(r["seqs"]) for r in records}


async def _ids(dsn: str) -> list[int]:
    async with connected(dsn) as connection:
        return [r["id"] for r in await connection.fetch("SELECT id FROM relay.outbox")]


async def test_a_restore_that_did_not_bring_the_sequence_along_loses_nothing(
    log: str, elsewhere: SandboxPostgres, broker: str, tmp_path: Path
) -> None:
    async with audit(broker, "order.#") as witness:
        async with connected(log) as producer:
            await insert(producer, "order/old", count=2)
            await insert(producer, "ghost/1")  # parked with id 3, which is given out again
            await insert(producer, "order/old", count=48)
        assert (await _drain(log, broker)).parked == 1
        await witness.wait_for(50)
        restored = await _move(log, elsewhere, tmp_path)
        async with connected(restored) as producer:
            await producer.execute("ALTER SEQUENCE relay.outbox_id_seq RESTART WITH 1")  # as after logical replication
            await insert(
                producer, "order/new", count=10
            )  # ids 1 to 10, below what was published, and small transaction ids
            assert await producer.fetchval("SELECT max(id) FROM relay.outbox WHERE aggregate_id = 'new'") == 10
        await _drain(restored, broker)
        await witness.wait_for(60)
        async with connected(restored) as producer:
            await insert(producer, "order/new")
            assert (
                await producer.fetchval("SELECT min(id) FROM relay.outbox WHERE aggregate_id = 'new' AND seq = 11") > 50
            )
        await _drain(restored, broker)
        await witness.wait_for(61)
    assert witness.sequences(first_only=False) == {"order/old": list(range(1, 51)), "order/new": list(range(1, 12))}
