"""The record of every act: who, when, what, why, how many rows. Written in the transaction of the act itself."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from relay.message import Aggregate
from relay.operate.selection import Selection
from relay.postgres.connect import Connection
from relay.postgres.queries import query

Side = Literal["outbox", "inbox"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Who acts, and why."""

    who: str  # user@host
    why: str = ""


def person() -> str:
    """The user at this terminal, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


async def record(
    connection: Connection,
    *,
    operator: Operator,
    side: Side,
    act: str,
    selection: Selection,
    rows: int,
    aggregates: Iterable[Aggregate] = (),
    also: Mapping[str, object] | None = None,
) -> int:
    """Write the record of an act and return its id. Call it inside the transaction of the act.

    `also`: what was asked for beside the filters, for example how far.
    """
    touched = sorted(set(aggregates))
    audit_id: int = await connection.fetchval(
        query("record_act"),
        operator.who,
        side,
        act,
        json.dumps(selection.as_json() | dict(also or {})),
        operator.why,
        rows,
        [a[0] for a in touched],
        [a[1] for a in touched],
    )
    return audit_id
