"""Where an act is: in which database, whether that is a producer's, and whether anybody carries the act out now."""

from __future__ import annotations

from dataclasses import dataclass

from relay.postgres.connect import Connection
from relay.postgres.errors import postgres_errors
from relay.postgres.queries import query


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxPlace:
    """The outbox of one database."""

    database: str
    is_used: bool  # a relay has run on it, or events were committed to it
    is_served: bool  # a relay owns its log now
    consumers: tuple[str, ...]  # whose inbox is in the same database; only of an outbox that is not used

    @property
    def doubt(self) -> str:
        """What makes it look like the wrong database; empty where nothing does."""
        if self.is_used:
            return ""
        here = f"; here is the inbox of {', '.join(self.consumers)}" if self.consumers else ""
        return (
            f"no relay has ever run on database {self.database}, and no event was committed to it{here}."
            " Is postgres.dsn the producer's?"
        )


async def outbox_place(connection: Connection) -> OutboxPlace:
    """Look: small tables and the locks only."""
    with postgres_errors():
        found = await connection.fetchrow(query("outbox_place"))
        assert found is not None  # noqa: S101 - the statement returns one row whatever there is
        consumers: list[str] = []
        if not found["is_used"]:
            consumers = [r["consumer"] for r in await connection.fetch(query("known_consumers"))]
            consumers = consumers or [r["consumer"] for r in await connection.fetch(query("consumers_with_cursors"))]
    return OutboxPlace(**found, consumers=tuple(consumers))


async def when_relay_acts(connection: Connection) -> str:
    """`now`, or what it waits for."""
    place = await outbox_place(connection)
    return "now" if place.is_served else "as soon as a relay runs (none does now)"


async def connected(connection: Connection, consumer: str | None) -> int:
    """How many daemons of this consumer are connected."""
    with postgres_errors():
        daemons: int = await connection.fetchval(query("connected_consumers"), consumer)
    return daemons


async def when_inbox_acts(connection: Connection, consumer: str | None) -> str:
    """`now`, or what it waits for."""
    running = await connected(connection, consumer)
    return "now" if running else f"as soon as it runs (no consumer {consumer} is connected now)"
