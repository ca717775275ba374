"""A replay's look-ups stay on their indexes in a log that was never analysed: EXPLAIN of the very blocks, as its sessions run them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from relay.operate.retained import COUNT_PLANS
from relay.postgres.connect import READER_PLANS, Connection, close, connect
from relay.sandbox import Postgres
from relay.settings import PostgresSettings
from tests.harness.outbox import connected
from tests.integration.test_reader_plans import HISTORY, NEW, PAGE_BYTES, _explain, _seed

PAGE = 1000
LOOK = 5000
EACH = HISTORY // 1000  # rows of each aggregate of the history
MANY = 2**62


@pytest.fixture(scope="module")
def published_log(postgres: Postgres, template_database: str) -> Iterator[str]:
    """200 000 published rows of 1000 aggregates, over the whole ring, and 100 that wait."""
    name = f"relay_replay_plans_{secrets.token_hex(4)}"
    dsn = postgres.create_database(name, template_database)

    async def seed() -> None:
        log = await _seed(dsn, 5, analysed=False)
        async with connected(dsn) as db:
            await db.execute(
                "UPDATE relay.outbox_cursor SET snapshot = $1::text::pg_snapshot, high_id = $2, source = 'shop'",
                f"{log.seen}:{log.seen}:",
                HISTORY,
            )

    with asyncio.Runner() as runner:
        runner.run(seed())
    yield dsn
    postgres.drop_database(name)


@pytest.fixture(params=[READER_PLANS], ids=["as it pages"])
async def paging(published_log: str, request: pytest.FixtureRequest) -> AsyncIterator[Connection]:
    opened = await connect(PostgresSettings(dsn=SecretStr(published_log)), application="test", plans=request.param)
    yield opened
    await close(opened)


@pytest.fixture
async def counting(published_log: str) -> AsyncIterator[Connection]:
    opened = await connect(PostgresSettings(dsn=SecretStr(published_log)), application="test", plans=COUNT_PLANS)
    yield opened
    await close(opened)


def filters(**given: Any) -> list[Any]:
    names = ("kind", "name", "kinds", "names", "type", "event", "since", "until", "from_seq", "to_seq", "ids")
    return [given.get(name) for name in names]


async def test_one_aggregate_is_read_by_its_index_and_nothing_else(paging: Connection) -> None:
    done = await _explain(
        paging, "replay_page", "aggregate", 0, MANY, 0, LOOK, PAGE, PAGE_BYTES, *filters(kind="order", name="42")
    )
    assert done.rows == EACH
    assert done.sequential() == []
    assert done.blocks < 12 * EACH


async def test_a_page_in_the_middle_of_an_aggregate_does_not_read_what_is_before_it(paging: Connection) -> None:
    done = await _explain(
        paging,
        "replay_page",
        "aggregate",
        0,
        MANY,
        EACH - 10,
        LOOK,
        PAGE,
        PAGE_BYTES,
        *filters(kind="order", name="42"),
    )
    assert done.rows == 10
    assert done.blocks < 250


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 0.95])
async def test_a_page_of_the_log_reads_only_itself(paging: Connection, place: float) -> None:
    done = await _explain(
        paging, "replay_page", "log", int(HISTORY * place), MANY, 0, LOOK, PAGE, PAGE_BYTES, *filters(kinds="ord%")
    )
    assert done.rows == PAGE
    assert done.sequential() == []
    assert (
        done.blocks < 12_000
    )  # an index row for each of those looked at, a handful of blocks for each row of the page


async def test_a_page_of_which_nothing_is_selected_ends_after_a_bounded_look(paging: Connection) -> None:
    done = await _explain(paging, "replay_page", "log", 0, MANY, 0, LOOK, PAGE, PAGE_BYTES, *filters(event="Never"))
    assert done.rows == 1  # which tells how far it was looked
    assert done.sequential() == []
    assert done.blocks < 12 * LOOK


async def test_single_rows_are_looked_up(paging: Connection) -> None:
    ids = [1, 1000, HISTORY, MANY]
    done = await _explain(paging, "replay_page", "ids", 0, MANY, 0, LOOK, PAGE, PAGE_BYTES, *filters(ids=ids))
    assert done.rows == 3
    assert done.sequential() == []
    assert done.blocks < 150


async def test_one_aggregate_is_counted_by_its_index(counting: Connection) -> None:
    done = await _explain(counting, "count_replay", *filters(kind="order", name="42"))
    assert done.rows == 1
    assert not [table for table in done.sequential() if table.startswith("outbox_") and table[-1].isdigit()]
    assert done.blocks < 4 * EACH


async def test_numbers_that_are_missing_are_found_by_the_index(counting: Connection) -> None:
    done = await _explain(counting, "missing_numbers", "order", "42", None, None, 20)
    assert not [table for table in done.sequential() if table.startswith("outbox_") and table[-1].isdigit()]
    assert done.blocks < 4 * EACH


async def test_a_look_at_the_backlog_is_bounded(paging: Connection) -> None:
    done = await _explain(paging, "live_backlog", LOOK)
    assert done.rows == 1
    assert done.sequential() in ([], ["outbox_cursor"])  # all of a table of one row
    assert done.blocks < 3 * NEW
