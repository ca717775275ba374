"""`relay replay` as an operator runs it: a real consumer's effects, a real Ctrl-C, a kill -9; what it says, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from relay.operate.audit import Operator
from relay.operate.replays import begin
from relay.operate.retained import Retained
from relay.operate.selection import Selection
from relay.postgres.connect import connection
from relay.sandbox import Postgres
from relay.settings import Settings
from tests.harness import console
from tests.harness.console import Answer
from tests.harness.logins import Logins
from tests.harness.outbox import connected, settings_for, until
from tests.integration.inbox_harness import World, recording, world
from tests.integration.test_replay import Queue, published, replayed, write


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


async def started(settings: Settings, *arguments: str) -> asyncio.subprocess.Process:
    """`relay ...` as a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_")} | {
        "RELAY_POSTGRES_DSN": settings.postgres.dsn.get_secret_value(),
        "RELAY_RABBITMQ_URL": settings.rabbitmq.url.get_secret_value(),
        "RELAY_OUTBOX_PAGE_ROWS": str(settings.outbox.page_rows),
    }
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
    )


async def ended(process: asyncio.subprocess.Process, *, timeout_s: float = 60) -> Ended:
    async with asyncio.timeout(timeout_s):
        out, err = await process.communicate()
    return Ended(process.returncode or 0, out.decode(), err.decode())


async def relay(settings: Settings, *arguments: str, timeout_s: float = 60) -> Ended:
    return await ended(await started(settings, *arguments), timeout_s=timeout_s)


@pytest.fixture
def settings(database: str, broker: str) -> Settings:
    return settings_for(database, broker, outbox__page_rows=100)


@pytest.fixture
def here(settings: Settings, broker: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[Answer]]:
    """`relay ...` in this process: for what sends nothing, and so needs no signals."""
    monkeypatch.setenv("RELAY_RABBITMQ_URL", broker)

    async def run(*arguments: str) -> Answer:
        return await asyncio.to_thread(console.relay, settings.postgres.dsn.get_secret_value(), *arguments)

    return run


AGGREGATES = 30
EVENTS = 1500
ALL = sorted((str(a), seq) for a in range(AGGREGATES) for seq in range(1, EVENTS // AGGREGATES + 1))


async def test_a_consumer_is_rebuilt_exactly_through_a_ctrl_c_and_a_kill_and_nobody_else_gets_anything(
    settings: Settings, consumer_database: str, broker: str
) -> None:
    """The issue's third condition with a few thousand rows; tests/bench/replay_200k.py does it with 200 000."""
    audit = await Queue(broker, "audit").declare(bind="#")
    await write(settings, [(f"order/{a}", EVENTS // AGGREGATES) for a in range(AGGREGATES)], event_type="T")
    await published(settings, [])
    async with world(consumer_database, broker, batch=300, prefetch=600) as w, w.running(recording()):
        # The first time only to this queue as well, so that the audit queue tells of everything that strays.
        assert (await replayed(settings, Selection(everything=True), "shop")).sent == EVENTS
        await w.until(lambda total: total.applied == EVENTS)
        assert await effects(w) == ALL

        # All of it again: duplicates, and no effect.
        assert (await replayed(settings, Selection(everything=True), "shop")).sent == EVENTS
        await w.until(lambda total: total.duplicates == EVENTS)
        assert await effects(w) == ALL

        # And rebuilt, though the replay is interrupted twice.
        await w.db.execute("TRUNCATE effect; UPDATE relay.inbox_aggregate SET last_seq = 0, last_digest = NULL")
        number = await newest(settings) + 1
        first = await started(
            settings, "replay", "--all", "--to-queue", "shop", "--rate", "600", "--yes", "--why", "rebuild"
        )
        await until(lambda: sent(settings, number, at_least=300))
        first.send_signal(signal.SIGINT)
        stopped = await ended(first)
        assert stopped.code == 130
        assert f"continue with: relay replay --resume {number}" in stopped.err
        assert 300 <= await sent(settings, number) < EVENTS

        second = await started(settings, "replay", "--resume", "--rate", "600")
        await until(lambda: sent(settings, number, at_least=900))
        second.kill()
        await second.communicate()
        assert 900 <= await sent(settings, number) < EVENTS

        third = await relay(settings, "replay", "--resume", "--rate", "100000", "--json")
        told = json.loads(third.out)
        assert (third.code, told["state"], told["sent"]) == (0, "done", EVENTS)
        await w.until(lambda total: total.applied == 2 * EVENTS)
        assert await effects(w) == ALL
        assert await w.held() == []
    assert await audit.count() == 0


async def effects(w: World) -> list[tuple[str, int]]:
    """What was applied, each once and in order: sorted by aggregate, which keeps the order of each."""
    rows = await w.db.fetch("SELECT aggregate, seq FROM effect ORDER BY id")
    by_aggregate: dict[str, list[int]] = {}
    for row in rows:
        by_aggregate.setdefault(row["aggregate"], []).append(row["seq"])
    return [(aggregate, seq) for aggregate in sorted(by_aggregate) for seq in by_aggregate[aggregate]]


async def sent(settings: Settings, number: int, at_least: int = 0) -> int:
    """How far a replay has got, 0 while that is less than `at_least`."""
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        rows: int = await db.fetchval("SELECT sent FROM relay.outbox_replay WHERE id = $1", number) or 0
    return rows if rows >= at_least else 0


async def newest(settings: Settings) -> int:
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        number: int = await db.fetchval("SELECT max(id) FROM relay.outbox_replay")
    return number


async def test_a_dry_run_counts_and_changes_nothing(settings: Settings, here: Callable[..., Awaitable[Answer]]) -> None:
    await published(settings, [("order/1", 3), ("invoice/1", 2)], event_type="Paid")
    async with connected(settings.postgres.dsn.get_secret_value()) as db:
        await db.execute("DELETE FROM relay.outbox WHERE aggregate_id = '1' AND aggregate_type = 'order' AND seq = 1")
        told = await here("replay", "order/1", "--dry-run")
        assert told.code == 0
        assert "2 rows of source shop, to everyone" in told.out
        assert "order/1: 1 is no longer retained" in told.out
        assert "nothing was sent" in told.out
        counted = (await here("replay", "--type", "order", "--dry-run", "--json")).json
        assert (counted["rows"], counted["types"], counted["dry_run"]) == (2, {"Paid": 2}, True)
        assert await db.fetchval("SELECT count(*) FROM relay.audit") == 0
        assert await db.fetchval("SELECT count(*) FROM relay.outbox_replay") == 0


CANNOT_BE_DONE: list[tuple[tuple[str, ...], int, str]] = [
    ((), 2, "nothing is selected"),
    (("--all", "order/1"), 2, "--all means everything"),
    (("--all",), 2, "no terminal to ask on"),
    (("order/9", "--yes"), 11, "nothing that was published and is retained is selected"),
    (("order/1", "--to-queue", "nowhere", "--yes"), 5, "the queue 'nowhere' does not exist"),
    (("--resume",), 11, "no replay is unfinished"),
    (("--resume", "7"), 11, "there is no replay 7"),
    (("--resume", "order/1"), 2, "expected the number of a replay"),
    (("--resume", "7", "order/1"), 2, "--resume stands alone"),
    (("--list", "--abandon", "1"), 2, "stands alone"),
]


async def test_what_cannot_be_done_is_said_and_nothing_is_sent(
    settings: Settings, broker: str, here: Callable[..., Awaitable[Answer]]
) -> None:
    everyone = await Queue(broker, "everyone").declare(bind="#")
    await published(settings, [("order/1", 3)])
    for arguments, code, message in CANNOT_BE_DONE:
        answer = await here("replay", *arguments)
        assert (answer.code, message in answer.err) == (code, True), (arguments, answer)
    assert await everyone.count() == 0


async def test_an_operator_may_replay_list_and_give_up(settings: Settings, postgres: Postgres, broker: str) -> None:
    """With the rights of relay_operator and no others."""
    one = await Queue(broker, "one").declare()
    await published(settings, [("order/1", 3)])
    with Logins(postgres) as logins:
        dsn = logins.create(settings.postgres.dsn.get_secret_value(), "relay_operator")
        operator = settings_for(dsn, broker)

        async def there(*arguments: str) -> Answer:
            return await asyncio.to_thread(console.relay, dsn, *arguments)

        done = await relay(operator, "replay", "order/1", "--to-queue", "one", "--yes", "--why", "they lost it")
        assert done.code == 0, done.err
        assert "done, 3 of 3 rows sent to the queue one" in done.out
        assert await one.count() == 3
        async with connection(settings.postgres, application="test") as opened:
            everything = Selection(everything=True)
            await begin(
                opened,
                selection=everything,
                count=await Retained(opened).count(everything),
                to_queue=None,
                operator=Operator(who="me@here"),
            )
        number = await newest(settings)
        tried = await there("replay", "--abandon", str(number), "--dry-run")
        assert (tried.code, tried.out) == (0, f"replay {number} has sent 0 of 3 rows, and would be given up\n")
        given_up = await there("replay", "--abandon", str(number), "--yes")
        assert (given_up.code, given_up.out) == (0, f"replay {number} has sent 0 of 3 rows, and is given up\n")
        listed: list[dict[str, Any]] = (await there("replay", "--list", "--json")).json
        assert [(r["state"], r["sent"], r["to_queue"]) for r in listed] == [("abandoned", 0, None), ("done", 3, "one")]
        assert listed[1]["why"] == "they lost it"
        first, newest_one, oldest = (await there("replay", "--list")).out.splitlines()
        assert first.split() == ["replay", "state", "sent", "rows", "to", "selection", "started", "by", "why"]
        assert newest_one.split()[:6] == [str(number), "abandoned", "0", "3", "everyone", "--all"]
        assert oldest.split()[1:6] == ["done", "3", "3", "one", "order/1"]


async def test_what_nobody_got_is_told_at_the_end(settings: Settings) -> None:
    await published(settings, [("order/1", 3)])
    done = await relay(settings, "replay", "--all", "--yes")
    assert done.code == 0
    assert "3 of them were unroutable: no queue is bound for their routing keys" in done.out
