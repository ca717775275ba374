"""Committed = published, under producers that do everything wrong at once."""

from __future__ import annotations

import asyncio
import json

from tests.harness.audit import Audit, audit
from tests.harness.outbox import connected, outbox_running, settings_for, shard_of
from tests.harness.producers import Ledger, hostile_producer, insert_event

PRODUCERS = 24
HELD_S = 30.0


def tokens(witness: Audit) -> set[str]:
    return {json.loads(message.body)["token"] for message in witness.messages}


async def test_24_hostile_producers_lose_nothing_and_an_open_transaction_delays_only_its_own_aggregate(
    database: str, broker: str
) -> None:
    settings = settings_for(database, broker, outbox__page_rows=5)
    ledger, stop = Ledger(), asyncio.Event()
    async with audit(broker) as witness, connected(database) as patient, outbox_running(settings) as outbox:
        held = patient.transaction()
        await held.start()
        await insert_event(patient, "order/held", "held-1")
        producers = [asyncio.create_task(hostile_producer(database, n, ledger, stop)) for n in range(PRODUCERS)]
        await asyncio.sleep(HELD_S)  # the length of the transaction is the fault, not a wait
        stop.set()
        await asyncio.gather(*producers)
        # Everything the others committed is out while the transaction is still open: it delayed nobody.
        await witness.wait_for_distinct(len(ledger.committed))
        assert "held-1" not in tokens(witness)
        await insert_event(patient, "order/held", "held-2")
        await held.commit()
        ledger.committed |= {"held-1": ("order/held", 1), "held-2": ("order/held", 2)}
        await witness.wait_for_distinct(len(ledger.committed))

        progress = await shard_of(outbox)
        published = tokens(witness)
        assert published == set(ledger.committed), "lost or phantom events"
        assert not published & ledger.rolled_back
        assert len(ledger.rolled_back) > 100, "the producers did not roll back enough to show anything"
        assert witness.sequences(first_only=False) == {
            a: list(range(1, last + 1)) for a, last in ledger.expected().items()
        }
        assert progress.pages > len(ledger.committed) / 5 * 0.5
