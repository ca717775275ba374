"""What the reader makes of the columns of a row: each query that it asks."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import SecretStr

from relay.message import Row
from relay.outbox.cursor import Position, Snapshot
from relay.outbox.reader import Reader
from relay.postgres.connect import connection
from relay.postgres.planning import Planning
from relay.settings import PostgresSettings

MOMENTS = (
    "1970-01-01T00:00:00.999999+00:00",
    "2026-11-25T22:59:59.999999+00:00",
    "2026-11-25T23:00:00+00:00",
    "9999-12-30T23:59:59.999999+00:00",
)
INSERT = """
INSERT INTO relay.outbox (aggregate_type, aggregate_id, event_type, payload, created_at) VALUES ('order', '1', 'Paid', '{}', $1)
"""


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
async def test_the_time_of_a_row_is_its_own_to_the_second_and_never_rounded_up(database: str, zone: str) -> None:
    """A time that went through floating point would be the next second's, the later the sooner."""
    settings = PostgresSettings(dsn=SecretStr(database))
    async with (
        connection(settings, application="relay") as writing,
        connection(settings, application="relay") as reading,
    ):
        await reading.execute("SELECT set_config('TimeZone', $1, false)", zone)
        late = writing.transaction()
        await late.start()
        await writing.execute(INSERT, datetime.fromisoformat(MOMENTS[0]))
        reader = Reader(reading, shard=0, page_rows=2, page_bytes=10_000, planning=Planning(reading))
        before = await reader.read(Position(Snapshot(1, 1)))
        await late.commit()
        for moment in MOMENTS[1:]:
            await writing.execute(INSERT, datetime.fromisoformat(moment))
        position = Position(Snapshot(1, 1)).after(before)
        found: list[Row] = []
        pages = 0
        while not (page := await reader.read(position)).empty:
            found += page.rows
            pages += 1
            position = position.after(page)
        again = await reader.read(Position(Snapshot(1, 1)))  # not in two parts: all of it is new
    assert not before.rows
    assert pages == 2
    assert again.rows == found[:2]
    assert [row.created_at for row in found] == [datetime.fromisoformat(m).replace(microsecond=0) for m in MOMENTS]


@pytest.mark.parametrize("late", [False, True], ids=["new", "late"])
@pytest.mark.parametrize(
    ("page_rows", "page_bytes", "pages"),
    [
        (10, 1000, [(5, True)]),
        (10, 10, [(5, True)]),
        (10, 9, [(5, True)]),
        (10, 8, [(4, False), (1, True)]),
        (10, 4, [(2, False), (2, False), (1, True)]),
        (2, 1000, [(2, False), (2, False), (1, True)]),
        (5, 1000, [(5, False), (0, True)]),
    ],
)
async def test_a_page_knows_whether_it_is_the_last_of_its_window_whatever_ended_it(
    database: str, page_rows: int, page_bytes: int, pages: list[tuple[int, bool]], *, late: bool
) -> None:
    """Five rows of two bytes, of one transaction; which was in progress at the cursor, if it is late."""
    async with connection(PostgresSettings(dsn=SecretStr(database)), application="relay") as opened:
        async with opened.transaction():
            for _ in range(5):
                await opened.execute(INSERT, datetime.fromisoformat(MOMENTS[1]))
            xid = int(await opened.fetchval("SELECT pg_current_xact_id()::text"))
        reader = Reader(opened, shard=0, page_rows=page_rows, page_bytes=page_bytes, planning=Planning(opened))
        position = Position(Snapshot(xid, xid + 1, (xid,)) if late else Snapshot(1, 1))
        found: list[tuple[int, bool]] = []
        while not found or not found[-1][1]:
            page = await reader.read(position)
            found.append((len(page.rows), page.complete))
            position = position.after(page)
    assert found == pages
