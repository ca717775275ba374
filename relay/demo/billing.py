"""Billing: what it does with an event, and the Inbox that makes sure it is done once and in order.

`book` is business code of the plainest kind. It knows nothing of duplicates or order, and it is the same for the inbox
and for the naive consumer: the only difference between them is who calls it, and when.
"""

from __future__ import annotations

from typing import Any

from relay.demo.sql import sql
from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection

STATES = {"OrderCreated": "created", "OrderPaid": "paid", "OrderShipped": "shipped", "OrderCancelled": "cancelled"}
"""The state of an order after each event type."""

inbox = Inbox("billing")


@inbox.on(*STATES)
async def on_order_event(event: Event, tx: Connection) -> None:
    """Book the event, in the inbox's transaction."""
    await book(event.event_type, event.json(), tx)


async def book(event_type: str, order: dict[str, Any], tx: Connection) -> None:
    """Set the order's state and write down that it was done; for money that moved, issue an invoice or a credit note.

    `order` is the payload: order (number), step, token, cents (to bill; negative: to pay back; 0 for none).
    """
    await tx.execute(
        sql("set_order_state"), order["order"], STATES[event_type], order["step"], event_type, order["token"]
    )
    if order["cents"]:
        await tx.execute(sql("issue_invoice"), order["order"], order["cents"])
