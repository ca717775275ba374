"""An aggregate's first event, when no other aggregate is in its batch, has its cursor created without being looked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast
from unittest.mock import patch

import pytest

from relay.inbox import Inbox, work
from relay.inbox.charges import Charges, Suspects
from relay.inbox.sequencer import Arrival, Cursor, Key
from relay.inbox.store import Due, Store
from relay.inbox.work import Batch, Rules, Work
from relay.message import Event
from relay.postgres.connect import Connection
from relay.settings import InboxSettings
from tests.unit.test_sequencer import event


class Asked(Exception):
    """How the cursors were asked for."""


class Asking(Store):
    async def lock_cursors(self, keys: Iterable[Key], *, is_new: bool = False) -> dict[Key, Cursor]:
        raise Asked(is_new)


async def seems_new(events: Sequence[Event], due: Sequence[Due] = ()) -> bool:
    """Whether the store is told that the first aggregate of a batch of these is probably not known."""
    rules = Rules(consumer="billing", inbox=Inbox("billing"), settings=InboxSettings())
    batch = Batch(arrivals=[Arrival(each, tag) for tag, each in enumerate(events, start=1)], due=due)
    with patch.object(work, "Store", Asking), pytest.raises(Asked) as asked:
        await Work(cast("Connection", None), rules, careful=False, charges=Charges(Suspects())).run(batch)
    return bool(asked.value.args[0])


@pytest.mark.parametrize("seqs", [[1], [1, 1], [1, 2, 3]])
async def test_one_that_begins_with_number_1_seems_new(seqs: list[int]) -> None:
    assert await seems_new([event(seq) for seq in seqs])


@pytest.mark.parametrize("seqs", [[2], [2, 1], []])
async def test_one_that_goes_on_does_not(seqs: list[int]) -> None:
    assert not await seems_new([event(seq) for seq in seqs])


async def test_nor_one_of_which_something_is_held() -> None:
    due = Due(held_id=7, source="shop", aggregate_type="order", aggregate_id="1", seq=1, message_id="1/1")
    assert not await seems_new([event(1)], [due])
