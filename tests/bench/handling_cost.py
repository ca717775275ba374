"""What the inbox itself costs a message, in microseconds of CPU, from the arrival to the COMMIT: the Store answers from memory.

    python -m tests.bench.handling_cost [--kind each|batch] [--aggregates 1000] [--profile]

500 events a transaction; a handler that does nothing, once for each event or once for all. Compare figures of one machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast
from unittest.mock import patch

from relay.inbox import Event, Inbox, work
from relay.inbox.charges import Charges, Suspects
from relay.inbox.sequencer import Arrival, Cursor, Key
from relay.inbox.store import Conflict, Store
from relay.inbox.work import Batch, Rules, Work
from relay.message import content_digest
from relay.postgres.connect import Connection
from relay.settings import InboxSettings

BATCH = 500
ROUNDS = 40


class Nowhere:
    """A connection that nothing is asked."""

    def is_closed(self) -> bool:
        """Never."""
        return False

    def is_in_transaction(self) -> bool:
        """Always."""
        return True


class Memory(Store):
    """Cursors in a dictionary; nothing is held."""

    cursors: ClassVar[dict[Key, Cursor]] = {}

    async def transaction_id(self) -> str:
        """Always the same."""
        return "1"

    async def lock_cursors(self, keys: Iterable[Key], *, is_new: bool = False) -> dict[Key, Cursor]:
        """As they were written last."""
        return {key: self.cursors.get(key, Cursor()) for key in keys}

    async def looked_for_held(self, cursors: Mapping[Key, Cursor]) -> dict[Key, Cursor]:
        """Nothing is held of any."""
        return {key: cursor._replace(has_held=False) for key, cursor in cursors.items()}

    async def write_cursors(self, cursors: Mapping[Key, Cursor], *, look: bool) -> list[Key]:
        """Remember them; nothing is held of any."""
        self.cursors.update(cursors)
        return []

    async def successors(self, cursors: Mapping[Key, Cursor], portion: int) -> list[Arrival]:
        """None."""
        return []

    async def delete_held_through(self, cursors: Any, applied: Any) -> list[Conflict]:
        """None."""
        return []


async def each(event: Event, tx: Connection) -> None:
    """Nothing."""


async def together(events: Sequence[Event], tx: Connection) -> None:
    """Nothing."""


def inbox_for(kind: str) -> Inbox:
    """An inbox whose handler gets one event, or all of them."""
    inbox = Inbox("bench")
    if kind == "batch":
        inbox.on_batch("Booked")(together)
    else:
        inbox.on("Booked")(each)
    return inbox


def batches(aggregates: int) -> list[list[Arrival]]:
    """Events of all aggregates in turn."""
    digest = content_digest("Booked", "application/json", b"{}")
    arrivals = [
        Arrival(
            event=Event(
                source="shop",
                aggregate_type="order",
                aggregate_id=str(i % aggregates),
                seq=i // aggregates + 1,
                event_type="Booked",
                message_id=str(i),
                content_type="application/json",
                body=b"{}",
                digest=digest,
            ),
            tag=i + 1,
            exchange="relay.events",
            routing_key="order.Booked",
        )
        for i in range(BATCH * ROUNDS)
    ]
    return [arrivals[start : start + BATCH] for start in range(0, len(arrivals), BATCH)]


async def measure(kind: str, aggregates: int) -> float:
    """Microseconds a message: the median of the transactions."""
    Memory.cursors.clear()
    rules = Rules(consumer="bench", inbox=inbox_for(kind), settings=InboxSettings())
    took = []
    for arrivals in batches(aggregates):
        started = time.process_time()
        once = Work(cast("Connection", Nowhere()), rules, careful=False, charges=Charges(Suspects()))
        stats = await once.run(Batch(arrivals=arrivals))
        once.committed()
        took.append((time.process_time() - started) / BATCH * 1e6)
        assert stats.applied == BATCH
    return statistics.median(took)


def main() -> None:
    """Print both kinds, or profile one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=["each", "batch"])
    parser.add_argument("--aggregates", type=int, default=1000)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    with patch.object(work, "Store", Memory):
        show(given)


def show(given: argparse.Namespace) -> None:
    """Measure with the Store that is in memory."""
    kinds = [given.kind] if given.kind else ["each", "batch"]
    if given.profile:
        profile = cProfile.Profile()
        profile.runcall(asyncio.run, measure(kinds[-1], given.aggregates))
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    for kind in kinds:
        rounds = [asyncio.run(measure(kind, given.aggregates)) for _ in range(5)]
        print(f"{kind:6} {statistics.median(rounds):6.2f} us a message ({min(rounds):.2f} to {max(rounds):.2f})")


if __name__ == "__main__":
    main()
