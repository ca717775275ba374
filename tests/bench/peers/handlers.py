"""relay's own handlers in the comparison of inboxes: `relay inbox run tests.bench.peers.handlers:one` (or `:many`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relay.inbox import Event, Inbox

EFFECT = "INSERT INTO effect (aggregate, seq) VALUES ($1, $2)"
EFFECTS_OF_MANY = "INSERT INTO effect (aggregate, seq) SELECT * FROM unnest($1::text[], $2::bigint[])"

one = Inbox("bench")
many = Inbox("bench")


@one.on("Measured")
async def apply_one(event: Event, tx: Any) -> None:
    """One statement a message."""
    await tx.execute(EFFECT, event.aggregate_id, event.seq)


@many.on_batch("Measured")
async def apply_many(events: Sequence[Event], tx: Any) -> None:
    """One statement a batch."""
    await tx.execute(EFFECTS_OF_MANY, [event.aggregate_id for event in events], [event.seq for event in events])
