"""The example inbox of compose.yaml: `relay inbox run billing:inbox` applies every paid order once, in order."""

import structlog

from relay.inbox import Event, Inbox
from relay.postgres.connect import Connection

inbox = Inbox("billing")
log = structlog.get_logger()


@inbox.on("OrderPaid", aggregate_type="order")
async def settle(event: Event, tx: Connection) -> None:
    """What is written with `tx` is committed together with the inbox's own cursor, or not at all."""
    invoices = await tx.fetchval("SELECT 1")  # here your own INSERT or UPDATE
    log.info("settled", order=event.aggregate_id, seq=event.seq, invoices=invoices)
