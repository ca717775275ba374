"""The two INSERTs of sql/queries/producer.sql with their parameters, in the spelling of each driver. Pure but for reading the file."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal

from relay.errors import InputError
from relay.postgres.queries import query
from relay.producer.event import NewEvent

Style = Literal["$1", "%s", ":p1"]
"""asyncpg and psycopg's raw cursor; Django; SQLAlchemy."""

_PLACEHOLDER = re.compile(r"\$(\d+)")
_COMMENT = re.compile(r"^\s*--.*\n?", re.MULTILINE)

NOT_IN_A_TRANSACTION = (
    "not in a transaction: the event would be committed on its own, whatever becomes of the change that it tells about. "
    "{remedy}, or pass allow_autocommit=True if that is meant"
)


@cache
def statement(name: Literal["insert_event", "insert_events"], style: Style) -> str:
    """The text of a block with placeholders of a style. In each, the parameters come once and in the block's order."""
    text = _COMMENT.sub("", query(name))  # a comment that names $1 would count as a parameter
    if style == "%s":
        return _PLACEHOLDER.sub("%s", text.replace("%", "%%"))
    if style == ":p1":
        return _PLACEHOLDER.sub(r"(:p\1)", text)  # in brackets: SQLAlchemy would not see the end of :p1::text
    return text


def parameters(event: NewEvent) -> tuple[Any, ...]:
    """The parameters of `insert_event`."""
    if not isinstance(event, NewEvent):
        raise InputError(f"emit takes a NewEvent, not a {type(event).__name__}; for several use emit_many")
    return (
        event.aggregate_type,
        event.aggregate_id,
        event.event_type,
        event.payload_json,
        event.body,
        event.content_type,
        event.headers_json,
        event.routing_key,
        event.seq,
    )


def named(values: tuple[Any, ...]) -> dict[str, Any]:
    """Parameters by SQLAlchemy's names."""
    return {f"p{place}": value for place, value in enumerate(values, 1)}


def require_transaction(inside: bool, remedy: str) -> None:
    """Raise InputError unless a transaction holds event and change together."""
    if not inside:
        raise InputError(NOT_IN_A_TRANSACTION.format(remedy=remedy))
