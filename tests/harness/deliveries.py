"""A message as the broker would deliver it, without a broker."""

from __future__ import annotations

from relay.message import Delivery, Message


def delivered(message: Message, tag: int = 0) -> Delivery:
    """For the first time, from relay's exchange."""
    return Delivery(
        tag=tag,
        redelivered=False,
        exchange="relay.events",
        routing_key=message.routing_key,
        message_id=message.message_id,
        event_type=message.event_type,
        source=message.source,
        content_type=message.content_type,
        occurred_at=message.occurred_at,
        headers=message.headers,
        body=message.body,
    )
