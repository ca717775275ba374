"""Row 33 of the fault matrix: time zones and the hour that comes twice. Clock jumps are a kind of the laboratory."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import pytest

from tests.harness.audit import audit
from tests.harness.outbox import connected, insert, until
from tests.harness.program import environment, relay

FAKETIME = shutil.which("faketime")
LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime",
    "/usr/lib/aarch64-linux-gnu/faketime",
    "/usr/lib/faketime",
    "/usr/local/lib/faketime",
)
LIBRARY = next((path for folder in LIBRARIES if (path := Path(folder) / "libfaketimeMT.so.1").exists()), None)

NEW_YORK = "America/New_York"
LAST_SECONDS_OF_SUMMER = "@2026-11-01 01:59:56"
"""At two o'clock it becomes one o'clock again. libfaketime takes the first of the two hours, in TZ."""


@pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime (Debian's package faketime)")
async def test_the_hour_that_comes_twice_neither_delays_a_retry_nor_takes_the_lease(
    database: str, broker: str, tmp_path: Path
) -> None:
    """The relay's clock goes through the end of summer time, the database keeps another zone, and the right time."""
    environ = environment(database, broker, outbox_retry_first_s="1", outbox_retry_max_s="1") | {
        "TZ": NEW_YORK,
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME": LAST_SECONDS_OF_SUMMER,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # NTP does not step that one either
    }
    async with connected(database) as db:
        name = urlsplit(database).path[1:]
        await db.execute(f"ALTER DATABASE \"{name}\" SET timezone = 'Asia/Kolkata'")
    async with (
        audit(broker, "order.#") as witness,
        connected(database) as db,
        relay(tmp_path, environ, "run") as program,
    ):
        await insert(db, "ghost/1")
        await insert(db, "order/1")
        await witness.wait_for_distinct(1)
        began, count = time.monotonic(), 1
        while not spans_the_change(program.log):
            await insert(db, "order/1")
            count += 1
            await witness.wait_for_distinct(count)
            await until(
                partial(has_attempts, db, count - 1), timeout_s=10, every_s=0.1
            )  # so it logs something each second
        retries_s = (time.monotonic() - began) / (count - 1)
        assert await db.fetchval("SELECT epoch FROM relay.outbox_cursor") == 1, "the session ended"
        await witness.queue.bind(witness.exchange, "ghost.#")
        await witness.wait_for_distinct(count + 1)
        assert (await program.stop())[0] == 0
        created = await db.fetch(
            "SELECT floor(extract(epoch FROM created_at))::bigint AS at FROM relay.outbox ORDER BY id"
        )
    sent = [message.timestamp for message in witness.messages if str(message.routing_key).startswith("order")]
    assert all(at is not None and abs(at.timestamp() - time.time()) < 300 for at in sent), (
        "a time of the relay's own clock went out"
    )
    assert {int(at.timestamp()) for at in sent if at is not None} <= {r["at"] for r in created}
    assert witness.sequences() == {"order/1": list(range(1, count + 1)), "ghost/1": [1]}
    assert retries_s < 4, "a retry waited for the relay's clock"
    print(f"row 33: {count} events through the change, a retry every {retries_s:.1f} s")


async def has_attempts(db: object, count: int) -> bool:
    """Whether the ghost was tried so often: it is, about once a second, by the database's clock."""
    return bool(await db.fetchval("SELECT attempts >= $1 FROM relay.outbox_parked", count))  # type: ignore[attr-defined]


def spans_the_change(log: str) -> bool:
    """Whether the relay's own clock was seen on both sides of the change: the proof that it was faked."""
    at = [datetime.fromisoformat(json.loads(line)["timestamp"]) for line in log.splitlines() if line.startswith("{")]
    offsets = {
        moment.astimezone(ZoneInfo(NEW_YORK)).utcoffset() for moment in at if moment < datetime(2026, 11, 2, tzinfo=UTC)
    }
    return len(offsets) == 2


async def test_a_relay_and_a_database_in_different_zones_agree_on_every_moment(
    database: str, broker: str, tmp_path: Path
) -> None:
    """Without any fake: a retry is due when the database says so, and a wire timestamp is that of the row."""
    environ = environment(database, broker, outbox_retry_first_s="0.2") | {"TZ": "Pacific/Kiritimati"}
    async with connected(database) as db:
        name = urlsplit(database).path[1:]
        await db.execute(f"ALTER DATABASE \"{name}\" SET timezone = 'America/New_York'")
    async with (
        audit(broker, "order.#") as witness,
        connected(database) as db,
        relay(tmp_path, environ, "run") as program,
    ):
        assert await db.fetchval("SHOW timezone") == "America/New_York"
        await insert(db, "ghost/1")
        await insert(db, "order/1")
        (message,) = await witness.wait_for(1)
        await until(lambda: has_attempts(db, 1), timeout_s=10)
        await witness.queue.bind(witness.exchange, "ghost.#")
        await witness.wait_for_distinct(2, timeout_s=10)
        created = await db.fetchval(
            "SELECT date_trunc('second', created_at) FROM relay.outbox WHERE aggregate_type = 'order'"
        )
        assert (await program.stop())[0] == 0
    assert message.timestamp == created
