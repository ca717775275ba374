"""Handlers that take one event each, called for a whole batch: in its order, one after the other, up to the first that fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from relay.inbox import Event, Inbox
from relay.inbox.calls import Caller
from relay.inbox.charges import Charges, Suspects
from relay.inbox.failures import HandlerFailed
from relay.inbox.handling import Handling
from relay.inbox.sequencer import Arrival, Placed
from relay.inbox.stats import Stats, Tally
from relay.inbox.store import Store
from relay.postgres.connect import Connection
from tests.unit.test_sequencer import arrival, tombstone


class Open:
    """A connection in a transaction."""

    def is_closed(self) -> bool:
        return False

    def is_in_transaction(self) -> bool:
        return True


def handling(inbox: Inbox, tally: Tally, charges: Charges, *, careful: bool = False) -> Handling:
    connection = cast("Connection", Open())
    caller = Caller(connection, cast("Store", None), charges, timeout_s=10)
    return Handling(inbox, caller, charges, tally, careful=careful)


def placed(*arrivals: Arrival) -> list[Placed]:
    return [(("shop", "order", "1"), one) for one in arrivals]


def recorder(inbox: Inbox, did: list[object], *, fails_at: int | None = None) -> None:
    @inbox.on("T")
    async def handle(event: Event, _: Connection) -> None:
        did.append(event.seq)
        if event.seq == fails_at:
            raise ValueError("no")


async def test_each_event_is_handled_in_the_order_it_came_in_after_a_step() -> None:
    inbox, tally, did = Inbox("billing"), Tally(), list[object]()
    recorder(inbox, did)
    given = placed(arrival(2), arrival(1), arrival(3))
    await handling(inbox, tally, Charges(Suspects())).call_each(given, lambda: did.append("step"))
    assert did == ["step", 2, "step", 1, "step", 3]
    assert tally.stats() == Stats(applied=3)


async def test_what_has_no_handler_is_skipped_with_a_step_all_the_same() -> None:
    """Or the next batch would not be ready where most of what comes is for nobody here."""
    inbox, tally, did = Inbox("billing"), Tally(), list[object]()
    recorder(inbox, did)
    given = placed(tombstone(1), arrival(2), arrival(3, event_type="Other"))
    await handling(inbox, tally, Charges(Suspects())).call_each(given, lambda: did.append("step"))
    assert did == ["step", "step", 2, "step"]
    assert tally.stats() == Stats(applied=1, skipped=2)


async def test_the_first_that_fails_is_named_and_none_after_it_is_called() -> None:
    inbox, did = Inbox("billing"), list[object]()
    recorder(inbox, did, fails_at=2)
    given = placed(arrival(1), arrival(2), arrival(3))
    with pytest.raises(HandlerFailed) as raised:
        await handling(inbox, Tally(), Charges(Suspects())).call_each(given, lambda: None)
    assert did == [1, 2]
    assert list(raised.value.arrivals) == [given[1][1]]


async def test_they_are_not_called_so_once_anything_is_known_against_a_message_or_with_batch_handlers() -> None:
    inbox, charges = Inbox("billing"), Charges(Suspects())
    recorder(inbox, [])
    assert handling(inbox, Tally(), charges).calls_each
    assert not handling(inbox, Tally(), charges, careful=True).calls_each
    charges.doom(("tag", 1), "it ended the transaction")
    assert not handling(inbox, Tally(), charges).calls_each

    @inbox.on_batch("U")
    async def together(events: Sequence[Event], tx: Connection) -> None:
        """Nothing."""

    assert not handling(inbox, Tally(), Charges(Suspects())).calls_each
