"""Two services in different databases: `relay run` beside one, `relay inbox run --store` beside the other, which is psql and nothing else."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from relay.sandbox.postgres_binaries import all_postgres_binaries
from tests.harness.outbox import RelayProcess, connected, settings_for, until

SIDECAR = ("inbox", "run", "--store", "--consumer", "billing", "-s", "inbox.bindings=order.#", "-s", "inbox.batch=50")
ORDERS, EVENTS = 12, 40

# What the service does with what it has taken, in the transaction in which it takes it.
TAKE = """
INSERT INTO invoice (order_id, seq, amount, by)
SELECT aggregate_id, seq, (payload ->> 'amount')::int, pg_backend_pid() FROM relay.inbox_take(20, 'billing');
"""


def psql_program() -> str:
    """psql, from the machine or from one of its PostgreSQL installations."""
    found = shutil.which("psql")
    for binaries in all_postgres_binaries() if found is None else ():
        candidate = Path(binaries.folder) / "psql"
        if candidate.exists():
            return str(candidate)
    if found is None:
        pytest.skip("no psql: install postgresql-client")
    return found


class Psql:
    """A psql session that is typed into."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lines = 0

    async def __call__(self, script: str) -> str:
        """Type something, and return all that psql printed for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._lines += 1
        mark = f"-- {self._lines} --"
        self._process.stdin.write(f"{script}\n\\echo {mark}\n".encode())
        await self._process.stdin.drain()
        printed = []
        async with asyncio.timeout(30):
            while (line := (await self._process.stdout.readline()).decode()).strip() != mark:
                assert line, "psql has ended"
                printed.append(line)
        return "".join(printed)


@asynccontextmanager
async def psql(dsn: str) -> AsyncIterator[Psql]:
    process = await asyncio.create_subprocess_exec(
        *(psql_program(), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", dsn),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield Psql(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def test_a_service_in_psql_gets_every_event_once_and_in_order_and_is_woken_by_it(
    database: str, consumer_database: str, broker: str
) -> None:
    relay = await RelayProcess.start(settings_for(database, broker))
    billing = settings_for(consumer_database, broker)
    sidecar = await RelayProcess.start(billing, *SIDECAR)
    try:
        async with psql(consumer_database) as owner, psql(database) as shop:
            await owner(
                "CREATE TABLE invoice (id bigint GENERATED ALWAYS AS IDENTITY, order_id text, seq bigint, amount int, by int);"
            )
            await _subscribed(consumer_database)
            await _is_woken(owner, shop)
            async with psql(consumer_database) as one, psql(consumer_database) as two:
                selling = asyncio.create_task(_sell(shop))
                taking = [asyncio.create_task(_take(taker, seed)) for seed, taker in enumerate((one, two))]
                try:
                    await _taken(consumer_database, 100)
                    await sidecar.kill()
                    sidecar = await RelayProcess.start(billing, *SIDECAR)
                    await selling
                    await _taken(consumer_database, ORDERS * EVENTS + 1)
                finally:
                    for task in taking:
                        task.cancel()
                    failures = await asyncio.gather(*taking, return_exceptions=True)
                assert all(isinstance(failure, asyncio.CancelledError) for failure in failures), failures
            assert await owner("SELECT count(*) FROM relay.inbox;") == "0\n"
            assert await owner("SELECT count(DISTINCT by) FROM invoice WHERE order_id <> 'first';") == "2\n"
            for order in range(ORDERS):
                numbers = await owner(f"SELECT seq FROM invoice WHERE order_id = '{order}' ORDER BY id;")
                assert numbers.split() == [str(seq) for seq in range(1, EVENTS + 1)]
    finally:
        code, _ = await sidecar.terminate()
        await relay.terminate()
    assert code == 0


async def _subscribed(dsn: str) -> None:
    """The sidecar is there. An event that comes before its queue is bound is parked for a second, which is not the subject here."""
    async with connected(dsn) as db:
        await until(lambda: db.fetchval("SELECT count(*) FROM relay.inbox_progress"))


async def _is_woken(service: Psql, shop: Psql) -> None:
    """LISTEN, and an event of another database arrives as a notification; only then is there something to take."""
    await service("LISTEN relay_inbox;")
    assert await service("SELECT count(*) FROM relay.inbox_take();") == "0\n"
    await shop("SELECT relay.emit('order', 'first', 'OrderPaid', '{\"amount\": 1}');")
    await until(lambda: _notified(service))
    await service(f"BEGIN; {TAKE} COMMIT;")
    assert await service("SELECT order_id, seq, amount FROM invoice;") == "first|1|1\n"
    await service("UNLISTEN relay_inbox;")


async def _notified(service: Psql) -> bool:
    """psql reads what was notified when it runs something."""
    return 'Asynchronous notification "relay_inbox" with payload "billing"' in await service("SELECT;")


async def _sell(shop: Psql) -> None:
    dice = random.Random(7)
    left = [str(order) for order in range(ORDERS) for _ in range(EVENTS)]
    dice.shuffle(left)
    while left:
        emits = [
            f"SELECT relay.emit('order', '{left.pop()}', 'OrderPaid', '{{\"amount\": 5}}');"
            for _ in range(min(len(left), 5))
        ]
        await shop(f"BEGIN; {' '.join(emits)} COMMIT;")
        await asyncio.sleep(0.005)


async def _take(service: Psql, seed: int) -> None:
    """Every third transaction, roughly, does not work out."""
    dice = random.Random(seed)
    while True:
        await service(f"BEGIN; {TAKE} {'ROLLBACK' if dice.random() < 0.3 else 'COMMIT'};")


async def _taken(dsn: str, count: int) -> None:
    async with connected(dsn) as db:
        await until(lambda: db.fetchval("SELECT count(*) >= $1 FROM invoice", count), timeout_s=60)
