"""The producer's side: insert events in the caller's own transaction, with the caller's own connection.

One module a driver, none of which imports another's: `relay.producer.asyncpg`, `.psycopg`, `.sqlalchemy`, `.django`.
"""

from __future__ import annotations

from relay.producer.event import JsonText, NewEvent

__all__ = ["JsonText", "NewEvent"]
