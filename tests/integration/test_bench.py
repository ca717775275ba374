"""`relay bench`: every stage runs, measures in processes of its own, verifies what it measured, and leaves nothing behind.

With tiny numbers: what the figures say is not looked at, only that there are some.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest
from click.testing import CliRunner

from relay.bench import measure
from relay.bench.children import revealed
from relay.bench.figures import MeasurementFailed, Result
from relay.bench.measure import Bench, require_applied, require_in_log, require_in_queue
from relay.bench.plan import steps
from relay.bench.servers import Servers, Vhosts, fill
from relay.bench.stages import inbox, live, outbox, whole
from relay.bench.workload import Workload
from relay.cli.main import cli
from relay.postgres.queries import query
from relay.sandbox import ExternalPostgres, Postgres, RabbitMQ
from relay.sandbox.postgres import EXTERNAL_DSN
from relay.sandbox.rabbitmq import EXTERNAL_MANAGEMENT_URL, EXTERNAL_URL
from tests.harness.outbox import connected

LOAD = Workload(
    events=600,
    aggregates=30,
    payload_bytes=256,
    seconds=0.4,
    live_rate=250,
    rates=(3000,),
    producers=2,
    samples=3,
    interval_s=0.25,
)


@pytest.fixture
async def bench(postgres: Postgres, rabbitmq: RabbitMQ) -> AsyncIterator[Bench]:
    servers = Servers(postgres, Vhosts(rabbitmq))
    yield Bench(servers)
    await servers.close()


def _is_measured(result: Result, *processes: str) -> None:
    assert result.seconds > 0
    assert result.rate > 0
    assert set(result.cpu_us) == {*processes, "postgresql", "rabbitmq"}
    for process in processes:
        assert (result.cpu_us[process] or 0) > 0
        assert (result.rss_mib[process] or 0) > 1


async def test_insert_read_publish_and_drain(bench: Bench) -> None:
    for way, events in (("one", 60), ("statement", 600), ("emit_many", 600)):
        result = await outbox.insert(bench, LOAD, way)
        assert (result.key, result.events) == (("insert", way), events)
        _is_measured(result, "producers")
    for result in (
        await outbox.read(bench, LOAD),
        await outbox.publish(bench, LOAD, "classic"),
        await outbox.drain(bench, LOAD, "quorum"),
    ):
        assert result.events == 600
        _is_measured(result, "relay")


async def test_live_with_the_relay_and_without(bench: Bench) -> None:
    without = await live.live(bench, LOAD, "without")
    beside = await live.live(bench, LOAD, "relay")
    assert without.events == beside.events == 100
    _is_measured(without, "producers")
    _is_measured(beside, "producers", "relay")
    assert beside.latency is not None
    assert beside.latency.samples == 100
    assert without.more.keys() == {"transaction_ms", "transaction_p99_ms", "late_s"}
    assert beside.more.keys() == without.more.keys() | {"backlog", "catch_up_s"}


async def test_live_with_several_events_a_transaction(bench: Bench) -> None:
    beside = await live.live(bench, replace(LOAD, live_rows=4), "relay")
    assert beside.events == 400
    assert beside.latency is not None
    assert beside.latency.samples == 100  # of each transaction, until the last of its events is confirmed


async def test_consume_statements_and_apply(bench: Bench) -> None:
    for result in (await inbox.consume(bench, LOAD), await inbox.statements(bench, LOAD)):
        _is_measured(result, "inbox")
    _is_measured(await inbox.apply(bench, LOAD, "empty", share=0.0), "inbox")
    for handler in ("batch", "statement"):
        result = await inbox.apply(bench, LOAD, handler, share=0.1)
        assert result.variant == f"{handler}-disorder"
        assert result.more["duplicates"] > 20
        assert result.more["swaps"] > 20


async def test_the_whole_way_under_load_and_asleep(bench: Bench) -> None:
    under_load, asleep = await whole.end_to_end(bench, LOAD, 3000), await whole.asleep(bench, LOAD)
    assert under_load.events == 1200  # three of one aggregate in each transaction, at such a rate
    for result, samples in ((under_load, 400), (asleep, 3)):
        _is_measured(result, "producers", "relay", "inbox")
        assert result.latency is not None
        assert result.latency.samples == samples
        assert result.latency.p50_ms > 0


# --- what is not as measured is not measured


async def test_a_queue_that_holds_another_number_fails_the_stage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SETTLED_S", 0.2)
    async with bench.servers.fresh() as settings:
        await measure.declare_bound_queue(settings, "classic")
        await require_in_queue(settings, 0)
        with pytest.raises(MeasurementFailed, match="the queue holds 0 messages, not 1"):
            await require_in_queue(settings, 1)


async def test_a_log_with_another_number_or_with_parked_rows_fails_the_stage(bench: Bench) -> None:
    async with bench.servers.fresh() as settings:
        await fill(settings.postgres, LOAD)
        await require_in_log(settings, 600)
        with pytest.raises(MeasurementFailed, match="600 events of 601"):
            await require_in_log(settings, 601)
        async with connected(settings.postgres.dsn.get_secret_value()) as db:
            await db.execute(
                "INSERT INTO relay.outbox_parked (id, shard, reason, state) VALUES (1, 0, 'behind', 'waiting')"
            )
        with pytest.raises(MeasurementFailed, match="1 are parked"):
            await require_in_log(settings, 600)


@pytest.mark.parametrize(
    ("effects", "message"),
    [
        ([1, 2, 3], None),
        ([1, 2], "'effects': 2"),
        ([1, 2, 3, 3], "'effects': 4"),
        ([1, 3, 2], "'out_of_turn': 2"),
        ([1, 2, 2], "'out_of_turn': 1"),
    ],
)
async def test_effects_that_are_lost_repeated_or_out_of_order_fail_the_stage(
    bench: Bench, effects: list[int], message: str | None
) -> None:
    async with bench.servers.fresh() as settings:
        async with connected(settings.postgres.dsn.get_secret_value()) as db:
            await db.execute("INSERT INTO relay.inbox_aggregate VALUES ('bench', 'bench', 'bench', 'a', 3)")
            for seq in effects:
                await db.execute(query("bench_effect"), "a", seq)
        if message is None:
            await require_applied(settings, 3, effects=True)
            return
        with pytest.raises(MeasurementFailed, match=message):
            await require_applied(settings, 3, effects=True)


async def test_a_process_that_fails_fails_the_stage_with_its_last_words(bench: Bench) -> None:
    async with bench.servers.fresh() as settings:
        gone = settings
    with pytest.raises(MeasurementFailed, match=r"(?s)read ended by itself.*does not exist"):
        async with bench.child("read", gone) as made:
            await made.ask("go")


async def test_no_process_outlives_the_benchmark(bench: Bench) -> None:
    """Its standard input ends with whoever started it, also when that one was killed."""
    async with bench.servers.fresh() as settings:
        spec = {"role": "relay", "drain": False, "settings": revealed(settings)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay.bench.child", "asyncio"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            assert json.loads(await process.stdout.readline()) == {"ready": True}
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), 10) == 1
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


# --- the command


def test_the_command_on_throwaway_servers_prints_rates_and_ratios(postgres: Postgres, rabbitmq: RabbitMQ) -> None:
    result = CliRunner().invoke(
        cli,
        ["bench", "--stage", "read", "--events", "200", "--aggregates", "5,50", "--rounds", "1"],
        env={**_addresses(postgres, rabbitmq), "COLUMNS": "240"},
    )
    assert result.exit_code == 0, result.output
    assert "200 events of 256 bytes, 5 aggregates" in result.stdout
    assert "events/s by workload" in result.stdout


def test_on_own_servers_it_makes_things_of_its_own_says_so_and_removes_them(
    database: str, broker: str, rabbitmq: RabbitMQ
) -> None:
    before = _everything(database, broker, rabbitmq)
    result = CliRunner().invoke(
        cli,
        [
            "bench",
            "--own-servers",
            "--stage",
            "publish",
            "--stage",
            "consume",
            "--events",
            "100",
            "--rounds",
            "1",
            "--json",
        ],
        env={"RELAY_POSTGRES_DSN": database, "RELAY_RABBITMQ_URL": broker},
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["servers"] == "own"
    assert [(r["stage"], r["variant"], len(r["rounds"])) for r in report["workloads"][0]["results"]] == [
        ("publish", "quorum", 1),
        ("publish", "classic", 1),
        ("consume", "quorum", 1),
    ]
    assert report["machine"]["postgresql"]["fsync"] in ("on", "off")
    assert report["machine"]["rabbitmq"]["version"]
    made = re.findall(r"creating the database (\w+)", result.stderr)
    assert made
    assert set(made) == set(re.findall(r"dropping the database (\w+)", result.stderr))
    assert set(made) & _databases(database) == set()
    assert _everything(database, broker, rabbitmq) == before


async def test_a_database_that_was_not_made_for_it_is_never_migrated(empty_database: str) -> None:
    servers = Servers(_Elsewhere(empty_database), _Nowhere())
    with pytest.raises(MeasurementFailed, match="the DSN leads to the database relay_test_"):
        async with servers.fresh():
            pass
    async with connected(empty_database) as db:
        assert await db.fetchval("SELECT count(*) FROM pg_namespace WHERE nspname = 'relay'") == 0


class _Elsewhere(ExternalPostgres):
    """Makes nothing and says that the user's database is what it made."""

    def execute(self, statement: str, database: str = "postgres") -> None:
        return

    def create_database(self, name: str, template: str | None = None) -> str:
        return self._dsn


class _Nowhere:
    async def create(self, _: str) -> dict[str, str]:
        return {}

    async def remove(self, _: str, __: object) -> None:
        return


def _addresses(postgres: Postgres, rabbitmq: RabbitMQ) -> dict[str, str]:
    """The servers of the test run, as those that the benchmark finds."""
    port = getattr(rabbitmq, "management_port", None)
    management = f"http://127.0.0.1:{port}" if port else os.environ[EXTERNAL_MANAGEMENT_URL]
    return {EXTERNAL_DSN: postgres.dsn(), EXTERNAL_URL: rabbitmq.url(), EXTERNAL_MANAGEMENT_URL: management}


def _everything(dsn: str, url: str, rabbitmq: RabbitMQ) -> tuple[object, ...]:
    """What is in the user's database and virtual host."""
    vhost = url.rpartition("/")[2]
    api = rabbitmq.management()
    names = [
        sorted(each["name"] for each in json.loads(api.request("GET", f"/api/{kind}/{vhost}")))
        for kind in ("queues", "exchanges")
    ]

    async def rows() -> int:
        async with connected(dsn) as db:
            found: int = await db.fetchval("SELECT count(*) FROM relay.outbox")
            return found

    return asyncio.run(rows()), *names


def _databases(dsn: str) -> set[str]:
    async def look() -> set[str]:
        opened = await asyncpg.connect(dsn)
        try:
            return {r[0] for r in await opened.fetch("SELECT datname FROM pg_database")}
        finally:
            await opened.close()

    return asyncio.run(look())


def test_a_round_of_everything_has_each_key_once() -> None:
    keys = [(step.stage, step.variant) for step in steps((), LOAD)]
    assert len(keys) == len(set(keys))
