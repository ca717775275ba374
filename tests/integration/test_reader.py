"""What the reader makes of the columns of a row: each query that it asks."""

from __future__ import annotations

from datetime import datetime

import pytest
from pydantic import SecretStr

from relay.message import Row
from relay.outbox.cursor import Position, Snapshot
from relay.outbox.reader import Reader
from relay.postgres.connect import connection
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
        reader = Reader(reading, shard=0, page_rows=2, page_bytes=10_000)
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
