"""What counts toward outbox.parked_limit: rows that were refused and what waits behind them, and nothing that is on its way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from relay.message import Aggregate, Row
from relay.outbox.blocked import Blocked
from relay.outbox.parking import Parked, Reason
from relay.outbox.pause import Pauses
from relay.outbox.store import Store
from tests.unit.test_parking import rows

A: Aggregate = ("order", "a")


class Tables:
    """What a look finds: (parked rows, those of them that were refused or are behind one) by aggregate."""

    def __init__(self, found: dict[Aggregate | None, tuple[int, int]]) -> None:
        self.found = found

    async def pauses(self) -> Pauses:
        return Pauses()

    async def blocked(self) -> dict[Aggregate | None, tuple[int, int]]:
        return self.found

    async def reconcile(self, _pauses: Pauses) -> bool:
        return False


async def looked(found: dict[Aggregate | None, tuple[int, int]] | None = None) -> Blocked:
    blocked = Blocked(store=cast("Store", Tables(found or {})), shard=0)
    await blocked.look()
    return blocked


def parked(page: Sequence[Row], *reasons: Reason) -> list[Parked]:
    return [Parked(row, reason) for row, reason in zip(page, reasons, strict=True)]


def counts(blocked: Blocked) -> tuple[int, int]:
    return blocked.rows, blocked.refused_rows


@pytest.mark.parametrize(("head", "refused"), [("unroutable", 3), ("paused", 0)])
async def test_rows_count_as_refused_when_the_row_that_holds_them_up_was(head: Reason, refused: int) -> None:
    blocked = await looked()
    blocked.note(parked(rows("a", "a"), head, "behind"))
    blocked.note(parked(rows("a"), "behind"))
    assert counts(blocked) == (3, refused)
    assert set(blocked.aggregates) == {A}


async def test_a_row_without_an_aggregate_counts_by_itself() -> None:
    blocked = await looked({None: (4, 1)})
    page = rows(None, None, None)
    blocked.note(parked(page, "nacked", "paused", "paused"))
    assert counts(blocked) == (7, 2)
    release(blocked, published=page[:2], refused_before=[page[0]])
    assert counts(blocked) == (5, 1)
    blocked.release([], parked(page[2:], "nacked"), {}, {}, first_refusals=1)  # that had only been paused
    assert counts(blocked) == (5, 2)
    assert not blocked.aggregates


async def test_what_goes_out_after_a_resume_never_counts_as_refused() -> None:
    blocked = await looked({A: (5, 0), ("order", "b"): (2, 2)})
    release(blocked, published=rows("a", "a"), still={A: False})
    assert counts(blocked) == (5, 2)
    release(blocked, published=rows("a", "a", "a"))
    assert counts(blocked) == (2, 2)
    assert set(blocked.aggregates) == {("order", "b")}


async def test_a_line_counts_from_the_moment_that_its_head_is_refused_to_the_moment_that_the_head_goes_out() -> None:
    blocked = await looked({A: (5, 0)})
    (head, following) = rows("a", "a")
    release(blocked, refused=[head], still={A: True})
    assert counts(blocked) == (5, 5)
    release(blocked, published=[head], still={A: False})
    assert counts(blocked) == (4, 0)
    release(blocked, refused=[following], still={A: True})
    assert counts(blocked) == (4, 4)


async def test_a_row_that_stays_because_it_is_to_go_out_as_a_tombstone_still_counts() -> None:
    blocked = await looked({A: (2, 2)})
    blocked.release(rows("a"), [], {}, {A: True}, first_refusals=0)
    assert counts(blocked) == (2, 2)


async def test_what_was_parked_twice_is_counted_right_when_it_is_gone() -> None:
    """A session that ended in the middle parked rows; the next one knows them, reads them again and parks them again."""
    blocked = await looked({A: (2, 2)})
    blocked.note(parked(rows("a", "a"), "behind", "behind"))
    release(blocked, published=rows("a", "a"))
    assert counts(blocked) == (0, 0)


def release(
    blocked: Blocked,
    *,
    published: Sequence[Row] = (),
    refused: Sequence[Row] = (),
    still: dict[Aggregate, bool] | None = None,
    refused_before: Sequence[Row] = (),
) -> None:
    gone: dict[int, Any] = {row.id: row in refused_before for row in published}
    blocked.release(published, [Parked(row, "nacked") for row in refused], gone, still or {}, first_refusals=0)
