"""Where a row goes. Pure: row -> routing key."""

from __future__ import annotations

from relay.message import Message, Row, to_message


def routing_key(row: Row, template: str) -> str:
    """The row's own routing key, or the template's. An event without an aggregate type leaves its part out: `.Paid` -> `Paid`."""
    if row.routing_key is not None:
        return row.routing_key
    key = template.format(
        aggregate_type=row.aggregate_type or "", event_type=row.event_type, aggregate_id=row.aggregate_id or ""
    )
    return key if row.aggregate_type else key.strip(".")


def route(row: Row, *, source: str, template: str) -> Message:
    """The message of a row, addressed."""
    return to_message(row, source=source, routing_key=routing_key(row, template))
