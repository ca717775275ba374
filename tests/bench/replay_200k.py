"""`python -m tests.bench.replay_200k [--rows 200000]`: the issue's third condition at full size, with figures.

A log of 200 000 published rows is replayed to one consumer: nobody else receives a message, its effects do not change; after
`relay inbox reset` and a replay that is interrupted by Ctrl-C and by kill -9, and resumed, they are rebuilt exactly. Uses the
servers of RELAY_TEST_POSTGRES_DSN and RELAY_TEST_RABBITMQ_URL, or throwaway ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from relay.postgres.migrate import migrate
from relay.sandbox import find_postgres, find_rabbitmq
from relay.settings import Settings
from tests.harness.outbox import connected, settings_for, until
from tests.integration.inbox_harness import World, recording, world
from tests.integration.test_replay import Queue, drain
from tests.integration.test_replay_command import ended, relay, sent, started

AGGREGATES = 2000
RATE = 1_000_000
LONG_S = 1800.0


def main() -> int:
    """Run it; 0 when all held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows // AGGREGATES * AGGREGATES
    name = f"relay_replay_{secrets.token_hex(4)}"
    with find_postgres() as postgres, find_rabbitmq() as rabbitmq:
        producer, consumer = postgres.create_database(name), postgres.create_database(f"{name}_consumer")
        broker = rabbitmq.create_vhost(name)
        try:
            asyncio.run(_measure(settings_for(producer, broker), consumer, broker, rows))
        finally:
            rabbitmq.delete_vhost(name)
            postgres.drop_database(name)
            postgres.drop_database(f"{name}_consumer")
    return 0


async def _measure(settings: Settings, consumer: str, broker: str, rows: int) -> None:
    for dsn in (settings.postgres.dsn.get_secret_value(), consumer):
        async with connected(dsn) as db:
            await migrate(db)
    audit = await Queue(broker, "audit").declare(bind="#")
    await Queue(broker, "shop").declare(bind="order.#")
    await Queue(broker, "shop").delete()  # the inbox declares it with its own arguments
    async with world(consumer, broker, batch=500, prefetch=1000) as w, w.running(recording()):
        with _timed("write and publish the first time", rows):
            async with connected(settings.postgres.dsn.get_secret_value()) as db:
                await db.execute(
                    "INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload) "
                    "SELECT 'order', (n % $1)::text, 'T', jsonb_build_object('amount', n) FROM generate_series(1, $2) AS n",
                    AGGREGATES,
                    rows,
                    timeout=600,
                )
            await drain(settings)
        await _until(w, applied=rows)
        first = await _effects(w)
        assert first == _expected(rows), "the first delivery is not what was written"
        await audit.delete()
        await audit.declare(bind="#")

        with _timed("replay, all duplicates", rows):
            done = await relay(settings, *_replay(), "--json", timeout_s=LONG_S)
        print("   ", done.out.strip())
        await _until(w, duplicates=rows)
        assert await _effects(w) == first, "a duplicate had an effect"

        await _reset(w, consumer)
        number = json.loads(done.out)["replay"] + 1
        with _timed("replay, interrupted twice, all effects again", rows):
            one = await started(settings, *_replay())
            await until(lambda: sent(settings, number, at_least=rows // 4), timeout_s=LONG_S)
            one.send_signal(signal.SIGINT)
            stopped = await ended(one)
            assert stopped.code == 130, stopped
            print("    Ctrl-C:", stopped.err.strip().splitlines()[-1])
            two = await started(settings, "replay", "--resume", "--rate", str(RATE))
            await until(lambda: sent(settings, number, at_least=rows // 2), timeout_s=LONG_S)
            two.kill()
            await two.communicate()
            print(f"    kill -9 at {await sent(settings, number):,}")
            three = await relay(settings, "replay", "--resume", "--rate", str(RATE), "--json", timeout_s=LONG_S)
            assert json.loads(three.out)["sent"] == rows, three
            await _until(w, applied=2 * rows)
        assert await _effects(w) == first, "not rebuilt exactly"
        assert await w.held() == []
        print(f"    repeated by the interruptions: {w.total.duplicates - rows:,} messages")
    assert await audit.count() == 0, "somebody else received a message"
    print(f"effects equal, {rows:,} rows, {AGGREGATES:,} aggregates; the audit queue is empty")


def _replay() -> list[str]:
    return ["replay", "--all", "--to-queue", "shop", "--rate", str(RATE), "--yes"]


async def _reset(w: World, consumer: str) -> None:
    environment = os.environ | {"RELAY_POSTGRES_DSN": consumer}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relay",
        "inbox",
        "reset",
        "--all",
        "--consumer",
        "shop",
        "--yes",
        "--force",
        env=environment,
    )
    assert await process.wait() == 0
    await w.db.execute("TRUNCATE effect")


async def _until(w: World, **counts: int) -> None:
    async def reached() -> bool:
        return all(getattr(w.total, name) >= count for name, count in counts.items())

    await until(reached, timeout_s=LONG_S, every_s=0.1)


async def _effects(w: World) -> list[tuple[str, list[int]]]:
    """What was applied of each aggregate, in the order in which it was."""
    rows = await w.db.fetch("SELECT aggregate, array_agg(seq ORDER BY id) AS seqs FROM effect GROUP BY aggregate")
    return sorted((r["aggregate"], list(r["seqs"])) for r in rows)


def _expected(rows: int) -> list[tuple[str, list[int]]]:
    return sorted((str(a), list(range(1, rows // AGGREGATES + 1))) for a in range(AGGREGATES))


@contextmanager
def _timed(what: str, rows: int) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    print(f"{what}: {seconds:.1f} s, {rows / seconds:,.0f} rows/s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
