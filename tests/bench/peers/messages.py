"""What the inboxes are given: messages of relay's wire contract, which any AMQP client can read; some twice, some swapped. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from relay.message import Message, Row, to_message

SOURCE = "bench"
ROUTING_KEY = "bench.Measured"
PAGE = 500
_OCCURRED_AT = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """`events` distinct ones, spread evenly over the aggregates."""

    events: int
    aggregates: int
    fill_bytes: int = 210
    duplicates: float = 0.0  # share that is sent a second time, with the next page of 500
    swaps: float = 0.0  # share that changes places with the next one of its aggregate
    seed: int = 1


def pages(wanted: Wanted) -> Iterator[list[Message]]:
    """In the order in which they are to be published; within a page all ids are distinct."""
    dice = random.Random(wanted.seed)
    order = _order(wanted, dice)
    again: list[Message] = []
    for first in range(0, wanted.events, PAGE):
        page = [_message(wanted, place) for place in order[first : first + PAGE]]
        yield page + again
        again = [message for message in page if dice.random() < wanted.duplicates]
    if again:
        yield again


def _order(wanted: Wanted, dice: random.Random) -> list[int]:
    """Places in the sequence 0, 1, 2 ...: aggregate = place % aggregates, number = place // aggregates + 1."""
    order = list(range(wanted.events))
    step = wanted.aggregates
    place = 0
    while place + step < wanted.events:
        # Each swap moves two messages; a message that was moved is not moved again.
        if order[place] == place and order[place + step] == place + step and dice.random() < wanted.swaps / 2:
            order[place], order[place + step] = order[place + step], order[place]
        place += 1
    return order


def _message(wanted: Wanted, place: int) -> Message:
    aggregate, seq = str(place % wanted.aggregates), place // wanted.aggregates + 1
    body = {"aggregate": aggregate, "seq": seq, "fill": "x" * wanted.fill_bytes}
    row = Row(
        id=place + 1,
        aggregate_type="bench",
        aggregate_id=aggregate,
        seq=seq,
        event_type="Measured",
        content_type="application/json",
        headers={},
        routing_key=None,
        created_at=_OCCURRED_AT,
        body=json.dumps(body).encode(),
    )
    return to_message(row, source=SOURCE, routing_key=ROUTING_KEY)
