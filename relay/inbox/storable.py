"""Makes whatever came over the wire storable in PostgreSQL: text without NUL, JSON that jsonb takes. Pure.

The body is stored byte for byte elsewhere; here only names and headers are concerned. What cannot be kept as it is
(NUL, lone surrogates) becomes U+FFFD, bytes become {"base64": ...}.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from relay.message import Delivery, Event

_DEEPEST = 32


def text(value: str) -> str:
    """The text as PostgreSQL can store it."""
    return value.replace("\0", "\ufffd").encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def optional(value: str | None) -> str | None:
    """`text`, or None."""
    return None if value is None else text(value)


def headers(values: Mapping[str, Any]) -> str:
    """Headers as JSON text."""
    return _dumped(dict(values))


def properties_of_delivery(delivery: Delivery) -> str:
    """What a delivery said about itself, as JSON text."""
    return _dumped(
        {
            "message_id": delivery.message_id,
            "type": delivery.event_type,
            "app_id": delivery.source,
            "content_type": delivery.content_type,
            "timestamp": delivery.occurred_at,
            "redelivered": delivery.redelivered,
            **{name: value for name, value in delivery.others.items() if value is not None},
            "headers": delivery.headers,
        }
    )


def properties_of_event(event: Event) -> str:
    """The same for what was understood as an event."""
    return _dumped(
        {
            "message_id": event.message_id,
            "type": event.event_type,
            "app_id": event.source,
            "content_type": event.content_type,
            "timestamp": event.occurred_at,
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "sequence": event.seq,
            "digest": event.digest.hex(),
            "headers": event.headers,
        }
    )


def _dumped(value: object) -> str:
    """In ASCII: one character of four bytes would make every other one of a long text as wide."""
    return json.dumps(_plain(value, 0), allow_nan=False)


def _plain(value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, datetime):
        return value.isoformat()
    if depth >= _DEEPEST:
        return "nested too deeply"
    if isinstance(value, Mapping):
        return {text(str(k)): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, depth + 1) for v in value]
    return text(str(value))
