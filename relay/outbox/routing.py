"""Where a row goes. Pure: row -> routing key."""

from __future__ import annotations

from functools import lru_cache

from relay.message import Message, Row, to_message

_REMEMBERED = 4096
"""Routing keys remembered: one for each type of event, unless the template names the aggregate."""


def routing_key(row: Row, template: str) -> str:
    """The row's own routing key, or the template's. An event without an aggregate type leaves its part out: `.Paid` -> `Paid`."""
    if row.routing_key is not None:
        return row.routing_key
    if "{aggregate_id}" in template:
        return _formatted(template, row.aggregate_type, row.event_type, row.aggregate_id or "")
    return _remembered(template, row.aggregate_type, row.event_type)


def route(row: Row, *, source: str, template: str) -> Message:
    """The message of a row, addressed."""
    return to_message(row, source=source, routing_key=routing_key(row, template))


def _formatted(template: str, aggregate_type: str | None, event_type: str, aggregate_id: str = "") -> str:
    key = template.format(aggregate_type=aggregate_type or "", event_type=event_type, aggregate_id=aggregate_id)
    return key if aggregate_type else key.strip(".")


_remembered = lru_cache(_REMEMBERED)(_formatted)
