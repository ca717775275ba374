"""Row 32 of the fault matrix: the disk of PostgreSQL is full. The broker's disk is the laboratory's (an alarm, as row 5)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from relay.daemon import Outbox
from relay.errors import SandboxError
from relay.postgres.migrate import migrate
from relay.sandbox import SandboxPostgres
from tests.faults.own_servers import postgres_version
from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, outbox_running, settings_for, until

__all__ = ["postgres_version"]

DISK = "160m"
SETTINGS = {"max_wal_size": "32MB", "min_wal_size": "32MB", "wal_recycle": "off", "wal_init_zero": "on"}
"""No segment of the write-ahead log is kept for later: the next one needs room."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, small enough to be filled."""
    place = Path(tempfile.mkdtemp(prefix="relay-disk-", dir="/tmp"))  # PostgreSQL runs as a user of its own
    place.chmod(0o755)
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=1777", "relay", str(place)],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError) as exc:
        place.rmdir()
        pytest.skip(f"needs the right to mount a small disk (root, CAP_SYS_ADMIN): {exc}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


@pytest.fixture
def server(disk: Path, postgres_version: str | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxPostgres]:
    """A PostgreSQL whose data and write-ahead log are on it, of the version that the other tests use."""
    made = SandboxPostgres(postgres_version, settings=SETTINGS)
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(disk))
        made.start()
    try:
        assert made.log.is_relative_to(disk)
        yield made
    finally:
        made.stop()


async def test_a_full_disk_of_postgresql_is_waited_for_and_no_mark_is_lost(
    server: SandboxPostgres, disk: Path, broker: str
) -> None:
    """While there is room in the write-ahead log, producers are refused and the relay goes on; without it the server panics."""
    dsn = server.create_database("shop")
    filler = disk / "filler"
    settings = settings_for(dsn, broker)
    async with connected(dsn) as db:
        await migrate(db)
    async with audit(broker) as witness, outbox_running(settings):
        async with connected(dsn) as db:
            await insert(db, "order/1", count=3)
        await witness.wait_for(3)
        with capture_logs() as logged:
            fill(filler)
            committed, refusal = await write_until_refused(dsn)
            assert "could not extend file" in server.log.read_text(), "inconclusive: there was room for data"
            async with connected(dsn) as db:
                await insert(db, "order/3", count=5)  # small ones find room in pages that are there already
            await witness.wait_for_distinct(8 + committed)
            assert not await has_failed(logged), "a disk without room for data is no reason for another session"
            await write_until_refused(dsn, "SELECT pg_switch_wal()")
            assert "PANIC" in server.log.read_text(), "inconclusive: there was room for the write-ahead log"
            await until(lambda: has_failed(logged))
        filler.unlink()
        freed = time.monotonic()
        await asyncio.to_thread(revive, server)
        async with connected(dsn) as db:
            stored = await db.fetchval("SELECT count(*) FROM relay.outbox WHERE aggregate_id = '2'")
            assert stored in (committed, committed + 1)  # of the last one nobody knows
            await insert(db, "order/1", count=2)
        await witness.wait_for_distinct(10 + stored)
        recovered_s = time.monotonic() - freed
    async with connected(dsn) as db:
        published = len(witness.messages)
        await Outbox(settings).run(drain=True)
        assert len(witness.messages) == published, "a mark was lost: something is published again"
        assert await db.fetchval("SELECT count(*) FROM relay.outbox_parked") == 0
    found = witness.sequences()
    assert found.pop("order/2", []) == list(range(1, stored + 1))
    assert found == {"order/1": [1, 2, 3, 4, 5], "order/3": [1, 2, 3, 4, 5]}
    print(
        f"row 32: {committed} committed until {refusal}, 5 more were published meanwhile; then a panic;"
        f" published {recovered_s:.1f} s after there was room, the server's own recovery included"
    )


def fill(filler: Path) -> None:
    """Until nothing more can be written."""
    with filler.open("wb", buffering=0) as file:
        for size in (1024 * 1024, 4096):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


async def write_until_refused(dsn: str, first: str = "SELECT") -> tuple[int, str]:
    """(how many commits were acknowledged, what the first that was not says)."""
    committed = 0
    try:
        async with connected(dsn) as db:
            while True:
                await db.execute(first)
                await insert(db, "order/2", payload='"' + os.urandom(100_000).hex() + '"')
                committed += 1
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as exc:
        return committed, type(exc).__name__


async def has_failed(logged: list[Any]) -> bool:
    """Whether the relay's session ended and is being tried again: it writes, at the latest, with its next checkpoint."""
    return any(line["event"] == "session_failed" for line in logged)


def revive(server: SandboxPostgres) -> None:
    """After a panic PostgreSQL restarts itself, or cannot and ends: then somebody starts it."""
    try:
        server.restart("immediate")
    except SandboxError:  # it had ended already
        server.start_again()
